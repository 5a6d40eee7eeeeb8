"""The mask that a correction starts from, read from a file: a viewer's current one, or a version that was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.configs.preset import Preset
from lib.errors import ImageError, LabelError, ParameterError
from lib.transforms.volume import Grid, least_apart_mm, read_volume

LabelArray = npt.NDArray[np.uint8]


def names_of(label_info: Any) -> dict[int, str]:
    """Value to name, of ``label_info`` as viewers send it: a list of a name and its ``id`` or ``idx``.

    Raises:
        ParameterError: when it is not such a list.
    """
    valid = "a list of {name, id}"
    if not isinstance(label_info, list):
        raise ParameterError("label_info", str(label_info)[:100], valid)
    names = {}
    for row in label_info:
        value = row.get("id", row.get("idx")) if isinstance(row, dict) else None
        if not isinstance(value, int) or isinstance(value, bool) or not isinstance(row.get("name"), str):
            raise ParameterError("label_info", str(row)[:100], valid)
        names[value] = row["name"]
    return names


def read_values(file: Path, grid: Grid, name: str) -> npt.NDArray[np.int64]:
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
    values = np.rint(volume.voxels)
    if (
        not np.isfinite(volume.voxels).all()
        or (values != volume.voxels).any()
        or values.min() < 0
        or values.max() > 65535
    ):
        raise LabelError(f"{name} has values that are no whole numbers from 0")
    return np.asfortranarray(values.astype(np.int64))


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
    return table[values]
