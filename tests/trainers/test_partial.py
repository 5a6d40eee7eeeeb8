"""Partially labelled cases: what a label does not speak of is neither trained on nor counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib.cases.labelled import MISSING, PREDICTED, Case, ReadCased
from lib.cases.metrics import without_missing
from lib.configs.preset import Training
from lib.datastore.records import LabelVersion
from lib.trainers.loop import run_training
from lib.trainers.optimization import build_loss, leave_out_missing
from lib.trainers.run.job import TrainingJob, TrainingResult
from lib.trainers.submitted import case_of_version
from tests.tiny import QUIET_AUGMENTATION, tiny_preset, without_core

LOGITS = torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(1))
LABEL = torch.tensor([0.0, 1, 2, 0, 1, 2, 0, 0]).reshape(1, 1, 2, 2, 2).repeat(2, 1, 1, 1, 1)


def test_nothing_missing_changes_nothing() -> None:
    logits, label = leave_out_missing(LOGITS, LABEL, torch.zeros(2, 3, dtype=torch.bool))
    assert logits is LOGITS and label is LABEL


def test_missing_class_and_background_become_one() -> None:
    missing = torch.tensor([[False, False, True], [False, False, False]])
    logits, label = leave_out_missing(LOGITS, LABEL, missing)
    before, after = LOGITS.softmax(dim=1), logits.softmax(dim=1)
    torch.testing.assert_close(after[0, 0], before[0, 0] + before[0, 2])
    torch.testing.assert_close(after[0, 1], before[0, 1])
    assert float(after[0, 2].max()) == 0
    assert label[0].unique().tolist() == [0, 1]
    torch.testing.assert_close(logits[1], LOGITS[1])
    torch.testing.assert_close(label[1], LABEL[1])


def test_loss_does_not_depend_on_how_background_and_missing_share() -> None:
    """Only their sum counts: the gradient of moving probability from one to the other is 0."""
    missing = torch.tensor([[False, False, True]])
    logits = LOGITS[:1].clone().requires_grad_()
    shown, target = leave_out_missing(logits, LABEL[:1] * (LABEL[:1] != 2), missing)
    build_loss(Training())(shown, target).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    shares = logits.detach().softmax(dim=1)
    # along a change of the two logits that keeps exp(a) + exp(b), the loss stays: share-weighted gradients agree
    torch.testing.assert_close(logits.grad[:, 0] * shares[:, 2], logits.grad[:, 2] * shares[:, 0], atol=1e-6, rtol=1e-4)


def test_missing_classes_travel_with_the_case(make_cases: Callable[..., tuple[Case, ...]]) -> None:
    case = replace(make_cases(1)[0], missing=(2,), predicted=(1,))
    item = ReadCased(tiny_preset())(case.as_item())
    assert item[MISSING].tolist() == [False, False, True]
    assert item[PREDICTED].tolist() == [False, True, False]


def test_missing_labels_have_no_score() -> None:
    scores = without_missing({"Left Box": 0.9, "core": 0.0}, {"Left Box": 1, "core": 2}, (2,))
    assert scores["Left Box"] == 0.9 and math.isnan(scores["core"])


def version(**fields: object) -> LabelVersion:
    return LabelVersion(image_id="a", file=Path("kept.nii.gz"), **fields)  # type: ignore[arg-type]


def test_case_of_a_version_maps_by_name() -> None:
    swapped = version(label_map={"CORE": 1, "left_box": 2, "tumour": 3})
    assert case_of_version(swapped, Path("a.nii.gz"), tiny_preset()).values == {1: 2, 2: 1}
    partial = case_of_version(version(label_map={"Left Box": 1}, missing_labels=("core",)), Path("a"), tiny_preset())
    assert (partial.values, partial.missing) == ({1: 1}, (2,))
    said = case_of_version(
        version(label_map={"Left Box": 1, "core": 2}, missing_labels=("core",)), Path("a"), tiny_preset()
    )
    assert said.missing == (2,), "drawn, but not wholly"
    assert case_of_version(version(), Path("a"), tiny_preset()).values is None
    empty = version(missing_labels=("Left Box", "core"))
    assert case_of_version(empty, Path("a"), tiny_preset()).missing == (1, 2)


@pytest.fixture
def train(make_cases: Callable[..., tuple[Case, ...]], tmp_path: Path) -> Callable[..., TrainingResult]:
    recipe = {"max_epochs": 16, "batch_size": 2, "learning_rate": 8e-3, "warmup_fraction": 0.1, "val_interval": 16}
    quiet = {"precision": "fp32", "augmentation": QUIET_AUGMENTATION, "crops_per_case": 1}
    preset = tiny_preset(training=quiet | recipe)
    validation = make_cases(2, first=101)

    def run(cases: list[Case], name: str) -> TrainingResult:
        plan = TrainingJob(preset, tuple(cases), validation, tmp_path / name, torch.device("cpu"))
        return run_training(plan)

    return run


def test_partially_labelled_cases_do_not_lower_the_missing_organ(
    make_cases: Callable[..., tuple[Case, ...]], train: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    """Four cases with a core, eight in which nobody drew it: marked as such they do no harm, unmarked they do."""
    full, partial = list(make_cases(4)), [without_core(case, tmp_path) for case in make_cases(8, first=11)]
    unmarked = [replace(case, missing=()) for case in partial]
    alone, marked, as_background = (
        train(cases, name).dice["core"]
        for cases, name in ((full * 3, "alone"), (full + partial, "marked"), (full + unmarked, "unmarked"))
    )
    assert marked > alone - 0.03
    assert marked > as_background + 0.1
