"""What a label does not speak of is taken from the served model, and nothing else of the label changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from lib.cases.labelled import Case, read_case
from lib.infers.segmenter import Segmenter
from lib.networks.checkpoint import Checkpoint
from lib.trainers.completion import complete_labels, keep_teacher
from lib.trainers.judging.masks import CaseMasks
from tests.tiny import boxes, tiny_preset, write_nifti

PRESET = tiny_preset(intensity={"kind": "window", "lower": 0, "upper": 700})


class Bright(nn.Module):
    """Draws the box where it is bright and the core where it is brighter; no core where it has not learnt it."""

    def __init__(self, core: bool = True) -> None:
        super().__init__()
        self.core = core

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        wanted = torch.tensor([0.0, 0.43, 1.0 if self.core else 9.0]).reshape(1, 3, 1, 1, 1)
        return -(windows - wanted).abs()


def masks_of(network: nn.Module) -> CaseMasks:
    return CaseMasks(Segmenter(network, PRESET, torch.device("cpu"), "fp32"))


def voxels_of(case: Case) -> np.ndarray:
    return np.asarray(nib.load(case.label).dataobj)


@pytest.fixture
def full(make_cases: Callable[..., tuple[Case, ...]]) -> Case:
    return make_cases(1)[0]


@pytest.fixture
def partial(full: Case, tmp_path: Path) -> Case:
    """A person has drawn the box alone, one plane larger than it is, and inside of it where the core begins."""
    label = (voxels_of(full) == 1).astype(np.uint8)
    places = np.argwhere(voxels_of(full) > 0)
    x, y, z = places.min(axis=0)
    label[x - 1, y : y + 10, z : z + 10] = 1
    label[x + 2, y + 2 : y + 8, z + 2 : z + 8] = 1
    return replace(full, label=write_nifti(tmp_path / "drawn.nii.gz", label), missing=(2,))


def test_missing_structure_is_the_models_and_what_was_drawn_stays(full: Case, partial: Case, tmp_path: Path) -> None:
    (case,) = complete_labels([partial], masks_of(Bright()), (), tmp_path / "completed")
    assert (case.missing, case.predicted, case.case_id, case.image) == ((), (2,), full.case_id, full.image)
    drawn, completed = voxels_of(partial), read_case(case, PRESET)[1]
    np.testing.assert_array_equal(completed[drawn == 1], 1)
    core = (voxels_of(full) == 2) & (drawn == 0)
    assert (completed[core] == 2).mean() > 0.97
    assert (completed[(drawn == 0) & ~core] == 0).all(), "the model's own box is not taken: a person has drawn it"


def test_label_that_lacks_nothing_is_the_same_case(full: Case, partial: Case, tmp_path: Path) -> None:
    first, second, third = complete_labels([full, partial, partial], masks_of(Bright()), (), tmp_path / "completed")
    assert first is full
    assert second is third, "an oversampled case is completed once"


@pytest.mark.parametrize("network", [Bright(core=False), Bright()], ids=["draws none", "never learnt"])
def test_what_the_model_does_not_know_stays_missing(network: Bright, partial: Case, tmp_path: Path) -> None:
    never_learnt = ("core",) if network.core else ()
    (case,) = complete_labels([partial], masks_of(network), never_learnt, tmp_path / "completed")
    assert (case.missing, case.predicted) == ((2,), ())
    np.testing.assert_array_equal(read_case(case, PRESET)[1], voxels_of(partial))


def test_structure_drawn_in_part_of_which_the_model_draws_nothing_stays_missing(
    full: Case, partial: Case, tmp_path: Path
) -> None:
    label = voxels_of(partial)
    label[tuple(np.argwhere(voxels_of(full) == 2)[-1])] = 2
    begun = replace(partial, label=write_nifti(tmp_path / "begun.nii.gz", label))
    (case,) = complete_labels([begun], masks_of(Bright(core=False)), (), tmp_path / "completed")
    assert (case.missing, case.predicted) == ((2,), ())
    assert (read_case(case, PRESET)[1] == 2).sum() == 1, "what a person has drawn stays"
    (case,) = complete_labels([begun], masks_of(Bright()), (), tmp_path / "by another model")
    assert (case.missing, case.predicted) == ((), ()), "the model's part is learnt as the person's is"
    assert (read_case(case, PRESET)[1] == 2).sum() > 1


def test_values_of_another_numbering_become_the_presets(partial: Case, tmp_path: Path) -> None:
    other = write_nifti(tmp_path / "other.nii.gz", (voxels_of(partial) * 7).astype(np.uint8))
    one, two = (
        complete_labels([case], masks_of(Bright()), (), tmp_path / case.label.stem)[0]
        for case in (partial, replace(partial, label=other, values={7: 1}))
    )
    assert two.values is None
    np.testing.assert_array_equal(voxels_of(one), voxels_of(two))


def test_resumed_run_keeps_its_completed_labels_whatever_is_served_by_then(partial: Case, tmp_path: Path) -> None:
    (before,) = complete_labels([partial], masks_of(Bright()), (), tmp_path / "completed")
    content = before.label.read_bytes()
    (after,) = complete_labels([partial], masks_of(Bright(core=False)), (), tmp_path / "completed")
    assert after == before and after.label.read_bytes() == content


def test_resumed_run_keeps_its_teacher_whatever_is_served_by_then(tmp_path: Path) -> None:
    begun_with, served_now = (Checkpoint({"w": torch.full((2,), value)}, PRESET) for value in (1.0, 2.0))
    assert keep_teacher(begun_with, tmp_path / "completed") is begun_with
    kept = keep_teacher(served_now, tmp_path / "completed").model
    torch.testing.assert_close(kept, begun_with.model, rtol=0, atol=0)


def test_boxes_are_as_bright_as_the_test_thinks() -> None:
    image, label = boxes(seed=1)
    assert [round(float(image[label == value].mean()), -2) for value in range(3)] == [0, 300, 700]
