"""A simulated annotator: where somebody who knows the right mask would click next.

Pure and seeded, so that training, evaluation and tests see the same clicks. Of what is wrong it chooses a connected
part, the larger the likelier, and clicks near its deepest place, since nobody hits that exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lib.interaction.prompts import Prompts, Voxel, make_prompts

LabelArray = npt.NDArray[np.uint8]
SHALLOWEST = 0.7
"""Of the greatest depth: how deep a jittered click lies at least."""


@dataclass(frozen=True)
class Correction:
    """One click.

    Attributes:
        value: of the label that the voxel belongs to; 0: to none.
        point: the voxel.
    """

    value: int
    point: Voxel


def next_click(
    labels: LabelArray,
    truth: LabelArray,
    spacing_mm: Sequence[float],
    random: np.random.Generator | None = None,
    taken: Sequence[Voxel] = (),
) -> Correction | None:
    """The next click; None where nothing is wrong any more.

    Args:
        labels: the mask as it is, shape (X, Y, Z).
        truth: the right one.
        spacing_mm: of their voxels.
        random: draws the part and the place in it; without it, the largest part and its deepest place.
        taken: voxels that have been clicked already.
    """
    parts = _wrong_parts(labels, truth)
    if not parts:
        return None
    sizes = np.array([mask.sum() for _, _, mask in parts], dtype=float)
    chosen = int(sizes.argmax()) if random is None else int(random.choice(len(parts), p=sizes / sizes.sum()))
    value, box, mask = parts[chosen]
    depth = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
    for point in taken:
        inside = tuple(v - part.start for v, part in zip(point, box, strict=True))
        if all(0 <= v < size for v, size in zip(inside, mask.shape, strict=True)):
            depth[inside] = 0
    if not depth.any():
        return None
    deep = np.argwhere(depth >= (depth.max() if random is None else SHALLOWEST * depth.max()))
    place = deep[0] if random is None else deep[int(random.integers(len(deep)))]
    x, y, z = (int(v) + part.start for v, part in zip(place, box, strict=True))
    return Correction(value, (x, y, z))


def prompts_of(clicks: Sequence[Correction]) -> Prompts:
    """The clicks as a viewer would send them."""
    positive: dict[int, list[Voxel]] = {}
    for click in clicks:
        if click.value:
            positive.setdefault(click.value, []).append(click.point)
    return make_prompts(positive, [click.point for click in clicks if not click.value])


def _wrong_parts(labels: LabelArray, truth: LabelArray) -> list[tuple[int, tuple[slice, ...], npt.NDArray[np.bool_]]]:
    """Connected parts that are wrong in the same way: the right value, where, and which voxels there."""
    found = []
    values = [int(v) for v in np.unique(truth[labels != truth])] if (labels != truth).any() else []
    for value in values:
        components, _ = ndimage.label((truth == value) & (labels != value))
        for number, box in enumerate(ndimage.find_objects(components), 1):
            found.append((value, box, components[box] == number))
    return found
