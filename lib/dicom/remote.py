"""Series of a DICOMweb server, which may be unavailable, hang, or delete a series during a request."""

from __future__ import annotations

import hashlib
import logging
import struct
import threading
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import requests
import urllib3
from dicomweb_client import DICOMwebClient
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from requests.auth import HTTPBasicAuth

from lib.dicom.attributes import Json, first_value
from lib.dicom.circuit import Circuit
from lib.dicom.files import reading
from lib.dicom.sources import INFO_KEYWORDS, MATCHED_KEYWORDS, SHOWN_KEYWORDS, SeriesInfo, series_info
from lib.errors import ImageError, NotFoundError, UpstreamError

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

SECONDS_A_LIST_IS_KEPT = 2.0
CONNECT_SECONDS, QUERY_SECONDS, TRANSFER_SECONDS = 3.0, 10.0, 30.0
"""Timeouts: for connecting, between two parts of a query response, and between two parts of instances."""
UNAVAILABLE = (502, 503, 504)
GONE = (404, 410)
UNEXPECTED = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    InvalidDicomError,
    BytesLengthException,
    struct.error,
    zlib.error,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
)
"""Exceptions that invalid responses cause, including responses that are not DICOMweb."""


class RemoteSource:
    """Series of a DICOMweb server.

    After a failed query, further queries return the last known list, or an error, at once for some seconds; then one
    query in the background tests the server again.

    Args:
        client: DICOMweb client.
        modalities: modalities that can be segmented.
        circuit: circuit breaker.
        clock: monotonic clock in seconds.
        filters: additional attributes of the query, by keyword.
        list_seconds: time for which a list of series is valid.
    """

    def __init__(
        self,
        client: DICOMwebClient,
        modalities: Collection[str],
        circuit: Circuit | None = None,
        clock: Callable[[], float] = time.monotonic,
        filters: Mapping[str, str] | None = None,
        list_seconds: float = SECONDS_A_LIST_IS_KEPT,
    ) -> None:
        self.client = client
        self._circuit = circuit or Circuit(clock=clock)
        self._clock = clock
        self._modalities = sorted(modalities)
        self._filters, self._list_seconds = dict(filters or {}), list_seconds
        self._listed: tuple[float, dict[str, SeriesInfo]] | None = None
        self._shared: dict[str, list[str]] = {}
        self._stale = False
        self._listing = threading.Lock()

    def start(self) -> None:
        """See :class:`SeriesSource`; nothing runs in the background, since queries are sent on demand."""

    def stop(self) -> None:
        """See :class:`SeriesSource`."""

    def series(self) -> dict[str, SeriesInfo]:
        """See :class:`SeriesSource`; a list is valid for two seconds, and longer while the server does not respond.

        Raises:
            UpstreamError: if the server has never responded as a DICOMweb server.
        """
        self._look_again()
        if not self._circuit.is_open:
            with self._listing:  # waiting threads use the response, or the failure, of the thread that sent the query
                if not self._circuit.is_open and self._is_due():
                    self._list()
        if self._listed is None:
            raise UpstreamError(self._sentence())
        return self._listed[1]

    def stamp(self, uid: str) -> str:
        """See :class:`SeriesSource`; it is computed from the instances' UIDs.

        Raises:
            NotFoundError, UpstreamError: if there is no such series, or no response.
            ImageError: if it belongs to several studies.
        """
        info = self._known(uid)
        instances = self._ask_for(uid, lambda: self.client.search_for_instances(info.study, uid, get_remaining=True))
        if not instances:
            raise self._gone(uid)
        uids = sorted(first_value(entry, "SOPInstanceUID") for entry in instances)
        return hashlib.sha256(" ".join(uids).encode()).hexdigest()[:16]

    def fetch(self, uid: str, folder: Path) -> list[Path]:
        """See :class:`SeriesSource`; each instance is downloaded in the transfer syntax in which it is stored.

        Raises:
            NotFoundError, UpstreamError: if there is no such series, or no response.
            ImageError: if the server has no instance of it, or a damaged one, or if it belongs to several studies.
        """
        info = self._known(uid)
        files: list[Path] = []
        as_stored = (("application/dicom", "*"),)
        instances = self._ask_for(uid, lambda: self.client.iter_series(info.study, uid, media_types=as_stored))
        while (instance := self._ask_for(uid, lambda: next(instances, None))) is not None:
            file = folder / f"{len(files):05d}.dcm"
            with reading(f"instance {instance.get('SOPInstanceUID', '')} of series {uid} is damaged"):
                instance.save_as(file, write_like_original=False)
            files.append(file)
        if not files:
            raise ImageError(f"series {uid} has no instances on the DICOMweb server")
        return files

    def in_frame_of_reference(self, frame: str, study: str) -> list[str]:
        """See :class:`SeriesSource`; all series of the study, since a PACS need not list frames of reference.

        Raises:
            UpstreamError: if the server has never responded as a DICOMweb server.
        """
        return sorted(uid for uid, info in self.series().items() if info.study == study)

    def keep_segmentation(self, seg: Dataset, series_uid: str) -> None:
        """See :class:`SeriesSource`: a PACS keeps old objects, so a new series with a later date and number is added.

        Raises:
            UpstreamError: if the server does not accept it.
        """
        self.keep_instance(seg)

    def keep_instance(self, instance: Dataset) -> None:
        """See :class:`SeriesSource`.

        Raises:
            UpstreamError: if the server does not accept it.
        """
        self.ask(lambda: self.client.store_instances([instance]))

    def status(self) -> dict[str, Any]:
        """Address of the server, age of its list of series, and its problem."""
        status: dict[str, Any] = {"dicomweb": self.client.base_url, "list_age_seconds": self.list_age_seconds()}
        problems = {f"series {uid}": self._ambiguous(uid) for uid in self._shared}
        status |= {"problems": problems} if problems else {}
        return {**status, **({"problem": self._sentence()} if self._circuit.is_open else {})}

    def list_age_seconds(self) -> float | None:
        """Age of the list of series; None before the first list."""
        return None if self._listed is None else round(self._clock() - self._listed[0], 1)

    def problem(self) -> str:
        """See :class:`SeriesSource`; the server is queried now, unless it was queried recently."""
        try:
            self.series()
        except UpstreamError as error:
            return str(error)
        return self._sentence() if self._circuit.is_open else ""

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """The server's response to a question.

        Raises:
            UpstreamError: if the response is not as expected; at once while the server is known to be unavailable.
        """
        self._look_again()
        if self._circuit.is_open:
            raise UpstreamError(self._sentence())
        try:
            return question()
        except UNEXPECTED as error:
            reason = _reason(error)
            if _is_away(error):
                self._circuit.fail(reason)
            raise UpstreamError(f"the DICOMweb server does not answer as expected ({reason})") from error

    def _ask_for(self, uid: str, question: Callable[[], Answer]) -> Answer:
        """Like ``ask``, for a series that may have been deleted since the list was made."""
        try:
            return self.ask(question)
        except UpstreamError as error:
            if _status(error.__cause__) in GONE:
                raise self._gone(uid) from error
            raise

    def _gone(self, uid: str) -> NotFoundError:
        self._stale = True
        return NotFoundError("series", uid)

    def _known(self, uid: str) -> SeriesInfo:
        info = self.series().get(uid)
        if info is None:
            raise NotFoundError("series", uid)
        if uid in self._shared:
            raise ImageError(self._ambiguous(uid))
        return info

    def _ambiguous(self, uid: str) -> str:
        """Why a series UID that several studies share is not segmented: its mask might go to another series."""
        return (
            f"series {uid} is in the studies {' and '.join(self._shared[uid])}, and viewers name an image by this UID "
            "alone; valid: a series of one study"
        )

    def _is_due(self) -> bool:
        return self._stale or self._listed is None or self._clock() - self._listed[0] > self._list_seconds

    def _list(self) -> None:
        """Query the list of series, and store it or the failure."""
        try:
            entries = [
                entry
                for modality in self._modalities
                for entry in self._search({**self._filters, "Modality": modality})
            ]
            infos = [series_info(entry) for entry in entries]
            studies: dict[str, set[str]] = {}
            for info in infos:
                studies.setdefault(info.uid, set()).add(info.study)
            shared = {uid: sorted(of_uid) for uid, of_uid in studies.items() if len(of_uid) > 1}
            by_uid = {info.uid: info for info in infos}
        except UNEXPECTED as error:
            logger.warning("the DICOMweb server %s does not list its series: %r", self.client.base_url, error)
            self._circuit.fail(_reason(error))
        else:
            self._listed, self._shared, self._stale = (self._clock(), by_uid), shared, False
            self._circuit.succeed()

    def _look_again(self) -> None:
        """Test a failed server again, in the background, when the waiting time is over and no other thread tests it."""
        if self._circuit.begin_attempt():
            threading.Thread(target=self._list, name="dicomweb-attempt", daemon=True).start()

    def _search(self, filters: dict[str, str]) -> list[Json]:
        fields = [*INFO_KEYWORDS, *SHOWN_KEYWORDS, *MATCHED_KEYWORDS]
        entries: list[Json] = self.client.search_for_series(search_filters=filters, fields=fields, get_remaining=True)
        return entries

    def _sentence(self) -> str:
        age = self.list_age_seconds()
        known = "its series were never listed" if age is None else f"its series were listed {age:.0f} s ago"
        return f"the DICOMweb server does not answer as expected ({self._circuit.problem}); {known}"


