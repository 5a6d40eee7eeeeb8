"""How claims on voxels become a mask, and what holds whatever they say.

A voxel goes to the prompt that claims it most. Every positive click carries its label, every negative one carries none
of the labels that were clicked; what nobody claims, and what lies outside of the box, stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.interaction.growth import NEVER, Claim
from lib.interaction.prompts import Box, Prompts
from lib.transforms.postprocess import interpolate_to_grid
from lib.transforms.volume import Affine

LabelArray = npt.NDArray[np.uint8]
Part = tuple[slice, ...]
"""A part of an image: its first voxel and one beyond its last on each axis."""


@dataclass(frozen=True)
class LabelClaim:
    """A claim for a label.

    Attributes:
        value: of the label that the voxels are to have; 0 to take them away.
        takes_from: values that may be taken away; empty: any.
        claim: on the network's grid.
    """

    value: int
    takes_from: tuple[int, ...]
    claim: Claim


def apply_claims(
    labels: LabelArray, affine_ras: Affine, claims: Sequence[LabelClaim], affine_network: Affine, box: Box | None
) -> tuple[LabelArray, list[Part]]:
    """The mask after all claims, and the parts of the image outside of which it is as before.

    Args:
        labels: the mask before, on the image's grid; it stays as it is.
        affine_ras: of the image.
        claims: what is wanted, in any order: of two, the smaller value wins, and of two alike the lower label.
        affine_network: of the grid that claims are on.
        box: nothing changes outside of it.
    """
    result = labels.copy(order="K")
    won: list[tuple[Part, npt.NDArray[np.float32]]] = []
    placed = [(one, *_on_image(one.claim, affine_network, labels.shape, affine_ras)) for one in claims]
    for one, where, values in sorted(placed, key=lambda item: item[0].value or 256):
        wins = (values < 1) & _inside(where, box)
        if one.takes_from:
            wins &= np.isin(labels[where], (*one.takes_from, one.value))
        for other_where, other in won:
            both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(where, other_where, strict=True)]
            if all(part.start < part.stop for part in both):
                mine, theirs = _within(both, where), _within(both, other_where)
                wins[mine] &= values[mine] < other[theirs]
        result[where][wins] = one.value
        won.append((where, np.where(wins, values, np.inf).astype(np.float32)))
    return result, [where for where, _ in won]


def obey(labels: LabelArray, before: LabelArray, prompts: Prompts) -> None:
    """Give every positive click its label, and take the clicked labels from every negative one, in place."""
    for point in prompts.negative:
        if prompts.of_label is None:
            labels[point] = 0
        elif labels[point] == prompts.of_label:
            labels[point] = before[point] if before[point] != prompts.of_label else 0
    for value, points in prompts.positive:
        labels[tuple(np.array(points).T)] = value


def around(parts: Sequence[Part]) -> Part | None:
    """The least part that holds all of them; None for none."""
    if not parts:
        return None
    return tuple(slice(min(p.start for p in axis), max(p.stop for p in axis)) for axis in zip(*parts, strict=True))


def _within(part: Sequence[slice], whole: Sequence[slice]) -> tuple[slice, ...]:
    return tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, whole, strict=True))


def _on_image(
    claim: Claim, affine_network: Affine, shape: tuple[int, ...], affine_ras: Affine
) -> tuple[tuple[slice, ...], npt.NDArray[np.float32]]:
    """A claim on the image's grid: where, and its values there, as the part of the image that it covers."""
    start = np.eye(4)
    start[:3, 3] = claim.start
    affine_claim = affine_network @ start
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(claim.values.shape) - 1
    on_image = (corners @ (np.linalg.inv(affine_ras) @ affine_claim).T)[:, :3]
    low = np.clip(np.floor(on_image.min(axis=0)).astype(int), 0, np.array(shape) - 1)
    high = np.clip(np.ceil(on_image.max(axis=0)).astype(int) + 1, low + 1, shape)
    part = np.eye(4)
    part[:3, 3] = low
    # What lies outside of the claim comes back as 0, which means "mine": so the distance to "nobody's" is moved.
    shifted = (NEVER - claim.values).astype(np.float16)
    moved = interpolate_to_grid(shifted, affine_claim, tuple(high - low), affine_ras @ part)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)), NEVER - moved


def _inside(where: tuple[slice, ...], box: Box | None) -> npt.NDArray[np.bool_]:
    """Which voxels of a part of the image lie in the box."""
    inside = np.ones(tuple(part.stop - part.start for part in where), dtype=bool)
    if box is None:
        return inside
    for axis, (part, low, high) in enumerate(zip(where, box.start, box.stop, strict=True)):
        places = np.arange(part.start, part.stop)
        shape = [-1 if a == axis else 1 for a in range(3)]
        inside &= ((places >= low) & (places < high)).reshape(shape)
    return inside
