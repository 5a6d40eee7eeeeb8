"""Solves a structure that was segmented from clicks alone again, with all of its clicks, whenever a click is added.

Parts of the structure with different intensities are cut out of the image separately (`cut.py`), each with its own
clicks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lib.interaction.growth import NEVER, Claim, claim_around
from lib.interaction.regions.cut import LIKE, at_points, depth_at, intensities, part_of, solved_claim
from lib.interaction.regions.single import SMOOTH_VOXELS, MaskArray, Points, without_holes
from lib.transforms.volume import FloatArray

FEW_VOXELS = 1000
"""A structure that fronts reach without a region, and of fewer voxels than this, counts as small."""
BEYOND_BORDER = 2.3
"""Reach of a negative click in a small structure, as a multiple of its distance to the border."""
HALFWAY = 0.5
"""Share of a front's reach that counts as core."""


@dataclass(frozen=True)
class Drawn:
    """The segmentation that one positive click yields by itself.

    Attributes:
        seed: the clicked voxel, shape (3,).
        claim: a region of similar intensities, or the voxels that a front from the click reaches.
        is_region: whether the claim is a region.
    """

    seed: Points
    claim: Claim
    is_region: bool

    @property
    def core(self) -> MaskArray:
        """The voxels that most likely belong to the structure: the whole region, or half of a front's reach."""
        likely: MaskArray = self.claim.values < (1 if self.is_region else HALFWAY)
        return likely


@dataclass
class _Group:
    """Clicks on voxels of similar intensity.

    Attributes:
        level, spread: mean and standard deviation of the smoothed intensities.
        guess: union of what each of the clicks segments alone, shape (X, Y, Z).
        core: union of the cores of these segmentations.
        seeds: the clicked voxels, shape (n, 3).
    """

    level: float
    spread: float
    guess: MaskArray
    core: MaskArray
    seeds: list[Points]


def sorted_regions(
    image: FloatArray,
    regions: Sequence[tuple[Points, Claim | None]],
    positive: Points,
    negative: Points,
    spacing_mm: Sequence[float],
) -> list[tuple[Points, Claim | None]]:
    """Regions of clicks on one structure, sorted by the support of the other clicks and then by size.

    Clicks without a region follow, sorted by how little the image changes around them, since it changes much at a
    border. The first region is always kept, since one negative click may lie near its border. Any other region that
    contains as many negative as positive clicks deep inside has leaked, and becomes None.

    Args:
        image: shape (X, Y, Z).
        regions: each region with the voxel of its click; None where a click has no region.
        positive, negative: voxels of all clicks, shape (n, 3).
        spacing_mm: voxel size.
    """
    sampling = [s / min(spacing_mm) for s in spacing_mm]

    def rank(one: tuple[Points, Claim | None]) -> tuple[int, float]:
        seed, claim = one
        if claim is None:
            near = tuple(slice(max(0, v - 2), v + 3) for v in seed.tolist())
            return -len(positive) - len(negative), -float(image[near].std())
        leaks = _number_deep_in(claim, seed, negative, sampling)
        return _number_in(claim, positive) - leaks, float((claim.values < 1).sum())

    ranked = sorted(((rank(one), one) for one in regions), key=lambda pair: pair[0], reverse=True)
    return [(one[0], one[1] if number == 0 or place[0] > 0 else None) for number, (place, one) in enumerate(ranked)]


def _number_deep_in(claim: Claim, seed: Points, points: Points, sampling: Sequence[float]) -> int:
    """Number of points at least half as deep in a claim as its own click; points near the border only correct it."""
    places = points - claim.start
    places = places[((places >= 0) & (places < claim.values.shape)).all(axis=1)]
    if not len(places):
        return 0
    depth = depth_at(np.concatenate([(seed - claim.start)[None], places]), claim.values < 1, sampling)
    return int((depth[1:] > depth[0] / 2).sum())


def share_within(claim: Claim, mask: MaskArray) -> float:
    """The share of a claim's voxels that lie in a mask."""
    own = claim.values < 1
    return float((own & mask[claim.part]).sum() / max(own.sum(), 1))


def _number_in(claim: Claim, points: Points) -> int:
    """Number of points that lie in a claim."""
    places = points - claim.start
    places = places[((places >= 0) & (places < claim.values.shape)).all(axis=1)]
    return int((claim.values[tuple(places.T)] < 1).sum())


