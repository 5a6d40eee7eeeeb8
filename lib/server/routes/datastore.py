"""``/datastore/``: images and labels of the studies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Response, UploadFile
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from monailabel.interfaces.datastore import Datastore
from monailabel.utils.others.generic import file_checksum
from starlette.exceptions import HTTPException

from lib.configs.preset import Preset
from lib.datastore.images.folder import ending_of
from lib.datastore.records import FINAL, INFERENCE, LabelVersion
from lib.datastore.store import VersionedDatastore
from lib.errors import ConflictError, FileKindError, ImageError, NotFoundError, ParameterError
from lib.server.dependencies import (
    CheckImageDep,
    DatastoreDep,
    ImageFileDep,
    ImageInspectorDep,
    LeasesDep,
    PresentedDep,
    PresetsDep,
    ReadersDep,
    SettingsDep,
    StoreDep,
    SubmissionsDep,
)
from lib.server.downloads import send_file
from lib.server.http.auth import AsAdmin, AsAnnotator, AsUser, User
from lib.server.http.bodies import LabelParams, described_by
from lib.server.http.names import as_attachment, check_tag, find_label, safe_file_name, safe_new_id
from lib.server.http.parameters import KEPT_BY_SERVER, check_room_for, parse_aside, parse_info
from lib.server.http.uploads import MIB, FormRoute, check_header, receive, temporary_folder
from lib.server.labels.submissions import tag_for_prediction
from lib.server.work.image_checks import inspect_for_any
from lib.server.work.modality import modality_of, models_for
from lib.transforms.channel_search import ENDINGS
from lib.transforms.channels import ChannelSources, read_sources
from lib.transforms.inputs import sources_of

logger = logging.getLogger("unetr.server")
router = APIRouter(prefix="/datastore", tags=["Datastore"], route_class=FormRoute)

# Formats that a folder of studies lists; files of other formats would be stored and never found again.
STORED_SUFFIXES = (".nii.gz", ".nii", ".nrrd")
# Serialises concurrent uploads, so that the second one with an id finds the first.
ADDING = threading.Lock()
CHECKSUMS = ("SHA256", "SHA512", "MD5")
ANSWERED_OF_LABELS = (
    "tag",
    "label_map",
    "missing_labels",
    "voxels_changed",
    "prompts_used",
    "seconds_spent",
    "model_version",
    "sha256",
    "notes",
    "saved_at",
)
"""Fields of the stored version in the response to a submission."""
KEPT_OF_LABELS = (*KEPT_BY_SERVER, *LabelVersion.__dataclass_fields__, "changed_by")
"""Reserved keys of a label's information; values from clients would hide those of the version."""


class Listing(str, Enum):
    """The response of ``GET /datastore/``."""

    train = "train"
    stats = "stats"
    all = "all"


@router.get("/", summary="Figures of the studies, or all images and labels", response_model=None)
def list_datastore(store: DatastoreDep, user: AsUser, output: Listing = Listing.stats) -> JSONResponse:
    """Counts; with ``all`` all information, with ``train`` the pairs for training."""
    listing = store.json() if output is Listing.all else store.datalist() if output is Listing.train else store.status()
    # serialised here, in a thread: FastAPI would do it on the event loop, which takes seconds for ten thousand images
    return JSONResponse(listing)


@router.put("/", summary="Add an image", include_in_schema=False)
@router.put("/image", summary="Add an image")
async def add_image(
    datastore: DatastoreDep,
    presets: PresetsDep,
    settings: SettingsDep,
    readers: ReadersDep,
    user: AsAnnotator,
    file: Annotated[list[UploadFile], File()],
    image: str = "",
    params: Annotated[str, Form()] = "{}",
) -> dict[str, Any]:
    """Add a new image with the given id or its file's name, made safe; the response states the id.

    Several parts ``file`` are the sequences of one case, each named by its channel; they require an id.
    """
    info = parse_info(params, "params") | {"user": user.name}
    limit_mib, served = settings.unpacked_limit_mib, list(presets.values())

    def keep() -> dict[str, Any]:
        if len(file) == 1:
            return store_image(datastore, image, file[0], info, limit_mib, served, readers.reading)
        return store_case(datastore, image, file, info, limit_mib, served, readers.reading)

    return await readers.beside(keep)


@router.delete("/", summary="Remove an image and its labels", include_in_schema=False)
@router.delete("/image", summary="Remove an image and its labels")
def remove_image(datastore: DatastoreDep, check_image: CheckImageDep, user: AsAdmin, id: str) -> dict[str, Any]:
    """Remove an image of the studies."""
    datastore.remove_image(check_image(id))
    logger.info("image %s removed by %s", id, user.name)
    return {}


