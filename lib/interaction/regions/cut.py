"""Segments one structure from all clicks on it together, by a minimal cut.

The intensities of the structure are learnt from the guess, which is the union of what each positive click segments
alone. A minimal cut (Boykov and Jolly 2001) then assigns each voxel to the structure or to the background. It weighs
three terms against a border that is cheap along edges of the image: the intensity of the voxel, its distance to the
guess, and whether a front from a negative click reaches it before a front from a positive click. A negative click deep
in a leak removes the leak, and one near the border only what lies next to it, because it reaches as far as it lies deep
in the guess. Finally the border moves to where voxels resemble those outside more than those inside (Lankton and
Tannenbaum 2008). The limits were chosen on abdominal CTs (docs/decisions/0075-all-clicks-together.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from numpymaxflow import maxflow
from scipy import ndimage

from lib.interaction.growth import NEVER, Claim
from lib.interaction.regions.single import REGION_CLAIM, SMOOTH_VOXELS, MaskArray, Points, without_holes
from lib.transforms.volume import FloatArray

AnyArray = TypeVar("AnyArray", FloatArray, MaskArray)

MARGIN_VOXELS = 10
"""Largest distance of the structure's voxels from the guess and its clicks."""
MANY_VOXELS = 500_000
"""Larger parts are cut at half the resolution, and their border is fitted at full resolution."""
LEAST_SPREAD, MOST_SPREAD = 0.08, 0.2
"""Standard deviation of a structure's smoothed intensities, relative to that of the part around it."""
LIKE = 2.5
"""Intensity difference, in standard deviations, that counts neither for nor against a voxel; smaller ones count for it.
"""
FAR_VOXELS = 4.0
"""Distance from the guess at which the distance term outweighs the best intensity term."""
NEGATIVE_WEIGHT, SHARPNESS = 3.0, 4.0
"""Weight of a negative click, and the lead of its front at which this weight is reached."""
NEGATIVE_REACH = 4.0
"""Reach of a negative click, as a multiple of its depth in the guess."""
SMOOTHNESS, EDGE = 1.0, 0.2
"""Cost of a border in the cut, and the intensity step, in standard deviations, across which it becomes cheap."""
NECK_SHARE, MOST_NECK_VOXELS, NECK_MARGIN = 0.25, 5.0, 1.5
"""A part is a neck if half of its thickness is below this share of the greatest depth and below this number of voxels;
the last value is how far a structure extends beyond its deeper voxels.
"""
BORDER_STEPS, BORDER_SMOOTH_VOXELS, LEAST_CONTRAST = 2, 1.5, 0.12
"""Voxels that the border moves, radius in which both sides are compared, and smallest difference between them."""
SURFACE_VOXELS, SURFACE_SHARE = 0.6, 0.15
"""Smoothing of the surface, and its upper limit as a share of the greatest depth, so that small structures keep their
corners.
"""
SLOWEST, LONGEST = 0.02, 400.0
"""Smallest speed of a front, and the arrival time at which it stops."""


