"""The viewer's files as they are handed out below a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.server.pages.viewer_files import adapted, index_page

PAGE = (
    '<head><meta name="msapplication-TileImage" content="/ohif/assets/mstile.png"/>'
    '<script>window.PUBLIC_URL = \'/ohif/\';</script><link rel="manifest" href="/ohif/manifest.json"/>'
    '<link rel="apple-touch-icon" sizes="57x57" href="/ohif/assets/icon-57.png"/>'
    '<script rel="preload" as="script" type="module" src="/ohif/init-service-worker.js"></script><title>OHIF</title>'
    '<link rel="preconnect" href="https://fonts.example" crossorigin/>'
    '<link href="https://fonts.example/css?family=Inter:100&display=swap" rel="stylesheet"/>'
    '<link href="/ohif/app.bundle.css" rel="stylesheet"></head>'
)


@pytest.mark.parametrize("base", ["", "/unetr", "/a/b"])
def test_first_page_names_this_server_only(base: str) -> None:
    assert index_page(PAGE, base) == (
        f"<head><script>window.PUBLIC_URL = '{base}/ohif/';</script><title>OHIF</title>"
        f'<link rel="icon" href="{base}/page/assets/icon.svg" type="image/svg+xml"/>'
        f'<link href="{base}/ohif/app.bundle.css" rel="stylesheet"></head>'
    )


def test_fixed_addresses_of_a_script_get_the_path_before_them(tmp_path: Path) -> None:
    script = tmp_path / "a.js"
    script.write_text("r.p = \"/ohif/\"; s = '/ohif/x.wasm'; t = a/ohif/b")
    assert adapted(script, "") is None, "handed out as it is"
    assert adapted(script, "/unetr") == b"r.p = \"/unetr/ohif/\"; s = '/unetr/ohif/x.wasm'; t = a/ohif/b"


def test_style_sheet_asks_no_other_server_for_a_font(tmp_path: Path) -> None:
    sheet = tmp_path / "a.css"
    sheet.write_text("@import url(https://fonts.example/css2?family=Inter:wght@100..900&display=swap);\n.a{color:red}")
    assert adapted(sheet, "") == b"\n.a{color:red}"