@router.head("/image", summary="Whether an image is there")
def has_image(
    check_image: CheckImageDep, image_file: ImageFileDep, user: AsUser, image: str, check_sum: str = ""
) -> Response:
    """200 if it exists (and, with ``check_sum`` as ``SHA256:<digest>``, is that file), otherwise 404."""
    path = single_file(image_file(check_image(image)), image)
    if check_sum and not matches(path, check_sum):
        raise NotFoundError("image with that checksum", image)
    return Response()


@router.get("/image", summary="An image's file", response_class=FileResponse)
def get_image(
    check_image: CheckImageDep, image_file: ImageFileDep, user: AsUser, image: str, model: str = "", channel: str = ""
) -> FileResponse:
    """Download an image; with ``model`` and ``channel``, the file of that sequence of a case of several."""
    file = single_file(image_file(check_image(image)), image)
    if not channel:
        return send_file(file)
    files = channels_of(file, image, model).files
    if channel not in files:
        raise NotFoundError("channel", channel, list(files))
    return send_file(single_file(files[channel], image))


@router.get("/image/channels", summary="The sequences of a case")
def list_channels(
    store: StoreDep, check_image: CheckImageDep, image_file: ImageFileDep, user: AsUser, image: str, model: str
) -> dict[str, Any]:
    """The files of a case of several sequences for a model, missing channels, and problems."""
    image = check_image(image)
    stamp, file = store.stamp(image), single_file(image_file(image), image)
    sources = channels_of(file, image, model)
    return {
        "files": {name: ending_of(path.name, ENDINGS) for name, path in sources.files.items()},
        "stacked": sources.stacked,
        "shown": next((name for name, path in sources.files.items() if path == sources.shown), ""),
        "ending": ending_of(file.name, ENDINGS),
        "missing": list(sources.missing),
        "problem": sources.problem,
        "notes": list(sources.notes),
        "stamp": stamp,
    }


def channels_of(file: Path, image: str, model: str) -> ChannelSources:
    """The sequences of the case that a file represents.

    Raises:
        NotFoundError: if it represents none for that model.
    """
    kept = read_sources(file)
    if model not in kept:
        raise NotFoundError(f"case of several sequences of {model!r}", image)
    return kept[model]


@router.get("/problems", summary="Files that are no cases, images that are left out, and images that look odd")
def list_problems(store: StoreDep, inspector: ImageInspectorDep, presets: PresetsDep, user: AsUser) -> dict[str, Any]:
    """``files`` of the folder; ``left_out`` of Next Sample, by model; ``odd``: unusual intensities."""
    return {
        "files": [{"name": problem.name, "reason": problem.reason} for problem in store.problems],
        "left_out": {
            model: {image: check.problem for image, check in inspector.left_out(model).items()} for model in presets
        },
        "odd": {check.image_id: check.warning for check in inspector.warned()},
    }


@router.post("/image/check", summary="Look anew at an image that was left out")
def check_again(
    check_image: CheckImageDep, inspector: ImageInspectorDep, presets: PresetsDep, user: AsAnnotator, image: str
) -> dict[str, Any]:
    """Check the image again for each model: an empty ``problem`` returns it to the pool."""
    image = check_image(image)
    inspector.forget(image)
    checks = [inspector.check(image, preset) for preset in presets.values()]
    return {"image": image, "checks": {c.preset: {"problem": c.problem, "warning": c.warning} for c in checks}}


@router.get("/image/info", summary="What is known of an image")
def get_image_info(
    datastore: DatastoreDep, check_image: CheckImageDep, presets: PresetsDep, user: AsUser, image: str
) -> dict[str, Any]:
    """Information on an image, and the models that are suitable for it."""
    info: dict[str, Any] = datastore.get_image_info(check_image(image))
    return {**info, "models": models_for(presets, [modality_of(datastore, image)])}


@router.put("/image/info", summary="Add to what is known of an image")
def put_image_info(
    datastore: DatastoreDep,
    check_image: CheckImageDep,
    user: AsAnnotator,
    image: str,
    info: Annotated[str, Form()] = "{}",
) -> None:
    """Add information on an image."""
    added, image = parse_info(info) | {"user": user.name}, check_image(image)
    check_room_for(added, datastore.get_image_info(image))
    datastore.update_image_info(image, added)


