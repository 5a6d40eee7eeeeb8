"""Fits the statistical model of abdominal CT that the synthetic cases are drawn from.

    python sample-data/fit_abdomen_model.py --data ../shared/data/btcv_ct

It takes about six minutes on one core. Every case is scaled and moved such that its organs and its outline lie where
they lie on average, and is then warped onto a common shape (``registration.py``). The file holds mean signed distances
of the organs, mean shares of tissue, and the mean and principal modes of the warps, and no case.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import nibabel.affines
import numpy as np
import numpy.typing as npt
from registration import invert, register_to_common_shape
from scipy import ndimage
from statistical_model import (
    Array,
    Arrays,
    block_means,
    check_shares,
    fit_parser,
    principal_modes,
    quantised,
    save_model,
)
from synthetic_abdomen import BONE_FROM, GRID, MODEL_FILE, SHAPE_STEP, SPACING_MM
from synthetic_hippocampus import double, warp
from torso_phantom import ORGANS

Mask = npt.NDArray[np.bool_]

LEAST_HU, AIR_BELOW_HU, FAT_BELOW_HU, BRIGHT_FROM_HU = -125.0, -112.0, -20.0, 135.0
"""The data's lower end, and the limits between its classes of tissue."""
SHAPE_MODES = 4
FARTHEST_MM = 12.0
OUTLINE_WEIGHT = 3.0
"""How many organs an end of the body's outline counts for."""
ROUNDS = ((40, 2.5), (50, 2.0), (60, 1.5), (60, 1.2))
"""Of the registration, on a grid of 6 mm."""
GUIDE_VALUES = (1.5, 1.9, 1.9, 0.75, 1.7, 1.3, 1.0, 2.3, 2.0, 1.9, 1.6, 1.8, 1.8)
"""What each organ is painted with for the registration; soft tissue has about 0.5, bone 1."""
LUNG_VALUE, OUTSIDE_VALUE = -0.6, -1.0
RIB_SHARE, RIB_OF_LARGEST, RIB_DEPTH_MM = 0.13, 0.62, (6.0, 32.0)
"""Where ribs are: bright tissue near the surface, and more of it than beside."""
SOURCE = (
    "MICCAI 2015 Multi-Atlas Labeling Beyond the Cranial Vault, abdomen (Synapse syn3193805), by way of a public "
    "repository that keeps 8-bit slices"
)


@dataclass(frozen=True)
class ReadCase:
    """A case at 3 mm, axes right, anterior, superior, air outside the body.

    Attributes:
        image_hu, label, body: of one shape.
        centres_mm: organ's number to its centre, from the first voxel.
        outline_mm: the body's ends right and left, back and front, in the slices of the large organs, shape (2, 2).
    """

    image_hu: Array
    label: npt.NDArray[np.uint8]
    body: Mask
    centres_mm: Mapping[int, npt.NDArray[np.float64]]
    outline_mm: npt.NDArray[np.float64]


