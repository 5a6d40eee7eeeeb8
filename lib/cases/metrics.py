"""Dice, Hausdorff distance and normalised surface distance of label volumes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

LabelArray = npt.NDArray[np.uint8]
Distances = npt.NDArray[np.float64]


def dice_per_label(predicted: LabelArray, reference: LabelArray, indices: Mapping[str, int]) -> dict[str, float]:
    """Dice of each label, NaN where neither volume has it (Dice 1945).

    >>> import numpy as np
    >>> dice_per_label(np.array([1, 1, 0]), np.array([1, 0, 0]), {"a": 1})
    {'a': 0.6666666666666666}
    """
    return {name: _dice(predicted == index, reference == index) for name, index in indices.items()}


def surface_per_label(
    predicted: LabelArray,
    reference: LabelArray,
    indices: Mapping[str, int],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> tuple[dict[str, float], dict[str, float]]:
    """Hausdorff distance and normalised surface distance of each label.

    The results equal those of MONAI's ``compute_hausdorff_distance`` and ``compute_surface_dice``, as a test verifies.
    These functions compute the distances once each and emit a deprecation warning: they take 0.12 s for a sphere of 60
    voxels on one core, whereas one pair of distance transforms for both metrics takes 0.04 s.

    Args:
        predicted: predicted labels, shape (X, Y, Z).
        reference: reference labels, shape (X, Y, Z).
        indices: label names and values.
        spacing_mm: voxel size along the array's axes.
        tolerance_mm: distance up to which a surface element counts as correct.

    Returns:
        HD95, the 95th percentile of the distance in millimetres, the larger of both directions; NaN where one is
        empty. And the normalised surface distance, the share of both surfaces that lies within the tolerance of the
        other (Nikolov et al. 2018, arXiv 1809.04430); 0 where one is empty, NaN where both are.
    """
    hd95, nsd = {}, {}
    for name, index in indices.items():
        distances = _surface_distances(predicted == index, reference == index, spacing_mm)
        hd95[name], nsd[name] = _hd95(distances), _nsd(distances, tolerance_mm)
    return hd95, nsd


def without_missing(
    scores: Mapping[str, float], indices: Mapping[str, int], missing: Iterable[int]
) -> dict[str, float]:
    """The scores, with NaN for labels that the reference does not annotate.

    >>> without_missing({"a": 0.9, "b": 0.0}, {"a": 1, "b": 2}, [2])
    {'a': 0.9, 'b': nan}
    """
    unknown = set(missing)
    return {name: math.nan if indices[name] in unknown else score for name, score in scores.items()}


def mean_known(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def mean_per_label(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over cases of each label's value."""
    return {name: mean_known(row[name] for row in rows) for name in (rows[0] if rows else {})}


def _dice(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else math.nan


def _surface_distances(
    a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_], spacing_mm: Sequence[float]
) -> tuple[Distances, Distances] | None:
    """Distances in millimetres from each surface voxel to the other surface; None if both masks are empty."""
    if not a.any() and not b.any():
        return None
    box = tuple(slice(int(w.min()), int(w.max()) + 1) for w in np.nonzero(a | b))
    # Padding with background gives a mask at the edge of the volume a surface there too.
    surface_a, surface_b = (_surface(np.pad(mask[box], 1)) for mask in (a, b))
    return _distances(surface_a, surface_b, spacing_mm), _distances(surface_b, surface_a, spacing_mm)


def _hd95(distances: tuple[Distances, Distances] | None) -> float:
    if distances is None or not all(d.size and np.isfinite(d).all() for d in distances):
        return math.nan
    return max(float(np.percentile(d, 95)) for d in distances)


def _nsd(distances: tuple[Distances, Distances] | None, tolerance_mm: float) -> float:
    if distances is None:
        return math.nan
    both = np.concatenate(distances)
    return float((both <= tolerance_mm).mean())


def _surface(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Voxels of a mask that share a face with a voxel outside of it."""
    surface: npt.NDArray[np.bool_] = mask & ~ndimage.binary_erosion(mask)
    return surface


def _distances(surface: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_], spacing_mm: Sequence[float]) -> Distances:
    """Distances from the voxels of one surface to the nearest voxel of another; infinite if the other is empty."""
    if not other.any():
        return np.full(int(surface.sum()), np.inf)
    to_other: Distances = ndimage.distance_transform_edt(~other, sampling=spacing_mm)
    return to_other[surface]
