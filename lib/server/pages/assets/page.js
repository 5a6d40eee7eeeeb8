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
    const payload = await answer.json().catch(() => null);
    say(answer.ok ? document.documentElement.dataset.done : (payload && payload.detail) || answer.statusText);
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

// Clicks on the slices of a case: all of them are sent each time, and the answer names the layer that shows the mask.
const clicked = { made: [], undone: [], layer: "", sending: false, again: false };

function placeOn(image, x, y) {
  // the picture is fitted into its element: what lies beside it is no part of it
  const box = image.getBoundingClientRect();
  const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
  const across = (x - box.left - (box.width - image.naturalWidth * scale) / 2) / (image.naturalWidth * scale);
  const down = (y - box.top - (box.height - image.naturalHeight * scale) / 2) / (image.naturalHeight * scale);
  return across >= 0 && across < 1 && down >= 0 && down < 1 ? { across, down } : null;
}

function startClicks(panel) {
  const button = (name) => document.getElementById(`clicks-${name}`);
  const body = () => JSON.stringify({ clicks: clicked.made, start: panel.dataset.start });
  const post = (path) => fetch(base + path, { method: "POST", body: body(), headers: { "Content-Type": "application/json" } });
  const sayProblem = async (answer) => { const payload = await answer.json().catch(() => null); say((payload && payload.detail) || answer.statusText); };
  const show = () => {
    button("undo").disabled = button("clear").disabled = !clicked.made.length;
    button("redo").disabled = !clicked.undone.length;
    if (button("save")) button("save").disabled = !clicked.made.length || !clicked.layer;
    button("count").textContent = clicked.made.length ? panel.dataset.answer.replace("{count}", clicked.made.length) : "";
  };
  const send = async () => {
    show();
    if (clicked.sending) { clicked.again = true; return; }
    clicked.sending = true;
    try {
      do {
        clicked.again = false;
        if (!clicked.made.length) { clicked.layer = ""; continue; }
        const answer = await post(panel.dataset.path);
        if (answer.ok) clicked.layer = (await answer.json()).layer;
        else { clicked.made.pop(); await sayProblem(answer); clicked.again = clicked.made.length > 0; }
      } while (clicked.again);
    } catch (error) {
      say(document.documentElement.dataset.unreachable);
    } finally {
      clicked.sending = false;
      show();
      document.dispatchEvent(new Event("clicked"));
    }
  };
  const add = (figure, place, remove) => {
    const label = document.querySelector("[name=click-label]:checked").value;
    const kind = remove || button("remove").checked ? "remove" : "add";
    const index = Number(figure.querySelector("input[type=range]").value);
    clicked.made.push({ plane: figure.dataset.plane, index, ...place, label, kind });
    clicked.undone = [];
    send();
  };
  const undo = () => { if (clicked.made.length) { clicked.undone.push(clicked.made.pop()); send(); } };
  const redo = () => { if (clicked.undone.length) { clicked.made.push(clicked.undone.pop()); send(); } };
  button("undo").addEventListener("click", undo);
  button("redo").addEventListener("click", redo);
  button("clear").addEventListener("click", () => { clicked.made = []; clicked.undone = []; send(); });
  button("save")?.addEventListener("click", async () => {
    button("save").disabled = true;
    try {
      const answer = await post(`${panel.dataset.path}/save`);
      if (answer.ok) { say(panel.dataset.saved); location.reload(); } else { await sayProblem(answer); show(); }
    } catch (error) { say(document.documentElement.dataset.unreachable); show(); }
  });
  for (const figure of document.querySelectorAll("figure[data-plane]")) {
    const image = figure.querySelector("img"), cross = document.createElement("span");
    const at = { across: 0.5, down: 0.5 };
    cross.className = "cross";
    cross.hidden = true;
    image.after(cross);
    const move = () => {
      const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
      cross.style.left = `${image.offsetLeft + image.clientWidth / 2 + (at.across - 0.5) * image.naturalWidth * scale}px`;
      cross.style.top = `${image.offsetTop + image.clientHeight / 2 + (at.down - 0.5) * image.naturalHeight * scale}px`;
    };
    image.addEventListener("click", (event) => {
      const place = placeOn(image, event.clientX, event.clientY);
      if (place) { Object.assign(at, place); add(figure, place, event.shiftKey); }
    });
    image.addEventListener("focus", () => { cross.hidden = !image.matches(":focus-visible"); move(); });
    image.addEventListener("blur", () => { cross.hidden = true; });
    image.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (step) {
        at.across = Math.min(0.999, Math.max(0, at.across + step[0] / 64));
        at.down = Math.min(0.999, Math.max(0, at.down + step[1] / 64));
        cross.hidden = false;
        move();
      } else if (event.key === "Enter") add(figure, { ...at }, event.shiftKey);
      else return;
      event.preventDefault();
    });
  }
  document.addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || event.target.matches("input[type=text], textarea")) return;
    const key = event.key.toLowerCase();
    if (key === "z" && !event.shiftKey) undo();
    else if (key === "y" || (key === "z" && event.shiftKey)) redo();
    else return;
    event.preventDefault();
  });
}

const clicksPanel = document.getElementById("clicks");
if (clicksPanel) startClicks(clicksPanel);

// The case page: a slider for each plane; the picture follows, one request at a time.
for (const figure of document.querySelectorAll("figure[data-plane]")) {
  const [image, slider, text] = ["img", "input", "output"].map((name) => figure.querySelector(name));
  let wanted = null;
  const draw = () => {
    const shown = [...document.querySelectorAll("[name=layer]:checked")].map((box) => box.value);
    const layers = (clicked.layer ? [clicked.layer] : shown).join(",");
    const query = new URLSearchParams({ plane: figure.dataset.plane, index: slider.value, layers });
    const channel = document.querySelector("[name=channel]:checked")?.value;
    if (channel) query.set("channel", channel);
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
  document.addEventListener("change", (event) => { if (["layer", "channel"].includes(event.target.name)) draw(); });
  document.addEventListener("clicked", draw);
  draw();
}

listen();
