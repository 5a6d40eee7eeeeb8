"""Training on two sequences, of which each shows only half of what is to be found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.cases.labelled import Case, find_channel_cases
from lib.trainers.loop import run_training
from lib.trainers.run.job import TrainingJob
from tests.tiny import QUIET_AUGMENTATION, tiny_preset, write_nifti

CHANNELS = [{"name": "t1"}, {"name": "flair"}]
SHAPE = (28, 28, 28)
EDGE = 10
RECIPE = {
    "max_epochs": 140,
    "batch_size": 3,
    "crops_per_case": 2,
    "learning_rate": 8e-3,
    "warmup_fraction": 0.1,
    "val_interval": 140,
    "precision": "fp32",
    "augmentation": QUIET_AUGMENTATION,
}


def _write_case(folder: Path, seed: int) -> None:
    """A box that only T1 shows, and one elsewhere that only FLAIR shows; where one is says nothing about the other."""
    random = np.random.default_rng(seed)
    label = np.zeros(SHAPE, dtype=np.uint8)
    # One in the lower half of the third axis and one in the upper, so that they never overlap.
    for value, lowest in ((1, 0), (2, SHAPE[2] // 2)):
        x, y = random.integers(0, SHAPE[0] - EDGE + 1, 2)
        z = lowest + random.integers(0, SHAPE[2] // 2 - EDGE + 1)
        label[x : x + EDGE, y : y + EDGE, z : z + EDGE] = value
    for place in (0, 1):
        image = 600.0 * (label == place + 1) + random.normal(0, 30, SHAPE)
        write_nifti(folder / "images" / f"c{seed}_{place:04d}.nii.gz", image.astype(np.float32))
    write_nifti(folder / "labels" / f"c{seed}.nii.gz", label)


def _mean_dice(preset_channels: list[dict[str, str]], cases: list[Case], folder: Path) -> float:
    preset = tiny_preset(channels=preset_channels, training=RECIPE)
    job = TrainingJob(preset, tuple(cases[:6]), tuple(cases[6:]), folder, torch.device("cpu"))
    return float(np.mean(list(run_training(job).dice.values())))


@pytest.mark.slow
def test_two_sequences_show_what_neither_shows_alone(tmp_path: Path) -> None:
    for seed in range(8):
        _write_case(tmp_path, seed)
    both = find_channel_cases(tmp_path / "images", tmp_path / "labels", tiny_preset(channels=CHANNELS))
    dice = {"both": _mean_dice(CHANNELS, both, tmp_path / "both")}
    for name in ("t1", "flair"):
        alone = [replace(case, image=case.channels[name], channels={}) for case in both]
        dice[name] = _mean_dice([], alone, tmp_path / name)
    assert dice["both"] > 0.85
    assert max(dice["t1"], dice["flair"]) < 0.6
