"""Turns prompts into a corrected mask: computes the claims of each click on the network's grid and merges them into the
mask.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from scipy import ndimage

from lib.infers.logit_margins import LogitMargins
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
from lib.interaction.margins.correction import Evidence, evidence_of, margin_claims
from lib.interaction.merge import LabelClaim, Part, apply_claims, enclosing_part, enforce_prompts
from lib.interaction.prompts import Prompts, Voxel
from lib.interaction.regions.cut import part_of
from lib.interaction.regions.joint import Drawn, share_within, sorted_regions, structure_claim
from lib.interaction.regions.single import kept_regions, region_claim
from lib.storage.bounded_cache import BoundedCache
from lib.transforms.postprocess import restore_to_grid
from lib.transforms.volume import Affine, FloatArray

LabelArray = npt.NDArray[np.uint8]
MaskArray = npt.NDArray[np.bool_]
Points = npt.NDArray[np.int64]

BESIDE_VOXELS = 2.0
LEAST_SHARED = 0.5
"""Of the region of a click that lies in another one: how much of it does, where it is one of the same structure."""
MOST_REGIONS = 16
"""Clicks on one structure that may draw a region; of more, as of a scribble, the others correct the border."""


@dataclass(frozen=True)
class Edited:
    """A corrected mask.

    Attributes:
        labels: on the image's own grid, shape (X, Y, Z); labels that were not prompted are unchanged.
        values: values of the labels that were prompted.
        part: box outside of which no voxel has changed; None where none has changed at all.
    """

    labels: LabelArray
    values: tuple[int, ...]
    part: Part | None = None


class Scene:
    """A preprocessed image together with a mask of it.

    Args:
        image: shape (1, X, Y, Z), with the affine of the network's grid.
        labels: the mask to correct, on the image's own grid.
        affine_ras: affine of the image's own grid.
        regions: cache of the regions around clicks where nothing is drawn; a region depends on the image and its click
            alone.
        key: key of the image in that cache.
        margins: by how much the network preferred the chosen label at each voxel; None where no network segmented the
            image.
    """

    def __init__(
        self,
        image: MetaTensor,
        labels: LabelArray,
        affine_ras: Affine,
        regions: BoundedCache | None = None,
        key: Hashable = None,
        margins: LogitMargins | None = None,
    ) -> None:
        self._regions, self._key = regions or kept_regions(), key
        self.margins = margins
        self.voxels: FloatArray = image.as_subclass(torch.Tensor)[0].numpy()
        self.affine_network: Affine = np.asarray(image.affine.numpy(), dtype=np.float64)
        self.labels, self.affine_ras = labels, affine_ras
        self.coarse = restore_to_grid(labels, affine_ras, self.voxels.shape, self.affine_network)
        self.spacing_mm = tuple(float(s) for s in np.linalg.norm(self.affine_network[:3, :3], axis=0))

    def region_of(self, seed: Points) -> Claim | None:
        """The region around a click where nothing is drawn; None where only front propagation applies."""
        key = (self._key, *seed.tolist())
        return self._regions.get(key, lambda: region_claim(self.voxels, seed, self.spacing_mm), _size)

    def structure_of(self, drawn: Sequence[Drawn], guess: MaskArray, negative: Points, walls: MaskArray) -> Claim:
        """The structure that all clicks on it segment together; ``guess`` is what each positive click does alone."""
        positive = np.array([one.seed for one in drawn])
        part = part_of(guess, positive)
        inside = [all(s.start <= v < s.stop for v, s in zip(place, part, strict=True)) for place in negative.tolist()]
        others, near = negative[np.array(inside, dtype=bool)], walls[part]
        # Clicks outside of this part have no effect and are left out of the key, since each new click repeats all the
        # others.
        walled = np.packbits(near).tobytes() if near.any() else b""
        return self._regions.get(
            (self._key, positive.tobytes(), others.tobytes(), sha256(walled).digest()),
            lambda: structure_claim(self.voxels, drawn, others, walls, self.spacing_mm),
            _size,
        )

    def place_of(self, point: Voxel) -> Voxel:
        """The voxel of the network's grid that corresponds to a voxel of the image."""
        x, y, z = (int(v) for v in self.on_network([point])[0])
        return x, y, z

    def evidence_at(self, seed: Points, value: int) -> Evidence:
        """The statement that one label is right at a voxel of the network's grid and the label drawn there is wrong."""
        x, y, z = (int(v) for v in seed)
        drawn = int(self.coarse[x, y, z])
        return evidence_of(self.coarse, self.spacing_mm, (x, y, z), value, drawn if drawn != value else 0)

    def on_network(self, points: Sequence[Voxel]) -> Points:
        """Voxels of the image as distinct voxels of the network's grid, shape (n, 3)."""
        to_network = np.linalg.inv(self.affine_network) @ self.affine_ras
        homogeneous = np.c_[np.array(points, dtype=float).reshape(-1, 3), np.ones(len(points))]
        places = np.rint((homogeneous @ to_network.T)[:, :3]).astype(np.int64)
        voxels: Points = np.unique(places.clip(0, np.array(self.voxels.shape) - 1), axis=0)
        return voxels


