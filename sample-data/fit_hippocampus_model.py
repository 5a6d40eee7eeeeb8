"""Fits the statistical model of hippocampus MR crops that the synthetic cases are drawn from.

    python sample-data/fit_hippocampus_model.py --data ../shared/data/hippocampus_mr

It takes about six minutes on two cores. Every case is warped onto a common shape
(``registration.py``); the warps, and the warped intensities together with the labels' warped signed
distances, are each described by a mean and principal modes. What the modes leave out is described by power spectra
and histograms. The file holds means, modes and statistics over all cases, and no case.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import nibabel as nib
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
from synthetic_hippocampus import LABELS, MODEL_FILE, HippocampusModel, draw_anatomy, warp

Voxel = TypeVar("Voxel", bound=np.generic)

GRID = (40, 56, 44)
HALF_GRID = (20, 28, 22)
SPECTRUM_BOX = (28, 40, 28)
"""Within nearly every crop, when centred on the labels."""
SHAPE_MODES = 28
APPEARANCE_MODES = 28
DISTANCE_WEIGHT = 0.3
"""Standard deviations of intensity that a millimetre of the labels' border counts for."""
CALIBRATION_DRAWS = 100
QUANTILE_STEPS = 41
SOURCE = (
    "Medical Segmentation Decathlon, Task04 Hippocampus (Antonelli et al. 2022, doi:10.1038/s41467-022-30695-9), "
    "by way of the Udacity nd320 starter"
)
HISTOGRAM_STEPS = 65


@dataclass(frozen=True)
class AlignedCase:
    """One case on the common grid, its label's centroid at the centre.

    Attributes:
        image: z-scored intensities, shape ``GRID``, continued beyond the crop by its outermost voxels.
        inside_crop: where there are real intensities, shape ``GRID``.
        distances_mm: signed distances (negative inside) of both labels, shape (2, *GRID).
        histogram: quantiles of the z-scored crop, shape (HISTOGRAM_STEPS,).
        size: voxels of the original crop.
        raw_mean, raw_std: of the original intensities, clipped to the 0.5 and 99.5 percentiles.
    """

    image: Array
    inside_crop: npt.NDArray[np.bool_]
    distances_mm: Array
    histogram: Array
    size: tuple[int, ...]
    raw_mean: float
    raw_std: float

    @property
    def guide(self) -> Array:
        """What the registration looks at: the image, with the labels' borders made plain."""
        union = np.tanh(self.distances_mm.min(axis=0) / 2)
        parts = np.tanh((self.distances_mm[0] - self.distances_mm[1]) / 4) * (union < 0)
        guide: Array = (0.7 * self.image + 2.0 * union + parts).astype(np.float32)
        return guide

    @property
    def volumes(self) -> list[int]:
        """Voxels of each label."""
        return [int(np.count_nonzero(distances < 0)) for distances in self.distances_mm]


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit and write the model; 0 on success, 2 when there is too little data."""
    options = fit_parser(__doc__, "hippocampus_mr", MODEL_FILE).parse_args(arguments)
    labels = sorted((options.data / "labels").glob("*.nii.gz"))
    needed = max(SHAPE_MODES, APPEARANCE_MODES) + 1
    if len(labels) < needed:
        print(f"error: --data {options.data} has {len(labels)} labelled cases; needed: {needed}", file=sys.stderr)
        return 2
    cases = [read_aligned(options.data / "images" / path.name, path) for path in labels]
    fields = register_to_common_shape([case.guide for case in cases], options.jobs)
    save_model(options.out, fit(cases, fields), describe(len(cases)))
    return 0


def describe(cases: int) -> dict[str, object]:
    """What the model is, from which data, and under which licence."""
    return {
        "what": "Statistical model of hippocampus T1 MR crops: means, principal modes and statistics, no case",
        "labels": LABELS,
        "cases": cases,
        "source": SOURCE,
        "licence": "CC-BY-SA 4.0",
        "licence_url": "https://creativecommons.org/licenses/by-sa/4.0/",
        "changes": "fitted by fit_hippocampus_model.py; the cases' voxels are not in it",
    }


def read_aligned(image_path: Path, label_path: Path) -> AlignedCase:
    """Read a case and put its label's centroid at the centre of the grid."""
    image = np.asarray(nib.load(image_path).dataobj, dtype=np.float32)
    label = np.asarray(nib.load(label_path).dataobj).astype(np.uint8)
    shift = np.rint(np.argwhere(label > 0).mean(axis=0)).astype(int) - np.array(GRID) // 2
    clipped = np.clip(image, *np.percentile(image, [0.5, 99.5]))
    normal = ((clipped - clipped.mean()) / clipped.std()).astype(np.float32)
    distances = [_signed_distance(_on_grid(label == index, shift, "constant")) for index in LABELS.values()]
    return AlignedCase(
        image=_on_grid(normal, shift, "edge"),
        inside_crop=_on_grid(np.ones(image.shape, dtype=bool), shift, "constant"),
        distances_mm=np.stack(distances),
        histogram=np.quantile(normal, np.linspace(0, 1, HISTOGRAM_STEPS)).astype(np.float32),
        size=image.shape,
        raw_mean=float(clipped.mean()),
        raw_std=float(clipped.std()),
    )