def solved_claim(
    image: FloatArray,
    guess: MaskArray,
    core: MaskArray,
    positive: Points,
    negative: Points,
    walls: MaskArray,
    spacing_mm: Sequence[float],
) -> Claim:
    """The claim of a structure that is segmented from clicks alone and has uniform intensities.

    Args:
        image: shape (X, Y, Z).
        guess: union of what each positive click segments alone.
        core: part of the guess that most likely belongs to the structure.
        positive, negative: voxels of the clicks, shape (n, 3); ``positive`` has at least one.
        walls: voxels of other structures, which the structure may not take.
        spacing_mm: voxel size.
    """
    part = part_of(guess, positive)
    low, size = np.array([side.start for side in part]), np.array([side.stop - side.start for side in part])
    crop, taken = image[part], walls[part]
    seeds, others = positive - low, negative - low
    others = others[((others >= 0) & (others < size)).all(axis=1)]
    inside, outside = at_points(seeds, size), at_points(others, size) | taken
    # Two clicks in one voxel of this grid lie in different voxels of the image's own grid, where both are enforced.
    outside &= ~inside
    sampling = [s / min(spacing_mm) for s in spacing_mm]
    step = 2 if crop.size > MANY_VOXELS else 1
    masks = guess[part], core[part], taken
    if step > 1:
        near, likely, walled = (_halved(mask) > 0.5 for mask in masks)
        seen = _halved(crop)
    else:
        (near, likely, walled), seen = masks, crop
    places, away = np.unique(seeds // step, axis=0), np.unique(others // step, axis=0)
    kept, deepest = _solve(seen, near, likely, walled, places, away, [s * step for s in sampling])
    if step > 1:
        kept = _doubled(kept, crop.shape)
    box = _grown(ndimage.find_objects((kept | inside).astype(np.uint8))[0], BORDER_STEPS + step, crop.shape)
    smooth = min(SURFACE_VOXELS, SURFACE_SHARE * deepest)
    fitted = _fit_border(crop[box], (kept & ~outside | inside)[box], inside[box], outside[box], smooth, step)
    structure = np.zeros_like(kept)
    structure[box] = without_holes(fitted)
    # Voxels far from the structure are cropped: to resample them to the image's grid would take most of the time.
    start = np.array([side.start for side in box])
    return Claim(low + start, _values((structure & ~outside | inside)[box], inside[box], outside[box]))


def _solve(
    crop: FloatArray,
    near: MaskArray,
    core: MaskArray,
    taken: MaskArray,
    seeds: Points,
    others: Points,
    sampling: Sequence[float],
) -> tuple[MaskArray, float]:
    """The structure in a part of an image, and the depth of its deepest voxel in the unit of ``sampling``.

    Args:
        crop: the part, shape (X, Y, Z).
        near: union of what each positive click segments alone.
        core: part of it that most likely belongs to the structure.
        taken: voxels of other structures.
        seeds, others: positive and negative clicks, shape (n, 3).
        sampling: edge lengths of a voxel.
    """
    size = np.array(crop.shape)
    inside, clicked = at_points(seeds, size), at_points(others, size)
    outside = (clicked | taken) & ~inside
    distances = _distances(crop, core & ~taken | inside)
    evidence = np.clip(1 - (distances / LIKE) ** 2, -2, 1)
    evidence += core - np.clip(_distance_to(near | inside, sampling) / FAR_VOXELS, 0, 2)
    if len(others):
        evidence += NEGATIVE_WEIGHT * _nearer_to_others(distances, near, seeds, others, sampling)
    chance = 1 / (1 + np.exp(-2 * evidence))
    sure_inside = (ndimage.binary_dilation(inside) & (distances < LIKE) & ~outside) | inside
    chance[sure_inside] = 1
    chance[(ndimage.binary_dilation(clicked) & ~sure_inside) | outside] = 0
    whole = without_holes(_connected(_cut(crop, chance.astype(np.float32)), inside))
    box = _grown(ndimage.find_objects(whole.astype(np.uint8))[0], 1, whole.shape)
    depth = min(sampling) - _distance_to(np.pad(whole[box], 1), sampling)[1:-1, 1:-1, 1:-1]
    kept = np.zeros_like(whole)
    kept[box] = _without_necks(depth, seeds - [side.start for side in box], sampling)
    return kept, float(depth.max())


def _halved(array: FloatArray | MaskArray) -> FloatArray:
    """Means of 2x2x2 voxels."""
    padded = np.pad(array, [(0, n % 2) for n in array.shape], mode="edge")
    a, b, c = (n // 2 for n in padded.shape)
    means: FloatArray = padded.reshape(a, 2, b, 2, c, 2).mean(axis=(1, 3, 5), dtype=np.float32)
    return means


def _doubled(array: AnyArray, shape: Sequence[int]) -> AnyArray:
    """An array of the given shape in which each voxel is repeated eight times."""
    whole: AnyArray = array.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    return whole[tuple(slice(0, n) for n in shape)]


def part_of(guess: MaskArray, positive: Points) -> tuple[slice, ...]:
    """The part of the volume to which a structure is limited."""
    low, high = positive.min(axis=0), positive.max(axis=0) + 1
    boxes = ndimage.find_objects(guess.astype(np.uint8))
    if boxes:
        low = np.minimum(low, [side.start for side in boxes[0]])
        high = np.maximum(high, [side.stop for side in boxes[0]])
    low, high = np.maximum(low - MARGIN_VOXELS, 0), np.minimum(high + MARGIN_VOXELS, guess.shape)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def intensities(smooth: FloatArray, mask: MaskArray) -> tuple[float, float]:
    """Mean and standard deviation of a structure's smoothed intensities."""
    inner = ndimage.binary_erosion(mask)
    known = smooth[inner] if inner.sum() > 30 else smooth[mask]
    level, contrast = float(np.median(known)), max(float(smooth.std()), 1e-6)
    spread = 1.48 * float(np.median(abs(known - level)))
    return level, float(np.clip(spread, LEAST_SPREAD * contrast, MOST_SPREAD * contrast))


def _grown(box: Sequence[slice], voxels: int, shape: Sequence[int]) -> tuple[slice, ...]:
    """A box enlarged by ``voxels`` on each side, limited to the array."""
    return tuple(slice(max(0, a.start - voxels), min(n, a.stop + voxels)) for a, n in zip(box, shape, strict=True))


def at_points(points: Points, size: npt.NDArray[np.int64]) -> MaskArray:
    """A mask that is true at the points."""
    mask = np.zeros(size, dtype=bool)
    mask[tuple(points.T)] = True
    return mask


def _distances(crop: FloatArray, guess: MaskArray) -> FloatArray:
    """Distance of smoothed intensities from those of the guess, in standard deviations of the guess."""
    smooth = ndimage.gaussian_filter(crop, SMOOTH_VOXELS)
    level, spread = intensities(smooth, guess)
    distances: FloatArray = abs(smooth - level) / spread
    return distances


def _nearer_to_others(
    distances: FloatArray, guess: MaskArray, seeds: Points, others: Points, sampling: Sequence[float]
) -> FloatArray:
    """0 where a front from a positive click arrives first, down to -1 where one from a negative click does."""
    speed = np.maximum(1 / (1 + (distances / 2) ** 2), SLOWEST)
    depth = depth_at(seeds, guess, sampling)
    # A click near the border corrects the border there: its front starts when that of the deepest click passes it.
    late = depth.max() - depth
    own, other = _arrival(speed, seeds, late, sampling), _arrival(speed, others, np.zeros(len(others)), sampling)
    first = np.clip(SHARPNESS * np.log((other + 1) / (own + 1)), -1, 0)
    reach = np.zeros(guess.shape, dtype=np.float32)
    axes = np.ogrid[tuple(slice(0, n) for n in guess.shape)]
    for place, deep in zip(others, depth_at(others, guess, sampling), strict=True):
        square = sum(((axis - v) * s) ** 2 for axis, v, s in zip(axes, place, sampling, strict=True))
        np.maximum(reach, np.exp(-square / (NEGATIVE_REACH * max(deep, 1)) ** 2), out=reach)
    nearer: FloatArray = first * reach
    return nearer


def depth_at(points: Points, mask: MaskArray, sampling: Sequence[float]) -> npt.NDArray[np.float64]:
    """Distance of points to the border of the mask that they lie in; 0 for points outside."""
    padded = np.pad(mask, 1)
    beside = (np.argwhere(ndimage.binary_dilation(padded) & ~padded) - 1) * np.asarray(sampling)
    depths = np.zeros(len(points))
    for number, point in enumerate(points):
        if mask[tuple(point)] and len(beside):
            depths[number] = np.sqrt(((beside - point * np.asarray(sampling)) ** 2).sum(axis=1).min())
    return depths


def _distance_to(mask: MaskArray, sampling: Sequence[float]) -> FloatArray:
    """Distance of voxels to a mask (Maurer et al. 2003); 0 on its outermost voxels, negative inside."""
    field = sitk.GetImageFromArray(mask.astype(np.uint8))
    field.SetSpacing([float(s) for s in sampling][::-1])
    distance: FloatArray = sitk.GetArrayFromImage(
        sitk.SignedMaurerDistanceMap(field, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
    )
    return distance


def _arrival(speed: FloatArray, seeds: Points, late: npt.NDArray[np.float64], sampling: Sequence[float]) -> FloatArray:
    """Arrival time of a front from the seeds, in voxels of the finest axis; computed at half the resolution.

    Args:
        speed: shape (X, Y, Z).
        seeds: shape (n, 3).
        late: start time at each seed.
        sampling: edge lengths of a voxel, the shortest of which is 1.
    """
    field = sitk.GetImageFromArray(_halved(speed))
    field.SetSpacing([2 * s for s in sampling][::-1])
    starts: dict[tuple[int, ...], float] = {}
    for place, start in zip((seeds // 2).tolist(), late.tolist(), strict=True):
        starts[tuple(place[::-1])] = min(start, starts.get(tuple(place[::-1]), LONGEST))
    front = sitk.FastMarchingImageFilter()
    front.SetStoppingValue(LONGEST)
    front.SetTrialPoints(list(starts))
    front.SetInitialTrialValues(list(starts.values()))
    arrival = np.minimum(sitk.GetArrayFromImage(front.Execute(field)), LONGEST)
    return _doubled(arrival, speed.shape)


def _cut(crop: FloatArray, chance: FloatArray) -> MaskArray:
    """The minimal cut between likely voxels of the structure and the others."""
    sure = np.clip(chance, 1e-6, 1 - 1e-6)
    edge = EDGE * max(float(crop.std()), 1e-6)
    structure: MaskArray = (
        maxflow(np.ascontiguousarray(crop[None]), np.stack([1 - sure, sure]), SMOOTHNESS, edge, 6)[0] > 0.5
    )
    return structure


def _connected(mask: MaskArray, seeds: MaskArray) -> MaskArray:
    """The components that contain a positive click."""
    components, _ = ndimage.label(mask)
    numbers = np.unique(components[seeds])
    return np.isin(components, numbers[numbers > 0])


def _without_necks(depth: FloatArray, seeds: Points, sampling: Sequence[float]) -> MaskArray:
    """The parts that are connected with a positive click by more than necks that are thin relative to the whole.

    Args:
        depth: distance of voxels to the border of the structure; 0 and less outside.
        seeds: positive clicks, shape (n, 3).
        sampling: edge lengths of a voxel, the shortest of which is 1.
    """
    structure = depth > 0
    thin = min(NECK_SHARE * float(depth.max()), MOST_NECK_VOXELS)
    components, _ = ndimage.label(depth > thin)
    places = np.argwhere(components)
    numbers, alone = [], []
    for seed in seeds:
        square = (((places - seed) * np.asarray(sampling)) ** 2).sum(axis=1)
        nearest = int(square.argmin())
        numbers.append(components[tuple(places[nearest])])
        if square[nearest] > (thin + NECK_MARGIN) ** 2:
            alone.append(seed)
    kept: MaskArray = structure & (_distance_to(np.isin(components, numbers), sampling) <= thin + NECK_MARGIN)
    for seed in alone:
        steps = [int((thin + NECK_MARGIN) / s) for s in sampling]
        near = tuple(slice(max(0, v - n), v + n + 1) for v, n in zip(seed.tolist(), steps, strict=True))
        kept[near] |= structure[near]
    return kept


def _fit_border(
    crop: FloatArray, mask: MaskArray, inside: MaskArray, outside: MaskArray, smooth_voxels: float, step: int
) -> MaskArray:
    """The mask with a smooth border, placed where intensities change between nearby voxels inside and outside.

    Args:
        crop: a part of an image, shape (X, Y, Z).
        mask: the structure in this part.
        inside, outside: voxels that must stay inside or outside.
        smooth_voxels: width of the smoothing, in voxels.
        step: edge length, in voxels of this grid, of the voxels of the grid on which the mask was computed.
    """
    least = LEAST_CONTRAST * float(crop.std())
    for _ in range(BORDER_STEPS + step - 1):
        weight = ndimage.gaussian_filter(mask.astype(np.float32), BORDER_SMOOTH_VOXELS)
        own = ndimage.gaussian_filter(crop * mask, BORDER_SMOOTH_VOXELS) / np.maximum(weight, 1e-3)
        other = ndimage.gaussian_filter(crop * ~mask, BORDER_SMOOTH_VOXELS) / np.maximum(1 - weight, 1e-3)
        # Where both sides have similar intensities, as where two organs touch, the image has no evidence of the border.
        like_own = np.where(abs(own - other) > least, abs(crop - other) - abs(crop - own), 0)
        added = ndimage.binary_dilation(mask) & ~mask & (like_own > 0)
        removed = mask & ndimage.binary_dilation(~mask) & (like_own < 0)
        mask = ndimage.gaussian_filter(((mask | added) & ~removed).astype(np.float32), smooth_voxels) > 0.5
        mask = mask & ~outside | inside
    return mask


def _values(mask: MaskArray, inside: MaskArray, outside: MaskArray) -> FloatArray:
    """A mask as claim values that change smoothly across its border, so that the border can lie between voxels."""
    soft = 2 * (1 - ndimage.gaussian_filter(mask.astype(np.float32), SURFACE_VOXELS))
    values = np.where(mask, np.clip(soft, REGION_CLAIM, 0.95), np.clip(soft, 1.05, NEVER)).astype(np.float32)
    values[inside], values[outside] = 0, NEVER
    return values
