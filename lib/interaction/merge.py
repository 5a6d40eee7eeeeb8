"""Merges claims on voxels into a mask, and enforces the prompts themselves.

A voxel goes to the prompt with the strongest claim on it. A positive click claims voxels for its label; a negative
click claims them for none of the clicked labels. Voxels that no prompt claims, and voxels outside of the box, do not
change.
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
    """A claim of voxels for a label.

    Attributes:
        value: label that the voxels receive; 0 to remove them.
        takes_from: labels that may lose voxels; empty: any.
        claim: the strength of the claim, on the network's grid.
    """

    value: int
    takes_from: tuple[int, ...]
    claim: Claim


def apply_claims(
    labels: LabelArray, affine_ras: Affine, claims: Sequence[LabelClaim], affine_network: Affine, box: Box | None
) -> tuple[LabelArray, list[Part]]:
    """The mask after all claims, and the parts of the image outside of which it is unchanged.

    Args:
        labels: the mask before, on the image's grid; it is not modified.
        affine_ras: affine of the image's grid.
        claims: in any order; at each voxel the smallest value wins, and among equal values the lower label.
        affine_network: affine of the grid of the claims.
        box: nothing changes outside of it.
    """
    result = labels.copy(order="K")
    won: list[tuple[Part, npt.NDArray[np.float32]]] = []
    placed = [(one, *_on_image(_trimmed(one.claim), affine_network, labels.shape, affine_ras)) for one in claims]
    for one, where, values in sorted(placed, key=lambda item: item[0].value or 256):
        wins = values < 1
        if box is not None:
            wins &= _inside(where, box)
        if one.takes_from:
            taken = np.zeros(256, dtype=bool)
            taken[[*one.takes_from, one.value]] = True
            wins &= taken[labels[where]]
        for other_where, other in won:
            both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(where, other_where, strict=True)]
            if all(part.start < part.stop for part in both):
                mine, theirs = _within(both, where), _within(both, other_where)
                wins[mine] &= values[mine] < other[theirs]
        np.copyto(result[where], np.uint8(one.value), where=wins)
        if len(placed) > 1:
            values[~wins] = np.inf
        won.append((where, values))
    return result, [where for where, _ in won]


def enforce_prompts(labels: LabelArray, before: LabelArray, prompts: Prompts) -> None:
    """Give each positive click's voxel its label, and take clicked labels from negative clicks' voxels, in place."""
    for point in prompts.negative:
        if prompts.of_label is None:
            labels[point] = 0
        elif labels[point] == prompts.of_label:
            labels[point] = before[point] if before[point] != prompts.of_label else 0
    for value, points in prompts.positive:
        labels[tuple(np.array(points).T)] = value


def enclosing_part(parts: Sequence[Part]) -> Part | None:
    """The smallest part that contains all the parts; None if there are none."""
    if not parts:
        return None
    return tuple(slice(min(p.start for p in axis), max(p.stop for p in axis)) for axis in zip(*parts, strict=True))


def _within(part: Sequence[slice], whole: Sequence[slice]) -> tuple[slice, ...]:
    return tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, whole, strict=True))


def _trimmed(claim: Claim) -> Claim:
    """The part of a claim that counts, and a voxel around it: to resample the rest to the image would cost time."""
    part = []
    for axis in range(3):
        counts = np.flatnonzero((claim.values < 1).any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(counts):
            return claim
        part.append(slice(max(0, int(counts[0]) - 1), int(counts[-1]) + 2))
    return Claim(claim.start + [axis.start for axis in part], claim.values[tuple(part)])


def _on_image(
    claim: Claim, affine_network: Affine, shape: tuple[int, ...], affine_ras: Affine
) -> tuple[tuple[slice, ...], npt.NDArray[np.float32]]:
    """A claim resampled to the image's grid: the part of the image that it covers, and its values there."""
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
    # Resampling returns 0 outside of the claim, where 0 would mean the strongest claim: so the difference from NEVER is
    # resampled.
    shifted = (NEVER - claim.values).astype(np.float16)
    moved = interpolate_to_grid(shifted, affine_claim, tuple(high - low), affine_ras @ part)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)), NEVER - moved


def _inside(where: tuple[slice, ...], box: Box) -> npt.NDArray[np.bool_]:
    """The voxels of a part of the image that lie in the box."""
    inside = np.ones(tuple(part.stop - part.start for part in where), dtype=bool)
    for axis, (part, low, high) in enumerate(zip(where, box.start, box.stop, strict=True)):
        places = np.arange(part.start, part.stop)
        shape = [-1 if a == axis else 1 for a in range(3)]
        inside &= ((places >= low) & (places < high)).reshape(shape)
    return inside
