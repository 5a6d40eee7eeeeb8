"""From prompts to a new mask: what each click claims on the network's grid, merged into the mask on the image's own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from scipy import ndimage

from lib.interaction.editor import Editor
from lib.interaction.growth import (
    FROM_NOTHING_VOXELS,
    LEAST_VOXELS,
    MOST_VOXELS,
    NEVER,
    Claim,
    claim_around,
    is_drawn_nearby,
    reach_of,
)
from lib.interaction.merge import LabelClaim, Part, apply_claims, around, obey
from lib.interaction.prompts import Prompts, Voxel
from lib.interaction.regions import REGION_CLAIM, kept_regions, region_claim
from lib.storage.bounded_cache import BoundedCache
from lib.transforms.postprocess import restore_to_grid
from lib.transforms.volume import Affine, FloatArray

LabelArray = npt.NDArray[np.uint8]
MaskArray = npt.NDArray[np.bool_]
Points = npt.NDArray[np.int64]

BESIDE_VOXELS = 2.0
BEYOND_NEW_BORDER = 1.7
"""Times the distance to the border of what other clicks draw anew: how far a click takes it away again."""
MOST_REGIONS = 16
"""Clicks on one structure that may draw a region; of more, as of a scribble, the others correct the border."""


@dataclass(frozen=True)
class Edited:
    """A corrected mask.

    Attributes:
        labels: on the image's own grid, shape (X, Y, Z), with the labels that nobody clicked as they were.
        values: of the labels that were prompted.
        part: outside of it no voxel has changed; None where nothing has.
    """

    labels: LabelArray
    values: tuple[int, ...]
    part: Part | None = None


class Scene:
    """An image as the network sees it, with a mask of it.

    Args:
        image: shape (1, X, Y, Z), with the network grid's affine.
        labels: the mask that is corrected, on the image's own grid.
        affine_ras: of the image's own grid.
        regions: keeps what clicks draw where nothing is drawn; it depends on the image and the click alone.
        key: of the image there.
    """

    def __init__(
        self,
        image: MetaTensor,
        labels: LabelArray,
        affine_ras: Affine,
        regions: BoundedCache | None = None,
        key: Hashable = None,
    ) -> None:
        self._regions, self._key = regions or kept_regions(), key
        self.voxels: FloatArray = image.as_subclass(torch.Tensor)[0].numpy()
        self.affine_network: Affine = np.asarray(image.affine.numpy(), dtype=np.float64)
        self.labels, self.affine_ras = labels, affine_ras
        self.coarse = restore_to_grid(labels, affine_ras, self.voxels.shape, self.affine_network)
        self.spacing_mm = tuple(float(s) for s in np.linalg.norm(self.affine_network[:3, :3], axis=0))

    def region_of(self, seed: Points) -> Claim | None:
        """What a click draws where nothing is drawn; None where only a front grows."""
        return self._regions.get((self._key, *seed.tolist()), lambda: region_claim(self.voxels, seed, self.spacing_mm))

    def on_network(self, points: Sequence[Voxel]) -> Points:
        """Voxels of the image as voxels of the network's grid, shape (n, 3), each once."""
        to_network = np.linalg.inv(self.affine_network) @ self.affine_ras
        homogeneous = np.c_[np.array(points, dtype=float).reshape(-1, 3), np.ones(len(points))]
        places = np.rint((homogeneous @ to_network.T)[:, :3]).astype(np.int64)
        found: Points = np.unique(places.clip(0, np.array(self.voxels.shape) - 1), axis=0)
        return found


