"""The changes that clicks make to an automatic mask, computed from the network's logit margins.

The lead of one label over the others, a difference of logits, is treated as an estimate whose error is a Gaussian
process with a covariance that decays exponentially with distance. A click states that its label leads at its voxel by
at least a margin. The smallest change of the field that satisfies all clicks (kriging with inequality constraints;
Dubrule and Kostov 1986) gives the voxels at which another label leads now. Wrong voxels are usually voxels at which the
network was uncertain, so a click reaches far along an uncertain border and hardly into voxels that were certain.

A click is expected in the middle of the wrong part, so that the part is about as wide as the mask's border is far from
the click; the covariance of each click is scaled with that distance. The weight of a click is bounded, as is the
multiplier of a constraint with a penalised slack: where the network was certain of another label, the click is an
outlier, and says little about the voxels next to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lib.infers.logit_margins import LogitMargins
from lib.interaction.growth import NEVER, Claim, reach_of
from lib.interaction.merge import LabelClaim
from lib.transforms.volume import FloatArray

LabelArray = npt.NDArray[np.uint8]
Pairs = npt.NDArray[np.int64]
"""A label and the one that it is to lead over, shape (n, 2)."""

LENGTH_VOXELS, LENGTH_MM = 2.0, 2.0
"""Their sum is the least length at which the covariance falls to 1/e: 4 voxels of 1 mm or less, 2.7 of 3 mm."""
LENGTH_PER_DEPTH, LONGEST_VOXELS = 2.0, 6.0
"""The length per voxel of distance between a click and the mask's border, and its maximum."""
MARGIN = 5.0
"""Minimum lead of a click's label at its voxel; chosen, like the other constants, on half of the subjects."""
WEIGHT_PER_LENGTH = 3.0
"""Maximum weight of a click, as a difference of logits, per voxel of the least length."""
REACH_LENGTHS = 3.0
"""A click changes nothing beyond this many lengths."""
DEEPEST_VOXELS = 14.0
"""The mask's border is searched for within this distance."""
NUGGET = 0.05
"""How uncertain a click is, as a variance, so that clicks that contradict each other have an answer."""
MOST_SWEEPS, PRECISE = 200, 1e-3


@dataclass(frozen=True)
class Evidence:
    """The statement of a click: at this voxel of the network's grid, one label is right and another one is not.

    Attributes:
        place: the voxel.
        value, over: the label that is right, and the one that is not.
        length: distance at which the covariance has fallen to 1/e, in voxels of the finest axis.
    """

    place: tuple[int, int, int]
    value: int
    over: int
    length: float

    @property
    def reach(self) -> float:
        """Distance beyond which the click changes nothing, in voxels of the finest axis."""
        return REACH_LENGTHS * self.length


Moved = tuple[Evidence, float]
"""A click and its weight in a field."""


def evidence_of(
    coarse: LabelArray, spacing_mm: Sequence[float], place: tuple[int, int, int], value: int, over: int
) -> Evidence:
    """The statement of a click on a mask, with the length that its depth in the wrong part implies.

    Args:
        coarse: the mask to correct, on the network's grid, shape (X, Y, Z).
        spacing_mm: voxel size of that grid.
        place: voxel of the click.
        value, over: the label that is right, and the one that is not.
    """
    sides = [(coarse == label, label == over) for label in (value, over) if label]
    depth = min(reach_of(place, mask, inside, spacing_mm, DEEPEST_VOXELS) for mask, inside in sides)
    length = max(_least_length(spacing_mm), min(LENGTH_PER_DEPTH * depth, LONGEST_VOXELS))
    return Evidence(place, value, over, length)


def _least_length(spacing_mm: Sequence[float]) -> float:
    """The least length, in voxels of the finest axis."""
    return LENGTH_VOXELS + LENGTH_MM / max(min(spacing_mm), 1.0)


def margin_claims(
    margins: LogitMargins, coarse: LabelArray, spacing_mm: Sequence[float], clicks: Sequence[Evidence]
) -> list[LabelClaim]:
    """The claims of all clicks on a mask, solved for each connected group of clicks by itself.

    Args:
        margins: logit margins of the network.
        coarse: the mask to correct, on the network's grid, shape (X, Y, Z).
        spacing_mm: voxel size of that grid.
        clicks: all clicks, in a defined order.
    """
    if not clicks:
        return []
    strengths, claims = solve(margins, spacing_mm, clicks), list[LabelClaim]()
    away, reaches = _distances(clicks, spacing_mm), np.array([click.reach for click in clicks])
    for pair in sorted({(click.value, click.over) for click in clicks}):
        sides = _likeness(np.array([pair]), _pairs(clicks))[0]
        against = (sides < 0) & (strengths > 0)
        own = [
            number
            for number, click in enumerate(clicks)
            if (click.value, click.over) == pair and (strengths[number] > 0 or coarse[click.place] == click.over)
        ]
        if not own:
            continue
        together = [(click, float(moves)) for click, moves in zip(clicks, sides * strengths, strict=True) if moves]
        alone = [
            (clicks[number], float(solve(margins, spacing_mm, [clicks[number]])[0]))
            for number in own
            if not (against & (away[number] <= reaches[number] + reaches)).any()
        ]
        claims += _claims_of(pair, [clicks[number] for number in own], margins, coarse, spacing_mm, together, alone)
    return claims


