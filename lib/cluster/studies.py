"""Opens the source that ``--studies`` names: a folder, a running server, or a PACS."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from lib.cluster.channel_source import ChannelFolder, ChannelPacs
from lib.cluster.remote import Access, PacsSource, Rest, ServerSource
from lib.cluster.source import CaseSource, FolderSource
from lib.configs.preset import Preset
from lib.errors import ConfigError


def open_source(studies: str, preset: Preset, access: Access, keeps: str = "") -> CaseSource:
    """The cases of a folder, of a running server by its address, or of a PACS by its DICOMweb address.

    The part after ``?`` in the address is a query of series (QIDO-RS), such as ``StudyDate=20250101-``.

    Args:
        studies: a path or an address.
        preset: the preset that segments them.
        access: credentials for the server.
        keeps: see :class:`ServerSource`.

    Raises:
        ConfigError: for an invalid folder or address, or a server that refuses this program.
        UpstreamError: if the server does not respond.
    """
    if "://" not in studies:
        if keeps:
            raise ConfigError("--save-labels sends masks to a running server; --studies is a folder")
        return ChannelFolder(Path(studies), preset) if preset.channels else FolderSource(Path(studies))
    parts = urlsplit(studies)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--studies {studies!r}; valid: a folder, or an address that begins with http:// or https://")
    if parts.username or parts.password:
        raise ConfigError("--studies holds a password, which everybody on the machine sees; set the variables instead")
    root = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    if not parts.query and _is_server(Rest(root, access)):
        return ServerSource(Rest(root, access), preset, keeps)
    if keeps:
        raise ConfigError(f"--save-labels sends masks to a running server, and {root} is none")
    filters = {"Modality": preset.modality} | dict(parse_qsl(parts.query))
    url = root.removesuffix("/series")
    return ChannelPacs(url, filters, access, preset) if preset.channels else PacsSource(url, filters, access)


def _is_server(rest: Rest) -> bool:
    answer = rest.ask("GET", "/info/")
    try:
        return answer.status_code == 200 and "models" in answer.json()
    except ValueError:
        return False
