"""Segments a structure that is not drawn yet from one click: the region of similar intensities in whose middle the
click lies.

An annotator clicks into the middle of a structure. Regions around the click are tried with a growing intensity
tolerance. A region is accepted if the click lies deep in it, which is not so if it has leaked into a larger neighbour,
and if it contains most of the voxels that a front from the click reaches first. No larger tolerance is tried after a
jump in size. If no region is accepted, the front alone is used (`growth.py`). The limits were chosen with one click on
each of ten organs of 8 abdominal CTs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lib.interaction.growth import FROM_NOTHING_VOXELS, NEVER, Claim, claim_around
from lib.storage.bounded_cache import BoundedCache
from lib.transforms.volume import FloatArray

MaskArray = npt.NDArray[np.bool_]
Points = npt.NDArray[np.int64]

REACH_VOXELS = 60
"""Largest distance of a region's voxels from its click."""
TOLERANCES = (0.15, 0.2, 0.25, 0.3, 0.4)
"""Tolerances tried: the largest intensity difference to the click, in standard deviations of the part around it."""
SMOOTH_VOXELS = 0.7
LEAST_OVERLAP, FULL_OVERLAP = 0.5, 0.8
"""Smallest share of the front's voxels that an accepted region contains, and the share above which it alone is used."""
LEAST_DEPTH = 0.6
"""Smallest depth of a click in its region, as a share of the greatest depth."""
LEAP, LESS_DEEP = 2.5, 0.15
"""A region that is larger by this factor than with the previous tolerance, and in which the click's relative depth is
smaller by this share, has leaked into a neighbour: no larger tolerance is tried.
"""
REGION_CLAIM = 0.75
"""Claim value inside of a region; voxels near another prompt have a stronger claim from that prompt."""
MOST_KEPT_MIB = 64
"""Memory for regions; one region has up to 121x121x121 values, 7 MiB."""
MANY_VOXELS = 20_000
NEAR_VOXELS = 2
"""Radius around a click in which its region is searched, since the clicked voxel itself may be noise."""
NEIGHBOURS = ndimage.generate_binary_structure(3, 2)


def kept_regions() -> BoundedCache:
    """A cache of regions, which is needed because each new click repeats all earlier ones."""
    return BoundedCache(MOST_KEPT_MIB * 2**20)


def region_claim(image: FloatArray, seed: Points, spacing_mm: Sequence[float]) -> Claim | None:
    """The claim of one click on a structure of which nothing is drawn; None if no region is accepted.

    Args:
        image: shape (X, Y, Z).
        seed: the click's voxel, shape (3,).
        spacing_mm: voxel size.
    """
    near = claim_around(image, seed[None], FROM_NOTHING_VOXELS, spacing_mm)
    low = np.maximum(seed - REACH_VOXELS, 0)
    high = np.minimum(seed + REACH_VOXELS + 1, image.shape)
    values = np.full(high - low, NEVER, dtype=np.float32)
    place = tuple(slice(a, a + n) for a, n in zip(near.start - low, near.values.shape, strict=True))
    values[place] = near.values
    part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    region, overlap = _choose(image[part], tuple(seed - low), values < 1, spacing_mm)
    if region is None:
        return None
    if overlap >= FULL_OVERLAP:
        values[~region] = NEVER
    values[region] = np.minimum(values[region], REGION_CLAIM)
    box = ndimage.find_objects((values < 1).astype(np.uint8))[0]
    wide = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
    return Claim(low + [side.start for side in wide], values[wide].copy())


def _choose(
    crop: FloatArray, seed: tuple[int, ...], front: MaskArray, spacing_mm: Sequence[float]
) -> tuple[MaskArray | None, float]:
    """The accepted region of the largest tolerance, and its share of the front's voxels; None if none is accepted."""
    smooth = ndimage.gaussian_filter(crop, SMOOTH_VOXELS)
    around = tuple(slice(max(0, v - 1), v + 2) for v in seed)
    level = float(smooth[around].mean())
    differences = abs(smooth - level)
    spread = float(smooth.std())
    chosen: MaskArray | None = None
    overlap, size, deep = 0.0, 0, 0.0
    for tolerance in TOLERANCES:
        region = _connected(differences < tolerance * spread, seed)
        if region is None:
            continue
        held, depth = float((region & front).sum() / front.sum()), _relative_depth(region, seed, spacing_mm)
        voxels = int(region.sum())
        if chosen is not None and voxels > LEAP * size and depth < max(deep - LESS_DEEP, LEAST_DEPTH):
            break
        if held >= LEAST_OVERLAP and depth >= LEAST_DEPTH:
            size, deep = voxels, depth
            # Smoothing of the image removes the outermost voxels at a sharp border.
            rim = ndimage.binary_dilation(region) & (abs(crop - level) < tolerance * spread)
            chosen, overlap = region | rim, held
    return chosen, overlap


def _connected(alike: MaskArray, seed: tuple[int, ...]) -> MaskArray | None:
    """The part of similar voxels, without holes, that is connected with the seed by more than thin bridges."""
    components, _ = ndimage.label(alike)
    number = _number_near(components, seed, 1)
    if number == 0:
        return None
    box = ndimage.find_objects(components)[number - 1]
    own = np.pad(components[box] == number, 2)
    place = tuple(v - side.start + 2 for v, side in zip(seed, box, strict=True))
    opened, _ = ndimage.label(ndimage.binary_erosion(own, NEIGHBOURS))
    middle = _number_near(opened, place, NEAR_VOXELS)
    if middle == 0:
        return None
    grown = ndimage.binary_dilation(opened == middle, NEIGHBOURS) & own
    filled = without_holes(grown)
    region = np.zeros(alike.shape, dtype=bool)
    region[box] = filled[2:-2, 2:-2, 2:-2]
    return region


def without_holes(mask: MaskArray) -> MaskArray:
    """A mask with its holes filled."""
    beside, _ = ndimage.label(~np.pad(mask, 1))
    whole: MaskArray = (beside != beside[0, 0, 0])[1:-1, 1:-1, 1:-1]
    return whole


def _number_near(components: npt.NDArray[np.int32], seed: tuple[int, ...], voxels: int) -> int:
    """The component of a voxel, or the most frequent component next to it; 0 for none."""
    if all(0 <= v < n for v, n in zip(seed, components.shape, strict=True)) and components[seed]:
        return int(components[seed])
    beside = components[tuple(slice(max(0, v - voxels), max(0, v + voxels + 1)) for v in seed)]
    return int(np.bincount(beside[beside > 0]).argmax()) if beside.any() else 0


def _relative_depth(region: MaskArray, seed: tuple[int, ...], spacing_mm: Sequence[float]) -> float:
    """Depth of a voxel in a region, as a share of the greatest depth; large regions are subsampled by two."""
    box = ndimage.find_objects(region.astype(np.uint8))[0]
    step = 2 if region.sum() > MANY_VOXELS else 1
    place = [v - side.start for v, side in zip(seed, box, strict=True)]
    seen = region[box][tuple(slice(v % step, None, step) for v in place)]
    depth = ndimage.distance_transform_edt(np.pad(seen, 1), sampling=spacing_mm)
    # A noisy voxel may be excluded from the region around it.
    around = depth[tuple(slice(max(0, v // step), max(0, v // step + 3)) for v in place)]
    return float(around.max(initial=0) / depth.max())