def structure_claim(
    image: FloatArray, drawn: Sequence[Drawn], negative: Points, walls: MaskArray, spacing_mm: Sequence[float]
) -> Claim:
    """The claim of all clicks on a structure of which nothing was drawn before.

    Parts with different intensities, as a kidney and its cyst, are solved separately, each with its own clicks.

    Args:
        image: shape (X, Y, Z).
        drawn: the segmentation of each positive click, the largest region first; at least one.
        negative: voxels of negative clicks, shape (n, 3).
        walls: voxels of other structures, which the structure may not take.
        spacing_mm: voxel size.
    """
    groups, single = _groups(image, drawn)
    claims = [
        solved_claim(image, group.guess, group.core, np.array(group.seeds), negative, walls, spacing_mm)
        for group in groups
    ]
    if len(claims) == 1 and not single:
        return claims[0]
    if single:
        claims.append(_limit_by_negative_clicks(image, _union([one.claim for one in single]), negative, spacing_mm))
    union = _union(claims)
    low, values = union.start, union.values
    part, size = union.part, np.array(values.shape)
    others = negative - low
    others = others[((others >= 0) & (others < size)).all(axis=1)]
    outside = walls[part] | at_points(others, size)
    for one in drawn:
        outside[tuple(one.seed - low)] = False
    values[outside] = NEVER
    if groups:  # voxels between two parts that were solved separately may resemble neither part
        closed = without_holes(ndimage.binary_closing(np.pad(values < 1, 2), iterations=2)[2:-2, 2:-2, 2:-2])
        values[closed & ~outside & (values >= 1)] = 0.95
    return Claim(low, values)


def _union(claims: Sequence[Claim]) -> Claim:
    """The union of the claims."""
    low = np.min([claim.start for claim in claims], axis=0)
    high = np.max([claim.start + claim.values.shape for claim in claims], axis=0)
    values = np.full(high - low, NEVER, dtype=np.float32)
    for claim in claims:
        place = tuple(slice(a, a + n) for a, n in zip(claim.start - low, claim.values.shape, strict=True))
        np.minimum(values[place], claim.values, out=values[place])
    return Claim(low, values)


def _limit_by_negative_clicks(image: FloatArray, claim: Claim, negative: Points, spacing_mm: Sequence[float]) -> Claim:
    """The voxels that fronts reach before those from negative clicks, which extend slightly beyond the border."""
    low, values = claim.start, claim.values.copy()
    places = negative[((negative >= low) & (negative < low + values.shape)).all(axis=1)]
    sampling = [s / min(spacing_mm) for s in spacing_mm]
    for seed, deep in zip(places, depth_at(places - low, values < 1, sampling), strict=True):
        if deep:
            other = _within(claim_around(image, seed[None], BEYOND_BORDER * deep, spacing_mm), claim)
            values[(other < 1) & (other < claim.values)] = NEVER
    return Claim(low, values)


def _within(claim: Claim, whole: Claim) -> FloatArray:
    """The values of a claim in the box of another claim."""
    values = np.full(whole.values.shape, NEVER, dtype=np.float32)
    both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(claim.part, whole.part, strict=True)]
    inner = tuple(slice(p.start - int(a), p.stop - int(a)) for p, a in zip(both, whole.start, strict=True))
    values[inner] = claim.values[
        tuple(slice(p.start - int(a), p.stop - int(a)) for p, a in zip(both, claim.start, strict=True))
    ]
    return values


def _groups(image: FloatArray, drawn: Sequence[Drawn]) -> tuple[list[_Group], list[Drawn]]:
    """Clicks grouped by intensity, and the clicks in no uniform region, which only change their surroundings."""
    groups, single = list[_Group](), list[Drawn]()
    # Small structures end where the front ends: they have too few inner voxels to estimate intensities from.
    if not any(one.is_region for one in drawn) and (_union([one.claim for one in drawn]).values < 1).sum() < FEW_VOXELS:
        return groups, list(drawn)
    for one in drawn:
        smooth = _smooth_at(image, one.seed)
        likely = [group for group in groups if abs(smooth - group.level) < LIKE * group.spread]
        if likely:
            group = min(likely, key=lambda group: abs(smooth - group.level) / group.spread)
        elif one.is_region or not groups:
            guess = np.zeros(image.shape, dtype=bool)
            guess[one.claim.part] = one.claim.values < 1
            part = part_of(guess, one.seed[None])
            crop = ndimage.gaussian_filter(image[part], SMOOTH_VOXELS)
            core = np.zeros_like(guess)
            core[one.claim.part] = one.core
            group = _Group(*intensities(crop, core[part]), guess, core, [])
            groups.append(group)
        else:
            single.append(one)
            continue
        group.guess[one.claim.part] |= one.claim.values < 1
        group.core[one.claim.part] |= one.core
        group.seeds.append(one.seed)
    return groups, single


def _smooth_at(image: FloatArray, seed: Points) -> float:
    """The smoothed intensity at a voxel."""
    near = tuple(slice(max(0, v - 4), v + 5) for v in seed.tolist())
    smooth = ndimage.gaussian_filter(image[near], SMOOTH_VOXELS)
    return float(smooth[tuple(v - side.start for v, side in zip(seed.tolist(), near, strict=True))])
