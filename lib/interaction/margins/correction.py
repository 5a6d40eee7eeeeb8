"""The changes that clicks make to an automatic mask, computed from the network's logit margins.

The lead of one label over the others, a difference of logits, is treated as an estimate whose error is a Gaussian
process with a covariance that decays exponentially with distance. A click states that its label leads at its voxel by
at least a margin. The smallest change of the field that satisfies all clicks (kriging with inequality constraints;
Dubrule and Kostov 1986) gives the voxels at which another label leads now. Wrong voxels are usually voxels at which the
network was uncertain, so a click reaches far along an uncertain border and hardly into voxels that were certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lib.infers.logit_margins import LogitMargins
from lib.interaction.growth import NEVER, Claim
from lib.interaction.merge import LabelClaim
from lib.transforms.volume import FloatArray

LabelArray = npt.NDArray[np.uint8]
Pairs = npt.NDArray[np.int64]
"""A label and the one that it is to lead over, shape (n, 2)."""
Moved = tuple[tuple[int, int, int], float]
"""A click's voxel, and how strongly it moves a field."""

LENGTH_VOXELS = 4.0
"""In which the covariance falls to 1/e, in voxels of the finest axis; chosen with MARGIN on half of the subjects."""
MARGIN = 5.0
"""By how much the label of a click leads there at least."""
REACH_VOXELS = 12
"""How far a click changes anything."""
NUGGET = 0.05
"""How uncertain a click is, as a variance, so that clicks that contradict each other have an answer."""
MOST_SWEEPS, PRECISE = 200, 1e-3


@dataclass(frozen=True)
class Evidence:
    """The statement of a click: at this voxel of the network's grid, one label is right and another one is not."""

    place: tuple[int, int, int]
    value: int
    over: int


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
    away = _distances(clicks, spacing_mm)
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
        together = [
            (click.place, float(moves)) for click, moves in zip(clicks, sides * strengths, strict=True) if moves
        ]
        alone = [
            (clicks[number].place, float(solve(margins, spacing_mm, [clicks[number]])[0]))
            for number in own
            if not (against & (away[number] <= 2 * REACH_VOXELS)).any()
        ]
        places = np.array([clicks[number].place for number in own])
        claims += _claims_of(pair, places, margins, coarse, spacing_mm, together, alone)
    return claims


def solve(margins: LogitMargins, spacing_mm: Sequence[float], clicks: Sequence[Evidence]) -> npt.NDArray[np.float64]:
    """The weight of each click in the field; 0 where the network and the other clicks imply the click already."""
    covariance = _likeness(_pairs(clicks), _pairs(clicks)) * np.exp(-_distances(clicks, spacing_mm) / LENGTH_VOXELS)
    missing = MARGIN - np.array([float(margins.lead(c.value, c.place)) for c in clicks])
    strengths = np.zeros(len(clicks))
    for _ in range(MOST_SWEEPS):
        largest = 0.0
        for i in range(len(clicks)):
            rest = missing[i] - covariance[i] @ strengths + covariance[i, i] * strengths[i]
            changed = max(0.0, rest / (covariance[i, i] + NUGGET))
            largest, strengths[i] = max(largest, abs(changed - strengths[i])), changed
        if largest < PRECISE:
            break
    return strengths


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
    places: npt.NDArray[np.int64],
    margins: LogitMargins,
    coarse: LabelArray,
    spacing_mm: Sequence[float],
    together: Sequence[Moved],
    alone: Sequence[Moved],
) -> list[LabelClaim]:
    """The voxels around the clicks at ``places`` that the first label of a pair takes from the second.

    Args:
        together: all clicks, and their weights in the field of this pair when they are solved together.
        alone: those that no click contradicts, and how strongly each would move it by itself: what it changes then
            stays, however many clicks of its kind come.
    """
    reach = np.ceil(REACH_VOXELS * min(spacing_mm) / np.asarray(spacing_mm)).astype(int)
    low = np.maximum(places.min(axis=0) - reach, 0)
    high = np.minimum(places.max(axis=0) + reach + 1, coarse.shape)
    part = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    field, before = margins.lead(pair[0], part), coarse[part]
    guess = field.copy()
    for place, strength in together:
        box, similar = _covariance_in(field.shape, np.array(place) - low, reach, spacing_mm)
        field[box] += strength * similar
    for place, strength in alone:
        box, similar = _covariance_in(field.shape, np.array(place) - low, reach, spacing_mm)
        field[box] = np.maximum(field[box], guess[box] + strength * similar)
    wins = np.zeros(field.shape, dtype=bool)
    for place in places - low:
        box, similar = _covariance_in(field.shape, place, reach, spacing_mm)
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
    shape: Sequence[int], place: npt.NDArray[np.int64], reach: npt.NDArray[np.int64], spacing_mm: Sequence[float]
) -> tuple[tuple[slice, ...], FloatArray]:
    """The covariance with a click in a part of the grid, and that part; the covariance is 0 beyond the reach."""
    low = np.clip(place - reach, 0, shape)
    high = np.clip(place + reach + 1, low, shape)
    steps = [
        (np.arange(a, b) - p) * s / min(spacing_mm) for a, b, p, s in zip(low, high, place, spacing_mm, strict=True)
    ]
    away = np.sqrt(steps[0][:, None, None] ** 2 + steps[1][:, None] ** 2 + steps[2] ** 2)
    similar = np.where(away <= REACH_VOXELS, np.exp(-away / LENGTH_VOXELS), 0).astype(np.float32)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)), similar