def fit(cases: Sequence[AlignedCase], fields: Sequence[Array]) -> Arrays:
    """The model's arrays, as ``HippocampusModel`` describes them; ``fields`` warp each case onto the common shape."""
    shapes = np.stack([block_means(invert(field), 2).ravel() for field in fields])
    shape_modes, shape_deviations = principal_modes(shapes - shapes.mean(axis=0), SHAPE_MODES)
    check_shares(shapes - shapes.mean(axis=0), shape_modes)
    arrays: Arrays = {
        "shape_mean_mm": shapes.mean(axis=0).reshape(3, *HALF_GRID).astype(np.float16),
        **quantised("shape_modes_mm", shape_modes.reshape(-1, 3, *HALF_GRID)),
        "shape_deviations": shape_deviations.astype(np.float32),
        **_fit_appearance(cases, fields),
        **_fit_scanner(cases),
    }
    return {**arrays, "log_power_of_anatomy": _power_of_anatomy(arrays).astype(np.float16)}


def _fit_appearance(cases: Sequence[AlignedCase], fields: Sequence[Array]) -> Arrays:
    """Joint modes of intensity and signed distances on the common shape."""
    images = np.stack([warp(c.image, f).ravel() for c, f in zip(cases, fields, strict=True)])
    known = np.stack([_warp_mask(c.inside_crop, f).ravel() for c, f in zip(cases, fields, strict=True)])
    complete_missing(images, known)
    distances = np.stack(
        [[warp(part, f, order=1) for part in c.distances_mm] for c, f in zip(cases, fields, strict=True)]
    )
    distance_mean = _with_true_volumes(distances)
    halves = np.stack([block_means(part, 2).ravel() for part in distances])
    # Only near a border does a distance matter; a voxel of the half grid stands for eight of the full one.
    weights = DISTANCE_WEIGHT * np.sqrt(8) * np.exp(-np.square(block_means(distance_mean, 2).ravel() / 4))
    joint = np.hstack([images - images.mean(axis=0), (halves - halves.mean(axis=0)) * weights])
    modes, deviations = principal_modes(joint, APPEARANCE_MODES)
    check_shares(joint, modes)
    image_modes, distance_modes = np.split(modes, [images.shape[1]], axis=1)
    residual = joint - joint @ modes.T @ modes
    texture = ndimage.gaussian_filter(residual[:, : images.shape[1]].std(axis=0).reshape(GRID), 1.5)
    return {
        "image_mean": images.mean(axis=0).reshape(GRID).astype(np.float16),
        **quantised("image_modes", image_modes.reshape(-1, *GRID)),
        "distance_mean_mm": distance_mean.astype(np.float16),
        **quantised("distance_modes_mm", (distance_modes / DISTANCE_WEIGHT / np.sqrt(8)).reshape(-1, 2, *HALF_GRID)),
        "appearance_deviations": deviations.astype(np.float32),
        "texture_std": block_means(texture / np.sqrt(np.square(texture).mean()), 2).astype(np.float16),
    }


def _fit_scanner(cases: Sequence[AlignedCase]) -> Arrays:
    """Spectra, histograms, crop sizes and intensity scales."""
    inside = [case for case in cases if case.inside_crop[_spectrum_slices()].all()]
    powers = np.stack([power_octant(case.image) for case in inside])
    mean_power = powers.mean(axis=0)
    profiles = np.stack([radial_profile(np.log(power / mean_power)) for power in powers])
    power_modes, _deviations = principal_modes(profiles - profiles.mean(axis=0), 2)
    histograms = np.stack([case.histogram for case in cases])
    histogram_modes, histogram_deviations = principal_modes(histograms - histograms.mean(axis=0), 3)
    steps = np.linspace(0, 1, QUANTILE_STEPS)
    raw_stds = np.array([case.raw_std for case in cases])
    raw_means = np.array([case.raw_mean for case in cases])
    volumes = np.array([case.volumes for case in cases])
    arrays = {
        "log_power": np.log(mean_power),
        "log_power_modes": power_modes,
        "log_power_quantiles": np.quantile((profiles - profiles.mean(axis=0)) @ power_modes.T, steps, axis=0).T,
        "histogram_mean": histograms.mean(axis=0),
        "histogram_modes": histogram_modes,
        "histogram_deviations": histogram_deviations,
        "size_quantiles": np.quantile([case.size for case in cases], steps, axis=0),
        "log10_raw_std_quantiles": np.quantile(np.log10(raw_stds), steps),
        "raw_mean_to_std": np.array([np.median(raw_means / raw_stds)]),
        "volume_range_voxels": np.quantile(volumes, [0.01, 0.99], axis=0),
        "cases": np.array([len(cases)]),
    }
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def _power_of_anatomy(arrays: Arrays) -> Array:
    """Log of the power that draws of the modes have, without sharpening and noise."""
    unused = {"log_power_of_anatomy": np.zeros(1, dtype=np.float32)}
    model = HippocampusModel.from_arrays({**arrays, **unused})
    draws = (draw_anatomy(model, np.random.default_rng([index]))[0] for index in range(CALIBRATION_DRAWS))
    mean: Array = np.mean([power_octant(image) for image in draws], axis=0)
    log_power: Array = np.log(mean)
    return log_power