def _size(claim: Claim | None) -> int:
    """Bytes of memory that a cached claim takes."""
    return 1 if claim is None else claim.values.nbytes


def edit_clicks(scene: Scene, prompts: Prompts, editor: Editor | None = None) -> Edited:
    """The mask after clicks, which does not depend on the order of the clicks.

    Args:
        scene: the image and the mask to correct.
        prompts: the clicks.
        editor: the editor network. Without one, and where it does not follow a click, a region grows around the click.
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
    enforce_prompts(labels, scene.labels, prompts)
    parts += [tuple(slice(v, v + 1) for v in point) for point in prompts.points]
    return Edited(labels, tuple(sorted(values)), enclosing_part(parts))


def _grown_claims(scene: Scene, prompts: Prompts) -> list[LabelClaim]:
    """The change around each click, computed from the network's logit margins, or else by region growing."""
    claims, corrected, evidence = list[LabelClaim](), False, list[Evidence]()
    for value, points in prompts.positive:
        seeds, mask = scene.on_network(points), scene.coarse == value
        near = np.array([is_drawn_nearby(seed.tolist(), mask, scene.spacing_mm) for seed in seeds], dtype=bool)
        # If the network has drawn any of the structure, a click on a missing part is a correction at any distance.
        near |= scene.margins is not None and mask.any()
        if scene.margins is not None:
            evidence += [scene.evidence_at(seed, value) for seed in seeds[near]]
        else:
            claims += [LabelClaim(value, (), _border_claim(scene, seed, mask, MOST_VOXELS)) for seed in seeds[near]]
        corrected |= bool(near.any())
        if not near.all():
            claims.append(_new_structure(scene, prompts, value, seeds[~near]))
    for point in prompts.negative:
        drawn = int(scene.labels[point])
        target = drawn if prompts.of_label is None or drawn == prompts.of_label else 0
        # A negative click next to a structure still keeps the clicked labels away from its voxel.
        takes_from = (target,) if target else tuple(value for value, _ in prompts.positive)
        if scene.margins is not None:
            place = scene.place_of(point)
            evidence += [evidence_of(scene.coarse, scene.spacing_mm, place, 0, value) for value in takes_from]
        elif target or corrected:
            claims.append(LabelClaim(0, takes_from, _negative_claim(scene, point, target)))
    if scene.margins is not None:
        claims += margin_claims(scene.margins, scene.coarse, scene.spacing_mm, evidence)
    return claims


def _network_claims(scene: Scene, prompts: Prompts, value: int, editor: Editor) -> list[LabelClaim]:
    """The voxels that the editor network adds to a label and removes from it."""
    own = [point for label, points in prompts.positive if label == value for point in points]
    not_own = [point for label, points in prompts.positive if label != value for point in points]
    not_own += prompts.negative if prompts.of_label in (None, value) else ()
    positive, negative = scene.on_network(own), scene.on_network(not_own)
    mask = scene.coarse == value
    probability = editor.probability(scene.voxels, mask, positive, negative)
    changed = connected_changes(probability > 0.5, mask, positive, negative)
    if not changed.any():
        return []
    probability = np.where(changed, probability, mask).astype(np.float32)
    # Voxels next to a change place its border between voxels; further away the mask keeps its border.
    near = ndimage.binary_dilation(changed)
    box = ndimage.find_objects(near.astype(np.uint8))[0]
    start = np.array([part.start for part in box])
    added = np.where(near[box], 2 * (1 - probability[box]), NEVER).astype(np.float32)
    taken = np.where(near[box], 2 * probability[box], NEVER).astype(np.float32)
    return [LabelClaim(value, (), Claim(start, added)), LabelClaim(0, (value,), Claim(start, taken))]


