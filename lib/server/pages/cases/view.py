"""The content of the case page: an image's slices with prediction, labels and uncertainty, and the history of its
label.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nibabel as nib
import numpy as np
import numpy.typing as npt

from lib.cases.metrics import dice_per_label, mean_known
from lib.configs.preset import Preset
from lib.datastore.records import LabelVersion
from lib.datastore.store import VersionedDatastore
from lib.drawing.contours import hex_color
from lib.errors import InputError, NotFoundError, ParameterError, UnetrError
from lib.infers.task import UnetrInferTask
from lib.server.pages.cases.models import CaseModels, channels_of
from lib.server.pages.cases.slices import PLANES, Plane, Stack, middle_of, reorient
from lib.server.pages.pool_view import ohif_path
from lib.server.pages.titles import Title, titles_of
from lib.server.presented.cases import PresentedCases
from lib.server.tasks import TasksByName
from lib.storage.bounded_cache import BoundedCache
from lib.trainers.task import UnetrTrainTask
from lib.transforms.channels import files_of
from lib.transforms.inputs import read_input
from lib.transforms.intensity_range import range_warning
from lib.transforms.volume import Volume, least_apart_mm, read_grid, read_volume

BYTES_OF_A_FIGURE = 500  # with its key
MOST_AGREEMENTS = 20
"""Number of newest versions whose agreement is computed, each of which requires reading a mask."""


@dataclass(frozen=True)
class PlaneView:
    """A plane of the case: number of slices, and the first one to display."""

    name: Plane
    count: int
    start: int


@dataclass(frozen=True)
class VersionRow:
    """A label version. ``agreement`` is its mean Dice with the version before it."""

    version: LabelVersion
    agreement: float | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.version, name)

    @property
    def restore_path(self) -> str:
        """The path of the request to make it the newest version again."""
        return f"/datastore/label/versions/{quote(self.version.version_id, safe='')}/restore"


@dataclass(frozen=True)
class CaseView:
    """Everything on the page besides the pictures."""

    id: str
    title: Title
    model: str
    model_version: str
    estimate: Mapping[str, float] | None
    ohif: str | None
    colors: Mapping[str, str]
    planes: tuple[PlaneView, ...]
    versions: tuple[VersionRow, ...]
    warning: str = ""
    edit_model: str = ""
    channels: tuple[str, ...] = ()
    edit_labels: tuple[str, ...] = ()


def stack_of(volumes: BoundedCache, path: Path, presets: Iterable[Preset] = (), channel: str = "") -> Stack:
    """Read an image, unless it is cached.

    Args:
        volumes: the cache.
        path: its file or folder.
        presets: the served presets.
        channel: for a case of several sequences, the requested channel; by default the display channel.

    Raises:
        ImageError: if it cannot be read.
        ParameterError: if the case has no such channel.
    """

    def read() -> Stack:
        volume = read_volume(path) if not channel else read_channel(path, presets, channel)
        return Stack.of(volume.voxels, volume.affine_ras)

    return volumes.get(("image", path, stamp_of(path), channel), read, lambda stack: stack.voxels.nbytes)


def read_channel(path: Path, presets: Iterable[Preset], channel: str) -> Volume:
    """One channel of a case, on the grid of the display channel.

    Raises:
        ImageError: if the case cannot be read.
        ParameterError: if it has no such channel.
    """
    preset, names = channels_of(path, presets)
    if preset is None or channel not in names:
        raise ParameterError("channel", channel[:100], ", ".join(names) or "none, since the image is a single one")
    volume = read_input(path, preset)
    place = [one.name for one in preset.channels].index(channel)
    return replace(volume, voxels=volume.channels[place])


def mask_of(volumes: BoundedCache, path: Path, image: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Read a mask and reorient it like its image, whose path is ``image``; ``shape`` is that of the result.

    Raises:
        InputError: if it does not have its image's grid.
    """

    key = ("mask", path, stamp_of(path), image, stamp_of(image))
    return volumes.get(key, lambda: read_mask(path, image, shape), lambda mask: mask.nbytes)


