"""``POST /infer/{model}``: segment an image of the studies, an uploaded file or a session's image."""

from __future__ import annotations

import io
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, File, Form, Request, Response, UploadFile
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.utils.others.generic import get_mime_type

from lib.dicom.segmentation_writer import Origin
from lib.errors import CheckpointError, ModelNotReadyError, ParameterError
from lib.infers.devices.lane import ALL
from lib.infers.devices.schedule import Forecast
from lib.infers.writer import EXTENSIONS, write_mask
from lib.networks.precision import resolve_device
from lib.server.http.auth import AsUser, Role, User
from lib.server.http.errors import ForbiddenError
from lib.server.http.parameters import parse_object
from lib.server.http.uploads import check_header, receive, temporary_folder
from lib.server.labels.segmentations import mask_as_segmentation, series_store
from lib.server.labels.submissions import keep_prediction, tag_for_prediction
from lib.server.routes.sessions import session_image
from lib.server.services import Parts, Services
from lib.server.work.modality import warnings_for
from lib.server.work.prefetch import PrefetchKey
from lib.transforms.volume import read_volume

logger = logging.getLogger("unetr.server")
router = APIRouter(prefix="/infer", tags=["Infer"])

INTERACTIVE = (InferType.DEEPEDIT, InferType.DEEPGROW, InferType.SCRIBBLES)
WARNINGS_HEADER = "X-Warnings"
"""Percent-encoded, for clients that ask for the mask alone; others find ``warnings`` in ``params``."""
# What a client may not set through ``params``: they say which file is read.
NOT_FROM_PARAMS = (
    "model", "image", "label", "session", "file", "description", "label_file", "label_name", "start_from"
)  # fmt: skip


class Output(str, Enum):
    """Which parts of the answer the client wants."""

    image = "image"
    json = "json"
    all = "all"
    dicom_seg = "dicom_seg"


@dataclass(frozen=True)
class Asked:
    """A request that has been checked. Exactly one of ``image_id``, ``upload`` and ``file`` says what to segment."""

    model: str
    image_id: str | None
    upload: UploadFile | None
    file: Path | None
    label: UploadFile | None
    params: Mapping[str, Any]
    output: Output
    on_series: bool = False

    @property
    def saves_label(self) -> bool:
        """Whether the mask is to be kept as the image's label."""
        return self.image_id is not None and str(self.params.get("save_label", "false")).lower() in ("true", "1")


@dataclass(frozen=True)
class Answer:
    """A mask, as bytes, and the JSON that goes with it."""

    name: str
    content: bytes
    params: dict[str, Any]


@router.post("/{model}", summary="Segment an image")
async def infer(
    request: Request,
    parts: Parts,
    user: AsUser,
    model: str,
    image: str = "",
    session_id: str = "",
    params: Annotated[str, Form()] = "{}",
    file: Annotated[UploadFile | None, File()] = None,
    label: Annotated[UploadFile | None, File()] = None,
    output: Output = Output.all,
) -> Response:
    """Answer with ``multipart/form-data`` of ``params`` (JSON) and ``image`` (the mask), or only one of them."""
    given = parse_object(params)
    # in a thread: a series may have to be fetched from a PACS, and nobody else waits for that
    asked = await anyio.to_thread.run_sync(
        lambda: check(parts, user, model, image, session_id, given, file, label, output)
    )
    ready = await anyio.to_thread.run_sync(lambda: recall(parts, asked, user))
    if ready is not None:
        return respond(ready, output)
    what = PrefetchKey(asked.model, str(asked.image_id or asked.file))
    forecast = await anyio.to_thread.run_sync(lambda: forecast_of(parts, asked))
    async with parts.inferences.slot(device_of(asked.params), what, forecast) as slot:
        if await request.is_disconnected():
            logger.info("the client left while it waited for %s", model)
            return Response(status_code=499)
        answer = await slot.run(lambda: run(parts, asked, user))
    return respond(answer, output)


def check(
    parts: Services,
    user: User,
    model: str,
    image: str,
    session_id: str,
    params: dict[str, Any],
    file: UploadFile | None,
    label: UploadFile | None,
    output: Output,
) -> Asked:
    """Check everything that can be checked without reading the image, so that bad requests do not wait.

    Raises:
        NotFoundError: for a model, image or session that there is not.
        ParameterError: for a parameter that is not valid, or when nothing says what to segment.
    """
    task = parts.infer_task(model)
    image_id, stored = None, None
    if session_id:
        stored, file = session_image(parts.sessions, session_id), None
    elif file is None:
        image_id = choose_image(parts, image, params)
    kept = {key: value for key, value in params.items() if key not in NOT_FROM_PARAMS}
    asked_for = str(params.get("image") or image)
    on_series = image_id is not None and parts.presented.case_of(asked_for) is not None
    if on_series:
        kept = parts.presented.on_file(str(image_id), kept)
    if takes_prompts(task):
        kept["label_name"] = params.get("label")
        if str(params.get("save_label", "false")).lower() in ("true", "1"):
            kept["all_labels"] = True  # what is saved is a mask of all labels
    asked = Asked(model, image_id, file, stored, label, kept, output, on_series)
    # the name stands in for the file, whose kind the default of result_extension follows
    task.validate_request({**kept, "image": image_id or "image.nii.gz"})
    if asked.saves_label:
        if user.role < Role.ANNOTATOR:
            raise ForbiddenError("save_label needs the role annotator")
        tag = tag_for_prediction(user, params)
        parts.store.history.check_replaceable(str(image_id), tag)
    if output is Output.dicom_seg:
        check_dicom_seg(parts, image_id)
    return asked


