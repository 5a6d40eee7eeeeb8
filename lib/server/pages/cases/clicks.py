"""Clicks on the slices of a case page, which correct its mask; the result is displayed and can be saved as a
version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio.to_thread
import nibabel as nib
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from lib.configs.preset import Preset
from lib.datastore.history import LabelHistory
from lib.datastore.records import FINAL, LabelVersion
from lib.errors import ParameterError
from lib.server.dependencies import PicturesDep, SubmissionsDep
from lib.server.http.auth import AsAnnotator
from lib.server.pages.cases.pictures import Pictures, take_turned
from lib.server.pages.cases.slices import AXES, Plane
from lib.server.pages.cases.view import stack_of
from lib.server.pages.sign_in import PageUser
from lib.server.work.prefetch import PrefetchKey
from lib.transforms.volume import Grid, read_grid

router = APIRouter(prefix="/case", include_in_schema=False)

CLIENT = "page"
MOST_CLICKS = 200


class Click(BaseModel):
    """A click on a slice image.

    Attributes:
        plane, index: the slice.
        across, down: position in the image, from 0 (left, top) to 1.
        label: label of the click.
        kind: whether the position belongs to the label.
    """

    model_config = ConfigDict(extra="forbid")

    plane: Plane
    index: Annotated[int, Field(ge=0, le=100_000)]
    across: Annotated[float, Field(ge=0, lt=1)]
    down: Annotated[float, Field(ge=0, lt=1)]
    label: Annotated[str, Field(max_length=64)]
    kind: Literal["add", "remove"] = "add"


class Clicks(BaseModel):
    """All clicks so far, and the version that they correct; without a version, the automatic mask or an empty one."""

    model_config = ConfigDict(extra="forbid")

    clicks: Annotated[list[Click], Field(min_length=1, max_length=MOST_CLICKS)]
    start: Annotated[str, Field(max_length=300)] = ""


@router.post("/{image}/clicks")
async def click(pictures: PicturesDep, user: PageUser, image: str, asked: Clicks) -> dict[str, str]:
    """Correct the mask by clicks; ``layer`` of the response names the images that show the result."""
    name = f"edit:{hashlib.sha256(asked.model_dump_json().encode()).hexdigest()[:24]}"
    file, _ = await corrected(pictures, image, asked)
    mask = await anyio.to_thread.run_sync(take_turned, file)
    pictures.edits.get((name, image), lambda: mask, lambda array: array.nbytes)
    return {"layer": name}


@router.post("/{image}/clicks/save")
async def save(
    pictures: PicturesDep, submissions: SubmissionsDep, user: AsAnnotator, image: str, asked: Clicks
) -> dict[str, Any]:
    """Save the corrected mask as the newest version of the case's label."""
    file, preset = await corrected(pictures, image, asked)
    info = {"model": preset.name, "client_id": CLIENT, "prompts_used": len(asked.clicks), "start": asked.start}
    info |= {"label_info": [{"name": n, "idx": v} for n, v in preset.label_indices.items()]}

    def keep() -> dict[str, Any]:
        try:
            return submissions.submit(image, file, FINAL, info, user, CLIENT).describe()
        finally:
            file.unlink(missing_ok=True)

    return await anyio.to_thread.run_sync(keep)


async def corrected(pictures: Pictures, image: str, asked: Clicks) -> tuple[Path, Preset]:
    """The corrected mask as a file, which the caller removes, and its preset."""
    models, inferences = pictures.models, pictures.inferences
    path = await anyio.to_thread.run_sync(lambda: models.images.file(models.images.check(image)))
    name = models.for_clicks(image, pictures.history.latest(image))
    if not name:
        raise ParameterError("image", image, "an image of a modality that one of the models is for")
    stack = await anyio.to_thread.run_sync(stack_of, pictures.volumes, path)
    grid = await anyio.to_thread.run_sync(read_grid, path)
    preset = models.presets[name]
    params: dict[str, Any] = {"image": str(path), "result_extension": ".nii", "all_labels": True}
    params |= prompts_of(asked.clicks, stack.voxels.shape, grid, preset)
    model = models.click_model(name)
    task = models.tasks.find(model)
    request = replace(task.parse(params), saved=version_of(pictures.history, image, asked.start))
    known = await anyio.to_thread.run_sync(task.recall, request)
    if known is not None:
        return Path(known[0]), preset
    forecast = await anyio.to_thread.run_sync(inferences.forecast, task, request)
    async with inferences.slot(what=PrefetchKey(model, image), forecast=forecast) as slot:
        made = await slot.run(lambda: task.segment(request))
    return Path(made[0]), preset


def version_of(history: LabelHistory, image: str, version_id: str) -> LabelVersion | None:
    """The version of an image's label from which a correction starts; None if none is named.

    Raises:
        NotFoundError, ParameterError: if there is none with this id, or if it belongs to another image.
    """
    if not version_id:
        return None
    version = history.get(version_id)
    if version.image_id != image:
        raise ParameterError("start", version_id, f"a version of {image}")
    history.mask(version)  # raises if the file has changed
    return version


def prompts_of(clicks: Sequence[Click], shape: Sequence[int], grid: Grid, preset: Preset) -> dict[str, list[list[int]]]:
    """The clicks as points of each label; clicks that remove voxels are points of the background."""
    points: dict[str, list[list[int]]] = {"background": []}
    for one in clicks:
        label = preset.find_label(one.label)
        if label is None:
            raise ParameterError("label", one.label, ", ".join(preset.label_indices))
        voxel = voxel_of(one, shape, grid)
        points.setdefault(label.name if one.kind == "add" else "background", []).append(voxel)
    return points


def voxel_of(one: Click, shape: Sequence[int], grid: Grid) -> list[int]:
    """The voxel of the image's own grid for a click on a slice image.

    Args:
        shape: shape of the image with its axes to right, anterior and superior, from which slices are taken.
        grid: the image's own grid.
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
