"""Synthetic abdominal CT with the 13 organs of BTCV, drawn from a statistical model; no patient is in it.

    >>> from synthetic_abdomen import draw_abdomen
    >>> case = draw_abdomen(0, seed=0)
    >>> case.image_hu.shape, case.image_hu.dtype, int(case.label.max())
    ((256, 192, 104), dtype('int16'), 13)

A drawn shape deforms mean signed distances of the organs and mean shares of tissue. Inside an organ its mean Hounsfield
units hold; elsewhere a smooth random field decides, voxel by voxel, between fat and soft tissue, as often as the mean
share says, so that a picture has borders and not the blur of a mean. ``fit_abdomen_model.py`` makes the model.

Case ``i`` of seed ``s`` is the same wherever and however often it is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage, special
from statistical_model import dequantised, draw_modes
from synthetic_hippocampus import warp
from torso_phantom import AIR_HU, TorsoCase

Array = npt.NDArray[np.float32]

MODEL_FILE = Path(__file__).with_name("abdomen_model.npz")
GRID = (128, 96, 104)
SPACING_MM = 3.0
FINER = (2, 2, 1)
"""Voxels of a drawn case for one of the grid, along each axis: 1.5 mm in the plane, slices of 3 mm."""
SHAPE_STEP = 4
"""Voxels of the grid for one of the shape's, along each axis."""
COEFFICIENT_LIMIT = 1.5
"""Standard deviations: what lies beyond is as likely a broken shape as a rare one."""
SIZE_DEVIATION = 0.05
FAT_HU, SOFT_TISSUE_HU, LUNG_HU = -100.0, 45.0, -850.0
CONTRAST_HU = 120.0
"""Of bowel that holds oral contrast."""
BONE_FROM, BONE_HU = 0.42, (120.0, 380.0)
"""Share of bright tissue from which a voxel is bone, and what bone has from there to the share of 0.9."""
LUNG_FROM = 0.5
FIELD_SIGMAS = ((2.2, 0.85), (1.0, 0.5), (0.5, 0.15))
"""Smoothness in voxels of the grid, and weight, of the parts of the random field; chosen by eye."""
TEXTURE_HU, ORGAN_HU = 8.0, 6.0
"""Standard deviation of soft tissue from place to place, and of an organ from case to case."""
NOISE_HU = 12.0


@dataclass(frozen=True)
class AbdomenModel:
    """Means and modes over all fitted cases, on a grid G of 3 mm voxels (axes right, anterior, superior) and on one of
    12 mm, H.

    Attributes:
        distances_mm: signed distances of the 13 organs, negative inside, within 12 mm of their borders, shape (13, *G).
        shares: of the body, and, in it and outside the organs, of air, of fat beside soft tissue, and of bright tissue
            (bone and oral contrast), 0 to 1, shape (4, *G).
        organ_hu: median Hounsfield units of each organ, shape (13,).
        shape_mean: field from a case's place to the common shape's, in voxels of G, shape (3, *H).
        shape_modes: of unit length, shape (S, 3, *H).
        shape_deviations: of their coefficients, shape (S,).
        cases: how many were fitted, shape (1,).

    Raises:
        ValueError: for another number of deviations than of modes.
    """

    distances_mm: Array
    shares: Array
    organ_hu: Array
    shape_mean: Array
    shape_modes: Array
    shape_deviations: Array
    cases: Array

    def __post_init__(self) -> None:
        if len(self.shape_modes) != len(self.shape_deviations):
            raise ValueError(
                f"{len(self.shape_modes)} modes have {len(self.shape_deviations)} deviations; they must be as many"
            )

    @classmethod
    def from_arrays(cls, stored: Mapping[str, npt.NDArray[np.generic]]) -> AbdomenModel:
        """From the file's arrays: what is 8-bit there has a scale each under ``<name>_scale``."""
        arrays = dequantised(stored)
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


@lru_cache(maxsize=1)
def load_model() -> AbdomenModel:
    """The fitted model.

    Raises:
        FileNotFoundError: when it has not been fitted; ``fit_abdomen_model.py`` makes it.
    """
    with np.load(MODEL_FILE, allow_pickle=False) as stored:
        return AbdomenModel.from_arrays({name: stored[name] for name in stored.files})


