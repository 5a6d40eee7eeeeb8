"""Synthetic hippocampus MR crops with reference labels, drawn from a statistical model; no patient is in them.

    >>> from synthetic_hippocampus import draw_case
    >>> case = draw_case(0, seed=0)
    >>> case.case_id, case.image.dtype, sorted(set(case.label.ravel().tolist()))
    ('synthetic_hippocampus_0000', dtype('float32'), [0, 1, 2])

An active appearance model (Cootes et al. 2001, doi:10.1109/34.927467): an anatomy is drawn from the joint modes of
intensity and of the labels' signed distances on a common shape, and is then warped by a drawn shape, so that edges
and labels move together. What the modes leave out is put back as sharpness and noise, such that the whole has the
power spectrum and the histogram of real images. ``fit_hippocampus_model.py`` makes the model.

Case ``i`` of seed ``s`` is the same wherever and however often it is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from statistical_model import dequantised, draw_modes

Array = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.uint8]

MODEL_FILE = Path(__file__).with_name("hippocampus_model.npz")
LABELS = {"anterior": 1, "posterior": 2}
MARGIN_VOXELS = 3
"""Least distance between the labels and the crop's faces, as in the real cases."""
ATTEMPTS = 50
SHARPENED_SHARE, NOISE_SHARE = 0.7, 0.8
"""Chosen by eye and by the statistics in README.md: all of it as noise looks grainy, all as sharpness rings."""
SHARPENING_LIMITS = (0.7, 4.0)
"""Least and greatest gain of power. More would ring, and less would blur what the labels follow."""
CENTRE_RAS_MM = (-27.0, -23.0, -14.0)
"""About where a left hippocampus lies when the origin is the anterior commissure."""


@dataclass(frozen=True)
class SyntheticCase:
    """An image with its reference.

    Attributes:
        case_id: for example ``synthetic_hippocampus_0003``.
        image: intensities on a scanner's arbitrary scale, shape (X, Y, Z), float32.
        label: 0 background, 1 anterior, 2 posterior hippocampus; the same shape, uint8.
        affine_ras: 4x4, voxel indices to millimetres in RAS; 1 mm voxels.

    Raises:
        ValueError: for shapes that differ or are not 3D, and for an affine that is not 4x4.
    """

    case_id: str
    image: Array
    label: LabelArray
    affine_ras: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.image.shape != self.label.shape or self.image.ndim != 3:
            raise ValueError(f"image {self.image.shape} and label {self.label.shape} must be 3D and of one shape")
        if self.affine_ras.shape != (4, 4):
            raise ValueError(f"affine_ras must be 4x4, and is {self.affine_ras.shape}")


@dataclass(frozen=True)
class HippocampusModel:
    """Means, modes and statistics over all fitted cases, on a grid G of 1 mm and on one of half its resolution, H.

    Modes have unit length; the deviations are those of their coefficients. Frequencies are in cycles a voxel.

    Attributes:
        image_mean: z-scored intensity, shape G.
        image_modes: shape (K, *G).
        distance_mean_mm: signed distances of both labels, negative inside, shape (2, *G).
        distance_modes_mm: they go with ``image_modes`` (one coefficient moves both), shape (K, 2, *H).
        appearance_deviations: shape (K,).
        shape_mean_mm: field from a case's place to the common shape's, shape (3, *H).
        shape_modes_mm: shape (S, 3, *H).
        shape_deviations: shape (S,).
        texture_std: how strong the noise is at each place, with mean square 1, shape H.
        log_power: log of real images' power, shape (A, B, C): one octant from frequency 0 to 0.5.
        log_power_of_anatomy: the same, for what the modes draw.
        log_power_modes: how cases differ from ``log_power``, by radial frequency from 0 to 0.5, shape (P, R).
        log_power_quantiles: of those modes' coefficients, which are skewed, at even steps from 0 to 1, shape (P, N).
        histogram_mean: quantiles of z-scored intensity, at even steps from 0 to 1, shape (Q,).
        histogram_modes: shape (T, Q).
        histogram_deviations: shape (T,).
        size_quantiles: crop sizes in voxels, at even steps from 0 to 1, shape (N, 3).
        log10_raw_std_quantiles: of raw intensities, at even steps from 0 to 1, shape (N,).
        raw_mean_to_std: median ratio, shape (1,).
        volume_range_voxels: least and greatest volume of each label, shape (2, 2).
        cases: how many were fitted, shape (1,).
    """

    image_mean: Array
    image_modes: Array
    distance_mean_mm: Array
    distance_modes_mm: Array
    appearance_deviations: Array
    shape_mean_mm: Array
    shape_modes_mm: Array
    shape_deviations: Array
    texture_std: Array
    log_power: Array
    log_power_of_anatomy: Array
    log_power_modes: Array
    log_power_quantiles: Array
    histogram_mean: Array
    histogram_modes: Array
    histogram_deviations: Array
    size_quantiles: Array
    log10_raw_std_quantiles: Array
    raw_mean_to_std: Array
    volume_range_voxels: Array
    cases: Array

    def __post_init__(self) -> None:
        for modes, deviations in (
            (self.image_modes, self.appearance_deviations),
            (self.distance_modes_mm, self.appearance_deviations),
            (self.shape_modes_mm, self.shape_deviations),
        ):
            if len(modes) != len(deviations):
                raise ValueError(f"{len(modes)} modes have {len(deviations)} deviations; they must be as many")

    @classmethod
    def from_arrays(cls, stored: Mapping[str, npt.NDArray[np.generic]]) -> HippocampusModel:
        """From the file's arrays: modes are 8-bit numbers there, with a scale each under ``<name>_scale``."""
        arrays = dequantised(stored)
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def draw_cases(count: int, seed: int = 0, first: int = 0) -> Iterator[SyntheticCase]:
    """Draw ``count`` cases of a seed, starting with number ``first``.

    Raises:
        ValueError: for a negative count, seed or first number.
    """
    if min(count, seed, first) < 0:
        raise ValueError(f"count ({count}), seed ({seed}) and first ({first}) must be 0 or more")
    return (draw_case(index, seed) for index in range(first, first + count))