def edit_clicks(scene: Scene, prompts: Prompts, editor: Editor | None = None) -> Edited:
    """The mask after clicks; the same for the same prompts, in whatever order they were made.

    Args:
        scene: the image and the mask before.
        prompts: the clicks.
        editor: the network that says what they change; without it, and where it does not follow a click, a region
            grows around the click.
    """
    values = {value for value, _ in prompts.positive}
    if prompts.of_label is not None:
        values.add(prompts.of_label)
    elif prompts.negative:
        values |= {int(scene.labels[point]) for point in prompts.negative} - {0}
    if editor is None:
        claims = _grown_claims(scene, prompts)
    else:
        claims = [claim for value in sorted(values) for claim in _network_claims(scene, prompts, value, editor)]
    labels, parts = apply_claims(scene.labels, scene.affine_ras, claims, scene.affine_network, prompts.box)
    if editor is not None and (ignored := _ignored(labels, scene.labels, prompts)) is not None:
        claims += _grown_claims(scene, ignored)
        labels, parts = apply_claims(scene.labels, scene.affine_ras, claims, scene.affine_network, prompts.box)
    obey(labels, scene.labels, prompts)
    parts += [tuple(slice(v, v + 1) for v in point) for point in prompts.points]
    return Edited(labels, tuple(sorted(values)), around(parts))


def _grown_claims(scene: Scene, prompts: Prompts) -> list[LabelClaim]:
    """What grows around each click."""
    claims, new = [], np.zeros(scene.coarse.shape, dtype=bool)
    for value, points in prompts.positive:
        claims += _positive_claims(scene, value, points, new)
    for point in prompts.negative:
        drawn = int(scene.labels[point])
        target = drawn if prompts.of_label is None or drawn == prompts.of_label else 0
        # A click beside what is drawn still holds off the labels that were clicked.
        takes_from = (target,) if target else tuple(value for value, _ in prompts.positive)
        if target or takes_from:
            where = scene.coarse == target if target else None
            claims.append(LabelClaim(0, takes_from, _negative_claim(scene, point, where, new)))
    return claims


def _network_claims(scene: Scene, prompts: Prompts, value: int, editor: Editor) -> list[LabelClaim]:
    """What the editor adds to a label and takes away from it."""
    own = [point for label, points in prompts.positive if label == value for point in points]
    not_own = [point for label, points in prompts.positive if label != value for point in points]
    not_own += prompts.negative if prompts.of_label in (None, value) else ()
    positive, negative = scene.on_network(own), scene.on_network(not_own)
    mask = scene.coarse == value
    found = editor.probability(scene.voxels, mask, positive, negative)
    changed = connected_changes(found > 0.5, mask, positive, negative)
    if not changed.any():
        return []
    found = np.where(changed, found, mask).astype(np.float32)
    # The voxels around a change tell where it ends between voxels; further off, the mask's own border stays as drawn.
    near = ndimage.binary_dilation(changed)
    box = ndimage.find_objects(near.astype(np.uint8))[0]
    start = np.array([part.start for part in box])
    added = np.where(near[box], 2 * (1 - found[box]), NEVER).astype(np.float32)
    taken = np.where(near[box], 2 * found[box], NEVER).astype(np.float32)
    return [LabelClaim(value, (), Claim(start, added)), LabelClaim(0, (value,), Claim(start, taken))]


def connected_changes(found: MaskArray, mask: MaskArray, positive: Points, negative: Points) -> MaskArray:
    """Of what a network would change, what is connected with a prompt of that kind.

    A click that adds a part cannot take another one away, nor change what is elsewhere in the window.

    Args:
        found: what the network says, shape (X, Y, Z).
        mask: the structure as it is drawn.
        positive, negative: voxels of prompts, shape (n, 3).
    """
    kept = np.zeros(mask.shape, dtype=bool)
    for wanted, points in ((found & ~mask, positive), (mask & ~found, negative)):
        components, _ = ndimage.label(wanted)
        numbers = np.unique(components[tuple(points.T)])
        kept |= np.isin(components, numbers[numbers > 0])
    return kept


def _ignored(labels: LabelArray, before: LabelArray, prompts: Prompts) -> Prompts | None:
    """The clicks that a mask does not follow; None where there are none."""
    positive = {value: [p for p in points if labels[p] != value] for value, points in prompts.positive}
    wrong = [p for p in prompts.negative if before[p] and labels[p] == before[p]]
    wrong = [p for p in wrong if prompts.of_label in (None, int(before[p]))]
    if not wrong and not any(positive.values()):
        return None
    kept = tuple((value, tuple(points)) for value, points in positive.items() if points)
    return Prompts(kept, tuple(wrong), prompts.of_label, prompts.box)