def choose_image(parts: Services, image: str, params: Mapping[str, Any]) -> str:
    """The image's id; one inside ``params`` counts too, as in MONAI Label, but it must be an id as well.

    Raises:
        ParameterError: when there is none.
        NotFoundError, ForbiddenError: when it is not an image of the studies.
    """
    wanted = params.get("image") or image
    if not isinstance(wanted, str) or not wanted:
        raise ParameterError("image", wanted, "an image id, or else a session_id or an uploaded part 'file'")
    parts.image_file(wanted)
    return parts.known_id(wanted)


def check_dicom_seg(parts: Services, image_id: str | None) -> None:
    """Refuse a DICOM SEG where there is no DICOM to refer to.

    Raises:
        ParameterError: saying what would be valid.
    """
    shown = image_id is not None and bool(parts.presented.attributes(image_id))
    if image_id is None or not (shown or series_store(parts).is_series(image_id)):
        raise ParameterError("output", "dicom_seg", "image, json or all, since the image is no DICOM series")


def device_of(params: Mapping[str, Any]) -> str:
    """The device that a request names; ``all`` where it names none."""
    device = params.get("device")
    device = device[0] if isinstance(device, list) and device else device
    return str(resolve_device(str(device))) if device and device != ALL else ALL


def forecast_of(parts: Services, asked: Asked) -> Forecast:
    """What a request needs, where there are several devices to choose from."""
    image = asked.file
    if image is None and asked.image_id is not None:
        image = parts.image_file(asked.image_id)
    return parts.forecast(asked.model, image)


def recall(parts: Services, asked: Asked, user: User) -> Answer | None:
    """The answer, where it is ready: it takes no slot of a device.

    Raises:
        NotFoundError, ForbiddenError: when the image is gone, or outside of what may be read.
    """
    if asked.upload is not None or asked.label is not None:
        return None
    image = asked.file if asked.file is not None else parts.image_file(str(asked.image_id))
    found = parts.infer_task(asked.model).recall(
        {**asked.params, "image": str(image), **start_from(parts, asked, user)}
    )
    return None if found is None else finish(parts, asked, user, Path(found[0]), found[1])


def run(parts: Services, asked: Asked, user: User) -> Answer:
    """Segment, in the thread of the device. No file is left behind, whatever happens.

    Raises:
        ImageError: when the image cannot be segmented.
        ModelNotReadyError: when there are no weights, or none that can be used.
    """
    with temporary_folder() as folder:
        files = input_files(parts, asked, folder) | start_from(parts, asked, user)
        request = {**asked.params, "model": asked.model, **files, "save_label": False}
        try:
            result = parts.instance.infer(request)
        except CheckpointError as error:
            parts.metrics.count_failure(asked.model, error)
            raise ModelNotReadyError(f"the weights of {asked.model!r} cannot be used: {error}") from error
        except Exception as error:
            parts.metrics.count_failure(asked.model, error)
            raise
        return finish(parts, asked, user, Path(result["file"]), result["params"])


def finish(parts: Services, asked: Asked, user: User, mask: Path, params: dict[str, Any]) -> Answer:
    """Count an answer, take it into memory, and remove its file."""
    hit = bool(params["cache"]["hit"])
    parts.metrics.count_ready(asked.model, hit)
    if not hit:
        parts.metrics.count_inference(asked.model, params["latencies_ms"])
    try:
        return keep(parts, asked, user, mask, params)
    finally:
        mask.unlink(missing_ok=True)