class _Session(requests.Session):
    """An HTTP session with timeouts; without them, the client would wait for ever for a hanging server.

    A server may close a kept connection at the moment of the next request, which then says nothing about the server: a
    GET is sent again, once, on another connection.
    """

    def request(self, method: str, *arguments: Any, **options: Any) -> requests.Response:  # type: ignore[override]
        query = "json" in str((options.get("headers") or {}).get("Accept", ""))
        posted = options.get("data") is not None
        seconds = QUERY_SECONDS if query and not posted else TRANSFER_SECONDS
        options.setdefault("timeout", (CONNECT_SECONDS, seconds))
        try:
            return super().request(method, *arguments, **options)
        except requests.ConnectionError as error:
            if method.upper() != "GET" or not _was_closed(error):
                raise
            logger.info("a connection was closed before the response (%s); the request is sent again", error)
        return super().request(method, *arguments, **options)


def _was_closed(error: requests.ConnectionError) -> bool:
    """Whether a connection that had been made was closed before any response."""
    cause = error.args[0] if error.args else None
    return isinstance(cause, urllib3.exceptions.ProtocolError) and isinstance(cause.args[-1], ConnectionError)


def connect(
    url: str, user: str | None, password: str | None, prefixes: Mapping[str, str | None], token: str = ""
) -> DICOMwebClient:
    """A client for a DICOMweb server.

    Args:
        url: root URL.
        user: user name for basic authentication; empty for none.
        password: password for basic authentication.
        prefixes: URL prefixes of ``qido``, ``wado`` and ``stow``, if the server has any.
        token: a bearer token, instead of user and password.
    """
    session = _Session()
    if token:
        session.headers["Authorization"] = f"Bearer {token}"
    elif user and password:
        session.auth = HTTPBasicAuth(user, password)
    given: dict[str, Any] = {f"{name}_url_prefix": prefix for name, prefix in prefixes.items() if prefix}
    client = DICOMwebClient(url.rstrip("/"), session, **given)
    client.set_http_retry_params(retry=False)  # a user waits for the response; the next request tries again
    return client


def _status(error: BaseException | None) -> int | None:
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _reason(error: Exception) -> str:
    return str(_status(error) or type(error).__name__)


def _is_away(error: Exception) -> bool:
    """Whether the server as a whole is unavailable, and not only one question failed."""
    no_answer = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.TimeoutError)
    return isinstance(error, no_answer) or _status(error) in UNAVAILABLE