def edit_scribbles(scene: Scene, drawn: Points, erased: Points, inside_box: Prompts) -> LabelArray:
    """The mask, 0 and 1, of one structure after scribbles.

    Args:
        scene: its mask is 1 where the structure is drawn.
        drawn, erased: voxels of the image that are scribbled as the structure's and as not the structure's; (n, 3).
        inside_box: carries the box.
    """
    mask, claims = scene.coarse == 1, []
    sides = [(1, scene.on_network([tuple(p) for p in drawn.tolist()]), False)]
    sides += [(0, scene.on_network([tuple(p) for p in erased.tolist()]), True)]
    reaches = [
        reach_of(seed.tolist(), mask, inside, scene.spacing_mm)
        for _, places, inside in sides
        for seed in places[:: 1 + len(places) // 64]
        if mask.any() or not inside
    ]
    reach = float(np.median(reaches)) if reaches else LEAST_VOXELS
    for value, places, _ in sides:
        if len(places):
            claims.append(LabelClaim(value, (), claim_around(scene.voxels, places, reach, scene.spacing_mm)))
    labels, _ = apply_claims(scene.labels, scene.affine_ras, claims, scene.affine_network, inside_box.box)
    labels[tuple(erased.T)] = 0
    labels[tuple(drawn.T)] = 1
    return labels


def _positive_claims(scene: Scene, value: int, points: Sequence[Voxel], new: MaskArray) -> list[LabelClaim]:
    """What clicks add to a structure; what is drawn where there was nothing is entered in ``new``."""
    seeds, mask = scene.on_network(points), scene.coarse == value
    near = np.array([is_drawn_nearby(seed.tolist(), mask, scene.spacing_mm) for seed in seeds], dtype=bool)
    claims = [LabelClaim(value, (), _border_claim(scene, seed, mask, MOST_VOXELS)) for seed in seeds[near]]
    # The largest region comes first, and what lies in it corrects it, in whatever order the clicks were made.
    alone, rest = seeds[~near][:MOST_REGIONS], seeds[~near][MOST_REGIONS:]
    regions = [(seed, scene.region_of(seed)) for seed in alone]
    regions.sort(key=lambda one: -int((one[1].values < 1).sum()) if one[1] is not None else 0)
    own = np.zeros(mask.shape, dtype=bool)
    for seed, region in [*regions, *((seed, None) for seed in rest)]:
        if region is None or own[tuple(seed)]:
            claim = _border_claim(scene, seed, own, FROM_NOTHING_VOXELS)
            claims.append(LabelClaim(value, (), claim))
        else:
            # It takes nothing from labels that are drawn already, but from the one that was clicked.
            claim = region
            claims.append(LabelClaim(value, (0, int(scene.coarse[tuple(seed)])), claim))
        own[claim.part] |= claim.values < 1
    new |= own
    return claims


def _border_claim(scene: Scene, seed: Points, mask: MaskArray, most: float) -> Claim:
    """What a click beside a structure adds to it: as far as its border is away."""
    reach = reach_of(seed.tolist(), mask, False, scene.spacing_mm, most)
    return claim_around(scene.voxels, seed[None], reach, scene.spacing_mm)


def _negative_claim(scene: Scene, point: Voxel, mask: MaskArray | None, new: MaskArray) -> Claim:
    """What a click takes away from a structure, or, beside it, holds off from what other clicks add."""
    seed = scene.on_network([point])[0]
    if mask is not None:
        reach = reach_of(seed.tolist(), mask, inside=True, spacing_mm=scene.spacing_mm)
    elif new[tuple(seed)]:
        away = reach_of(seed.tolist(), new, True, scene.spacing_mm, FROM_NOTHING_VOXELS)
        reach = BEYOND_NEW_BORDER * away / REGION_CLAIM
    else:
        reach = BESIDE_VOXELS
    return claim_around(scene.voxels, seed[None], reach, scene.spacing_mm)