def complete_missing(values: Array, known: npt.NDArray[np.bool_], rounds: int = 5, modes: int = 12) -> None:
    """Replace, in place, what lies outside a crop by what its inside and the other cases' modes say.

    Probabilistic principal components by expectation and maximisation (Tipping and Bishop 1999,
    doi:10.1111/1467-9868.00196): a case of which little is known stays near the mean.

    Args:
        values: shape (cases, features).
        known: the same shape; False where a value is to be replaced.
    """
    mean = np.where(known, values, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    np.copyto(values, np.broadcast_to(mean, values.shape), where=~known)
    for _ in range(rounds):
        mean = values.mean(axis=0)
        basis, deviations = principal_modes(values - mean, modes)
        noise = (np.square(values - mean).sum() / len(values) - np.square(deviations).sum()) / values.shape[1]
        for case, inside in zip(values, known, strict=True):
            seen = basis[:, inside]
            coefficients = np.linalg.solve(
                seen @ seen.T + np.diag(noise / np.square(deviations)), seen @ (case - mean)[inside]
            )
            case[~inside] = (mean + coefficients @ basis)[~inside]


def power_octant(image: Array) -> Array:
    """Power at non-negative frequencies 0 to 0.5 on each axis, in the middle of the grid; white noise of variance 1
    has power 1."""
    window = np.ones(())
    for size in SPECTRUM_BOX:
        window = np.multiply.outer(window, np.hanning(size))
    power = np.square(np.abs(np.fft.fftn(image[_spectrum_slices()] * window))) / np.square(window).sum()
    # A frequency and its mirror images are the same to the model: mean over the eight octants
    for axis, size in enumerate(SPECTRUM_BOX):
        mirrored = np.take(power, -np.arange(size), axis=axis, mode="wrap")
        power = np.take((power + mirrored) / 2, np.arange(size // 2 + 1), axis=axis)
    octant: Array = power.astype(np.float32)
    return octant


def radial_profile(octant: Array, bins: int = 17) -> Array:
    """Mean by radial frequency, 0 to 0.5 cycles a voxel."""
    axes = np.meshgrid(*[np.linspace(0, 0.5, size) for size in octant.shape], indexing="ij")
    place = np.sqrt(np.sum(np.square(axes), axis=0)) * 2 * (bins - 1)
    index = np.minimum(np.rint(place).astype(int), bins - 1).ravel()
    profile: Array = (np.bincount(index, octant.ravel(), bins) / np.bincount(index, None, bins)).astype(np.float32)
    return profile


def _with_true_volumes(distances_mm: Array) -> Array:
    """Mean over cases (cases, 2, *GRID), moved so that each label has the cases' mean volume.

    The mean of distances lies inside the mean of shapes wherever thin ends do not overlap.
    """
    mean: Array = distances_mm.mean(axis=0)
    for _ in range(3):  # the labels share a border: moving one moves the other a little
        for part in range(len(mean)):
            nearest = distances_mm[:, part] <= distances_mm[:, 1 - part]
            wanted = np.count_nonzero((distances_mm[:, part] < 0) & nearest) / len(distances_mm)
            candidates = np.sort(mean[part][mean[part] <= mean[1 - part]])
            mean[part] -= candidates[min(round(wanted), len(candidates) - 1)]
    return mean


def _spectrum_slices() -> tuple[slice, ...]:
    starts = [(size - part) // 2 for size, part in zip(GRID, SPECTRUM_BOX, strict=True)]
    return tuple(slice(start, start + part) for start, part in zip(starts, SPECTRUM_BOX, strict=True))


def _warp_mask(mask: npt.NDArray[np.bool_], field: Array) -> npt.NDArray[np.bool_]:
    """Where all that is interpolated lies in the mask."""
    covered: npt.NDArray[np.bool_] = warp(mask.astype(np.float32), field, order=1) > 0.99
    return covered


def _on_grid(
    volume: npt.NDArray[Voxel], shift: npt.NDArray[np.int_], mode: Literal["constant", "edge"]
) -> npt.NDArray[Voxel]:
    """Cut the grid out of a volume, padded where it ends."""
    before = np.maximum(-shift, 0)
    after = np.maximum(shift + np.array(GRID) - np.array(volume.shape), 0)
    padded = np.pad(volume, list(zip(before, after, strict=True)), mode=mode)
    start = np.maximum(shift, 0)
    cut: npt.NDArray[Voxel] = padded[tuple(slice(s, s + size) for s, size in zip(start, GRID, strict=True))]
    return cut


def _signed_distance(mask: npt.NDArray[np.generic]) -> Array:
    """Distance to the border in millimetres (1 mm voxels), negative inside."""
    inside, outside = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(mask == 0)
    # Half a voxel each way: the border runs between voxel centres.
    signed: Array = np.where(mask, 0.5 - inside, outside - 0.5).astype(np.float32)
    return signed


if __name__ == "__main__":
    sys.exit(main())