@router.put("/label", summary="Submit a label")
async def save_label(
    submissions: SubmissionsDep,
    presented: PresentedDep,
    check_image: CheckImageDep,
    leases: LeasesDep,
    readers: ReadersDep,
    user: AsAnnotator,
    image: str,
    label: Annotated[UploadFile, File()],
    params: Annotated[str, Form(json_schema_extra=described_by(LabelParams))] = "{}",
    tag: str = "",
) -> dict[str, Any]:
    """Submit a label for an image, with the tag ``final`` by default.

    The response describes what was stored: the version, the names of its values, and the labels that it does not
    annotate.
    """
    info, tag = await parse_aside(params), check_tag(tag)
    made = info.get("source") == INFERENCE
    if made:  # a model computed it on another machine: treated like the server's own
        tag = tag_for_prediction(user, {"label_tag": tag or FINAL})

    def keep() -> dict[str, Any]:
        case, image_id = presented.case_of(image), check_image(image)
        leases.renew(user.client(info.get("client_id")))
        with temporary_folder() as folder:
            file = receive(label, folder, "label.nii.gz")
            if case is not None:
                check_header(file, submissions.unpacked_limit_mib)
                with readers.reading:
                    file = presented.submitted_on_file(case, file, folder)
            version = submissions.submit(image_id, file, tag, info, user, INFERENCE if made else "rest")
        described = version.describe()
        answered = {name: described[name] for name in ANSWERED_OF_LABELS}
        return {"image": image_id, "label": image_id, "version": version.version_id} | answered

    return await readers.beside(keep)


@router.delete("/label", summary="Remove a label")
def remove_label(datastore: DatastoreDep, user: AsAdmin, id: str, tag: str) -> dict[str, Any]:
    """Remove an image's label."""
    find_label(datastore, id, check_tag(tag))
    datastore.remove_label(id, tag)
    logger.info("label %s of %s removed by %s", tag, id, user.name)
    return {}


@router.head("/label", summary="Whether a label is there")
def check_label(datastore: DatastoreDep, user: AsUser, image: str, tag: str = "") -> Response:
    """200 if it exists, otherwise 404."""
    find_label(datastore, image, check_tag(tag))
    return Response()


@router.get("/label", summary="A label's file", response_class=FileResponse)
def get_label(datastore: DatastoreDep, user: AsUser, label: str, tag: str = "") -> FileResponse:
    """Download a label."""
    return send_file(find_label(datastore, label, check_tag(tag)))


@router.get("/label/info", summary="What is known of a label")
def get_label_info(datastore: DatastoreDep, user: AsUser, label: str, tag: str = "") -> dict[str, Any]:
    """Information on a label."""
    find_label(datastore, label, check_tag(tag))
    info: dict[str, Any] = datastore.get_label_info(label, check_tag(tag))
    return info


@router.put("/label/info", summary="Add to what is known of a label")
def put_label_info(
    datastore: DatastoreDep, user: AsAnnotator, label: str, tag: str = "", info: Annotated[str, Form()] = "{}"
) -> None:
    """Add information on a label."""
    add_label_info(datastore, user, label, tag, info)


@router.put("/updatelabelinfo", include_in_schema=False)
def put_label_info_as_before(
    datastore: DatastoreDep, user: AsAnnotator, label: str, tag: str = "", params: Annotated[str, Form()] = "{}"
) -> None:
    """The same at the path of older clients."""
    add_label_info(datastore, user, label, tag, params)


@router.get(
    "/dataset", summary="All labelled images and their labels as a ZIP archive", response_class=StreamingResponse
)
def get_dataset(datastore: DatastoreDep, user: AsAnnotator, limit_cases: int | None = None) -> StreamingResponse:
    """Download the labelled cases as a ZIP archive."""
    if not datastore.datalist():
        raise HTTPException(404, "there is no labelled case yet")
    archive = Path(datastore.get_dataset_archive(limit_cases))
    headers = as_attachment("dataset.zip")
    return StreamingResponse(read_and_remove(archive), media_type="application/zip", headers=headers)


def store_image(
    datastore: Datastore,
    image_id: str,
    upload: UploadFile,
    info: dict[str, Any],
    limit_mib: int,
    presets: Collection[Preset],
    reading: AbstractContextManager[object],
) -> dict[str, Any]:
    """Add an uploaded image, if it is a valid one.

    Args:
        datastore: the studies.
        image_id: id of the image; if empty, it is derived from the file's name.
        upload: the upload.
        info: information on the image.
        limit_mib: size limit after decompression, in MiB.
        presets: presets of which at least one must be able to segment it.
        reading: lock that is held while it is read.

    Raises:
        ParameterError: for an id that is not a valid name.
        ConflictError: if there is an image with this id.
        ImageError: if it cannot be read, or if no served model can segment it.
    """
    name = safe_file_name(upload.filename, "image")
    suffix = next((end for end in STORED_SUFFIXES if name.lower().endswith(end)), None)
    if suffix is None:
        raise ImageError(
            f"image {name!r} is of a kind that the studies do not hold; valid: {', '.join(STORED_SUFFIXES)}"
        )
    new_id = safe_new_id(image_id or name[: -len(suffix)])
    with temporary_folder() as folder:
        file = receive(upload, folder).rename(folder / f"{name[: -len(suffix)] or 'image'}{suffix}")
        header = check_header(file, limit_mib)
        if header is None:
            raise FileKindError(f"image {name!r} is DICOM; valid here: NIfTI, NRRD")
        file = file.rename(folder / f"image{header.kind.suffix}")  # other programs detect the format by the name
        with reading:
            warnings = inspect_for_any(file, list(presets))
        with ADDING:
            if new_id in datastore.list_images():
                raise ConflictError(f"there is an image {new_id!r} already; remove it first, or choose another id")
            if image_id and image_id != new_id:
                info = {"named": image_id} | info
            return {"image": datastore.add_image(new_id, str(file), info), "warnings": warnings}


