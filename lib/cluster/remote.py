"""Cases of a running server, by its REST, and series of a PACS, by DICOMweb; and masks that go back to the server."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import requests
from requests.auth import HTTPBasicAuth

from lib.cluster.results import CaseResult
from lib.cluster.source import CaseSource, Fetched, FolderSource
from lib.configs.preset import Preset
from lib.datastore.records import FINAL, INFERENCE, is_drawn
from lib.dicom.remote import CONNECT_SECONDS, QUERY_SECONDS, TRANSFER_SECONDS, RemoteSource, connect
from lib.errors import ConfigError, ConflictError, NotFoundError, UpstreamError

TOKEN_VARIABLE = "UNETR_TOKEN"
PREFIXES = {"qido": "MONAI_LABEL_QIDO_PREFIX", "wado": "MONAI_LABEL_WADO_PREFIX", "stow": "MONAI_LABEL_STOW_PREFIX"}
CLIENT = "run.py segment"
TAG = r"[a-z0-9_\-]{1,32}"
FINAL_ROLES = ("reviewer", "admin")
ROLES = ("annotator", *FINAL_ROLES)
BLOCK = 2**20


@dataclass(frozen=True)
class Access:
    """By what a server lets a program in; never shown.

    Attributes:
        token: of this project's server, or of a PACS that takes bearer tokens.
        user, password: of a PACS, for basic authentication.
        prefixes: of a PACS' services, as the server's settings have them.
    """

    token: str = field(default="", repr=False)
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    prefixes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls, token_file: Path | None, environment: Mapping[str, str] = os.environ) -> Access:
        """From a file or the environment: what stands on a command line is seen by everybody on the machine.

        Raises:
            ConfigError: when the file cannot be read.
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
        """Of a request."""
        if self.token:
            return {"headers": {"Authorization": f"Bearer {self.token}"}}
        return {"auth": HTTPBasicAuth(self.user, self.password)} if self.user and self.password else {}


