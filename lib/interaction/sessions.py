"""Training examples of the editor: structures in windows, corrected click by click or scribble by scribble."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import nn

from lib.interaction.annotator import Correction, next_click, next_prompt, perturb_mask
from lib.interaction.editor import Points, Window, stack_input
from lib.transforms.volume import FloatArray

LabelArray = npt.NDArray[np.uint8]
MaskArray = npt.NDArray[np.bool_]

MOST_PROMPTS = 10
SCRIBBLE_SHARE = 0.2
"""Share of the prompts of a session that are scribbles; the others are clicks."""
NETWORK_MASK, SPOILED, EMPTY = "network", "spoiled", "empty"
STARTS = {NETWORK_MASK: 0.5, SPOILED: 0.2, EMPTY: 0.3}
"""Probabilities of the initial mask of a session: a network's mask, a perturbed reference, an empty mask."""
ROTATION_DEGREES, LARGEST_ZOOM = 15.0, 0.2
COARSE_SHARE = 0.3
"""Share of the sessions with a structure wider than the window that use half the resolution."""
REGION_SHARE = 0.2
"""Share of the sessions that use a region of similar intensities instead of a labelled structure."""
REGION_REACH, LEAST_REGION, MOST_REGION = 36, 200, 0.3
"""Largest extent of such a region from its seed, smallest number of voxels, and largest share of the part around it."""
IDLE_SHARE = 0.3
"""Share of the sessions that also have redundant clicks, as clicks on other labels are."""


@dataclass(frozen=True)
class Material:
    """A case on its preset's grid.

    Attributes:
        image, truth: shape (X, Y, Z).
        network_masks: masks of the preset's network for the image and for perturbed versions of it.
    """

    image: FloatArray
    truth: LabelArray
    network_masks: tuple[LabelArray, ...] = ()


@dataclass
class Session:
    """One structure in a window, and the prompts of the annotator so far.

    Attributes:
        image, truth, mask: shape of the window; ``mask`` is the initial mask, which all prompts correct.
        current: the corrected mask that the annotator sees.
        planned: total number of clicks and scribbles.
        made: clicks and scribbles made so far; a click is one voxel.
        redundant: redundant clicks, on voxels that were right before.
    """

    image: FloatArray
    truth: MaskArray
    mask: MaskArray
    current: MaskArray
    planned: int
    made: list[tuple[Correction, ...]] = field(default_factory=list)
    redundant: list[Correction] = field(default_factory=list)

    @property
    def corrected(self) -> list[Correction]:
        """Voxels of all clicks and scribbles so far."""
        return [voxel for prompt in self.made for voxel in prompt]

    def prompt(self, random: np.random.Generator) -> bool:
        """Add one click or scribble; False if the session is over."""
        if len(self.made) >= self.planned:
            return False
        current, truth = self.current.astype(np.uint8), self.truth.astype(np.uint8)
        taken = [voxel.point for voxel in self.corrected]
        scribble = random.random() < SCRIBBLE_SHARE
        prompt = next_prompt(current, truth, (1, 1, 1), random, taken, scribble)
        if not prompt:
            return False
        self.made.append(prompt)
        return True

    def input(self) -> FloatArray:
        """The input of the network."""
        return stack_input(self.image, self.mask, self._points(1), self._points(0))

    def _points(self, value: int) -> Points:
        points = [c.point for c in (*self.corrected, *self.redundant) if c.value == value]
        return np.array(points, dtype=np.int64).reshape(-1, 3)


