"""A simulated annotator, who knows the reference mask and clicks where the current mask differs from it.

The functions are pure and seeded, so that training, evaluation and tests use the same clicks. The annotator chooses a
connected wrong component with a probability that grows with its size, and clicks near the voxel that lies deepest in
it, because no human hits that voxel exactly.
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
"""Smallest depth of a jittered click, as a share of the greatest depth in the component."""


@dataclass(frozen=True)
class Correction:
    """One corrective click.

    Attributes:
        value: value of the label that the voxel belongs to; 0 where it belongs to none.
        point: index of the clicked voxel.
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
    """Choose the next corrective click; None when the mask equals the reference.

    Args:
        labels: the current mask, shape (X, Y, Z).
        truth: the reference mask, shape (X, Y, Z).
        spacing_mm: voxel size of both masks.
        random: generator that draws the component and the voxel in it; without one, the deepest voxel of the largest
            component is clicked.
        taken: voxels that have been clicked already.
    """
    parts = _wrong_parts(labels, truth)
    if not parts:
        return None
    sizes = np.array([part.size for part in parts], dtype=float)
    chosen = parts[int(sizes.argmax()) if random is None else int(random.choice(len(parts), p=sizes / sizes.sum()))]
    value, mask = chosen.value, chosen.mask()
    start = [part.start + first for part, first in zip(chosen.box, chosen.start, strict=True)]
    depth = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
    for point in taken:
        inside = tuple(v - first for v, first in zip(point, start, strict=True))
        if all(0 <= v < size for v, size in zip(inside, mask.shape, strict=True)):
            depth[inside] = 0
    if not depth.any():
        return None
    deep = np.argwhere(depth >= (depth.max() if random is None else SHALLOWEST * depth.max()))
    place = deep[0] if random is None else deep[int(random.integers(len(deep)))]
    x, y, z = (int(v) + first for v, first in zip(place, start, strict=True))
    return Correction(value, (x, y, z))


def prompts_of(clicks: Sequence[Correction]) -> Prompts:
    """The clicks as prompts, in the form in which a viewer sends them."""
    positive: dict[int, list[Voxel]] = {}
    for click in clicks:
        if click.value:
            positive.setdefault(click.value, []).append(click.point)
    return make_prompts(positive, [click.point for click in clicks if not click.value])


@dataclass(frozen=True)
class _Part:
    """A connected component in which the mask is wrong in one way.

    Attributes:
        value: the label that the reference has there.
        box: bounding box within ``components``, whose first voxel is ``start`` in the volume.
        size: number of voxels.
        components: array of component numbers, counted from 1; ``number`` is the number of this component.
    """

    value: int
    box: tuple[slice, ...]
    start: Voxel
    size: int
    components: npt.NDArray[np.int32]
    number: int

    def mask(self) -> npt.NDArray[np.bool_]:
        """The voxels of the box that belong to this component."""
        inside: npt.NDArray[np.bool_] = self.components[self.box] == self.number
        return inside


def _wrong_parts(labels: LabelArray, truth: LabelArray) -> list[_Part]:
    """Connected components of voxels that are wrong in the same way."""
    wrong = labels != truth
    around = ndimage.find_objects(wrong.astype(np.uint8))
    if not around:
        return []
    x, y, z = (part.start for part in around[0])
    wrong_parts = list[_Part]()
    wrong, right = wrong[around[0]], truth[around[0]]
    for value in np.unique(right[wrong]):
        components, _ = ndimage.label((right == value) & wrong)
        sizes = np.bincount(components.ravel())
        for number, box in enumerate(ndimage.find_objects(components), 1):
            wrong_parts.append(_Part(int(value), box, (x, y, z), int(sizes[number]), components, number))
    return wrong_parts


def perturb_mask(truth: npt.NDArray[np.bool_], random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """A reference mask of one structure with errors typical of networks: rough borders, missing and added parts.

    Args:
        truth: shape (X, Y, Z).
        random: generator that draws the errors.
    """
    if not truth.any():
        return truth.copy()
    box = ndimage.find_objects(truth.astype(np.uint8))[0]
    part = tuple(slice(max(0, b.start - 10), b.stop + 10) for b in box)
    crop = truth[part]
    signed = ndimage.distance_transform_edt(crop) - ndimage.distance_transform_edt(~crop)
    rough = ndimage.gaussian_filter(random.normal(size=crop.shape), random.uniform(1.5, 4.0))
    moved = signed + rough / max(float(rough.std()), 1e-6) * random.uniform(0.3, 2.0) + random.uniform(-0.7, 0.7)
    spoiled = moved > 0
    near = np.argwhere(abs(signed) <= 1.5)
    for _ in range(int(random.integers(0, 4))):
        centre = near[int(random.integers(len(near)))]
        radius = random.uniform(1.5, 6.0)
        axes = [np.arange(n) - c for n, c in zip(crop.shape, centre, strict=True)]
        distance = np.sqrt(axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2)
        spoiled[distance <= radius] = random.random() < 0.4
    result = np.zeros_like(truth)
    result[part] = spoiled
    return result