@dataclass(frozen=True)
class Rest:
    """A server of this project.

    Attributes:
        url: its address, without a slash at the end.
    """

    url: str
    access: Access

    def ask(self, method: str, path: str, seconds: float = QUERY_SECONDS, **options: Any) -> requests.Response:
        """Its answer, whatever the status.

        Raises:
            ConfigError: when it does not let this program in, or not do this.
            UpstreamError: when it does not answer, or fails.
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


def _reason(answer: requests.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return answer.reason or str(answer.status_code)


class PacsSource:
    """Series of a DICOMweb server; a case's id is its Series Instance UID.

    A series is known again by the UIDs of its instances, which never change their content under a UID.

    Args:
        url: its root.
        filters: attributes of the query, by keyword; ``Modality`` is the preset's where the query has none.
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
        """As :class:`CaseSource`: what is broken shows when it is fetched."""
        return {}

    def cases(self) -> list[str]:
        """As :class:`CaseSource`.

        Raises:
            UpstreamError: when the server does not answer as one.
        """
        return sorted(self._remote().series())

    def is_unchanged(self, case: str, sha256: str, stamp: str) -> bool:
        """As :class:`CaseSource`; by its stamp."""
        return bool(stamp) and self._remote().stamp(case) == stamp

    def fetch(self, case: str, folder: Path) -> Fetched:
        """As :class:`CaseSource`.

        Raises:
            NotFoundError, UpstreamError, ImageError: when it cannot be had.
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


class ServerSource:
    """The pool of a running server: its files by REST, its DICOM series by its DICOMweb.

    Args:
        rest: the server.
        modality: of the series that are wanted.
        keeps: the tag of labels that masks are to be sent to; cases that a person drew one of are left out.
    """

    def __init__(self, rest: Rest, modality: str, keeps: str = "") -> None:
        self.rest = rest
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
        """As :class:`CaseSource`: the server has left those out."""
        return {}

    def cases(self) -> list[str]:
        """As :class:`CaseSource`."""
        return list(self._cases)

    def is_unchanged(self, case: str, sha256: str, stamp: str) -> bool:
        """As :class:`CaseSource`; of a file the server compares the checksum."""
        if case not in self._files:
            return self._series.is_unchanged(case, sha256, stamp)
        wanted = {"image": case, "check_sum": f"SHA256:{sha256}"}
        return self.rest.ask("HEAD", "/datastore/image", TRANSFER_SECONDS, params=wanted).status_code == 200

    def fetch(self, case: str, folder: Path) -> Fetched:
        """As :class:`CaseSource`.

        Raises:
            NotFoundError, UpstreamError, ImageError: when it cannot be had.
        """
        if case not in self._files:
            return self._series.fetch(case, folder)
        path = folder / f"image{self._files[case]}"
        answer = self.rest.ask("GET", "/datastore/image", TRANSFER_SECONDS, params={"image": case}, stream=True)
        with answer:
            if answer.status_code != 200:
                raise NotFoundError("image", case)
            try:
                with path.open("wb") as file:
                    for block in answer.iter_content(BLOCK):
                        file.write(block)
            except requests.RequestException as error:
                raise UpstreamError(f"the server broke off the image {case!r} ({type(error).__name__})") from error
        return Fetched(path)


@dataclass(frozen=True)
class ServerLabels:
    """Sends masks to a server as labels of a tag.

    Attributes:
        tag: under which they are kept there.
    """

    rest: Rest
    tag: str
    preset: Preset

    def check(self) -> None:
        """Refuse what the server would refuse, before anything is computed.

        Raises:
            ConfigError: for a tag that is none, or without the right to it.
            UpstreamError: when the server does not answer.
        """
        if not re.fullmatch(TAG, self.tag):
            raise ConfigError(f"--save-labels {self.tag!r}; valid: a tag of lower-case letters, digits, '_' or '-'")
        told = self.rest.ask("GET", "/auth/token/valid").json()
        needed = FINAL_ROLES if self.tag == FINAL else ROLES
        if not set(told["roles"]) & set(needed):
            raise ConfigError(
                f"--save-labels {self.tag}: {told['username']!r} is {', '.join(told['roles'])} on {self.rest.url}; "
                f"needed: {' or '.join(needed)}"
            )

    def __call__(self, result: CaseResult, mask: Path) -> str:
        """Send a mask, unless it is there; returns where.

        Raises:
            ConfigError: without the right to.
            ConflictError: when a person drew the label that there is, or the server refuses the mask.
            UpstreamError: when the server does not answer.
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


def open_source(studies: str, preset: Preset, access: Access, keeps: str = "") -> CaseSource:
    """The cases of a folder, of a running server by its address, or of a PACS by that of its DICOMweb server.

    What follows ``?`` in the address is a query of series (QIDO-RS), such as ``StudyDate=20250101-``.

    Args:
        studies: a path or an address.
        preset: what segments them.
        access: to the server.
        keeps: see :class:`ServerSource`.

    Raises:
        ConfigError: for a folder or an address that is none, or that does not let this program in.
        UpstreamError: when the server does not answer.
    """
    if "://" not in studies:
        if keeps:
            raise ConfigError("--save-labels sends masks to a running server; --studies is a folder")
        return FolderSource(Path(studies))
    parts = urlsplit(studies)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--studies {studies!r}; valid: a folder, or an address that begins with http:// or https://")
    if parts.username or parts.password:
        raise ConfigError("--studies holds a password, which everybody on the machine sees; set the variables instead")
    root = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    if not parts.query and _is_server(Rest(root, access)):
        return ServerSource(Rest(root, access), preset.modality, keeps)
    if keeps:
        raise ConfigError(f"--save-labels sends masks to a running server, and {root} is none")
    filters = {"Modality": preset.modality} | dict(parse_qsl(parts.query))
    return PacsSource(root.removesuffix("/series"), filters, access)


def _is_server(rest: Rest) -> bool:
    answer = rest.ask("GET", "/info/")
    try:
        return answer.status_code == 200 and "models" in answer.json()
    except ValueError:
        return False
