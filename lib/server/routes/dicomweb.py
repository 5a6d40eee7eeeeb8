"""DICOMweb: the studies folder, or the parts of a PACS that this server uses.

Its root is ``/dicom-web/...``. The routes ``/proxy/dicom/{qido,wado,stow}/...``, which MONAI Label's OHIF uses, are
equivalent.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Literal

import anyio.to_thread
import requests
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from monailabel.config import settings as stock_settings
from pydicom.dataset import FileDataset
from starlette.exceptions import HTTPException

from lib.dicom.attributes import dump, to_json
from lib.dicom.index import DicomIndex, Instance
from lib.dicom.query import search
from lib.dicom.remote import CONNECT_SECONDS, QUERY_SECONDS, TRANSFER_SECONDS, RemoteSource
from lib.dicom.resources import MediaType, Resource, parse_accept, parse_path
from lib.dicom.retrieve import (
    NotAcceptableError,
    Part,
    frame_parts,
    instance_parts,
    multipart,
    native_frames,
    picture,
    picture_of,
    whole_file,
)
from lib.dicom.segmentation_reader import is_segmentation
from lib.dicom.sources import FolderSource, SeriesSource
from lib.dicom.store import OTHER_STUDY, REFUSED, Outcome, PartWriter, answer, read_part
from lib.errors import InputError, NotFoundError, ParameterError, StorageError, UpstreamError
from lib.server.dependencies import PresentedDep, SegmentationsDep, StoreDep, StudiesDep
from lib.server.http.auth import AsAnnotator, AsUser, User
from lib.server.http.errors import TooLargeError
from lib.server.http.uploads import temporary_folder_beside_loop
from lib.server.labels.segmentations import Segmentations
from lib.server.presented.cases import PresentedCases, Searched
from lib.storage.disk import MIB

logger = logging.getLogger("unetr.server")
router = APIRouter(tags=["DICOMweb"])

Service = Literal["wado", "qido", "stow"]
KEPT_HEADERS = ("accept", "content-type")
RETURNED_HEADERS = ("content-type",)
BLOCK_BYTES = 256 * 1024
DICOM_JSON = "application/dicom+json"


@router.get("/dicom-web/{path:path}", summary="Query (QIDO-RS) or retrieve (WADO-RS)")
async def read(
    request: Request, store: StoreDep, studies: StudiesDep, presented: PresentedDep, user: AsUser, path: str
) -> Response:
    """Studies, series, instances, metadata, frames and rendered images."""
    resource = parse_path(path)
    return await anyio.to_thread.run_sync(lambda: respond(request, store.source, studies, presented, resource, path))


@router.get("/proxy/dicom/{service}/{path:path}", include_in_schema=False)
async def read_by_service(
    request: Request,
    store: StoreDep,
    studies: StudiesDep,
    presented: PresentedDep,
    user: AsUser,
    service: Service,
    path: str,
) -> Response:
    """The same at the paths that OHIF uses."""
    resource = parse_path(path)
    return await anyio.to_thread.run_sync(lambda: respond(request, store.source, studies, presented, resource, path))


@router.post("/dicom-web/{path:path}", summary="Store instances (STOW-RS)")
async def write(request: Request, segmentations: SegmentationsDep, user: AsAnnotator, path: str) -> Response:
    """Store instances; a DICOM SEG of a series is a submission of that series' label."""
    return await store_instances(request, segmentations, user, path)


@router.post("/proxy/dicom/{service}/{path:path}", include_in_schema=False)
async def write_by_service(
    request: Request, segmentations: SegmentationsDep, user: AsAnnotator, service: Service, path: str
) -> Response:
    """The same at the paths that OHIF uses."""
    return await store_instances(request, segmentations, user, path)


STREAMED = (write, write_by_service)
"""Routes whose body is written to files as it arrives, without FastAPI."""


def respond(
    request: Request, source: SeriesSource, studies: str, presented: PresentedCases, resource: Resource, path: str
) -> Response:
    """Answer from the index of the folder, or forward to the PACS."""
    if isinstance(source, FolderSource):
        if resource.series in source.index.series():  # called for each frame that a viewer loads
            return answer_from(source.index, request, resource, presented)
        label = presented.labels.find(resource.series)
        if label is not None and resource.view != "query":
            return answer_made(request, resource, [presented.labels.instance(label, resource.study, resource.sop)])
        if presented.case_of(resource.series or resource.study) is not None and resource.view != "query":
            return answer_presented(presented, request, resource)
        return answer_from(source.index, request, resource, presented)
    if isinstance(source, RemoteSource):
        return forward(request, source, studies, resource, path)
    raise NotFoundError("DICOMweb server behind", studies)


