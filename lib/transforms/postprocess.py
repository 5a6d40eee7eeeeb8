"""Restores the network's label volume to the image's own grid, and measures the labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from lib.configs.preset import Preset
from lib.transforms.resample import CHUNK_NUMBERS, interpolate_axis
from lib.transforms.volume import Affine, FloatArray

LabelArray = npt.NDArray[np.uint8]
Box = tuple[slice, ...]
_Sizes = TypeVar("_Sizes", int, npt.NDArray[np.int64])

EDGE_TOLERANCE_VOXELS = 1e-3
# weight of a voxel that lies entirely in one label, when weights are interpolated in eight bits
FULL_WEIGHT = 255
NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)
"""Voxels of a component touch by a face, an edge or a corner."""


@dataclass(frozen=True)
class SecondLabels:
    """The second most likely label of each voxel, from which borders are placed between voxels.

    Attributes:
        labels: shape (X, Y, Z); 0 also where no second label is to count.
        shares: what the most likely label has of :data:`FULL_WEIGHT`, more than half; the second one has the rest.
    """

    labels: LabelArray
    shares: LabelArray


def restore_to_grid(
    labels: LabelArray, affine_labels: Affine, shape: tuple[int, ...], affine_image: Affine
) -> LabelArray:
    """Resample a label volume to another grid by nearest neighbour.

    Orientation, spacing and padding permute, flip and scale axes but never mix them. Each output index along an axis
    then corresponds to one input index, so that three index look-ups replace a resampling of the volume. Only a sheared
    grid, as of a CT with a tilted gantry, needs a resampling.

    Args:
        labels: shape (I, J, K).
        affine_labels: 4x4, from voxel indices of the labels to millimetres in RAS.
        shape: shape of the target grid.
        affine_image: 4x4, from voxel indices of the target grid to millimetres in RAS.

    Returns:
        Labels of shape ``shape``; 0 outside the given volume. The array is in Fortran order, as files store it; the
        smaller of the two volumes is transposed.
    """
    image_to_labels = np.linalg.inv(affine_labels) @ affine_image
    source_axes = _source_axes(image_to_labels)
    if source_axes is None:
        return _resample(labels, image_to_labels, shape)
    axes, positions = _positions(image_to_labels, source_axes, shape)
    lookups = [
        np.rint(position).astype(np.int64).clip(0, labels.shape[axis] - 1)
        for axis, position in zip(axes, positions, strict=True)
    ]
    restored: LabelArray = _turned(labels, axes).numpy()[np.ix_(*lookups)]
    return _without_outside(restored, axes, positions, labels.shape).T


def restore_by_interpolation(
    labels: LabelArray,
    affine_labels: Affine,
    shape: tuple[int, ...],
    affine_image: Affine,
    second: SecondLabels | None = None,
    chunk_numbers: int = CHUNK_NUMBERS,
) -> LabelArray:
    """Resample a label volume to a finer grid with smooth borders.

    Each label's weight (by default 1 inside, 0 outside) is interpolated linearly, and a voxel takes the label of the
    largest one, background included. With second labels, the border between two voxels lies nearer to the one that is
    less certain. Where the grids coincide, the result is that of :func:`restore_to_grid`. It is computed
    slab by slab, each label only inside of its bounding box, so that only some tens of megabytes are needed in addition
    to the result. On a sheared grid it falls back to the nearest neighbour.

    Args:
        labels: shape (I, J, K).
        affine_labels: 4x4, from voxel indices of the labels to millimetres in RAS.
        shape: shape of the target grid.
        affine_image: 4x4, from voxel indices of the target grid to millimetres in RAS.
        second: on the grid of the labels.
        chunk_numbers: number of voxels of a slab.

    Returns:
        Labels of shape ``shape`` in Fortran's order; 0 outside the given volume.
    """
    image_to_labels = np.linalg.inv(affine_labels) @ affine_image
    source_axes = _source_axes(image_to_labels)
    if source_axes is None:
        return _resample(labels, image_to_labels, shape)
    axes, positions = _positions(image_to_labels, source_axes, shape)
    given = _turned(labels, axes)
    others = None if second is None else (_turned(second.labels, axes), _turned(second.shares, axes))
    boxes = [(index, box) for index, box in enumerate(ndimage.find_objects(given.numpy()), start=1) if box is not None]
    restored = torch.zeros([len(position) for position in positions], dtype=torch.uint8)
    planes = max(1, chunk_numbers // max(1, restored[:1].numel()))
    for first in range(0, len(restored), planes):
        slab = restored[first : first + planes]
        in_slab = [positions[0][first : first + planes], *positions[1:]]
        best, total = torch.zeros_like(slab), torch.zeros_like(slab)
        for index, box in boxes:
            _add_weight(given, others, index, box, in_slab, (slab, best, total))
        slab[best <= FULL_WEIGHT - total] = 0
    return _without_outside(restored.numpy(), axes, positions, labels.shape).T


def _add_weight(
    given: torch.Tensor,
    others: tuple[torch.Tensor, torch.Tensor] | None,
    index: int,
    box: Box,
    positions: list[npt.NDArray[np.float64]],
    slab: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Interpolate one label's weight, and assign the label where its weight is largest; total sums all weights."""
    near = _near(box, positions)
    if near is None:
        return
    lower = [max(0, part.start - 1) for part in box]
    around = tuple(slice(start, part.stop + 1) for start, part in zip(lower, box, strict=True))
    if others is None:
        weight = (given[around] == index).float().mul_(FULL_WEIGHT)
    else:
        seconds, shares = (volume[around] for volume in others)
        weight = torch.where(given[around] == index, shares, (FULL_WEIGHT - shares) * (seconds == index)).float()
    for place, (part, start) in enumerate(zip(near, lower, strict=True)):
        weight = interpolate_axis(weight, place, torch.from_numpy(positions[place][part] - start))
    # Weights are truncated and not rounded, so that their sum over all labels fits into eight bits.
    share = weight.to(torch.uint8)
    winners, best, total = (part[near] for part in slab)
    wins = share > best
    winners.masked_fill_(wins, index)
    torch.maximum(best, share, out=best)
    total.add_(share)