def read_mask(path: Path, image: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Like :func:`mask_of`, without the cache."""
    volume = read_volume(path)
    turned = reorient(volume.voxels.astype(np.uint8), _shown_affine(volume, image)).astype(np.uint8)
    if turned.shape != shape:
        raise InputError(f"mask {path.name!r} has shape {turned.shape}, its image {shape}")
    return turned


def _shown_affine(mask: Volume, image: Path) -> npt.NDArray[np.float64]:
    """The affine by which a mask is reoriented: its image's, if both match as ITK or as nibabel reads them."""
    if image.is_dir():
        return mask.affine_ras
    grid = read_grid(image)
    near = mask.voxels.shape == grid.shape and least_apart_mm(mask.grid, grid) <= grid.tolerance_mm
    return grid.affine_ras if near else mask.affine_ras


def stamp_of(path: Path) -> tuple[tuple[int, int], ...]:
    """A value that changes with the file, or with another file of its case.

    Raises:
        NotFoundError: if one of them is gone, such as that of an image that is being removed.
    """
    try:
        return tuple((status.st_mtime_ns, status.st_size) for status in map(Path.stat, files_of(path)))
    except FileNotFoundError as error:
        raise NotFoundError("file of the image", path.name) from error


@dataclass(frozen=True)
class CaseViews:
    """Composes the content of the pages of images.

    Args:
        store: images, and labels with all their versions.
        models: chooses the model of an image.
        trainers: the training task of each model, which knows the live version.
        presented: files as series.
    """

    store: VersionedDatastore
    models: CaseModels
    trainers: TasksByName[UnetrTrainTask]
    presented: PresentedCases

    def of(self, image: str, volumes: BoundedCache) -> CaseView:
        """The content of an image's page; its volumes are cached in ``volumes``."""
        path, presets = self.models.images.file(image), self.models.presets
        versions = list(reversed(self.store.history.versions(image)))
        newest = versions[0] if versions else None
        stack = stack_of(volumes, path)
        shape = stack.voxels.shape
        history = self.store.history
        shown = None if newest is None else _or_none(lambda: mask_of(volumes, history.mask(newest), path, shape))
        agreements = _agreements(volumes, versions[: MOST_AGREEMENTS + 1], path, shape)
        model = self.models.for_prediction(image, newest)
        preset: Preset | None = presets.get(model) or (presets.get(newest.preset) if newest else None)
        edit_model = self.models.for_clicks(image, newest)
        return CaseView(
            id=image,
            title=titles_of(self.store, [image])[image],
            model=model,
            model_version=self.trainers.find(model).serving()[0] if model else "",
            estimate=estimate_of(self.models.automatic.find(model), path) if model else None,
            ohif=ohif_path(self.store, self.presented, image),
            colors={} if preset is None else {label.name: hex_color(label.color) for label in preset.labels},
            planes=tuple(_plane(stack, plane, shown) for plane in PLANES),
            versions=tuple(
                VersionRow(version, agreement) for version, agreement in itertools.zip_longest(versions, agreements)
            ),
            warning="" if preset is None else range_warning(stack.voxels, preset.modality),
            edit_model=edit_model,
            edit_labels=tuple(presets[edit_model].label_indices) if edit_model else (),
            channels=channels_of(path, presets.values())[1],
        )


def estimate_of(task: UnetrInferTask, path: Path) -> Mapping[str, float] | None:
    """The prediction's expected Dice and its error, if the prediction is cached and its weights are calibrated."""
    answer = task.kept(task.parse({"image": str(path)}))
    return None if answer is None else answer.payload.get("quality")


def _plane(stack: Stack, plane: Plane, mask: npt.NDArray[np.uint8] | None) -> PlaneView:
    middle = middle_of(mask, plane) if mask is not None else None
    return PlaneView(plane, stack.count(plane), stack.count(plane) // 2 if middle is None else middle)


def _agreements(
    volumes: BoundedCache, versions: Sequence[LabelVersion], image: Path, shape: tuple[int, ...]
) -> list[float | None]:
    """Mean Dice between each version and the next one, newest first.

    The scores are cached, but the masks are not, since a case with many versions would fill the cache of pictures.
    """
    read = lru_cache(maxsize=2)(lambda file: _or_none(lambda: read_mask(file, image, shape)))

    def agree(newer: LabelVersion, older: LabelVersion) -> float | None:
        masks = read(newer.file), read(older.file)
        if masks[0] is None or masks[1] is None:
            return None
        mean = mean_known(dice_per_label(masks[0], masks[1], dict(newer.label_map)).values())
        return None if np.isnan(mean) else mean

    return [
        volumes.get(
            ("agreement", newer.version_id, older.version_id, image, stamp_of(image)),
            lambda newer=newer, older=older: agree(newer, older),  # type: ignore[misc]
            lambda _: BYTES_OF_A_FIGURE,
        )
        for newer, older in itertools.pairwise(versions)
    ]


def _or_none(read: Callable[[], npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8] | None:
    """A version's mask; None if its file is missing or damaged, so that the rest of the page can be displayed."""
    try:
        return read()
    except (UnetrError, OSError):
        return None


def as_mask(path: Path, dtype: type = np.uint8) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.float64]]:
    """Voxels and affine of a NIfTI file that this server has just written."""
    image = nib.load(path)
    return np.asarray(image.dataobj).astype(dtype), image.affine
