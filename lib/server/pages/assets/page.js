// Sections are drawn by the server. An event says which have changed; each is fetched anew and put in its place.
"use strict";

const base = document.documentElement.dataset.base;
const say = (text) => { document.querySelector("[role=status]").textContent = text; };

async function refresh(name) {
  const place = document.querySelector(`[data-section="${name}"]`);
  if (!place || place.contains(document.querySelector("dialog[open]"))) return;
  const answer = await fetch(`${base}/page/${name}`, { headers: { "Accept": "text/html" } });
  if (!answer.ok) return;
  const focused = place.contains(document.activeElement) ? document.activeElement.id : "";
  place.innerHTML = await answer.text();
  if (focused) document.getElementById(focused)?.focus();
}

function listen() {
  if (!document.querySelector("[data-section]")) return;
  const source = new EventSource(`${base}/page/events`);
  source.addEventListener("changed", (event) => JSON.parse(event.data).forEach(refresh));
  // after a break something may have been missed
  let broken = false;
  source.addEventListener("error", () => { broken = true; });
  source.addEventListener("open", () => {
    if (broken) document.querySelectorAll("[data-section]").forEach((place) => refresh(place.dataset.section));
    broken = false;
  });
}

function ask(text) {
  const dialog = document.querySelector("dialog.ask");
  dialog.querySelector("p").textContent = text;
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

// <button data-method data-path data-ask [data-body]>: asks, sends, says what came of it.
async function act(button) {
  if (button.dataset.ask && !(await ask(button.dataset.ask))) return;
  const options = { method: button.dataset.method };
  if (button.dataset.body) {
    options.body = button.dataset.body;
    options.headers = { "Content-Type": "application/json" };
  }
  button.disabled = true;
  try {
    const answer = await fetch(base + button.dataset.path, options);
    const told = await answer.json().catch(() => null);
    say(answer.ok ? document.documentElement.dataset.done : (told && told.detail) || answer.statusText);
  } catch (error) {
    say(document.documentElement.dataset.unreachable);
  } finally {
    button.disabled = false;
  }
}

async function copy(button) {
  await navigator.clipboard.writeText(new URL(base + "/", location.href).href.replace(/\/$/, ""));
  say(document.documentElement.dataset.copied);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.method) act(button);
  if (button?.dataset.copy !== undefined) copy(button);
});

// The case page: a slider for each plane; the picture follows, one request at a time.
for (const figure of document.querySelectorAll("figure[data-plane]")) {
  const [image, slider, text] = ["img", "input", "output"].map((name) => figure.querySelector(name));
  let wanted = null;
  const draw = () => {
    const layers = [...document.querySelectorAll("[name=layer]:checked")].map((box) => box.value).join(",");
    const query = new URLSearchParams({ plane: figure.dataset.plane, index: slider.value, layers });
    const address = `${figure.dataset.source}?${query}`;
    text.textContent = `${Number(slider.value) + 1} / ${Number(slider.max) + 1}`;
    if (wanted !== null) { wanted = address; return; }
    wanted = "";
    image.src = address;
  };
  const next = () => { const address = wanted; wanted = null; if (address) { wanted = ""; image.src = address; } };
  image.addEventListener("load", next);
  image.addEventListener("error", next);
  slider.addEventListener("input", draw);
  figure.addEventListener("wheel", (event) => {
    event.preventDefault();
    slider.value = Number(slider.value) - Math.sign(event.deltaY);
    draw();
  }, { passive: false });
  document.addEventListener("change", (event) => { if (event.target.name === "layer") draw(); });
  draw();
}

listen();
