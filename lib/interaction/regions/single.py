"""What a click on a structure that is not drawn yet draws: the region of like intensities in whose middle it lies.

An annotator clicks into the middle of what is to be drawn. Regions around the click are tried with a growing
tolerance; one counts where the click lies deep in it, as it does not where the region has leaked into a larger
neighbour, and where it holds most of what a front from the click reaches first; after a leap in size none is tried.
Without such a region, that front is all there is (`growth.py`). The limits were chosen with one click on each of ten
organs of 8 abdominal CTs.
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
"""How far a region reaches from its click."""
TOLERANCES = (0.15, 0.2, 0.25, 0.3, 0.4)
"""By how much intensities of a region differ from those at the click, in standard deviations of the part around it."""
SMOOTH_VOXELS = 0.7
LEAST_OVERLAP, FULL_OVERLAP = 0.5, 0.8
"""Of what the front reaches: how much of it a region holds at least; with this much, the region alone is drawn."""
LEAST_DEPTH = 0.6
"""How deep in its region a click lies at least, as a share of the deepest place."""
LEAP, LESS_DEEP = 2.5, 0.15
"""A region that is larger by this factor than with the tolerance before, and in which the click lies less deep by this
share, has run into a neighbour: larger tolerances are not tried."""
REGION_CLAIM = 0.75
"""What a click claims of its region; what lies near another prompt goes to that one."""
MOST_KEPT_MIB = 64
"""A region has up to 121x121x121 numbers, 7 MiB."""
MANY_VOXELS = 20_000
NEAR_VOXELS = 2
"""So near to a click its region has its middle voxels: the one that was clicked may be noise."""
NEIGHBOURS = ndimage.generate_binary_structure(3, 2)


def kept_regions() -> BoundedCache:
    """Where regions are kept: with each further click, all those before it are sent again."""
    return BoundedCache(MOST_KEPT_MIB * 2**20)


def region_claim(image: FloatArray, seed: Points, spacing_mm: Sequence[float]) -> Claim | None:
    """What a click draws where nothing is drawn; None where there is no region in whose middle it lies.

    Args:
        image: shape (X, Y, Z).
        seed: the click's voxel, shape (3,).
        spacing_mm: of the volume.
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
    """The region of the largest tolerance that counts, and how much of the front it holds; None without any."""
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
            # Smoothing takes the outermost voxels away where the border is sharp.
            rim = ndimage.binary_dilation(region) & (abs(crop - level) < tolerance * spread)
            chosen, overlap = region | rim, held
    return chosen, overlap


def _connected(alike: MaskArray, seed: tuple[int, ...]) -> MaskArray | None:
    """The part of like voxels that hangs together with the seed by more than thin bridges, without holes."""
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
    """A mask with what it encloses."""
    beside, _ = ndimage.label(~np.pad(mask, 1))
    whole: MaskArray = (beside != beside[0, 0, 0])[1:-1, 1:-1, 1:-1]
    return whole


def _number_near(components: npt.NDArray[np.int32], seed: tuple[int, ...], voxels: int) -> int:
    """The component that a voxel belongs to, or of which there is most beside it; 0 for none."""
    if all(0 <= v < n for v, n in zip(seed, components.shape, strict=True)) and components[seed]:
        return int(components[seed])
    beside = components[tuple(slice(max(0, v - voxels), max(0, v + voxels + 1)) for v in seed)]
    return int(np.bincount(beside[beside > 0]).argmax()) if beside.any() else 0


def _relative_depth(region: MaskArray, seed: tuple[int, ...], spacing_mm: Sequence[float]) -> float:
    """How deep a voxel lies in a region, as a share of the deepest place; a large region is seen at half its size."""
    box = ndimage.find_objects(region.astype(np.uint8))[0]
    step = 2 if region.sum() > MANY_VOXELS else 1
    place = [v - side.start for v, side in zip(seed, box, strict=True)]
    seen = region[box][tuple(slice(v % step, None, step) for v in place)]
    depth = ndimage.distance_transform_edt(np.pad(seen, 1), sampling=spacing_mm)
    # A voxel of noise may be none of a region that lies around it.
    around = depth[tuple(slice(max(0, v // step), max(0, v // step + 3)) for v in place)]
    return float(around.max(initial=0) / depth.max())