@dataclass(frozen=True)
class AlignedCase:
    """A case on the common grid.

    Attributes:
        image_hu, label, body: shape ``GRID``.
        known: where the scan reaches, shape ``GRID``.
    """

    image_hu: Array
    label: npt.NDArray[np.uint8]
    body: Mask
    known: Mask


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit the model, and write it with its side-car.

    Returns:
        0; 2 with a sentence when there are too few cases.
    """
    options = fit_parser(__doc__, "btcv_ct", MODEL_FILE).parse_args(arguments)
    labels = sorted((options.data / "labels").glob("*.nii.gz"))
    if len(labels) < 4 * SHAPE_MODES:
        print(f"error: --data {options.data} has {len(labels)} cases; needed: {4 * SHAPE_MODES}", file=sys.stderr)
        return 2
    cases = align([read_case(options.data / "images" / path.name, path) for path in labels])
    fields = register_to_common_shape(draw_guides(cases), options.jobs, ROUNDS)
    save_model(options.out, fit(cases, fields), describe(len(cases)))
    return 0


def describe(cases: int) -> dict[str, object]:
    """What the model is, from which data, and what is known of their licence."""
    return {
        "what": "Statistical model of abdominal CT: mean distances, shares of tissue and modes of shape, no case",
        "labels": ORGANS,
        "cases": cases,
        "source": SOURCE,
        "licence": "CC BY 4.0, as the CADS data set, eva and a public hub list the data; Synapse's words are not known",
        "licence_url": "https://creativecommons.org/licenses/by/4.0/",
        "changes": "fitted by fit_abdomen_model.py; the cases' voxels are not in it",
    }


def read_case(image_path: Path, label_path: Path) -> ReadCase:
    """Read a case, bring it to 3 mm, and find its body, organs and outline."""
    image, label = (nib.as_closest_canonical(nib.load(path)) for path in (image_path, label_path))
    steps = SPACING_MM / np.asarray(nib.affines.voxel_sizes(image.affine))
    shape = tuple(int(size) for size in np.floor((np.array(image.shape) - 1) / steps) + 1)
    # what is finer than 3 mm is averaged
    smooth = ndimage.gaussian_filter(
        np.asarray(image.dataobj, dtype=np.float32), 0.42 * np.sqrt((steps**2 - 1).clip(0))
    )
    image_hu = ndimage.affine_transform(smooth, steps, output_shape=shape, order=1, mode="nearest")
    values = np.asarray(label.dataobj).round().astype(np.uint8)
    labels = ndimage.affine_transform(values, steps, output_shape=shape, order=0, mode="nearest")
    body = find_body(image_hu)
    places = {number: np.argwhere(labels == number) for number in ORGANS.values()}
    centres = {number: voxels.mean(axis=0) * SPACING_MM for number, voxels in places.items() if len(voxels) > 5}
    heights = np.concatenate(
        [places[ORGANS[name]][:, 2] for name in ("spleen", "right_kidney", "left_kidney", "liver")]
    )
    low, high = np.percentile(heights, (20, 80)).astype(int)
    slices = [np.argwhere(body[:, :, z]) for z in range(low, high)]
    outline = np.mean([(voxels.min(axis=0), voxels.max(axis=0)) for voxels in slices], axis=0).T * SPACING_MM
    return ReadCase(np.where(body, image_hu, np.float32(LEAST_HU)), labels, body, centres, outline)


def find_body(image_hu: Array) -> Mask:
    """The largest piece of each slice that is not air, without holes: neither the table nor clothes."""
    solid: Mask = ndimage.binary_opening(image_hu > -110, iterations=2)
    body: Mask = np.zeros_like(solid)
    for z in range(solid.shape[2]):
        pieces, count = ndimage.label(solid[:, :, z])
        if count:
            largest = np.bincount(pieces.ravel())[1:].argmax() + 1
            body[:, :, z] = ndimage.binary_fill_holes(pieces == largest)
    return body


def align(cases: Sequence[ReadCase]) -> list[AlignedCase]:
    """Scale and move each case, axis by axis, to where organs and outline lie on average.

    Procrustes analysis (Gower 1975, doi:10.1007/BF02291478) with scales of mean 1 instead of rotations.
    """
    centres = [case.centres_mm for case in cases]
    outlines = [case.outline_mm for case in cases]
    for _ in range(4):
        mean_centres = {n: np.mean([c[n] for c in centres if n in c], axis=0) for n in ORGANS.values()}
        mean_outline = np.mean(outlines, axis=0)
        fits = np.array([_fit_axes(case, mean_centres, mean_outline) for case in cases])
        fits /= np.exp(np.log(fits[:, :, 0]).mean(axis=0))[:, None]
        scaled = list(zip(cases, fits[:, :, 0], fits[:, :, 1], strict=True))
        centres = [{n: scale * c + move for n, c in case.centres_mm.items()} for case, scale, move in scaled]
        outlines = [scale[:2, None] * case.outline_mm + move[:2, None] for case, scale, move in scaled]
    mean_centres = {n: np.mean([c[n] for c in centres if n in c], axis=0) for n in ORGANS.values()}
    height = (mean_centres[ORGANS["liver"]][2] + mean_centres[ORGANS["right_kidney"]][2]) / 2 - 25
    middle = np.array([*np.mean(outlines, axis=(0, 2)), height])
    origin = middle - np.array(GRID) * SPACING_MM / 2
    return [_onto_grid(case, 1 / scale, (origin - move) / scale / SPACING_MM) for case, scale, move in scaled]


def _fit_axes(
    case: ReadCase, centres_mm: Mapping[int, npt.NDArray[np.float64]], outline_mm: npt.NDArray[np.float64]
) -> list[npt.NDArray[np.float64]]:
    """Scale and shift of each axis, by least squares."""
    fits = []
    for axis in range(3):
        outline = axis < 2
        own = [c[axis] for c in case.centres_mm.values()] + (list(case.outline_mm[axis]) if outline else [])
        mean = [centres_mm[n][axis] for n in case.centres_mm] + (list(outline_mm[axis]) if outline else [])
        weights = np.array([1.0] * len(case.centres_mm) + [OUTLINE_WEIGHT] * (2 if outline else 0))
        scale, move = np.polyfit(own, mean, 1, w=np.sqrt(weights))
        fits.append(np.array([scale, move]))
    return fits


def _onto_grid(case: ReadCase, steps: npt.NDArray[np.float64], start: npt.NDArray[np.float64]) -> AlignedCase:
    def resample(volume: npt.NDArray[Any], order: int, outside: float) -> npt.NDArray[Any]:
        moved: npt.NDArray[Any] = ndimage.affine_transform(
            volume, steps, start, GRID, order=order, mode="constant", cval=outside
        )
        return moved

    reached = resample(np.ones(case.label.shape, dtype=np.float32), 0, 0).any(axis=(0, 1))  # beside the field is air
    return AlignedCase(
        image_hu=resample(case.image_hu, 1, LEAST_HU).astype(np.float32),
        label=resample(case.label, 0, 0).astype(np.uint8),
        body=resample(case.body.astype(np.float32), 1, 0) > 0.5,
        known=np.broadcast_to(reached, GRID),
    )


def draw_guides(cases: Sequence[AlignedCase]) -> list[Array]:
    """What is registered, at 6 mm: tissue with painted organs; where a scan ends, the mean of the others."""
    guides = []
    for case in cases:
        guide = ((case.image_hu - LEAST_HU) / 350).clip(0, 1)
        guide[ndimage.binary_opening(case.body & (case.image_hu < AIR_BELOW_HU - 3), iterations=2)] = LUNG_VALUE
        for number, value in enumerate(GUIDE_VALUES, start=1):
            guide[case.label == number] = value
        guide[~case.body] = OUTSIDE_VALUE
        guides.append(ndimage.gaussian_filter(guide, 1.0)[::2, ::2, ::2].astype(np.float32))
    known = np.stack([case.known[::2, ::2, ::2] for case in cases])
    mean = np.where(known, guides, 0).sum(axis=0) / known.sum(axis=0).clip(1)
    return [np.where(there, guide, mean).astype(np.float32) for there, guide in zip(known, guides, strict=True)]


def fit(cases: Sequence[AlignedCase], fields: Sequence[Array]) -> Arrays:
    """The model's arrays, as ``AbdomenModel`` describes them.

    Args:
        cases: on the common grid.
        fields: warp each case onto the common shape, on the grid of 6 mm.
    """
    full = [finer_field(field) for field in fields]
    coarse = SHAPE_STEP // 2
    shapes = np.stack([block_means(invert(field), coarse).ravel() * 2 for field in fields])  # in voxels of 3 mm
    modes, deviations = principal_modes(shapes - shapes.mean(axis=0), SHAPE_MODES)
    check_shares(shapes - shapes.mean(axis=0), modes)
    shape = tuple(size // SHAPE_STEP for size in GRID)
    distances, organ_hu = _fit_organs(cases, full)
    return {
        **quantised("distances_mm", distances),
        **quantised("shares", _fit_shares(cases, full, distances.min(axis=0) < 0)),
        "organ_hu": organ_hu.astype(np.float32),
        "shape_mean": shapes.mean(axis=0).reshape(3, *shape).astype(np.float16),
        **quantised("shape_modes", modes.reshape(-1, 3, *shape)),
        "shape_deviations": deviations.astype(np.float32),
        "cases": np.array([len(cases)], dtype=np.float32),
    }


def finer_field(field: Array) -> Array:
    """A field in voxels of 6 mm, on the grid of 3 mm."""
    return 2 * double(field)


def _fit_organs(cases: Sequence[AlignedCase], fields: Sequence[Array]) -> tuple[Array, npt.NDArray[np.float64]]:
    """Mean signed distances, moved so that each organ has its mean volume, and median intensities."""
    distances = np.zeros((len(ORGANS), *GRID), dtype=np.float32)
    hu, voxels = np.full((2, len(ORGANS), len(cases)), np.nan)
    for column, (case, field) in enumerate(zip(cases, fields, strict=True)):
        image = warp(case.image_hu, field, order=1)
        for row, number in enumerate(ORGANS.values()):
            organ = case.label == number
            if organ.any():
                warped = warp(_signed_distance_mm(organ), field, order=1)
                distances[row] += warped
                voxels[row, column], hu[row, column] = (warped < 0).sum(), np.median(image[warped < 0])
    distances /= np.isfinite(hu).sum(axis=1)[:, None, None, None]
    for _ in range(3):  # organs share borders: moving one moves others a little
        nearest = distances.argmin(axis=0)
        for row, wanted in enumerate(np.nanmean(voxels, axis=1)):
            candidates = np.sort(distances[row][nearest == row])
            distances[row] -= candidates[min(int(wanted), len(candidates) - 1)]
    return distances.clip(-FARTHEST_MM, FARTHEST_MM), np.nanmedian(hu, axis=1)


def _fit_shares(cases: Sequence[AlignedCase], fields: Sequence[Array], organs: Mask) -> Array:
    """Shares of the body, and of air, fat and bright tissue in it outside the organs, shape (4, *GRID)."""
    known, body, free, air, fat, soft, bright = np.zeros((7, *GRID), dtype=np.float32)
    for case, field in zip(cases, fields, strict=True):
        image = warp(case.image_hu, field, order=1)
        there = warp(case.known.astype(np.float32), field, order=1) > 0.99
        inside = there & (warp(case.body.astype(np.float32), field, order=1) > 0.5)
        tissue = inside & (warp((case.label > 0).astype(np.float32), field, order=1) < 0.5)
        known += there
        body += inside
        free += tissue
        air += tissue & (image < AIR_BELOW_HU)
        fat += tissue & (image >= AIR_BELOW_HU) & (image < FAT_BELOW_HU)
        soft += tissue & (image >= FAT_BELOW_HU) & (image < BRIGHT_FROM_HU)
        bright += tissue & (image >= BRIGHT_FROM_HU)
    # under an organ few cases say what lies beside it: the surroundings are asked too
    air, fat, soft, bright, free = (ndimage.gaussian_filter(part, 0.8) for part in (air, fat, soft, bright, free))
    total = free + 1e-3
    body /= known.clip(1)
    bright = np.where(_find_ribs(bright / total, body, organs), np.maximum(bright / total, 0.6), bright / total)
    beside_fat = soft + 0.3 * (total - fat - soft)
    shares: Array = np.stack([body, air / total, fat / (fat + beside_fat + 1e-6), bright]).clip(0, 1)
    return shares


def _find_ribs(bright: Array, body: Array, organs: Mask) -> Mask:
    """Where bright tissue is more than beside, near the surface: no case's ribs lie just where another's do."""
    smooth = ndimage.gaussian_filter(bright, 0.7)
    depth_mm = ndimage.distance_transform_edt(body > 0.5) * SPACING_MM
    near = (depth_mm > RIB_DEPTH_MM[0]) & (depth_mm < RIB_DEPTH_MM[1]) & ~organs & (bright < BONE_FROM)
    ribs: Mask = near & (smooth > RIB_SHARE) & (smooth > RIB_OF_LARGEST * ndimage.maximum_filter(smooth, 5))
    return ribs


def _signed_distance_mm(organ: Mask) -> Array:
    """Distance to the border, negative inside, as far as three times ``FARTHEST_MM``."""
    farthest = 3 * FARTHEST_MM
    margin = int(farthest / SPACING_MM) + 1
    places = np.argwhere(organ)
    low, high = (places.min(axis=0) - margin).clip(0), places.max(axis=0) + margin + 1
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    inside, outside = ndimage.distance_transform_edt(organ[box]), ndimage.distance_transform_edt(~organ[box])
    distances: Array = np.full(organ.shape, farthest, dtype=np.float32)
    distances[box] = (np.where(organ[box], 0.5 - inside, outside - 0.5) * SPACING_MM).clip(-farthest, farthest)
    return distances


if __name__ == "__main__":
    sys.exit(main())
