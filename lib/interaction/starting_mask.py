"""The mask that a correction starts from: the automatic mask, or one from a file (sent by a viewer, or a saved
version).

Successive clicks on one image usually start from the same mask: it is cached uncompressed, with the bounding box of
each label.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from lib.configs.preset import Preset
from lib.errors import ImageError, LabelError, ParameterError
from lib.interaction.merge import Part, enclosing_part
from lib.transforms.postprocess import find_boxes
from lib.transforms.volume import Affine, Grid, least_apart_mm, read_volume

LabelArray = npt.NDArray[np.uint8]
MIB = 1 << 20
HIGHEST_VALUE = 65535
KEPT_MIB = 192
"""Memory for starting masks, which suffices for three masks of a CT of 512x512x200 voxels."""


@dataclass(frozen=True)
class StartingMask:
    """An immutable mask that clicks correct.

    Attributes:
        labels: shape (X, Y, Z).
        affine_ras: 4x4, voxel indices to millimetres in RAS.
        origin: where the mask comes from, as the response names it.
        boxes: bounding box of each value from 1 on; None for a value without voxels.
    """

    labels: LabelArray
    affine_ras: Affine
    origin: str
    boxes: tuple[Part | None, ...]

    @classmethod
    def of(cls, labels: LabelArray, affine_ras: Affine, origin: str, highest: int) -> StartingMask:
        """A starting mask from an array with values up to ``highest``."""
        return cls(labels, affine_ras, origin, tuple(find_boxes(labels, highest)))

    def boxes_with(self, part: Part | None, values: tuple[int, ...]) -> list[Part | None]:
        """The bounding boxes after the labels ``values`` have changed inside a part of the image."""
        boxes = list(self.boxes)
        for value in values if part is not None else ():
            known = boxes[value - 1]
            boxes[value - 1] = enclosing_part([box for box in (known, part) if box is not None])
        return boxes

    @property
    def size_bytes(self) -> int:
        """Bytes of memory that the mask takes."""
        return int(self.labels.nbytes)


class StartingMasks:
    """A cache of starting masks that evicts the least recently used ones.

    Args:
        limit_mib: largest memory of the cache; 0 caches nothing.
    """

    def __init__(self, limit_mib: int = KEPT_MIB) -> None:
        size: Callable[[StartingMask], int] = attrgetter("size_bytes")
        self._kept: LRUCache[Hashable, StartingMask] = LRUCache(limit_mib * MIB, getsizeof=size)
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], StartingMask]) -> StartingMask:
        """The cached mask of a key; otherwise it is made, and cached if it fits."""
        with self._lock:
            known = self._kept.get(key)
        if known is not None:
            return known
        made = make()
        with self._lock:
            if made.size_bytes <= self._kept.maxsize:
                self._kept[key] = made
        return made

    @property
    def size_bytes(self) -> int:
        """Bytes of memory that all masks take."""
        return int(self._kept.currsize)


def names_of(label_info: Any) -> dict[int, str]:
    """Value to name, from ``label_info`` as viewers send it: a list of records with a name and an ``id`` or ``idx``.

    Raises:
        ParameterError: if the list is malformed, or if two names have one value.
    """
    valid = f"a list of {{name, id}}, each with an id of its own from 0 to {HIGHEST_VALUE}"
    if not isinstance(label_info, list):
        raise ParameterError("label_info", str(label_info)[:100], valid)
    names = {}
    for row in label_info:
        value = row.get("id", row.get("idx")) if isinstance(row, dict) else None
        if not isinstance(value, int) or isinstance(value, bool) or not isinstance(row.get("name"), str):
            raise ParameterError("label_info", str(row)[:100], valid)
        if not 0 <= value <= HIGHEST_VALUE or value in names:
            raise ParameterError("label_info", str(row)[:100], valid)
        names[value] = row["name"]
    return names


def read_values(file: Path, grid: Grid, name: str) -> npt.NDArray[np.uint16]:
    """The integer values of a mask file, shape (X, Y, Z), in Fortran order.

    Raises:
        LabelError: if the file cannot be read, has another grid than the image, or holds other values.
    """
    try:
        volume = read_volume(file)
    except ImageError as error:
        raise LabelError(f"{name}: {error}") from error
    if volume.voxels.shape != grid.shape:
        raise LabelError(f"{name} has shape {volume.voxels.shape}; valid: its image's {grid.shape}")
    apart = least_apart_mm(volume.grid, grid)
    if apart > grid.tolerance_mm:
        raise LabelError(f"{name} lies up to {apart:.3g} mm away from its image: their affines differ")
    values = np.empty(grid.shape, dtype=np.uint16, order="F")
    for z in range(grid.shape[2]):
        plane = volume.voxels[..., z]
        whole = np.clip(np.nan_to_num(plane), 0, HIGHEST_VALUE).astype(np.uint16)
        if not np.array_equal(whole, plane):
            raise LabelError(f"{name} has values that are no whole numbers from 0 to {HIGHEST_VALUE}")
        values[..., z] = whole
    return values


def read_mask(file: Path, grid: Grid, preset: Preset, names: Mapping[int, str] | None, name: str) -> LabelArray:
    """Read a mask file with the preset's label values; labels that the preset does not have are left out.

    Args:
        names: value to name; None if the file uses the preset's own values.

    Raises:
        LabelError: as :func:`read_values`, and for a value above those of the preset that has no name.
    """
    values = read_values(file, grid, name)
    highest = int(values.max())
    if names is None and highest > len(preset.labels):
        raise LabelError(f"{name} has the value {highest}; valid: {preset.label_indices}, or label_info that names it")
    table = np.zeros(highest + 1, dtype=np.uint8)
    for value in range(1, highest + 1):
        known = preset.find_label(names[value]) if names is not None and value in names else None
        table[value] = value if names is None else known.index if known is not None else 0
    return _renumbered(values, table)


def _renumbered(values: npt.NDArray[np.uint16], table: LabelArray) -> LabelArray:
    """``table[values]`` for a mask that is mostly background, ten times faster than to look up every voxel."""
    looked_up = np.zeros(values.shape, dtype=np.uint8, order="F")
    for z in range(values.shape[2]):
        drawn = values[..., z] > 0
        looked_up[..., z][drawn] = table[values[..., z][drawn]]
    return looked_up