def connected_changes(predicted: MaskArray, mask: MaskArray, positive: Points, negative: Points) -> MaskArray:
    """The changed voxels of a prediction that are connected with a prompt of the right kind.

    A click that adds a part can then neither remove another part nor change anything elsewhere in the window.

    Args:
        predicted: the mask that the network predicts, shape (X, Y, Z).
        mask: the structure before the prediction.
        positive, negative: voxels of the prompts, shape (n, 3).
    """
    kept = np.zeros(mask.shape, dtype=bool)
    for wanted, points in ((predicted & ~mask, positive), (mask & ~predicted, negative)):
        components, _ = ndimage.label(wanted)
        numbers = np.unique(components[tuple(points.T)])
        kept |= np.isin(components, numbers[numbers > 0])
    return kept


def _ignored(labels: LabelArray, before: LabelArray, prompts: Prompts) -> Prompts | None:
    """The clicks that the mask does not satisfy; None if it satisfies all of them."""
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
        scene: the image and its mask, which is 1 in the structure.
        drawn, erased: voxels of the image under foreground and background scribbles, shape (n, 3).
        inside_box: prompts that carry the box.
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


def _new_structure(scene: Scene, prompts: Prompts, value: int, seeds: Points) -> LabelClaim:
    """The claim of clicks on a structure of which nothing is drawn near them.

    Args:
        scene: the image and the mask to correct.
        prompts: all clicks.
        value: value of the structure.
        seeds: its clicks where nothing is drawn, on the network's grid; shape (n, 3).
    """
    others = [point for label, points in prompts.positive if label != value for point in points]
    others += prompts.negative if prompts.of_label in (None, value) else ()
    negative = scene.on_network(others)
    own_regions = [(seed, scene.region_of(seed)) for seed in seeds[:MOST_REGIONS]]
    regions = sorted_regions(scene.voxels, own_regions, seeds, negative, scene.spacing_mm)
    # A click inside an earlier region of this list corrects or extends that region, whatever the order of the clicks.
    guess, drawn = np.zeros(scene.coarse.shape, dtype=bool), []
    for seed, region in [*regions, *((seed, None) for seed in seeds[MOST_REGIONS:])]:
        claim = region
        if claim is None or (guess[tuple(seed)] and share_within(claim, guess) < LEAST_SHARED):
            claim = _border_claim(scene, seed, guess, FROM_NOTHING_VOXELS)
        guess[claim.part] |= claim.values < 1
        drawn.append(Drawn(seed, claim, claim is region))
    # The claim takes no voxels of labels that are drawn already, except of those that were clicked.
    takes_from = tuple(sorted({0, *(int(v) for v in scene.coarse[tuple(seeds.T)])}))
    walls = ~np.isin(scene.coarse, (*takes_from, value))
    return LabelClaim(value, takes_from, scene.structure_of(drawn, guess, negative, walls))


def _border_claim(scene: Scene, seed: Points, mask: MaskArray, most: float) -> Claim:
    """The voxels that a click next to a structure adds to it; the claim reaches as far as the border is away."""
    reach = reach_of(seed.tolist(), mask, False, scene.spacing_mm, most)
    return claim_around(scene.voxels, seed[None], reach, scene.spacing_mm)


def _negative_claim(scene: Scene, point: Voxel, target: int) -> Claim:
    """The voxels that a click removes from the label ``target``, or, for 0, protects from the other clicks."""
    seed, reach = scene.on_network([point])[0], BESIDE_VOXELS
    if target:
        reach = reach_of(seed.tolist(), scene.coarse == target, inside=True, spacing_mm=scene.spacing_mm)
    return claim_around(scene.voxels, seed[None], reach, scene.spacing_mm)