def boxes_after_restoring(
    labels: LabelArray, affine_labels: Affine, shape: tuple[int, ...], affine_image: Affine, most: int
) -> list[Box | None] | None:
    """Boxes that hold all voxels of each label once the labels have been restored to another grid.

    They are found on the network's grid, which has far fewer voxels than the image.

    Args:
        labels: shape (I, J, K).
        affine_labels: 4x4, from voxel indices of the labels to millimetres in RAS.
        shape: shape of the target grid.
        affine_image: 4x4, from voxel indices of the target grid to millimetres in RAS.
        most: the highest label value.

    Returns:
        One entry for each value from 1 to ``most``, None for one without voxels; None for a sheared grid.
    """
    image_to_labels = np.linalg.inv(affine_labels) @ affine_image
    source_axes = _source_axes(image_to_labels)
    if source_axes is None:
        return None
    axes, positions = _positions(image_to_labels, source_axes, shape)
    boxes = ndimage.find_objects(_turned(labels, axes).numpy(), most)
    near = [box and _near(box, positions) for box in boxes]
    return [box and box[::-1] for box in near]  # the restored array is transposed at the end


def _near(box: Box, positions: Sequence[npt.NDArray[np.float64]]) -> Box | None:
    """The part of a grid at less than a voxel from a box, by the grid's positions along each axis; None if empty."""
    near = [
        np.flatnonzero((position > part.start - 1) & (position < part.stop))
        for part, position in zip(box, positions, strict=True)
    ]
    return tuple(slice(int(places[0]), int(places[-1]) + 1) for places in near) if all(map(len, near)) else None


def interpolate_to_grid(
    values: npt.NDArray[np.float16] | FloatArray, affine_values: Affine, shape: tuple[int, ...], affine_image: Affine
) -> FloatArray:
    """Resample a scalar map on the network's grid to another grid by linear interpolation.

    Args:
        values: shape (I, J, K).
        affine_values: 4x4, from voxel indices of the map to millimetres in RAS.
        shape: shape of the target grid.
        affine_image: 4x4, from voxel indices of the target grid to millimetres in RAS.

    Returns:
        float32 of shape ``shape`` in Fortran's order; 0 outside the given volume.
    """
    image_to_values = np.linalg.inv(affine_values) @ affine_image
    source_axes = _source_axes(image_to_values)
    if source_axes is None:
        matrix, offset = image_to_values[:3, :3], image_to_values[:3, 3]
        single = values.astype(np.float32)
        sheared: FloatArray = ndimage.affine_transform(
            single, matrix, offset, shape, order=1, mode="grid-constant", cval=0
        )
        return sheared
    axes, positions = _positions(image_to_values, source_axes, shape)
    interpolated = _turned(values, axes).float()
    for place, position in enumerate(positions):
        interpolated = interpolate_axis(interpolated, place, torch.from_numpy(position))
    array: FloatArray = _without_outside(interpolated.numpy(), axes, positions, values.shape).T
    return array