def solve(margins: LogitMargins, spacing_mm: Sequence[float], clicks: Sequence[Evidence]) -> npt.NDArray[np.float64]:
    """The weight of each click in the field; 0 where the network and the other clicks imply the click already."""
    covariance = _likeness(_pairs(clicks), _pairs(clicks)) * _similarity(clicks, spacing_mm)
    most = WEIGHT_PER_LENGTH * _least_length(spacing_mm)
    missing = MARGIN - np.array([float(margins.lead(c.value, c.place)) for c in clicks])
    strengths = np.zeros(len(clicks))
    for _ in range(MOST_SWEEPS):
        largest = 0.0
        for i in range(len(clicks)):
            rest = missing[i] - covariance[i] @ strengths + covariance[i, i] * strengths[i]
            changed = min(max(0.0, rest / (covariance[i, i] + NUGGET)), most)
            largest, strengths[i] = max(largest, abs(changed - strengths[i])), changed
        if largest < PRECISE:
            break
    return strengths


def _similarity(clicks: Sequence[Evidence], spacing_mm: Sequence[float]) -> npt.NDArray[np.float64]:
    """The covariance at clicks of different lengths (Paciorek and Schervish 2006), shape (n, n)."""
    lengths = np.array([click.length for click in clicks])
    square = (lengths[:, None] ** 2 + lengths**2) / 2
    falls = np.exp(-_distances(clicks, spacing_mm) / np.sqrt(square))
    similarity: npt.NDArray[np.float64] = (lengths[:, None] * lengths / square) ** 1.5 * falls
    return similarity


def _distances(clicks: Sequence[Evidence], spacing_mm: Sequence[float]) -> npt.NDArray[np.float64]:
    """Distances between the clicks, in voxels of the finest axis, shape (n, n)."""
    places = np.array([click.place for click in clicks]) * (np.asarray(spacing_mm) / min(spacing_mm))
    distances: npt.NDArray[np.float64] = np.sqrt(((places[:, None] - places[None]) ** 2).sum(axis=-1))
    return distances


def _pairs(clicks: Sequence[Evidence]) -> Pairs:
    return np.array([(click.value, click.over) for click in clicks], dtype=np.int64).reshape(-1, 2)


def _likeness(some: Pairs, others: Pairs) -> npt.NDArray[np.float64]:
    """Correlation between the lead within one pair of labels and the lead within another pair, from -1 to 1."""
    value, over = some[:, None, 0], some[:, None, 1]
    same = (value == others[None, :, 0]).astype(float) + (over == others[None, :, 1])
    crossed = (value == others[None, :, 1]).astype(float) + (over == others[None, :, 0])
    likeness: npt.NDArray[np.float64] = 0.5 * (same - crossed)
    return likeness


def _claims_of(
    pair: tuple[int, int],
    own: Sequence[Evidence],
    margins: LogitMargins,
    coarse: LabelArray,
    spacing_mm: Sequence[float],
    together: Sequence[Moved],
    alone: Sequence[Moved],
) -> list[LabelClaim]:
    """The voxels around its own clicks that the first label of a pair takes from the second.

    Args:
        together: all clicks, and their weights in the field of this pair when they are solved together.
        alone: those that no click contradicts, and how strongly each would move it by itself: what it changes then
            stays, however many clicks of its kind come.
    """
    places = np.array([click.place for click in own])
    farthest = max(click.reach for click in own)
    reach = np.ceil(farthest * min(spacing_mm) / np.asarray(spacing_mm)).astype(int)
    low = np.maximum(places.min(axis=0) - reach, 0)
    high = np.minimum(places.max(axis=0) + reach + 1, coarse.shape)
    part = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    field, before = margins.lead(pair[0], part), coarse[part]
    guess = field.copy()
    for click, strength in together:
        box, similar = _covariance_in(field.shape, click, low, spacing_mm)
        field[box] += strength * similar
    for click, strength in alone:
        box, similar = _covariance_in(field.shape, click, low, spacing_mm)
        field[box] = np.maximum(field[box], guess[box] + strength * similar)
    wins = np.zeros(field.shape, dtype=bool)
    for click in own:
        box, similar = _covariance_in(field.shape, click, low, spacing_mm)
        wins[box] |= similar > 0
    wins &= (field > 0) & (before == pair[1])
    wins[tuple((places - low).T)] = True
    components, _ = ndimage.label(wins)
    claims, boxes = list[LabelClaim](), ndimage.find_objects(components)
    for number in sorted({int(components[tuple(place)]) for place in places - low}):
        box = tuple(
            slice(max(0, s.start - 2), min(n, s.stop + 2)) for s, n in zip(boxes[number - 1], field.shape, strict=True)
        )
        # Voxels that have the label already stay in the claim, so that no gap appears between the two on a finer grid.
        counts = (components[box] == number) | (before[box] == pair[0]) | ((field[box] <= 0) & (before[box] == pair[1]))
        values = np.where(counts, np.clip(1 - field[box] / MARGIN, 0, NEVER), NEVER).astype(np.float32)
        claims.append(LabelClaim(pair[0], (pair[1],), Claim(low + [s.start for s in box], values)))
    return claims


def _covariance_in(
    shape: Sequence[int], click: Evidence, start: npt.NDArray[np.int64], spacing_mm: Sequence[float]
) -> tuple[tuple[slice, ...], FloatArray]:
    """The covariance with a click in a part of the grid that begins at ``start``, and where it is not 0."""
    place = np.array(click.place) - start
    reach = np.ceil(click.reach * min(spacing_mm) / np.asarray(spacing_mm)).astype(int)
    low = np.clip(place - reach, 0, shape)
    high = np.clip(place + reach + 1, low, shape)
    steps = [
        (np.arange(a, b) - p) * s / min(spacing_mm) for a, b, p, s in zip(low, high, place, spacing_mm, strict=True)
    ]
    away = np.sqrt(steps[0][:, None, None] ** 2 + steps[1][:, None] ** 2 + steps[2] ** 2)
    similar = np.where(away <= click.reach, np.exp(-away / click.length), 0).astype(np.float32)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)), similar