def draw_abdomen(index: int, seed: int = 0) -> TorsoCase:
    """Draw case number ``index`` of a seed, 256x192x104 voxels of 1.5x1.5x3 mm.

    Raises:
        ValueError: for a negative index or seed.
        FileNotFoundError: when the model is missing.
    """
    if min(index, seed) < 0:
        raise ValueError(f"index ({index}) and seed ({seed}) must be 0 or more")
    model, random = load_model(), np.random.default_rng([seed, index])
    field = _draw_shape(model, random)
    label = _draw_organs(model, field)
    body, air, fat, bright = (_finer(warp(share, field, order=1)) for share in model.shares)
    image = _draw_tissue(air, fat, bright, random)
    for number, hu in enumerate(model.organ_hu, start=1):
        image[label == number] = hu + ORGAN_HU * random.standard_normal()
    image[body < 0.5] = AIR_HU
    label[body < 0.5] = 0
    voxel_mm = SPACING_MM / np.array(FINER) * (1 + SIZE_DEVIATION * np.clip(random.standard_normal(3), -2, 2))
    affine_ras = np.diag([*voxel_mm.round(3), 1.0])
    affine_ras[:3, 3] = np.round(-affine_ras.diagonal()[:3] * np.array(image.shape) / 2, 1)
    return TorsoCase(_scan(image, random), label, affine_ras)


def _draw_shape(model: AbdomenModel, random: np.random.Generator) -> Array:
    """A field on the model's grid: the mean shape, and a random sum of modes, each within the limit."""
    coarse = model.shape_mean + draw_modes(model.shape_modes, model.shape_deviations, random, COEFFICIENT_LIMIT)
    return np.stack([ndimage.zoom(part, SHAPE_STEP, order=1, mode="nearest", grid_mode=True) for part in coarse])


def _draw_organs(model: AbdomenModel, field: Array) -> npt.NDArray[np.uint8]:
    """At each voxel the organ that it lies deepest in."""
    shape = tuple(size * finer for size, finer in zip(GRID, FINER, strict=True))
    nearest, label = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.uint8)
    for number, distances in enumerate(model.distances_mm, start=1):
        warped = warp(distances, field, order=1)
        places = np.argwhere(warped < SPACING_MM)
        if not len(places):
            continue
        box = [slice(int(low), int(high) + 1) for low, high in zip(places.min(0), places.max(0), strict=True)]
        finer = _finer(warped[tuple(box)])
        there = tuple(slice(side.start * n, side.stop * n) for side, n in zip(box, FINER, strict=True))
        deeper = finer < nearest[there]
        nearest[there][deeper] = finer[deeper]
        label[there][deeper] = number
    return label


def _draw_tissue(air: Array, fat: Array, bright: Array, random: np.random.Generator) -> Array:
    """Hounsfield units outside the organs, from the shares of tissue."""
    parts = [weight * _smooth_noise(air.shape, sigma, random) for sigma, weight in FIELD_SIGMAS]
    rank = special.ndtr(np.sum(parts, axis=0))
    image = np.where(rank < fat, FAT_HU, SOFT_TISSUE_HU)
    image[rank > 1 - 0.6 * bright.clip(0, BONE_FROM)] = CONTRAST_HU
    bone = bright > BONE_FROM
    image[bone] = np.interp(bright[bone], (BONE_FROM, 0.9), BONE_HU)
    image += TEXTURE_HU * _smooth_noise(air.shape, 3.0, random)
    image[air > LUNG_FROM] = LUNG_HU
    tissue: Array = image.astype(np.float32)
    return tissue


def _scan(image: Array, random: np.random.Generator) -> npt.NDArray[np.int16]:
    """Blur and noise of a scanner."""
    blurred = ndimage.gaussian_filter(image, 0.45 * np.array(FINER))
    noisy = blurred + NOISE_HU * _smooth_noise(image.shape, 0.4, random)
    scanned: npt.NDArray[np.int16] = np.rint(noisy.clip(AIR_HU, 3000)).astype(np.int16)
    return scanned


def _smooth_noise(shape: tuple[int, ...], sigma: float, random: np.random.Generator) -> Array:
    """Normal noise of variance 1, smooth over ``sigma`` voxels of the model's grid."""
    noise = ndimage.gaussian_filter(random.standard_normal(shape, dtype=np.float32), sigma * np.array(FINER))
    smooth: Array = noise / noise.std()
    return smooth


def _finer(part: Array) -> Array:
    """From voxels of the model's grid to those of a drawn case."""
    finer: Array = ndimage.zoom(part, FINER, order=1, mode="nearest", grid_mode=True)
    return finer
