"""The page in a real browser: what is seen, what moves by itself, what can be done and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait
from synthetic_hippocampus import SyntheticCase, draw_cases

from lib.server.http.tokens import add_token
from tests.integration.conftest import encode, prepare
from tests.integration.server import Server

pytestmark = pytest.mark.browser

AXE = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
SERIOUS = ("serious", "critical")
QUICK = {"val_split": 0, "dataset": "Dataset", "pretrained": False, "learning_rate": 1e-3}
OpenBrowser = Callable[..., WebDriver]
KeepScreenshot = Callable[[WebDriver, str], Path]


@pytest.fixture(scope="module")
def cases() -> dict[str, SyntheticCase]:
    return {f"case_{number}": case for number, case in enumerate(draw_cases(6, seed=11))}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, SyntheticCase]) -> Iterator[Server]:
    server = prepare(Server(tmp_path_factory.mktemp("page"), {"models": "hippocampus_mr"}), cases).start()
    yield server
    assert server.stop() in (0, -15), "open pages must not hold up the server's stop"


def problems_in(browser: WebDriver) -> list[str]:
    """What axe-core finds that is serious, and what the browser complained of."""
    browser.execute_script(AXE)
    found = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")["violations"]
    serious = [
        f"{one['id']}: {one['help']} {[n['html'][:80] for n in one['nodes']]}"
        for one in found
        if one["impact"] in SERIOUS
    ]
    logged = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return serious + logged


def text_of(browser: WebDriver, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))


def wait_until(browser: WebDriver, condition: Callable[[], Any], seconds: float = 180) -> Any:
    return WebDriverWait(browser, seconds).until(lambda _: condition())


def press(browser: WebDriver, selector: str, answer: str = "yes") -> None:
    """Press a button and answer its question."""
    wait_until(browser, lambda: browser.find_element(By.CSS_SELECTOR, selector).is_enabled())
    browser.find_element(By.CSS_SELECTOR, selector).click()
    wait_until(browser, lambda: browser.find_element(By.CSS_SELECTOR, "dialog[open]"))
    browser.find_element(By.CSS_SELECTOR, f"dialog [value={answer}]").click()


def submit(server: Server, cases: dict[str, SyntheticCase], name: str, folder: Path) -> None:
    content = encode(cases[name].label, cases[name].affine_ras, folder)
    assert server.save_label(name, content, ["anterior", "posterior"]).status_code == 200


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1280, True), (2560, False)])
def test_first_visit_is_readable_at_every_size(
    server: Server, open_browser: OpenBrowser, keep_screenshot: KeepScreenshot, width: int, dark: bool
) -> None:
    browser = open_browser(width=max(500, width), height=1000, dark=dark)
    # a window is never narrower than 500 pixels, so a phone's screen is set
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    )
    if dark:
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        )
    browser.get(server.url)
    wait_until(browser, lambda: text_of(browser, "#count-open"))
    keep_screenshot(browser, f"page-first-visit-{width}{'-dark' if dark else ''}")
    assert problems_in(browser) == []
    wide = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert browser.execute_script(wide), "nothing sticks out sideways"
    smallest = """return Math.min(...[...document.querySelectorAll("body *")].filter(e => e.textContent.trim())
        .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
    assert browser.execute_script(smallest) >= 12


def test_language_follows_the_browser(
    server: Server, open_browser: OpenBrowser, keep_screenshot: KeepScreenshot
) -> None:
    browser = open_browser(language="zh-CN")
    browser.get(server.url)
    assert text_of(browser, "#title-pool") == "病例"
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "zh"
    keep_screenshot(browser, "page-chinese")
    assert problems_in(browser) == []


def test_submitted_label_is_seen_without_reloading(
    server: Server, cases: dict[str, SyntheticCase], open_browser: OpenBrowser, tmp_path: Path
) -> None:
    browser = open_browser()
    browser.get(server.url)
    before = int(text_of(browser, "#count-labelled"))
    submit(server, cases, f"case_{before}", tmp_path)
    wait_until(browser, lambda: int(text_of(browser, "#count-labelled")) == before + 1)
    assert f"case_{before}" in text_of(browser, "[data-section=activity]")


def test_training_moves_while_one_looks_and_its_version_can_be_rolled_back(
    server: Server,
    cases: dict[str, SyntheticCase],
    open_browser: OpenBrowser,
    keep_screenshot: KeepScreenshot,
    tmp_path: Path,
) -> None:
    for name in ("case_0", "case_1", "case_2"):
        submit(server, cases, name, tmp_path)
    browser = open_browser(height=1600)
    browser.get(server.url)
    press(browser, "#train-hippocampus_mr", answer="no")
    assert server.get("/train/?check_if_running=true").status_code == 404, "nothing starts without a yes"
    started = server.post("/train/hippocampus_mr", json=QUICK | {"max_epochs": 25})
    assert started.status_code == 200, started.text
    seen = set()

    def moved() -> bool:
        bar = browser.execute_script("return document.querySelector('#job-progress')?.value")
        if bar:
            seen.add(bar)
        return len(seen) >= 3

    wait_until(browser, moved, 120)
    wait_until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "[data-section=job] .chart polyline"))
    keep_screenshot(browser, "page-training")
    assert problems_in(browser) == []
    press(browser, "#stop")
    wait_until(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, "#job-progress"), 120)
    assert server.get("/train/").json()["status"] == "STOPPED"

    weights = server.get("/model/hippocampus_mr").content
    version = server.put("/model/hippocampus_mr", files={"file": ("mine.pt", weights)}).json()["version"]
    wait_until(browser, lambda: version in text_of(browser, "[data-section=models]"))
    keep_screenshot(browser, "page-published")
    press(browser, "#serve-hippocampus_mr-shipped")
    wait_until(browser, lambda: server.get("/model/versions/hippocampus_mr").json()["live"] == "shipped")
    wait_until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, f"#serve-hippocampus_mr-{version}"))
    keep_screenshot(browser, "page-rolled-back")


