"""Scores are of masks on the image's own grid, and summed up without what is unknown."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lib.cases.labelled import Case
from lib.errors import LabelError
from lib.infers.segmenter import Segmenter
from lib.trainers.judging.evaluate import CaseScore, Evaluation, evaluate
from lib.trainers.judging.masks import CaseMasks
from tests.tiny import oblique_affine, tiny_preset, write_nifti


class Threshold(nn.Module):
    """Intensities of the network's scale 0, 0.5 and 1 are background, label 1 and label 2."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return -(windows * 2 - torch.arange(3).reshape(1, 3, 1, 1, 1)).abs()


@pytest.fixture
def segmenter() -> Segmenter:
    preset = tiny_preset(intensity={"kind": "window", "lower": 0, "upper": 200})
    return Segmenter(Threshold(), preset, torch.device("cpu"), "fp32")


def _case(folder: Path, name: str, predicted: np.ndarray, reference: np.ndarray) -> Case:
    affine = oblique_affine("LPS", (1, 1, 2))
    image = write_nifti(folder / f"{name}_image.nii.gz", predicted.astype(np.float32) * 100, affine)
    return Case(name, image, write_nifti(folder / f"{name}_label.nii.gz", reference.astype(np.uint8), affine))


def test_scores_are_those_of_a_hand_calculation(segmenter: Segmenter, tmp_path: Path) -> None:
    shape = (20, 20, 12)
    first, second, third = (np.zeros(shape, dtype=np.uint8) for _ in range(3))
    first[2:10, 2:10, 2:8] = 1
    second[2:10, 2:10, 2:6] = 1  # two slices of 2 mm less
    first[14:18, 14:18, 2:6] = third[14:18, 14:18, 2:6] = 2
    cases = [_case(tmp_path, "a", first, second), _case(tmp_path, "b", first, first)]
    preset = segmenter.preset.model_copy(update={"spacing_mm": (1.0, 1.0, 2.0)})
    segmenter = Segmenter(Threshold(), preset, torch.device("cpu"), "fp32")
    found = evaluate(CaseMasks(segmenter), cases)
    dice = 2 * 256 / (384 + 256)
    assert found.cases[0].dice == {"Left Box": dice, "core": 0.0}
    assert found.cases[0].hd95_mm["Left Box"] == pytest.approx(4.0, abs=1e-5)
    assert math.isnan(found.cases[0].hd95_mm["core"])
    assert found.cases[1].dice == {"Left Box": 1.0, "core": 1.0}
    assert found.dice == pytest.approx({"Left Box": (dice + 1) / 2, "core": 0.5})
    assert found.mean_dice == pytest.approx(((dice + 1) / 2 + 0.5) / 2)
    assert found.hd95_mm == pytest.approx({"Left Box": 2.0, "core": 0.0}, abs=1e-5)


def test_summary_is_plain_and_rounded() -> None:
    scores = Evaluation(
        (
            CaseScore("a", {"x": 0.81234567, "y": math.nan}, {"x": 1.23456, "y": math.nan}, {"x": 0.5, "y": math.nan}),
            CaseScore("b", {"x": 0.9, "y": 0.5}, {"x": 2.0, "y": 3.0}, {"x": 0.75, "y": 1.0}),
        )
    )
    assert scores.summary() == {
        "cases": 2,
        "mean_dice": round(((0.81234567 + 0.9) / 2 + 0.5) / 2, 4),
        "dice": {"x": 0.8562, "y": 0.5},
        "hd95_mm": {"x": 1.617, "y": 3.0},
        "nsd": {"x": 0.625, "y": 1.0},
        "per_case": {"a": 0.8123, "b": 0.7},
    }


def test_summary_of_nothing_is_unknown() -> None:
    summary = Evaluation(()).summary()
    assert summary["cases"] == 0
    assert summary["dice"] == {}
    assert math.isnan(summary["mean_dice"])  # type: ignore[arg-type]


def test_case_that_cannot_be_read_names_itself(segmenter: Segmenter, tmp_path: Path) -> None:
    volume = np.zeros((20, 20, 12), dtype=np.uint8)
    volume[3:9, 3:9, 3:9] = 1
    with pytest.raises(LabelError, match="label of 'a' has shape"):
        evaluate(segmenter, [_case(tmp_path, "a", volume, volume[:-1])])
