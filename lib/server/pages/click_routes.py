"""Clicks on the slices of a case page: they correct its mask, which is shown and can be saved as a version."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio.to_thread
import nibabel as nib
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from lib.datastore.records import FINAL
from lib.errors import ParameterError
from lib.server.http.auth import AsAnnotator
from lib.server.http.names import check_image_known
from lib.server.labels.submissions import submit_label
from lib.server.pages.case_routes import Gallery, gallery_of, take_turned
from lib.server.pages.case_view import edit_model_for, stack_of
from lib.server.pages.sign_in import PageUser
from lib.server.pages.slices import AXES, Plane
from lib.server.services import Parts, Services
from lib.server.work.prefetch import PrefetchKey
from lib.transforms.volume import Grid, read_grid

router = APIRouter(prefix="/case", include_in_schema=False)

CLIENT = "page"
MOST_CLICKS = 200


class Click(BaseModel):
    """A click on a picture.

    Attributes:
        plane, index: the slice.
        across, down: where on the picture, from 0 (left, top) to 1.
        label: whose voxels it is about.
        kind: whether the place belongs to the label or not.
    """

    model_config = ConfigDict(extra="forbid")

    plane: Plane
    index: Annotated[int, Field(ge=0, le=100_000)]
    across: Annotated[float, Field(ge=0, lt=1)]
    down: Annotated[float, Field(ge=0, lt=1)]
    label: Annotated[str, Field(max_length=64)]
    kind: Literal["add", "remove"] = "add"


class Clicks(BaseModel):
    """All clicks so far, and the version that they correct; without one, the automatic mask, or nothing."""

    model_config = ConfigDict(extra="forbid")

    clicks: Annotated[list[Click], Field(min_length=1, max_length=MOST_CLICKS)]
    start: Annotated[str, Field(max_length=300)] = ""


@router.post("/{image}/clicks")
async def click(request: Request, parts: Parts, user: PageUser, image: str, asked: Clicks) -> dict[str, str]:
    """Correct the mask, and tell the name of the layer that shows it."""
    gallery = gallery_of(request)
    name = f"edit:{hashlib.sha256(asked.model_dump_json().encode()).hexdigest()[:24]}"
    file, _ = await _corrected(parts, gallery, image, asked)
    mask = await anyio.to_thread.run_sync(lambda: take_turned(file))
    gallery.edits.get((name, image), lambda: mask, lambda array: array.nbytes)
    return {"layer": name}


@router.post("/{image}/clicks/save")
async def save(request: Request, parts: Parts, user: AsAnnotator, image: str, asked: Clicks) -> dict[str, Any]:
    """Keep the corrected mask as the newest version of the case's label."""
    file, preset = await _corrected(parts, gallery_of(request), image, asked)
    info = {"model": preset, "client_id": CLIENT, "prompts_used": len(asked.clicks), "start": asked.start}
    info |= {"label_info": [{"name": n, "idx": v} for n, v in parts.presets[preset].label_indices.items()]}

    def keep() -> dict[str, Any]:
        try:
            return submit_label(parts, image, file, FINAL, info, user, CLIENT).describe()
        finally:
            file.unlink(missing_ok=True)

    return await anyio.to_thread.run_sync(keep)


async def _corrected(parts: Services, gallery: Gallery, image: str, asked: Clicks) -> tuple[Path, str]:
    """The corrected mask as a file, to be removed by the caller, and its preset."""
    path = await anyio.to_thread.run_sync(lambda: parts.image_file(check_image_known(parts.datastore, image)))
    newest = parts.store.history.latest(image)
    preset = edit_model_for(parts, image, newest)
    if not preset:
        raise ParameterError("image", image, "an image of a modality that one of the models is for")
    stack = await anyio.to_thread.run_sync(lambda: stack_of(gallery.volumes, path))
    grid = await anyio.to_thread.run_sync(lambda: read_grid(path))
    params: dict[str, Any] = {"image": str(path), "result_extension": ".nii", "all_labels": True}
    params |= _prompts(asked.clicks, stack.voxels.shape, grid, parts, preset)
    if asked.start:
        version = parts.store.history.get(asked.start)
        if version.image_id != image:
            raise ParameterError("start", asked.start, f"a version of {image}")
        saved = {"file": str(version.file), "label_map": dict(version.label_map), "version_id": version.version_id}
        params["start_from"] = saved
    model = parts.click_model(preset)
    task = parts.infer_task(model)
    task.validate_request(params)
    known = await anyio.to_thread.run_sync(lambda: task.recall(params))
    if known is not None:
        return Path(known[0]), preset
    what, forecast = PrefetchKey(model, image), await anyio.to_thread.run_sync(parts.forecast, model, path)
    async with parts.inferences.slot(what=what, forecast=forecast) as slot:
        made = await slot.run(lambda: task(params))
    return Path(str(made[0])), preset


def _prompts(
    clicks: Sequence[Click], shape: Sequence[int], grid: Grid, parts: Services, preset: str
) -> dict[str, list[list[int]]]:
    """The clicks as points of each label; those that remove are about the background."""
    points: dict[str, list[list[int]]] = {"background": []}
    for one in clicks:
        label = parts.presets[preset].find_label(one.label)
        if label is None:
            raise ParameterError("label", one.label, ", ".join(parts.presets[preset].label_indices))
        voxel = voxel_of(one, shape, grid)
        points.setdefault(label.name if one.kind == "add" else "background", []).append(voxel)
    return points


def voxel_of(one: Click, shape: Sequence[int], grid: Grid) -> list[int]:
    """The voxel of the image's own grid that a click on a picture means.

    Args:
        shape: of the image with its axes to right, anterior and superior, as pictures are cut from it.
        grid: the image's own.
    """
    axis = AXES[one.plane]
    first, second = (other for other in range(3) if other != axis)
    place = [0, 0, 0]
    place[axis] = min(one.index, shape[axis] - 1)
    place[first] = shape[first] - 1 - int(one.across * shape[first])
    place[second] = shape[second] - 1 - int(one.down * shape[second])
    voxel = []
    for own, (turned, flip) in enumerate(nib.io_orientation(grid.affine_ras).astype(int)):
        at = place[turned]
        voxel.append(int(at if flip == 1 else grid.shape[own] - 1 - at))
    return voxel