def draw_case(index: int, seed: int = 0) -> SyntheticCase:
    """Draw case number ``index`` of a seed.

    Raises:
        ValueError: for a negative index or seed.
        FileNotFoundError: when the model is missing.
        RuntimeError: when the model draws nothing plausible.
    """
    if min(index, seed) < 0:
        raise ValueError(f"index ({index}) and seed ({seed}) must be 0 or more")
    model = load_model()
    for attempt in range(ATTEMPTS):
        random = np.random.default_rng([seed, index, attempt])
        anatomy, label = draw_anatomy(model, random)
        if is_plausible(label, model):
            break
    else:
        raise RuntimeError(f"none of {ATTEMPTS} draws of case {index}, seed {seed}, is plausible: refit the model")
    detailed = add_detail(anatomy, model, random)
    box = _crop_box(label, model, random)
    matched = _match_histogram(detailed[box], model, random)
    raw = _to_raw_scale(matched, model, random)
    label = np.ascontiguousarray(label[box])
    return SyntheticCase(f"synthetic_hippocampus_{index:04d}", raw, label, _affine_ras(label, random))


@lru_cache(maxsize=1)
def load_model() -> HippocampusModel:
    """The fitted model, with its 8-bit modes as float32.

    Raises:
        FileNotFoundError: when it has not been fitted; ``fit_hippocampus_model.py`` makes it.
    """
    with np.load(MODEL_FILE, allow_pickle=False) as stored:
        return HippocampusModel.from_arrays({name: stored[name] for name in stored.files})


def draw_anatomy(model: HippocampusModel, random: np.random.Generator) -> tuple[Array, LabelArray]:
    """Smooth intensities and their labels, on the model's grid."""
    field = double(model.shape_mean_mm + draw_modes(model.shape_modes_mm, model.shape_deviations, random))
    image_modes = model.image_modes.reshape(len(model.image_modes), -1)
    distance_modes = model.distance_modes_mm.reshape(len(model.distance_modes_mm), -1)
    joint = draw_modes(np.hstack([image_modes, distance_modes]), model.appearance_deviations, random)
    image_part, distance_part = np.split(joint, [model.image_mean.size])
    image = model.image_mean + image_part.reshape(model.image_mean.shape)
    distances = model.distance_mean_mm + double(distance_part.reshape(model.distance_modes_mm.shape[1:]))
    label = labels_from_distances(np.stack([warp(part, field, order=1) for part in distances]))
    return warp(image, field), label


def add_detail(anatomy: Array, model: HippocampusModel, random: np.random.Generator) -> Array:
    """Sharpen the drawn anatomy and add noise, up to about a real image's power at each frequency.

    Part of what is missing is anatomy that the modes blur; the rest is noise, and anatomy that no two people share.
    """
    coefficients = [_from_quantiles(quantiles, random) for quantiles in model.log_power_quantiles]
    difference = coefficients @ model.log_power_modes
    radius = radial_frequency(anatomy.shape)
    shift = np.interp(radius, np.linspace(0, 0.5, len(difference)), difference)
    wanted = np.exp(_octant_on_grid(model.log_power, anatomy.shape) + shift)
    present = np.exp(_octant_on_grid(model.log_power_of_anatomy, anatomy.shape))
    gain = np.sqrt(np.clip(1 + SHARPENED_SHARE * (wanted / present - 1), *SHARPENING_LIMITS))
    noise_gain = NOISE_SHARE * np.sqrt(np.maximum(wanted - gain**2 * present, 0))
    noise = _filter(random.standard_normal(anatomy.shape), noise_gain) * double(model.texture_std[None])[0]
    detailed: Array = (_filter(anatomy, gain) + noise).astype(np.float32)
    return detailed