def keep(parts: Services, asked: Asked, user: User, mask: Path, params: dict[str, Any]) -> Answer:
    """Take the mask into memory, remember who was given it, and save it as a label where that is asked for."""
    content = mask.read_bytes()
    if asked.image_id is not None:
        client, model = user.client(asked.params.get("client_id")), params["model"]
        if takes_prompts(parts.infer_task(asked.model)):
            # what a label is held against stays the automatic mask
            parts.store.effort.count_prompt(asked.image_id, client)
        else:
            name, version = model["preset"], model["version"]
            engine = str(params["engine"])
            parts.store.predictions.remember(client, asked.image_id, name, version, mask.name, content, engine)
        parts.store.leases.renew(client)
    if asked.image_id is not None and asked.saves_label:
        tag = tag_for_prediction(user, asked.params)
        info = {"model": asked.model, "params": params}
        client_id = str(asked.params.get("client_id") or "")
        keep_prediction(parts, asked.image_id, mask, tag, info, user, client_id)
    warnings = [*warnings_for(parts.presets, parts.datastore, asked.model, asked.image_id), *params.get("warnings", [])]
    params = {**params, "warnings": warnings}
    if asked.on_series and asked.output is not Output.dicom_seg:
        content = as_shown(parts, asked, mask)
    if asked.output is not Output.dicom_seg:
        return Answer(mask.name, content, params)
    # PyTorch and OpenVINO may differ in single voxels: the mask says which of them made it
    origin = Origin("AUTOMATIC", f"{params['model']['version']} ({params['engine']})")
    preset = parts.infer_task(asked.model).preset
    seg = mask_as_segmentation(parts, str(asked.image_id), mask, preset, origin, as_presented=asked.on_series)
    packed = io.BytesIO()
    seg.save_as(packed, write_like_original=False)
    return Answer(f"{asked.image_id}.dcm", packed.getvalue(), params)


def as_shown(parts: Services, asked: Asked, mask: Path) -> bytes:
    """The mask on the grid of the series that presents its image, as a viewer orders its voxels."""
    labels = np.rint(read_volume(mask).voxels).astype(np.uint8)
    shown = parts.presented.on_series(str(asked.image_id), labels)
    suffix = max((end for end in EXTENSIONS if mask.name.endswith(end)), key=len)
    preset = parts.infer_task(asked.model).preset
    dtype = str(asked.params.get("result_dtype") or "uint8")
    file = write_mask(shown.voxels, shown.affine_ras, preset, suffix, dtype, bool(asked.params.get("result_compress")))  # type: ignore[arg-type]
    try:
        return file.read_bytes()
    finally:
        file.unlink(missing_ok=True)


def respond(answer: Answer, output: Output) -> Response:
    """The answer in the form that MONAI Label's clients read."""
    told = {WARNINGS_HEADER: quote("; ".join(answer.params["warnings"]))} if answer.params["warnings"] else {}
    if output is Output.json:
        return Response(json.dumps(answer.params), media_type="application/json", headers=told)
    if output is Output.all:
        content, boundary = encode_multipart(answer)
        return Response(content, media_type=f"multipart/form-data; boundary={boundary}", headers=told)
    mime = "application/dicom" if output is Output.dicom_seg else get_mime_type(answer.name)
    attachment = {"Content-Disposition": f'attachment; filename="{answer.name}"'}
    return Response(answer.content, media_type=mime, headers={**attachment, **told})


def input_files(parts: Services, asked: Asked, folder: Path) -> dict[str, Any]:
    """The paths that the task reads, uploads copied into ``folder``."""
    files: dict[str, Any] = {}
    if asked.upload is not None:
        uploaded = receive(asked.upload, folder)
        check_header(uploaded, parts.settings.unpacked_limit_mib)
        files["image"] = str(uploaded)
    elif asked.file is not None:
        files["image"] = str(asked.file)
    else:
        files["image"] = str(parts.image_file(str(asked.image_id)))
    if asked.label is not None:
        inside = folder / "label"
        inside.mkdir()
        label = receive(asked.label, inside, "label.nii.gz")
        check_header(label, parts.settings.unpacked_limit_mib)
        if asked.on_series:
            label = parts.presented.label_on_file(str(asked.image_id), label, inside)
        files["label_file" if takes_prompts(parts.infer_task(asked.model)) else "label"] = str(label)
    return files


def takes_prompts(task: object) -> bool:
    """Whether a task corrects a mask by clicks or scribbles."""
    return getattr(task, "type", None) in INTERACTIVE


def start_from(parts: Services, asked: Asked, user: User) -> dict[str, Any]:
    """The newest version that this client saved of the image, for a correction that comes without a mask."""
    if asked.image_id is None or asked.label is not None or not takes_prompts(parts.infer_task(asked.model)):
        return {}
    client, preset = str(asked.params.get("client_id") or ""), parts.infer_task(asked.model).preset
    newest = parts.store.history.latest(asked.image_id)
    own = newest is not None and newest.user == user.name and newest.client_id == client
    if newest is None or not own or newest.preset not in ("", preset.name):
        return {}
    saved = {"file": str(newest.file), "label_map": dict(newest.label_map), "version_id": newest.version_id}
    return {"start_from": saved}


def encode_multipart(answer: Answer) -> tuple[bytes, str]:
    """The parts ``params`` and ``image``, in the order and form that MONAI Label's server sends, and the boundary."""
    boundary = secrets.token_hex(16)
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\n'
        f"Content-Type: application/json\r\n\r\n{json.dumps(answer.params)}\r\n"
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{answer.name}"\r\n'
        f"Content-Type: {get_mime_type(answer.name)}\r\n\r\n"
    )
    return head.encode() + answer.content + f"\r\n--{boundary}--\r\n".encode(), boundary