def test_case_page_is_corrected_with_clicks_and_keys(
    server: Server, open_browser: OpenBrowser, keep_screenshot: KeepScreenshot
) -> None:
    browser = open_browser(width=1280, height=1600)
    browser.get(f"{server.url}/case/case_4")
    picture = browser.find_element(By.ID, "slice-axial")
    ready = "return document.querySelector('#slice-axial').naturalWidth > 0"
    wait_until(browser, lambda: browser.execute_script(ready))
    picture.click()
    shown = "return document.querySelector('#slice-axial').src.includes('edit%3A')"
    wait_until(browser, lambda: browser.execute_script(shown))
    assert "1" in text_of(browser, "#clicks-count")
    picture.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ENTER)
    wait_until(browser, lambda: "2" in text_of(browser, "#clicks-count"))
    picture.send_keys(Keys.CONTROL, "z")
    wait_until(browser, lambda: "1" in text_of(browser, "#clicks-count"))
    wait_until(browser, lambda: browser.find_element(By.ID, "clicks-redo").is_enabled())
    keep_screenshot(browser, "page-clicks")
    assert problems_in(browser) == []
    wait_until(browser, lambda: browser.find_element(By.ID, "clicks-save").is_enabled())
    browser.find_element(By.ID, "clicks-save").click()

    def saved() -> bool:
        versions = server.get("/datastore/label/versions", params={"image": "case_4"}).json()
        return bool(versions) and versions[0]["source"] == "page"

    wait_until(browser, saved)


def test_case_page_scrolls_by_keys_and_shows_its_layers(
    server: Server,
    cases: dict[str, SyntheticCase],
    open_browser: OpenBrowser,
    keep_screenshot: KeepScreenshot,
    tmp_path: Path,
) -> None:
    submit(server, cases, "case_3", tmp_path)
    browser = open_browser(height=1400)
    browser.get(f"{server.url}/case/case_3")
    drawn = "return [...document.querySelectorAll('figure img')].every(i => i.complete && i.naturalWidth > 50)"
    wait_until(browser, lambda: browser.execute_script(drawn))
    slider = browser.find_element(By.ID, "slider-axial")
    place, source = int(slider.get_property("value")), browser.find_element(By.ID, "slice-axial").get_attribute("src")
    slider.send_keys(Keys.ARROW_RIGHT)
    wait_until(browser, lambda: browser.find_element(By.ID, "slice-axial").get_attribute("src") != source)
    assert int(slider.get_property("value")) == place + 1
    browser.find_element(By.CSS_SELECTOR, "[name=layer][value=uncertainty]").click()
    wait_until(browser, lambda: "uncertainty" in browser.find_element(By.ID, "slice-axial").get_attribute("src"))
    wait_until(browser, lambda: browser.execute_script(drawn))
    keep_screenshot(browser, "page-case")
    assert problems_in(browser) == []


def test_whoever_lacks_a_role_is_asked_in_and_refused(
    cases: dict[str, SyntheticCase], open_browser: OpenBrowser, keep_screenshot: KeepScreenshot, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.yaml"
    token = add_token(tokens, "anna", "annotator")
    server = prepare(Server(tmp_path / "server", {"tokens": str(tokens)}), cases).start()
    try:
        browser = open_browser()
        browser.get(server.url)
        assert browser.current_url.endswith("/page/login")
        browser.find_element(By.ID, "token").send_keys("wrong" + Keys.ENTER)
        wait_until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "[role=alert]"))
        browser.find_element(By.ID, "token").send_keys(token + Keys.ENTER)
        wait_until(browser, lambda: text_of(browser, "#count-open"))
        assert not browser.find_element(By.ID, "train-hippocampus_mr").is_enabled()
        # a page can be made to offer what it does not; the server is who refuses
        browser.execute_script("document.getElementById('train-hippocampus_mr').disabled = false")
        press(browser, "#train-hippocampus_mr")
        said = wait_until(browser, lambda: text_of(browser, "[role=status]"))
        assert "needs the role reviewer" in said
        keep_screenshot(browser, "page-refused")
        kept = [cookie for cookie in browser.get_cookies() if cookie["name"] == "unetr_token"]
        assert [(cookie["httpOnly"], cookie["sameSite"]) for cookie in kept] == [(True, "Strict")]
        assert token not in server.log.read_text(errors="replace")
        assert json.dumps(token) not in browser.page_source
    finally:
        assert server.stop() in (0, -15)