def store_case(
    datastore: Datastore,
    image_id: str,
    uploads: Sequence[UploadFile],
    info: dict[str, Any],
    limit_mib: int,
    presets: Collection[Preset],
    reading: AbstractContextManager[object],
) -> dict[str, Any]:
    """Add the uploaded sequences of a case, if a served model can segment them.

    Args:
        datastore: the studies.
        image_id: id of the case.
        uploads: a file for each channel.
        info: information on the case.
        limit_mib: size limit of a file after decompression, in MiB.
        presets: the served presets.
        reading: lock that is held while they are read.

    Raises:
        ParameterError: for an id that is not a valid name, or if no served model takes several sequences.
        ConflictError: if there is an image with this id.
        ImageError: if a file cannot be read or is not a channel, or if a channel is missing or repeated.
    """
    taking = [preset for preset in presets if preset.channels]
    if not taking or not isinstance(datastore, VersionedDatastore):
        raise ParameterError("file", f"{len(uploads)} files", "one file: no served model takes several sequences")
    new_id = safe_new_id(image_id)
    with temporary_folder() as folder:
        place = folder / new_id
        place.mkdir()
        for upload in uploads:
            check_header(receive(upload, place), limit_mib)
        sources = channels_sent(place, taking)
        with reading:
            warnings = inspect_for_any(place, taking)
        with ADDING:
            if new_id in datastore.list_images():
                raise ConflictError(f"there is an image {new_id!r} already; remove it first, or choose another id")
            return {"image": datastore.add_case(new_id, sources.files, info), "warnings": warnings}


def channels_sent(folder: Path, presets: Sequence[Preset]) -> ChannelSources:
    """The uploaded file of each channel, for the first preset that has all of these channels.

    Raises:
        ImageError: if there is no such preset.
    """
    problems = []
    for preset in presets:
        try:
            sources = sources_of(folder, preset)
            sources.check()
            if others := sorted({path.name for path in folder.iterdir()} - {p.name for p in sources.files.values()}):
                raise ImageError(f"case {folder.name!r} has files that are no channel of {preset.name!r}: {others}")
            return sources
        except ImageError as error:
            problems.append(error)
    raise problems[0]


def add_label_info(datastore: Datastore, user: User, label: str, tag: str, info: str) -> None:
    """Add information on a label.

    Raises:
        NotFoundError, ParameterError: for a label that does not exist, invalid JSON, and reserved keys.
    """
    find_label(datastore, label, check_tag(tag))
    added = parse_info(info, kept=KEPT_OF_LABELS)
    check_room_for(added, datastore.get_label_info(label, check_tag(tag)))
    datastore.update_label_info(label, check_tag(tag), added | {"changed_by": user.name})


def single_file(path: Path, image: str) -> Path:
    """The file of an image that is a single file.

    Raises:
        NotFoundError: if it is a folder.
    """
    if not path.is_file():
        raise NotFoundError("single file of image", image)
    return path


def matches(path: Path, check_sum: str) -> bool:
    """Whether a file has a checksum, given as ``ALGORITHM:digest`` or a SHA-256 alone.

    Raises:
        ParameterError: for an unknown algorithm.
    """
    algorithm, _, digest = check_sum.rpartition(":")
    algorithm = algorithm or "SHA256"
    if algorithm not in CHECKSUMS:
        raise ParameterError("check_sum", check_sum[:200], f"ALGORITHM:digest, with one of {', '.join(CHECKSUMS)}")
    return bool(file_checksum(str(path), algo=algorithm) == f"{algorithm}:{digest}")


def read_and_remove(path: Path) -> Iterator[bytes]:
    """The blocks of a file, which is removed at the end, or when the client disconnects."""
    try:
        with path.open("rb") as file:
            while block := file.read(MIB):
                yield block
    finally:
        path.unlink(missing_ok=True)
