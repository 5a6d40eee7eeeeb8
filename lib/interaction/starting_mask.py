"""The mask that a correction starts from: the automatic one, or one from a file (what a viewer sent, a saved version).

Clicks on one image come one after the other, all on the same starting mask: it is kept as it is needed, unpacked and
with the box of each label.
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
from lib.interaction.merge import Part, around
from lib.transforms.postprocess import find_boxes
from lib.transforms.volume import Affine, Grid, least_apart_mm, read_volume

LabelArray = npt.NDArray[np.uint8]
MIB = 1 << 20
HIGHEST_VALUE = 65535
KEPT_MIB = 192
"""For starting masks in memory: three of a CT of 512x512x200 voxels."""


@dataclass(frozen=True)
class StartingMask:
    """A mask that clicks correct, and that nobody writes into.

    Attributes:
        labels: shape (X, Y, Z).
        affine_ras: 4x4, voxel indices to millimetres in RAS.
        origin: where it is from, in the answer's words.
        boxes: of each value from 1 on; None for one that has no voxel.
    """

    labels: LabelArray
    affine_ras: Affine
    origin: str
    boxes: tuple[Part | None, ...]

    @classmethod
    def of(cls, labels: LabelArray, affine_ras: Affine, origin: str, highest: int) -> StartingMask:
        """A mask of values up to ``highest``."""
        return cls(labels, affine_ras, origin, tuple(find_boxes(labels, highest)))

    def boxes_with(self, part: Part | None, values: tuple[int, ...]) -> list[Part | None]:
        """The boxes after a change of ``values`` inside of a part of the image."""
        boxes = list(self.boxes)
        for value in values if part is not None else ():
            known = boxes[value - 1]
            boxes[value - 1] = around([box for box in (known, part) if box is not None])
        return boxes

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""
        return int(self.labels.nbytes)


class StartingMasks:
    """Starting masks by what they are made of; those used longest ago leave first.

    Args:
        limit_mib: memory that they may take; 0 keeps none.
    """

    def __init__(self, limit_mib: int = KEPT_MIB) -> None:
        size: Callable[[StartingMask], int] = attrgetter("size_bytes")
        self._kept: LRUCache[Hashable, StartingMask] = LRUCache(limit_mib * MIB, getsizeof=size)
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], StartingMask]) -> StartingMask:
        """The mask of that key; made where it is not kept, and kept where it fits."""
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
        """Memory that all of them take."""
        return int(self._kept.currsize)


def names_of(label_info: Any) -> dict[int, str]:
    """Value to name, of ``label_info`` as viewers send it: a list of a name and its ``id`` or ``idx``.

    Raises:
        ParameterError: when it is not such a list, or two names have one value.
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
    """The whole numbers of a mask file, shape (X, Y, Z), in Fortran's order.

    Raises:
        LabelError: when it cannot be read, is not on the image's grid, or holds other numbers.
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
    """A mask file in the preset's values; names that the preset does not have are left out.

    Args:
        names: value to name; None: the file has the preset's own values.

    Raises:
        LabelError: as :func:`read_values`, and for values above the preset's where nothing names them.
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
    """``table[values]`` for a mask, most of which is background: to look up every voxel takes ten times as long."""
    looked_up = np.zeros(values.shape, dtype=np.uint8, order="F")
    for z in range(values.shape[2]):
        drawn = values[..., z] > 0
        looked_up[..., z][drawn] = table[values[..., z][drawn]]
    return looked_up