def drop_uncertain_components(
    labels: LabelArray, entropy: npt.NDArray[np.floating[Any]], limits: Mapping[int, float]
) -> LabelArray:
    """Turn each connected component (26 neighbours) of a label that is uncertain everywhere into background.

    The border of a structure is always uncertain. The most certain tenth of a component's voxels therefore decides, so
    that thin structures are judged like large ones.

    Args:
        labels: shape (X, Y, Z).
        entropy: of each voxel, from 0 (certain) to 1, of the same shape.
        limits: for each label, the largest allowed 10th percentile of a component's entropy; other labels are not
            changed.
    """
    result = labels.copy(order="K")
    for index, box in enumerate(find_boxes(labels), start=1):
        if box is None or index not in limits:
            continue
        mask = labels[box] == index
        components, count = ndimage.label(mask, structure=NEIGHBOURS)
        numbers, values = components[mask], entropy[box][mask]
        values = values[np.lexsort((values, numbers))]
        sizes = np.bincount(numbers, minlength=count + 1)[1:]
        firsts = np.cumsum(sizes) - sizes
        uncertain = np.concatenate([[False], values[firsts + _tenth(sizes)] > limits[index]])
        result[box][uncertain[components]] = 0
    return result


def certain_tenth(entropy: npt.NDArray[np.floating[Any]]) -> float:
    """The largest entropy among the most certain tenth of a component's voxels, of any shape but not empty."""
    place = _tenth(entropy.size)
    return float(np.partition(entropy.ravel(), place)[place])


def _tenth(sizes: _Sizes) -> _Sizes:
    """Place of the last voxel of the most certain tenth, in order of entropy, in components of these sizes."""
    return (sizes - 1) // 10


def keep_largest_components(
    labels: LabelArray, indices: Collection[int] | None = None, share: float = 1.0
) -> LabelArray:
    """Keep the largest connected component (26 neighbours) of each label; the rest becomes background.

    Args:
        labels: shape (X, Y, Z).
        indices: labels to process; all by default.
        share: size, as a share of the largest component, from which other components are kept too; 1 keeps only the
            largest.
    """
    result = labels.copy(order="K")
    for index, box in enumerate(find_boxes(labels), start=1):
        if box is None or (indices is not None and index not in indices):
            continue
        mask = labels[box] == index
        components, count = ndimage.label(mask, structure=NEIGHBOURS)
        if count > 1:
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            kept = sizes >= share * sizes.max() if share < 1 else np.arange(len(sizes)) == sizes.argmax()
            result[box][mask & ~kept[components]] = 0
    return result


def measure_labels(
    labels: LabelArray,
    affine_ras: Affine,
    preset: Preset,
    boxes: Sequence[Box | None] | None = None,
) -> dict[str, dict[str, object]]:
    """Voxel count, volume in millilitres and centroid (voxel indices, and millimetres in RAS) of each label present.

    Args:
        labels: shape (X, Y, Z).
        affine_ras: 4x4, voxel indices to millimetres in RAS.
        preset: provides the names of the labels.
        boxes: for each value from 1 on, a box that holds all of its voxels, None for a value without voxels; computed
            if not given.
    """
    voxel_ml = abs(float(np.linalg.det(affine_ras[:3, :3]))) / 1000
    measures: dict[str, dict[str, object]] = {}
    boxes = find_boxes(labels, len(preset.labels)) if boxes is None else boxes
    for label in preset.labels:
        box = boxes[label.index - 1]
        if box is None:
            continue
        voxels, middle = _count_and_centre(labels[box], label.index)
        if not voxels:
            continue
        centroid = middle + [part.start for part in box]
        centroid_mm = affine_ras[:3, :3] @ centroid + affine_ras[:3, 3]
        measures[label.name] = {
            "voxels": voxels,
            "volume_ml": round(voxels * voxel_ml, 4),
            "centroid_voxels": [round(float(c), 2) for c in centroid],
            "centroid_ras_mm": [round(float(c), 2) for c in centroid_mm],
        }
    return measures