def answer_presented(presented: PresentedCases, request: Request, resource: Resource) -> Response:
    """Answer for a file that is presented as a series.

    Raises:
        NotFoundError: if the address does not exist.
        ImageError: if the file cannot be read.
    """
    accepted = parse_accept(request.query_params.get("accept") or request.headers.get("accept"))
    headers = presented.headers(resource.study, resource.series, resource.sop)
    case = None if resource.series else presented.case_of(resource.study)
    label = None if case is None else presented.labels.of_case(case)
    beside = [] if label is None else [presented.labels.instance(label)]
    if resource.view == "metadata":
        texts = presented.metadata_texts(resource.study, resource.series, resource.sop)
        texts += [dump(to_json(instance)).decode() for instance in beside]
        return Response(f"[{', '.join(texts)}]", media_type=DICOM_JSON)
    if resource.view == "instances":
        files = itertools.chain((presented.file(header) for header in headers), map(whole_file, beside))
        return send_parts(files, accepted, "application/dicom")
    if resource.view == "frames":
        return send_parts(iter(presented.frame(headers[0], resource.frames)), accepted, "")
    return answer_made(request, resource, [presented.with_pixels(headers[(len(headers) - 1) // 2])])


def answer_made(request: Request, resource: Resource, made: Sequence[FileDataset]) -> Response:
    """Answer with generated instances, which are not files of the studies.

    Raises:
        ParameterError: for a frame that does not exist.
        HTTPException: 406 if the client accepts none of the possible media types.
    """
    accepted = parse_accept(request.query_params.get("accept") or request.headers.get("accept"))
    if resource.view == "metadata":
        return Response(dump([to_json(instance) for instance in made]), media_type=DICOM_JSON)
    if resource.view == "instances":
        return send_parts(map(whole_file, made), accepted, "application/dicom")
    if resource.view == "frames":
        return send_parts(iter(native_frames(made[0], resource.frames)), accepted, "")
    try:
        shown = picture_of(made[0], resource, dict(request.query_params), accepted)
    except NotAcceptableError as error:
        raise HTTPException(406, str(error)) from error
    return Response(shown.content, media_type=shown.media_type)


def answer_from(index: DicomIndex, request: Request, resource: Resource, presented: PresentedCases) -> Response:
    """Answer from an index; a whole study includes its regular series.

    Raises:
        NotFoundError: if the address does not exist.
        HTTPException: 406 if the client accepts none of the possible media types.
    """
    accepted = parse_accept(request.query_params.get("accept") or request.headers.get("accept"))
    if resource.view == "query":
        searched = Searched(index, presented)
        matches = search(searched, resource, request.query_params.multi_items(), root_of(request))
        return Response(dump(matches), media_type=DICOM_JSON)
    instances = named_instances(index, resource)
    try:
        if resource.view == "metadata":
            texts = index.metadata_texts(resource.study, resource.series, resource.sop)
            beside = [] if resource.series else presented.beside(resource.study)
            texts += [dump(to_json(instance)).decode() for instance in beside]
            return Response(
                f"[{', '.join(texts)}]", media_type=DICOM_JSON
            )  # the text is not parsed, since it is sent unchanged
        if resource.view == "instances":
            beside = [] if resource.series else presented.beside(resource.study)
            files = itertools.chain(instance_parts(instances, accepted), map(presented.file, beside))
            return send_parts(files, accepted, "application/dicom")
        if resource.view == "frames":
            return send_parts(iter(frame_parts(instances[0], resource.frames, accepted)), accepted, "")
        shown = picture(instances[(len(instances) - 1) // 2], resource, dict(request.query_params), accepted)
        return Response(shown.content, media_type=shown.media_type)
    except NotAcceptableError as error:
        raise HTTPException(406, str(error)) from error


def named_instances(index: DicomIndex, resource: Resource) -> list[Instance]:
    """The instances that an address names.

    Raises:
        NotFoundError: if there are none.
    """
    if resource.sop:
        instance = index.instance(resource.sop, resource.study, resource.series)
        instances = [instance] if instance else []
    else:
        instances = index.instances(resource.study, resource.series)
    if not instances:
        uids = (resource.study, resource.series, resource.sop)
        raise NotFoundError("instance below", "/".join(filter(None, uids)))
    return instances


def send_parts(parts: Iterator[Part], accepted: Sequence[MediaType], related: str) -> Response:
    """Parts as ``multipart/related``; a single part without it for a client that accepts only that.

    The first part is made before the response begins, so that an error has the right status.
    """
    first = next(parts)
    alone = next((entry for entry in accepted if not entry.multipart), None)
    wants_multipart = any(entry.multipart or entry.name == "*/*" for entry in accepted)
    if alone and not wants_multipart:
        return Response(first.content, media_type=first.media_type)
    boundary = secrets.token_hex(16)
    kind = related or first.media_type.split(";")[0]
    body = in_blocks(multipart(itertools.chain([first], parts), boundary))
    return StreamingResponse(body, media_type=f'multipart/related; type="{kind}"; boundary={boundary}')


def in_blocks(pieces: Iterator[bytes], least_bytes: int = MIB) -> Iterator[bytes]:
    """The same bytes in fewer blocks, since each is fetched from a thread, for which a busy server has to wait."""
    block = bytearray()
    for piece in pieces:
        block += piece
        if len(block) >= least_bytes:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def root_of(request: Request) -> str:
    """This server's DICOMweb root as the client sees it."""
    return f"{str(request.base_url).rstrip('/')}/dicom-web"


def forward(request: Request, source: RemoteSource, address: str, resource: Resource, path: str) -> Response:
    """Send the request to the PACS at ``address``, with the client's query; the response is streamed.

    Raises:
        UpstreamError: if the PACS does not respond.
    """
    # by the view and not by the path: OHIF requests metadata at the path of queries
    qido, wado = stock_settings.MONAI_LABEL_QIDO_PREFIX, stock_settings.MONAI_LABEL_WADO_PREFIX
    prefix = qido if resource.view == "query" else wado
    user, password = stock_settings.MONAI_LABEL_DICOMWEB_USERNAME, stock_settings.MONAI_LABEL_DICOMWEB_PASSWORD
    response = source.ask(
        lambda: requests.get(
            "/".join(filter(None, [address.rstrip("/"), prefix, path.removesuffix("/")])),
            params=request.url.query,
            headers={name: request.headers[name] for name in KEPT_HEADERS if name in request.headers},
            auth=(user, password) if user and password else None,
            timeout=(CONNECT_SECONDS, seconds_for(resource)),
            allow_redirects=False,
            stream=True,
        )
    )
    kept = {name: response.headers[name] for name in RETURNED_HEADERS if name in response.headers}
    return StreamingResponse(_blocks(response), response.status_code, kept)


def seconds_for(resource: Resource) -> float:
    """Timeout of the PACS: the response to a query begins soon or never. A setting of MONAI Label limits both."""
    seconds = QUERY_SECONDS if resource.view == "query" else TRANSFER_SECONDS
    return min(seconds, float(stock_settings.MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT))


def _blocks(response: requests.Response) -> Iterator[bytes]:
    with response:
        yield from response.iter_content(BLOCK_BYTES)


async def store_instances(request: Request, segmentations: Segmentations, user: User, path: str) -> Response:
    """Store the instances of a request one by one; the body is never in memory as a whole.

    Raises:
        ParameterError: if the request is not valid STOW-RS.
    """
    resource = parse_path(path)
    is_study = resource.view == "instances" and not resource.series
    if not is_study and path.strip("/") != "studies":
        raise HTTPException(405, headers={"Allow": "GET"})
    async with temporary_folder_beside_loop() as folder:
        files = await receive_parts(request, folder)
        return await anyio.to_thread.run_sync(lambda: store_files(request, segmentations, user, resource.study, files))


async def receive_parts(request: Request, folder: Path) -> list[Path]:
    """Write the parts of a body to files while it arrives; after an error, the rest is read and discarded.

    A client that is still sending when its connection closes would not receive the error.

    Raises:
        ParameterError: if the body is not ``multipart/related``, or is cut off.
    """
    stream = request.stream()
    try:
        writer = PartWriter(request.headers.get("content-type", ""), folder)
        try:
            async for block in _joined(stream):
                await anyio.to_thread.run_sync(writer.write, block)
            return await anyio.to_thread.run_sync(writer.finish)
        finally:
            writer.abandon()
    except (ParameterError, OSError):
        async for _ in stream:
            pass
        raise


async def _joined(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The blocks of a body joined to larger ones, so that fewer are passed to a thread."""
    joined = bytearray()
    async for block in stream:
        joined += block
        if len(joined) >= BLOCK_BYTES:
            yield bytes(joined)
            joined.clear()
    yield bytes(joined)


def store_files(
    request: Request, segmentations: Segmentations, user: User, study: str, files: Sequence[Path]
) -> Response:
    """Store instances, which are read one after the other.

    Raises:
        ParameterError: if one of them is not DICOM.
    """
    outcomes = [store_one(segmentations, user, read_part(file), study, root_of(request)) for file in files]
    status, payload = answer(outcomes)
    return Response(dump(payload), status, media_type=DICOM_JSON)


def store_one(segmentations: Segmentations, user: User, instance: FileDataset, study: str, root: str) -> Outcome:
    """Store an instance; an error is reported in its outcome and does not affect the others."""
    names = str(instance.SOPClassUID), str(instance.SOPInstanceUID)
    if study and str(instance.StudyInstanceUID) != study:
        return Outcome(*names, failure=OTHER_STUDY, sentence=f"instance is of study {instance.StudyInstanceUID}")
    try:
        if is_segmentation(instance):
            segmentations.submit(user, instance)
        else:
            segmentations.series.source.keep_instance(instance)
    except (InputError, NotFoundError, StorageError, TooLargeError, UpstreamError) as error:
        logger.info("instance %s of %s is not stored: %s", names[1], user.name, error)
        return Outcome(*names, failure=REFUSED, sentence=str(error))
    place = f"studies/{instance.StudyInstanceUID}/series/{instance.SeriesInstanceUID}/instances/{names[1]}"
    return Outcome(*names, address=f"{root}/{place}")
