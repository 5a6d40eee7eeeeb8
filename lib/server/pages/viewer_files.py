"""Serves the files of the OHIF viewer, adapted to the server's path and without references to other servers.

The build in MONAI Label's package is made for ``/ohif/`` at the root of a host, refers to icons that it does not
contain, and loads a font and the library of a service worker from other servers, which are unreachable in a hospital's
network and must not be contacted.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

BUILT_FOR = "/ohif/"
FIXED_ADDRESS = re.compile(rb"""(?<=["'])/ohif/""")
ICONS_AND_LIBRARIES = re.compile(
    r"""<link\b[^>]*\brel="(?:[^"]*icon|manifest|apple-touch-startup-image|yandex-tableau-widget|preconnect)"[^>]*>"""
    r"""|<link\b[^>]*\bhref="https?://[^>]*>"""
    r"""|<meta\b[^>]*\bname="msapplication-(?:TileImage|config)"[^>]*>"""
    r"""|<script\b[^>]*\bsrc="[^"]*init-service-worker\.js"[^>]*></script>"""
)
OTHER_SERVERS = re.compile(rb"@import url\(https?://[^)]*\);?")
ADAPTED = (".html", ".js", ".css")


@lru_cache(maxsize=64)
def adapted(file: Path, base: str) -> bytes | None:
    """A file's content for a server with the prefix ``base``; None for a file that is sent unchanged.

    Args:
        file: file of the viewer.
        base: prefix of every path of the server (``--root_path``), without a trailing slash.
    """
    if file.name == "index.html":
        return index_page(file.read_text(), base).encode()
    if file.suffix == ".css":
        return OTHER_SERVERS.sub(b"", file.read_bytes())
    if file.suffix == ".js" and base:
        content = file.read_bytes()
        return FIXED_ADDRESS.sub(_literal(base + BUILT_FOR), content) if FIXED_ADDRESS.search(content) else None
    return None


def index_page(text: str, base: str) -> str:
    """OHIF's index.html with this server's base address and icon, without links to other servers."""
    icon = f'<link rel="icon" href="{base}/page/assets/icon.svg" type="image/svg+xml"/>'
    text = ICONS_AND_LIBRARIES.sub("", text).replace("</title>", f"</title>{icon}", 1)
    return FIXED_ADDRESS.sub(_literal(base + BUILT_FOR), text.encode()).decode()


def _literal(address: str) -> bytes:
    """An address, escaped for use inside quotes and in a pattern's replacement."""
    return json.dumps(address)[1:-1].replace("'", "%27").replace("\\", "\\\\").encode()
