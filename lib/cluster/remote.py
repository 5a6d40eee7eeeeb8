"""Cases of a running server (REST) and series of a PACS (DICOMweb) as sources, and upload of masks to a server."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from requests.auth import HTTPBasicAuth

from lib.cluster.results import CaseResult
from lib.cluster.source import Fetched
from lib.configs.preset import Preset, canonical_name
from lib.datastore.records import FINAL, INFERENCE, is_drawn
from lib.dicom.remote import CONNECT_SECONDS, QUERY_SECONDS, TRANSFER_SECONDS, RemoteSource, connect
from lib.dicom.sources import SeriesInfo
from lib.errors import ConfigError, ConflictError, ImageError, NotFoundError, UpstreamError
from lib.storage.files import sha256_of
from lib.transforms.channels import ChannelSources

TOKEN_VARIABLE = "UNETR_TOKEN"
PREFIXES = {"qido": "MONAI_LABEL_QIDO_PREFIX", "wado": "MONAI_LABEL_WADO_PREFIX", "stow": "MONAI_LABEL_STOW_PREFIX"}
CLIENT = "run.py segment"
TAG = r"[a-z0-9_\-]{1,32}"
FINAL_ROLES = ("reviewer", "admin")
ROLES = ("annotator", *FINAL_ROLES)
BLOCK = 2**20


@dataclass(frozen=True)
class Access:
    """Credentials for a server, which are never displayed.

    Attributes:
        token: bearer token of this project's server, or of a PACS.
        user, password: basic authentication of a PACS.
        prefixes: URL prefixes of a PACS' services, as in the server's settings.
    """

    token: str = field(default="", repr=False)
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    prefixes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls, token_file: Path | None, environment: Mapping[str, str] = os.environ) -> Access:
        """Read from a file or the environment, since a command line is visible to all users of the machine.

        Raises:
            ConfigError: if the file cannot be read.
        """
        try:
            token = token_file.read_text(encoding="utf-8").strip() if token_file else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {str(token_file)!r} cannot be read: {error}") from error
        return cls(
            token or environment.get(TOKEN_VARIABLE, "").strip(),
            environment.get("MONAI_LABEL_DICOMWEB_USERNAME", ""),
            environment.get("MONAI_LABEL_DICOMWEB_PASSWORD", ""),
            {name: environment[key] for name, key in PREFIXES.items() if environment.get(key)},
        )

    def options(self) -> dict[str, Any]:
        """Options of a request."""
        if self.token:
            return {"headers": {"Authorization": f"Bearer {self.token}"}}
        return {"auth": HTTPBasicAuth(self.user, self.password)} if self.user and self.password else {}


@dataclass(frozen=True)
class Rest:
    """A client of this project's server.

    Attributes:
        url: its address, without a trailing slash.
    """

    url: str
    access: Access

    def ask(self, method: str, path: str, seconds: float = QUERY_SECONDS, **options: Any) -> requests.Response:
        """Its response, whatever the status.

        Raises:
            ConfigError: if it refuses this program, or this request.
            UpstreamError: if it does not respond, or fails.
        """
        try:
            answer = requests.request(
                method, self.url + path, timeout=(CONNECT_SECONDS, seconds), **self.access.options(), **options
            )
        except requests.RequestException as error:
            raise UpstreamError(f"the server {self.url} does not answer ({type(error).__name__})") from error
        if answer.status_code in (401, 403):
            raise ConfigError(
                f"the server {self.url} refuses: {_reason(answer)} "
                f"(a token is read from {TOKEN_VARIABLE} or --token-file)"
            )
        if answer.status_code >= 500:
            raise UpstreamError(f"the server {self.url} answers {answer.status_code}: {_reason(answer)}")
        return answer

    def download(self, path: Path, **wanted: str) -> Path:
        """Download the file of an image.

        Args:
            path: path of the downloaded file.
            wanted: the image, and which of its files.

        Raises:
            NotFoundError: if there is none.
            ConfigError, UpstreamError: see :meth:`ask`.
        """
        with self.ask("GET", "/datastore/image", TRANSFER_SECONDS, params=wanted, stream=True) as answer:
            if answer.status_code != 200:
                raise NotFoundError("image", wanted["image"])
            try:
                with path.open("wb") as file:
                    for block in answer.iter_content(BLOCK):
                        file.write(block)
            except requests.RequestException as error:
                broken = f"the server broke off the image {wanted['image']!r} ({type(error).__name__})"
                raise UpstreamError(broken) from error
        return path


def _reason(answer: requests.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return answer.reason or str(answer.status_code)


class PacsSource:
    """Series of a DICOMweb server; a case's id is its Series Instance UID.

    A series is recognised by the UIDs of its instances, whose content never changes.

    Args:
        url: root URL.
        filters: attributes of the query, by keyword; by default, ``Modality`` is that of the preset.
        access: see :class:`Access`.
    """

    def __init__(self, url: str, filters: Mapping[str, str], access: Access) -> None:
        self._url, self._access = url, access
        self._filters = dict(filters)
        self._source: RemoteSource | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}

    @property
    def broken(self) -> dict[str, str]:
        """See :class:`lib.cluster.source.CaseSource`: broken images are noticed only when they are fetched."""
        return {}

    def cases(self) -> list[str]:
        """See :class:`lib.cluster.source.CaseSource`.

        Raises:
            UpstreamError: if the server does not respond as a DICOMweb server.
        """
        return sorted(self.infos())

    def infos(self) -> dict[str, SeriesInfo]:
        """The attributes of each series, by UID.

        Raises:
            UpstreamError: if the server does not respond as a DICOMweb server.
        """
        return self._remote().series()

    def stamp(self, case: str) -> str:
        """A value that changes with the series.

        Raises:
            NotFoundError, UpstreamError, ImageError: if it is unavailable.
        """
        return self._remote().stamp(case)

    def is_unchanged(self, case: str, sha256: str, stamp: str) -> bool:
        """See :class:`lib.cluster.source.CaseSource`; it compares the stamp."""
        return bool(stamp) and self.stamp(case) == stamp

    def fetch(self, case: str, folder: Path) -> Fetched:
        """See :class:`lib.cluster.source.CaseSource`.

        Raises:
            NotFoundError, UpstreamError, ImageError: if it is unavailable.
        """
        stamp = self._remote().stamp(case)
        self._remote().fetch(case, folder)
        return Fetched(folder, stamp)

    def _remote(self) -> RemoteSource:
        if self._source is None:
            access, filters = self._access, dict(self._filters)
            client = connect(self._url, access.user, access.password, access.prefixes, access.token)
            modalities = filters.pop("Modality").split("\\")
            self._source = RemoteSource(client, modalities, filters=filters, list_seconds=math.inf)
        return self._source


class ServerChannels:
    """The files of a server's cases of several sequences.

    Args:
        rest: the server.
        preset: the preset that segments them.
    """

    def __init__(self, rest: Rest, preset: Preset) -> None:
        self._rest, self._preset = rest, preset

    def of(self, case: str) -> dict[str, Any]:
        """The server's description of a case: ``files`` by channel, missing channels and problems.

        Raises:
            ImageError: if there is no such case, or if the server does not serve the preset.
        """
        wanted = {"image": case, "model": self._preset.name}
        answer = self._rest.ask("GET", "/datastore/image/channels", TRANSFER_SECONDS, params=wanted)
        if answer.status_code != 200:
            raise ImageError(f"{case!r} is no case of several sequences: {_reason(answer)}")
        payload: dict[str, Any] = answer.json()
        return payload

    def fetch(self, case: str, folder: Path) -> Fetched:
        """Download the files of a case.

        Raises:
            ImageError: if it lacks a channel.
            NotFoundError, UpstreamError: if it is unavailable.
        """
        payload = self.of(case)
        files: dict[str, Path] = {}
        ChannelSources(case, {}, tuple(payload["missing"]), payload["problem"]).check()
        for channel, ending in payload["files"].items():
            wanted = {"image": case, "model": self._preset.name, "channel": channel}
            known = next(iter(files.values())) if payload["stacked"] and files else None
            files[channel] = known or self._rest.download(folder / f"{canonical_name(channel)}{ending}", **wanted)
        shown = files.get(payload["shown"])
        if shown is None and not payload["stacked"]:
            shown = self._rest.download(folder / f"shown{payload['ending']}", image=case)
        checksums = "".join(f"{name} {sha256_of(file)}\n" for name, file in sorted(files.items()))
        sha256 = hashlib.sha256(checksums.encode("utf-8")).hexdigest()
        sources = ChannelSources(case, files, notes=tuple(payload["notes"]), shown=shown)
        return Fetched(folder, payload["stamp"], sha256, sources)


class ServerSource:
    """The pool of a running server: files by REST, DICOM series by DICOMweb.

    Cases of several sequences are fetched by REST, whatever their format on the server.

    Args:
        rest: the server.
        preset: the preset that segments them; series of its modality are included.
        keeps: tag of the labels as which masks will be uploaded; cases with such a label drawn by a person are
            excluded.
    """

    def __init__(self, rest: Rest, preset: Preset, keeps: str = "") -> None:
        self.rest, modality = rest, preset.modality
        self._channels = ServerChannels(rest, preset) if preset.channels else None
        self._series = PacsSource(f"{rest.url}/dicom-web", {"Modality": modality}, Access(rest.access.token))
        self._files: dict[str, str] = {}
        self.drawn: list[str] = []
        listed = rest.ask("GET", "/datastore/", TRANSFER_SECONDS, params={"output": "all"}).json()
        self._cases = []
        for case, entry in sorted(listed["objects"].items()):
            if keeps in entry["labels"] and is_drawn(str(entry["labels"][keeps]["info"].get("source", "")), keeps):
                self.drawn.append(case)
            elif entry["image"]["ext"]:
                self._files[case] = entry["image"]["ext"]
                self._cases.append(case)
            elif entry["image"]["info"].get("Modality") == modality:
                self._cases.append(case)

    @property
    def broken(self) -> dict[str, str]:
        """See :class:`lib.cluster.source.CaseSource`: the server does not list such images."""
        return {}

    def cases(self) -> list[str]:
        """See :class:`lib.cluster.source.CaseSource`."""
        return list(self._cases)

    def is_unchanged(self, case: str, sha256: str, stamp: str) -> bool:
        """See :class:`lib.cluster.source.CaseSource`; for a file, the server compares the checksum."""
        if self._channels is not None:
            return bool(stamp) and self._channels.of(case)["stamp"] == stamp
        if case not in self._files:
            return self._series.is_unchanged(case, sha256, stamp)
        wanted = {"image": case, "check_sum": f"SHA256:{sha256}"}
        return self.rest.ask("HEAD", "/datastore/image", TRANSFER_SECONDS, params=wanted).status_code == 200

    def fetch(self, case: str, folder: Path) -> Fetched:
        """See :class:`lib.cluster.source.CaseSource`.

        Raises:
            NotFoundError, UpstreamError, ImageError: if it is unavailable.
        """
        if self._channels is not None:
            return self._channels.fetch(case, folder)
        if case not in self._files:
            return self._series.fetch(case, folder)
        return Fetched(self.rest.download(folder / f"image{self._files[case]}", image=case))


@dataclass(frozen=True)
class ServerLabels:
    """Uploads masks to a server as labels.

    Attributes:
        tag: tag of the labels.
    """

    rest: Rest
    tag: str
    preset: Preset

    def check(self) -> None:
        """Refuse what the server would refuse, before anything is computed.

        Raises:
            ConfigError: for an invalid tag, or without the permission for it.
            UpstreamError: if the server does not respond.
        """
        if not re.fullmatch(TAG, self.tag):
            raise ConfigError(f"--save-labels {self.tag!r}; valid: a tag of lower-case letters, digits, '_' or '-'")
        user = self.rest.ask("GET", "/auth/token/valid").json()
        needed = FINAL_ROLES if self.tag == FINAL else ROLES
        if not set(user["roles"]) & set(needed):
            raise ConfigError(
                f"--save-labels {self.tag}: {user['username']!r} is {', '.join(user['roles'])} on {self.rest.url}; "
                f"needed: {' or '.join(needed)}"
            )

    def __call__(self, result: CaseResult, mask: Path) -> str:
        """Upload a mask, unless the server has it; returns its location.

        Raises:
            ConfigError: without the permission.
            ConflictError: if a person drew the current label, or if the server refuses the mask.
            UpstreamError: if the server does not respond.
        """
        place = f"{self.tag} at {self.rest.url}"
        if result.sent_to == place:
            return place
        names = [{"name": name, "idx": index} for name, index in self.preset.label_indices.items()]
        params: dict[str, Any] = {"model": result.model, "client_id": CLIENT, "label_info": names, "source": INFERENCE}
        params |= {"model_version": result.version, "engine": result.engine, "estimated_dice": result.estimated_dice}
        with mask.open("rb") as file:
            parts = {"params": (None, json.dumps(params)), "label": (mask.name, file, "application/gzip")}
            query = {"image": result.case, "tag": self.tag}
            answer = self.rest.ask("PUT", "/datastore/label", TRANSFER_SECONDS, params=query, files=parts)
        if answer.status_code != 200:
            raise ConflictError(_reason(answer))
        return place
