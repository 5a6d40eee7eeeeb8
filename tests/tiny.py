"""A tiny task that every test can afford: two nested boxes in noise, a UNETR of 16-voxel windows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from lib.cases.labelled import Case
from lib.configs.preset import Preset, parse_preset

QUIET_AUGMENTATION = {
    "rotation_degrees": 0,
    "zoom": 0,
    "spatial_probability": 0,
    "noise_probability": 0,
    "intensity_probability": 0,
}


def preset_data(**changes: Any) -> dict[str, Any]:
    """Plain data of the tiny task, with top-level keys replaced."""
    return {
        "name": "tiny",
        "modality": "MR",
        "labels": [
            {"index": 1, "name": "Left Box", "color": [255, 128, 0], "aliases": ["box_left"]},
            {"index": 2, "name": "core"},
        ],
        "spacing_mm": [1.0, 1.0, 1.0],
        "roi_size": [16, 16, 16],
        "intensity": {"kind": "zscore"},
        "padding": "edge",
        "network": {"feature_size": 4, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4},
        "training": {
            "max_epochs": 2,
            "crops_per_case": 1,
            "learning_rate": 2e-3,
            "precision": "fp32",
            "augmentation": QUIET_AUGMENTATION,
        },
    } | changes


def tiny_preset(**changes: Any) -> Preset:
    """The tiny task, with top-level keys replaced."""
    return parse_preset(preset_data(**changes), source="test")


def boxes(shape: tuple[int, int, int] = (20, 18, 16), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image and its label: a bright box with a brighter core at a random place in noise."""
    random = np.random.default_rng(seed)
    label = np.zeros(shape, dtype=np.uint8)
    start = [int(random.integers(1, size - 11)) for size in shape]
    x, y, z = start
    label[x : x + 10, y : y + 10, z : z + 10] = 1
    label[x + 2 : x + 8, y + 2 : y + 8, z + 2 : z + 8] = 2
    image = np.array([0.0, 300.0, 700.0])[label] + random.normal(0, 30, shape)
    return image.astype(np.float32), label


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write voxels as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def write_cases(
    folder: Path, count: int, shape: tuple[int, int, int] = (20, 18, 16), first: int = 1
) -> tuple[Case, ...]:
    """Write cases of the tiny task as NIfTI, ``case_001`` and counting; the number is the seed of :func:`boxes`."""
    cases = []
    for number in range(first, first + count):
        image, label = boxes(shape, seed=number)
        name = f"case_{number:03d}"
        places = folder / "images" / f"{name}.nii.gz", folder / "labels" / f"{name}.nii.gz"
        cases.append(Case(name, write_nifti(places[0], image), write_nifti(places[1], label)))
    return tuple(cases)


def axis_affine(axcodes: str, spacing_mm: tuple[float, float, float] = (1, 1, 1), origin=(0, 0, 0)) -> np.ndarray:
    """The affine of an array whose axes point to ``axcodes``, such as "LPS"."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (letter, step) in enumerate(zip(axcodes, spacing_mm, strict=True)):
        row = next(i for i, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        affine[row, axis] = step if letter in "RAS" else -step
    affine[:3, 3] = origin
    return affine


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    """3x3 rotation about x, then y, then z."""
    x, y, z = np.radians(degrees)
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def oblique_affine(
    axcodes: str = "RAS",
    spacing_mm: tuple[float, float, float] = (1, 1, 1),
    degrees: tuple[float, float, float] = (12, -9, 17),
    origin: tuple[float, float, float] = (-31.5, 12.25, 88.0),
) -> np.ndarray:
    """An affine turned against the patient's axes."""
    affine = axis_affine(axcodes, spacing_mm)
    affine[:3, :3] = rotation(degrees) @ affine[:3, :3]
    affine[:3, 3] = origin
    return affine


def without_core(case: Case, folder: Path) -> Case:
    """The case as drawn by somebody who drew the box around the core and not the core."""
    image = nib.load(case.label)
    voxels = np.asarray(image.dataobj)
    label = write_nifti(folder / f"partial_{case.case_id}.nii.gz", np.where(voxels == 2, 0, voxels).astype(np.uint8))
    return replace(case, label=label, missing=(2,))
