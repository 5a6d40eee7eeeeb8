"""A real Chromium for each test; screenshots are kept in ``screenshots/``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from tests.browser.browsers import Browsers

SCREENSHOTS = Path(__file__).resolve().parents[2] / "screenshots"


@pytest.fixture(scope="session")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browsers]:
    """Those of this test run."""
    if not Browsers.are_installed():
        pytest.skip("needs Debian's chromium and chromium-driver")
    made = Browsers(tmp_path_factory.mktemp("browsers"))
    yield made
    made.quit()


@pytest.fixture
def open_browser(browsers: Browsers) -> Iterator[Callable[..., WebDriver]]:
    """Open browsers: ``open_browser(width=1280, height=900, language="en")``; each is empty, and goes with the test."""
    opened: list[WebDriver] = []

    def start(width: int = 1280, height: int = 900, language: str = "en", dark: bool = False) -> WebDriver:
        opened.append(browsers.take(width, height, language, dark))
        return opened[-1]

    yield start
    for browser in opened:
        browsers.give_back(browser)


@pytest.fixture
def keep_screenshot() -> Callable[[WebDriver, str], Path]:
    """Keep a screenshot under a name."""

    def keep(browser: WebDriver, name: str) -> Path:
        SCREENSHOTS.mkdir(exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        assert browser.save_screenshot(str(path))
        return path

    return keep