def begin_session(material: Material, window: Window, random: np.random.Generator) -> Session:
    """Start a session: a structure of a case, its initial mask, and a window around the first click."""
    region = region_alike(material.image, random) if random.random() < REGION_SHARE else None
    if region is not None:
        truth = region
        mask = np.zeros_like(truth) if random.random() < 0.7 else perturb_mask(truth, random)
    else:
        values = np.unique(material.truth)
        value = int(random.choice(values[values > 0])) if values.any() else 1
        truth = material.truth == value
        mask = _starting_mask(material, truth, value, random)
    first = next_click(mask.astype(np.uint8), truth.astype(np.uint8), (1, 1, 1), random)
    centre = np.array(first.point if first is not None else np.array(truth.shape) // 2)
    widest = max((part.stop - part.start for part in _box(truth)), default=0)
    coarse = widest > max(window) and random.random() < COARSE_SHARE
    image, right, drawn = _cut(material.image, truth, mask, centre, window, 2 if coarse else 1, random)
    session = Session(_change(image, random), right, drawn, drawn, int(random.integers(1, MOST_PROMPTS + 1)))
    if random.random() < IDLE_SHARE:
        session.redundant = _redundant_clicks(right, drawn, random)
    return session


def region_alike(image: FloatArray, random: np.random.Generator) -> MaskArray | None:
    """A connected region of similar intensities around a random voxel; None if no region of suitable size is found.

    Such regions teach the network to segment structures that are not among the labels.
    """
    for _ in range(4):
        seed = np.array([int(random.integers(0, n)) for n in image.shape])
        low = np.maximum(seed - REGION_REACH, 0)
        part = tuple(slice(int(a), int(b) + REGION_REACH + 1) for a, b in zip(low, seed, strict=True))
        smooth = ndimage.gaussian_filter(image[part], random.uniform(0.5, 1.5))
        at = tuple(seed - low)
        alike = abs(smooth - smooth[at]) < random.uniform(0.1, 0.5) * float(smooth.std())
        # Morphological opening keeps a region from leaking through a narrow bridge into its neighbour.
        depth = int(random.integers(1, 4))
        opened = ndimage.binary_erosion(alike, iterations=depth)
        components, _ = ndimage.label(opened)
        around = tuple(slice(max(0, int(v) - depth - 1), int(v) + depth + 2) for v in at)
        numbers = np.bincount(components[around].ravel())
        numbers[0] = 0
        if not numbers.any():
            continue
        grown = ndimage.binary_dilation(components == int(numbers.argmax()), iterations=depth) & alike
        if LEAST_REGION <= int(grown.sum()) <= MOST_REGION * grown.size:
            region = np.zeros(image.shape, dtype=bool)
            region[part] = ndimage.binary_fill_holes(grown)
            return region
    return None


def _starting_mask(material: Material, truth: MaskArray, value: int, random: np.random.Generator) -> MaskArray:
    kind = str(random.choice(list(STARTS), p=list(STARTS.values())))
    if kind == EMPTY:
        return np.zeros_like(truth)
    if kind == NETWORK_MASK and material.network_masks:
        mask: MaskArray = material.network_masks[int(random.integers(len(material.network_masks)))] == value
        return mask
    return perturb_mask(truth, random)


def _cut(
    image: FloatArray, truth: MaskArray, mask: MaskArray, centre: npt.NDArray[np.int64], window: Window, factor: int,
    random: np.random.Generator,
) -> tuple[FloatArray, MaskArray, MaskArray]:  # fmt: skip
    """Image and masks in a window around ``centre``, with a random rotation, zoom and flip."""
    size = np.array(window) * factor
    shape = np.array(image.shape)
    middle = centre + random.integers(-4, 5, 3) * factor
    # Where the volume is at least as large as the window, the window lies inside of it, as in the editor.
    middle = np.where(shape > size, np.clip(middle, size // 2, shape - size + size // 2), shape // 2)
    turn = _rotation(np.deg2rad(random.uniform(-ROTATION_DEGREES, ROTATION_DEGREES, 3)))
    turn = turn * random.uniform(1 - LARGEST_ZOOM, 1 + LARGEST_ZOOM)
    if random.random() < 0.5:
        turn[0] *= -1
    # Only the part of the volume that the rotated window can cover is sampled, since a whole CT would take long.
    reach = int(np.ceil(np.linalg.norm(size) / 2 * (1 + LARGEST_ZOOM))) + 2
    low, high = np.maximum(middle - reach, 0), np.minimum(middle + reach, shape)
    part = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    stacked = np.stack([image[part], truth[part], mask[part]]).astype(np.float32)
    extent = (high - low).astype(float)
    # grid_sample expects coordinates from -1 to 1 along each axis, in reverse order of the axes.
    half = size / 2
    matrix = np.zeros((3, 4))
    matrix[:, :3] = turn * half[None, :] / (extent[:, None] / 2)
    matrix[:, 3] = 2 * (middle - low) / extent - 1
    theta = torch.from_numpy(np.c_[matrix[::-1, :3][:, ::-1], matrix[::-1, 3]].astype(np.float32))[None]
    grid = nn.functional.affine_grid(theta, [1, 1, *(int(s) for s in size)], align_corners=False)
    given = torch.from_numpy(stacked)[None]
    cut = nn.functional.grid_sample(given[:, :1], grid, padding_mode="border", align_corners=False)
    masks = nn.functional.grid_sample(given[:, 1:], grid, padding_mode="zeros", align_corners=False)
    if factor > 1:
        cut, masks = nn.functional.avg_pool3d(cut, factor), nn.functional.avg_pool3d(masks, factor)
    return cut[0, 0].numpy(), masks[0, 0].numpy() > 0.5, masks[0, 1].numpy() > 0.5


def _rotation(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [other for other in range(3) if other != axis]
        one = np.eye(3)
        one[a, a] = one[b, b] = np.cos(angle)
        one[a, b], one[b, a] = -np.sin(angle), np.sin(angle)
        turn = turn @ one
    return turn


def _change(image: FloatArray, random: np.random.Generator) -> FloatArray:
    """Random contrast, brightness and noise."""
    changed = image * random.uniform(0.85, 1.15) + random.uniform(-0.15, 0.15)
    if random.random() < 0.3:
        changed = changed + random.normal(0, random.uniform(0, 0.1), image.shape)
    return changed.astype(np.float32)


def _redundant_clicks(truth: MaskArray, mask: MaskArray, random: np.random.Generator) -> list[Correction]:
    """Redundant clicks, on voxels that are right already."""
    made = []
    for value, right in ((1, truth & mask), (0, ~truth & ~mask)):
        places = np.argwhere(right)
        for _ in range(int(random.integers(0, 4)) if len(places) else 0):
            x, y, z = (int(v) for v in places[int(random.integers(len(places)))])
            made.append(Correction(value, (x, y, z)))
    return made


def _box(mask: MaskArray) -> tuple[slice, ...]:
    """The bounding box of a mask; () for an empty one."""
    sides = []
    for axis in range(mask.ndim):
        places = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not len(places):
            return ()
        sides.append(slice(int(places[0]), int(places[-1]) + 1))
    return tuple(sides)
