"""Chromium without a screen, driven by Selenium: started once for many tests, each of which gets it empty."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import urlsplit

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.remote.webdriver import WebDriver

# Without these, Chromium looks for updates and hosts of its own at every start.
QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
Kind = tuple[str, bool]


class Browsers:
    """Browsers by language and colour scheme, which are chosen when one starts.

    Args:
        folder: for their profiles.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._idle: dict[Kind, list[WebDriver]] = {}
        self._kinds: dict[WebDriver, Kind] = {}

    @staticmethod
    def are_installed() -> bool:
        """Whether Chromium and its driver are there."""
        return None not in (shutil.which("chromium"), shutil.which("chromedriver"))

    def take(self, width: int, height: int, language: str, dark: bool) -> WebDriver:
        """A browser with an empty page, which no other test has meanwhile."""
        idle = self._idle.setdefault((language, dark), [])
        browser = idle.pop() if idle else self._start(language, dark)
        browser.set_window_size(width, height)
        return browser

    def give_back(self, browser: WebDriver) -> None:
        """Take back a browser, and empty it: cookies, storage, emulations, pressed keys, log.

        Its HTTP cache stays, as with a user who comes back: what it holds is compiled already.
        """
        address = urlsplit(browser.current_url)
        browser.get("about:blank")
        if address.netloc:
            place = {"origin": f"{address.scheme}://{address.netloc}", "storageTypes": "all"}
            browser.execute_cdp_cmd("Storage.clearDataForOrigin", place)
        for command in ("Network.clearBrowserCookies", "Emulation.clearDeviceMetricsOverride"):
            browser.execute_cdp_cmd(command, {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        ActionBuilder(browser).clear_actions()
        browser.get_log("browser")
        self._idle[self._kinds[browser]].append(browser)

    def quit(self) -> None:
        """End all."""
        for browser in self._kinds:
            browser.quit()

    def _start(self, language: str, dark: bool) -> WebDriver:
        options = ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for argument in QUIET:
            options.add_argument(argument)
        options.add_argument(f"--user-data-dir={self._folder / f'profile-{len(self._kinds)}'}")
        options.add_argument(f"--lang={language}")
        options.add_experimental_option("prefs", {"intl.accept_languages": language})
        if dark:
            options.add_argument("--force-dark-mode")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = Chrome(options, Service(shutil.which("chromedriver")))
        browser.set_page_load_timeout(180)
        self._kinds[browser] = language, dark
        return browser