def _count_and_centre(labels: LabelArray, index: int) -> tuple[int, npt.NDArray[np.float64]]:
    """Number of voxels of a label and their mean position, computed plane by plane in memory order."""
    if labels.strides[0] < labels.strides[-1]:
        voxels, centre = _count_and_centre(labels.T, index)
        return voxels, centre[::-1]
    across = np.stack([np.ones(labels.shape[2]), np.arange(labels.shape[2])], axis=1)
    sums = np.stack(
        [(plane == index).astype(np.float64) @ across for plane in labels]
    )  # for each row: count and sum of positions
    rows = sums[..., 0]
    voxels = rows.sum()
    if not voxels:
        return 0, np.zeros(3)
    places = (np.arange(len(rows)) @ rows.sum(1), np.arange(rows.shape[1]) @ rows.sum(0), sums[..., 1].sum())
    return int(voxels), np.array(places) / voxels


def find_boxes(labels: LabelArray, most: int = 0) -> list[Box | None]:
    """The bounding box of each label from 1 on, up to the highest or to ``most``; voxels are read in memory order."""
    if labels.flags.f_contiguous:
        return [box and box[::-1] for box in ndimage.find_objects(labels.T, most)]
    boxes: list[Box | None] = ndimage.find_objects(labels, most)
    return boxes


def _resample(labels: LabelArray, image_to_labels: Affine, shape: tuple[int, ...]) -> LabelArray:
    """Nearest-neighbour resampling between any two grids."""
    matrix, offset = image_to_labels[:3, :3], image_to_labels[:3, 3]
    resampled: LabelArray = ndimage.affine_transform(
        labels, matrix, offset, shape, order=0, mode="grid-constant", cval=0
    )
    return resampled


def _source_axes(image_to_labels: Affine) -> npt.NDArray[np.int64] | None:
    """For each axis of the given grid, the parallel axis of the target grid; None for a sheared grid."""
    source_axes: npt.NDArray[np.int64] = np.abs(image_to_labels[:3, :3]).argmax(axis=1)
    permutes = sorted(source_axes) == [0, 1, 2] and _only(image_to_labels[:3, :3], source_axes)
    return source_axes if permutes else None


def _positions(
    image_to_given: Affine, source_axes: npt.NDArray[np.int64], shape: tuple[int, ...]
) -> tuple[list[int], list[npt.NDArray[np.float64]]]:
    """Axes of the given grid, the one along the image's last axis first, and the image planes' positions on each."""
    axes: list[int] = np.argsort(source_axes)[::-1].tolist()
    positions = []
    for axis in axes:
        source = source_axes[axis]
        positions.append(image_to_given[axis, source] * np.arange(shape[source]) + image_to_given[axis, 3])
    return axes, positions


def _turned(volume: npt.NDArray[Any], axes: list[int]) -> torch.Tensor:
    """The volume with permuted axes, also in memory; NumPy would take twice as long."""
    return torch.from_numpy(volume).permute(*axes).contiguous()


def _without_outside(
    restored: npt.NDArray[Any], axes: list[int], positions: list[npt.NDArray[np.float64]], given: tuple[int, ...]
) -> npt.NDArray[Any]:
    """Set voxels outside of the given volume, whose axes are numbered by ``axes``, to 0.

    The exact position decides and not the rounded index: at twice the spacing, the last voxel lies exactly half a voxel
    outside.
    """
    reach = 0.5 + EDGE_TOLERANCE_VOXELS
    for place, (axis, position) in enumerate(zip(axes, positions, strict=True)):
        outside = (position < -reach) | (position > given[axis] - 1 + reach)
        if outside.any():
            restored[(slice(None),) * place + (outside,)] = 0
    return restored


def _only(matrix: npt.NDArray[np.float64], source_axes: npt.NDArray[np.int64]) -> bool:
    """Whether each row of ``matrix`` has its only nonzero entry at its source axis."""
    rest = matrix.copy()
    rest[np.arange(3), source_axes] = 0
    return bool(np.abs(rest).max() < 1e-3)
