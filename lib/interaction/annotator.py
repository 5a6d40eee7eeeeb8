"""A simulated annotator, who knows the reference mask and clicks or scribbles where the current mask differs from it.

The functions are pure and seeded, so that training, evaluation and tests use the same clicks and scribbles. The
annotator chooses a connected wrong component with a probability that grows with its size, and clicks near the voxel
that lies deepest in it, because no human hits that voxel exactly. A scribble is a line along the middle of the
component around that voxel, in one plane, as people paint in a slice view.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra

from lib.interaction.prompts import Prompts, Voxel, make_prompts

LabelArray = npt.NDArray[np.uint8]
SHALLOWEST = 0.7
"""Smallest depth of a jittered click, as a share of the greatest depth in the component."""
MOST_SCRIBBLED, SCRIBBLE_DEPTH = 15, 0.5
"""Largest distance in voxels of a scribble from the voxel that was chosen, and the smallest depth of a scribbled voxel
as a share of that one's."""


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
    place = _choose_place(labels, truth, spacing_mm, random, taken)
    return None if place is None else place.correction(place.at)


def next_scribble(
    labels: LabelArray,
    truth: LabelArray,
    spacing_mm: Sequence[float],
    random: np.random.Generator | None = None,
    taken: Sequence[Voxel] = (),
) -> tuple[Correction, ...]:
    """Choose the next corrective scribble: voxels of one label in one plane; empty when the mask equals the reference.

    Args:
        labels, truth, spacing_mm, taken: as of :func:`next_click`.
        random: as of :func:`next_click`; it also draws the plane. Without one, it is the plane with the longest line.
    """
    place = _choose_place(labels, truth, spacing_mm, random, taken)
    if place is None:
        return ()
    axes = range(3) if random is None else [int(random.integers(3))]
    lines = [_line_in_plane(place.depth, place.at, axis) for axis in axes]
    return tuple(place.correction(point) for point in max(lines, key=len))


def next_prompt(
    labels: LabelArray,
    truth: LabelArray,
    spacing_mm: Sequence[float],
    random: np.random.Generator | None,
    taken: Sequence[Voxel],
    scribble: bool,
) -> tuple[Correction, ...]:
    """The voxels of the next scribble, or the one of the next click; the arguments are those of :func:`next_click`."""
    if scribble:
        return next_scribble(labels, truth, spacing_mm, random, taken)
    click = next_click(labels, truth, spacing_mm, random, taken)
    return () if click is None else (click,)


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


@dataclass(frozen=True)
class _Place:
    """The voxel of a wrong component that the annotator chooses.

    Attributes:
        value: the label that the reference has there.
        start: the first voxel of the component's box in the volume.
        depth: distance of each voxel of the box from the outside of the component, 0 for clicked voxels.
        at: index of the voxel in the box.
    """

    value: int
    start: Voxel
    depth: npt.NDArray[np.float64]
    at: Voxel

    def correction(self, point: Voxel) -> Correction:
        """The correction at a voxel of the box."""
        x, y, z = (first + v for first, v in zip(self.start, point, strict=True))
        return Correction(self.value, (x, y, z))


def _choose_place(
    labels: LabelArray,
    truth: LabelArray,
    spacing_mm: Sequence[float],
    random: np.random.Generator | None,
    taken: Sequence[Voxel],
) -> _Place | None:
    """A wrong component and a voxel deep in it; the arguments are those of :func:`next_click`."""
    parts = _wrong_parts(labels, truth)
    if not parts:
        return None
    sizes = np.array([part.size for part in parts], dtype=float)
    chosen = parts[int(sizes.argmax()) if random is None else int(random.choice(len(parts), p=sizes / sizes.sum()))]
    mask = chosen.mask()
    x, y, z = (part.start + first for part, first in zip(chosen.box, chosen.start, strict=True))
    depth = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
    for point in taken:
        inside = tuple(v - first for v, first in zip(point, (x, y, z), strict=True))
        if all(0 <= v < size for v, size in zip(inside, mask.shape, strict=True)):
            depth[inside] = 0
    if not depth.any():
        return None
    deep = np.argwhere(depth >= (depth.max() if random is None else SHALLOWEST * depth.max()))
    i, j, k = (int(v) for v in (deep[0] if random is None else deep[int(random.integers(len(deep)))]))
    return _Place(chosen.value, (x, y, z), depth, (i, j, k))


def _line_in_plane(depth: npt.NDArray[np.float64], at: Voxel, axis: int) -> list[Voxel]:
    """The longest line along the deepest voxels of the part around ``at``, in the plane across ``axis``."""
    section = np.take(depth, at[axis], axis=axis)
    components, _ = ndimage.label(section >= SCRIBBLE_DEPTH * depth[at], structure=np.ones((3, 3)))
    here = tuple(np.delete(at, axis))
    pixels = np.argwhere(components == components[here])
    pixels = pixels[np.abs(pixels - here).max(axis=1) <= MOST_SCRIBBLED]
    costs = _costs_between(pixels, section)
    # The pixel that is furthest from any one is an end of the longest line, and the one furthest from there the other.
    first = int(_finite(dijkstra(costs, indices=int((pixels == here).all(axis=1).argmax()))).argmax())
    distances, before = dijkstra(costs, indices=first, return_predecessors=True)
    line = [int(_finite(distances).argmax())]
    while line[-1] != first:
        line.append(int(before[line[-1]]))
    x, y, z = np.insert(pixels[line], axis, at[axis], axis=1).T.tolist()
    return list(zip(x, y, z, strict=True))


def _costs_between(pixels: npt.NDArray[np.int64], section: npt.NDArray[np.float64]) -> coo_array:
    """The costs of the steps between neighbours, which are low where the section is deep."""
    number = np.full(np.add(section.shape, 2), -1)
    number[tuple(pixels.T + 1)] = np.arange(len(pixels))
    starts, ends, costs = [], [], []
    for step in itertools.product((-1, 0, 1), repeat=2):
        to = number[tuple((pixels + 1 + step).T)]
        known = np.flatnonzero(to >= 0) if any(step) else np.zeros(0, dtype=int)
        starts.append(known)
        ends.append(to[known])
        costs.append(np.linalg.norm(step) / section[tuple(pixels[to[known]].T)])
    size = (len(pixels), len(pixels))
    return coo_array((np.concatenate(costs), (np.concatenate(starts), np.concatenate(ends))), shape=size)


def _finite(distances: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(np.isfinite(distances), distances, -1.0)


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
