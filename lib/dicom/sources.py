"""Where series come from: a folder with its index, or a DICOMweb server."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import requests
from dicomweb_client import DICOMwebClient
from pydicom import dcmread
from pydicom.dataset import Dataset
from requests.auth import HTTPBasicAuth

from lib.dicom.attributes import Json, first_value
from lib.dicom.index import DicomIndex, SeriesEntry
from lib.errors import ImageError, NotFoundError, ParameterError, UpstreamError

INFO_KEYWORDS = ("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "StudyDate", "StudyTime", "Modality")
SECONDS_A_LIST_IS_KEPT = 2.0
CONNECT_SECONDS, READ_SECONDS = 10, 120
SEGMENTATIONS = "segmentations"
STORED = "stored"
"""Folders for SEGs of series, and for other instances that are stored, in a folder of studies."""


@dataclass(frozen=True)
class SeriesInfo:
    """A series that can be segmented.

    Attributes:
        uid: Series Instance UID.
        study: Study Instance UID.
        attributes: what clients show of it, by keyword.
    """

    uid: str
    study: str
    attributes: Mapping[str, str]


class SeriesSource(Protocol):
    """What the datastore needs of it."""

    def start(self) -> None:
        """Keep up to date in the background, until ``stop``."""

    def stop(self) -> None:
        """End that."""

    def series(self) -> dict[str, SeriesInfo]:
        """The image series of the right modalities, by UID."""

    def stamp(self, uid: str) -> str:
        """Changes when the series does."""

    def fetch(self, uid: str, folder: Path) -> list[Path]:
        """The files of a series; ``folder``, which is empty, may be used for them."""

    def keep_segmentation(self, seg: Dataset, series_uid: str) -> None:
        """Put a SEG where viewers find it, in place of the one of that series before it."""

    def keep_instance(self, instance: Dataset) -> None:
        """Add an instance to what there is."""

    def status(self) -> dict[str, Any]:
        """What is told of it."""


class FolderSource:
    """Series of an index.

    Args:
        index: of the folder.
        modalities: those that can be segmented.
    """

    def __init__(self, index: DicomIndex, modalities: Collection[str]) -> None:
        self.index = index
        self._modalities = frozenset(modalities)
        self._scanning = threading.Lock()
        self._listed: tuple[dict[str, SeriesEntry], dict[str, SeriesInfo]] = ({}, {})

    def start(self) -> None:
        """As :class:`SeriesSource`."""
        self.index.start()

    def stop(self) -> None:
        """As :class:`SeriesSource`."""
        self.index.stop()

    def series(self) -> dict[str, SeriesInfo]:
        """As :class:`SeriesSource`; the first call of a process that does not scan in the background scans."""
        with self._scanning:
            if not self.index.is_started and not self.index.progress.scans:
                self.index.scan()
        entries, known = self.index.series(), self._listed
        if known[0] is not entries:  # the index makes another dictionary when anything has changed
            listed = {
                uid: _info(entry.summary)
                for uid, entry in entries.items()
                if entry.modality in self._modalities and entry.frames > 1
            }
            self._listed = known = (entries, listed)
        return known[1]

    def stamp(self, uid: str) -> str:
        """As :class:`SeriesSource`."""
        return self.index.stamp(uid)

    def fetch(self, uid: str, folder: Path) -> list[Path]:
        """As :class:`SeriesSource`; the files as they lie.

        Raises:
            NotFoundError: when there is no such series.
        """
        files = [instance.file for instance in self.index.instances(series=uid)]
        if not files:
            raise NotFoundError("series", uid)
        return files

    def keep_segmentation(self, seg: Dataset, series_uid: str) -> None:
        """As :class:`SeriesSource`: one file a series, replaced at once or not at all."""
        file = self.index.folder / SEGMENTATIONS / f"{series_uid}.dcm"
        _write(seg, file)
        self.index.add(file)

    def keep_instance(self, instance: Dataset) -> None:
        """As :class:`SeriesSource`: a file of its own below the folder; the same instance again changes nothing.

        Raises:
            ParameterError: when there is another instance of that UID.
        """
        uids = [str(instance.get(k)) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
        file = self.index.folder.joinpath(STORED, *uids[:2], f"{uids[2]}.dcm")
        known = self.index.instance(uids[2])
        if known is not None:
            if _pixels_and_uids(dcmread(known.file)) != _pixels_and_uids(instance):
                raise ParameterError("SOPInstanceUID", uids[2], "the UID of a new instance: another one has it already")
            return
        _write(instance, file)
        self.index.add(file)

    def status(self) -> dict[str, Any]:
        """Files found and indexed, and what could not be read."""
        progress = self.index.progress
        problems = {Path(path).name: problem for path, problem in sorted(progress.problems.items())[:20]}
        return {"files": progress.found, "indexed": progress.indexed, "problems": problems}


class RemoteSource:
    """Series of a DICOMweb server.

    Args:
        client: asks it.
        modalities: those that can be segmented.
    """

    def __init__(self, client: DICOMwebClient, modalities: Collection[str]) -> None:
        self.client = client
        self._modalities = sorted(modalities)
        self._listed: tuple[float, dict[str, SeriesInfo]] = (float("-inf"), {})
        self._listing = threading.Lock()

    def start(self) -> None:
        """As :class:`SeriesSource`: a server is asked when its answer is needed."""

    def stop(self) -> None:
        """As :class:`SeriesSource`."""

    def series(self) -> dict[str, SeriesInfo]:
        """As :class:`SeriesSource`; a list is good for two seconds.

        Raises:
            UpstreamError: when the server does not answer as one.
        """
        with self._listing:
            listed_at, found = self._listed
            if time.monotonic() - listed_at > SECONDS_A_LIST_IS_KEPT:
                entries = [entry for modality in self._modalities for entry in self._search({"Modality": modality})]
                found = {first_value(entry, "SeriesInstanceUID"): _info(entry) for entry in entries}
                self._listed = time.monotonic(), found
            return found

    def stamp(self, uid: str) -> str:
        """As :class:`SeriesSource`: of the instances' UIDs.

        Raises:
            NotFoundError, UpstreamError: when there is no such series, or no answer.
        """
        info = self._known(uid)
        found = self._ask(lambda: self.client.search_for_instances(info.study, uid, get_remaining=True))
        uids = sorted(first_value(entry, "SOPInstanceUID") for entry in found)
        return hashlib.sha256(" ".join(uids).encode()).hexdigest()[:16]

    def fetch(self, uid: str, folder: Path) -> list[Path]:
        """As :class:`SeriesSource`: downloaded instance by instance, as they are stored there.

        Raises:
            NotFoundError, UpstreamError: when there is no such series, or no answer.
            ImageError: when the server has no instance of it.
        """
        info = self._known(uid)
        files: list[Path] = []
        as_stored = (("application/dicom", "*"),)
        for instance in self._ask(lambda: self.client.iter_series(info.study, uid, media_types=as_stored)):
            file = folder / f"{len(files):05d}.dcm"
            instance.save_as(file, write_like_original=False)
            files.append(file)
        if not files:
            raise ImageError(f"series {uid} has no instances on the DICOMweb server")
        return files

    def keep_segmentation(self, seg: Dataset, series_uid: str) -> None:
        """As :class:`SeriesSource`: a PACS keeps what it has, so this is one more series, of a later date and number.

        Raises:
            UpstreamError: when the server does not take it.
        """
        self._ask(lambda: self.client.store_instances([seg]))

    def keep_instance(self, instance: Dataset) -> None:
        """As :class:`SeriesSource`.

        Raises:
            UpstreamError: when the server does not take it.
        """
        self._ask(lambda: self.client.store_instances([instance]))

    def status(self) -> dict[str, Any]:
        """Where it is."""
        return {"dicomweb": self.client.base_url}

    def _search(self, filters: dict[str, str]) -> list[Json]:
        fields = [*INFO_KEYWORDS, "SeriesDescription"]
        found: list[Json] = self._ask(
            lambda: self.client.search_for_series(search_filters=filters, fields=fields, get_remaining=True)
        )
        return found

    def _known(self, uid: str) -> SeriesInfo:
        info = self.series().get(uid)
        if info is None:
            raise NotFoundError("series", uid)
        return info

    def _ask(self, question: Any) -> Any:
        try:
            return question()
        except (requests.RequestException, ValueError) as error:
            reason = getattr(getattr(error, "response", None), "status_code", None) or type(error).__name__
            raise UpstreamError(f"the DICOMweb server does not answer as expected ({reason})") from error


class _Session(requests.Session):
    """Gives up on a server that does not answer, where the client itself would wait for ever."""

    def request(self, *arguments: Any, **options: Any) -> requests.Response:
        options.setdefault("timeout", (CONNECT_SECONDS, READ_SECONDS))
        return super().request(*arguments, **options)


def connect(url: str, user: str | None, password: str | None, prefixes: Mapping[str, str | None]) -> DICOMwebClient:
    """A client of a DICOMweb server.

    Args:
        url: its root.
        user: for basic authentication; none without.
        password: the same.
        prefixes: of ``qido``, ``wado`` and ``stow``, where the server has some.
    """
    session = _Session()
    if user and password:
        session.auth = HTTPBasicAuth(user, password)
    given: dict[str, Any] = {f"{name}_url_prefix": prefix for name, prefix in prefixes.items() if prefix}
    client = DICOMwebClient(url.rstrip("/"), session, **given)
    client.set_http_retry_params(retry=False)  # a user waits for the answer; the next request tries again
    return client


def _write(instance: Dataset, file: Path) -> None:
    """At once or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        instance.save_as(partial, write_like_original=False)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _pixels_and_uids(instance: Dataset) -> tuple[Any, ...]:
    return tuple(instance.get(k) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "PixelData"))


def _info(summary: Json) -> SeriesInfo:
    attributes = {keyword: first_value(summary, keyword) for keyword in (*INFO_KEYWORDS, "SeriesDescription")}
    return SeriesInfo(attributes["SeriesInstanceUID"], attributes["StudyInstanceUID"], attributes)