def is_plausible(label: LabelArray, model: HippocampusModel) -> bool:
    """Whether both labels have a volume that was seen, and the anterior one lies in front."""
    volumes = np.array([np.count_nonzero(label == index) for index in LABELS.values()])
    low, high = model.volume_range_voxels
    if (volumes < low).any() or (volumes > high).any():
        return False
    front, back = (np.argwhere(label == index)[:, 1].mean() for index in LABELS.values())
    return bool(front > back)


def warp(volume: Array, field: Array, order: int = 3) -> Array:
    """Sample ``volume`` at each voxel's displaced place; the field is in voxels, shape (3, *volume.shape)."""
    places = np.indices(volume.shape, dtype=np.float32) + field
    warped: Array = ndimage.map_coordinates(volume, places, order=order, mode="nearest")
    return warped


def labels_from_distances(distances_mm: Array) -> LabelArray:
    """The nearer of the two structures where one is within; each in one piece."""
    nearest = np.where(distances_mm[0] <= distances_mm[1], 1, 2)
    labels = np.where(distances_mm.min(axis=0) < 0, nearest, 0).astype(np.uint8)
    for index in LABELS.values():
        labels[(labels == index) & ~_largest_piece(labels == index)] = 0
    return labels


def double(parts: Array) -> Array:
    """Volumes of half resolution, shape (C, *H), on the full grid, shape (C, *G)."""
    return np.stack([ndimage.zoom(part, 2, order=1, mode="nearest", grid_mode=True) for part in parts])


def radial_frequency(shape: Sequence[int]) -> Array:
    """Length of each FFT coefficient's frequency, in cycles a voxel."""
    axes = np.meshgrid(*[np.fft.fftfreq(size) for size in shape], indexing="ij")
    radius: Array = np.sqrt(np.sum(np.square(axes), axis=0)).astype(np.float32)
    return radius


def _octant_on_grid(octant: Array, shape: Sequence[int]) -> Array:
    """Values over non-negative frequencies, 0 to 0.5 on each axis, at the frequencies of an FFT of ``shape``."""
    steps = [np.abs(np.fft.fftfreq(size)) * 2 * (part - 1) for size, part in zip(shape, octant.shape, strict=True)]
    values: Array = ndimage.map_coordinates(octant, np.meshgrid(*steps, indexing="ij"), order=1, mode="nearest")
    return values


def _filter(volume: npt.NDArray[np.generic], gain: Array) -> npt.NDArray[np.float64]:
    filtered: npt.NDArray[np.float64] = np.fft.ifftn(np.fft.fftn(volume) * gain).real
    return filtered


def _largest_piece(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    pieces, count = ndimage.label(mask)
    if count == 0:
        return mask
    largest: npt.NDArray[np.bool_] = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    return largest


def _crop_box(label: LabelArray, model: HippocampusModel, random: np.random.Generator) -> tuple[slice, ...]:
    """A box of a realistic size around the label, with room on every side."""
    positions = np.argwhere(label)
    low = np.maximum(positions.min(axis=0) - MARGIN_VOXELS, 0)
    high = np.minimum(positions.max(axis=0) + 1 + MARGIN_VOXELS, label.shape)
    box = []
    for axis, size in enumerate(label.shape):
        drawn = round(_from_quantiles(model.size_quantiles[:, axis], random))
        length = min(size, max(drawn, int(high[axis] - low[axis])))
        # Around the labels' middle, a few voxels off, as people crop
        middle = (low[axis] + high[axis] - length) / 2 + random.normal(0, 1)
        start = int(np.clip(round(middle), max(0, high[axis] - length), min(low[axis], size - length)))
        box.append(slice(start, start + length))
    return tuple(box)


def _from_quantiles(quantiles: Array, random: np.random.Generator) -> float:
    """A draw from a distribution that is given by its quantiles at even steps."""
    return float(np.interp(random.uniform(0.01, 0.99), np.linspace(0, 1, len(quantiles)), quantiles))


def _match_histogram(image: Array, model: HippocampusModel, random: np.random.Generator) -> Array:
    """Give the image a drawn histogram; a monotone change of intensities, so that edges stay where they are."""
    wanted = model.histogram_mean + draw_modes(model.histogram_modes, model.histogram_deviations, random)
    steps = np.linspace(0, 1, len(wanted))
    present = np.quantile(image, steps)
    matched: Array = np.interp(image, present, np.maximum.accumulate(wanted)).astype(np.float32)
    return matched


def _to_raw_scale(image: Array, model: HippocampusModel, random: np.random.Generator) -> Array:
    """Put normalised intensities on a scanner's scale: those of the real cases range over four decades."""
    std = 10 ** _from_quantiles(model.log10_raw_std_quantiles, random)
    raw: Array = np.maximum(0, (image + model.raw_mean_to_std[0]) * std).astype(np.float32)
    return raw


def _affine_ras(label: LabelArray, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """1 mm voxels, with the labels about where a hippocampus lies."""
    affine_ras = np.eye(4)
    affine_ras[:3, 3] = np.round(CENTRE_RAS_MM + random.normal(0, 1.5, 3) - np.argwhere(label).mean(axis=0), 2)
    return affine_ras
