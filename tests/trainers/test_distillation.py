"""What a label lacks is learnt from the old weights' probabilities, which pull at nothing until something changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.utils import one_hot

from lib.cases.labelled import Case
from lib.configs.preset import Training
from lib.infers.segmenter import Segmenter
from lib.networks.checkpoint import Checkpoint, load_weights
from lib.networks.layouts import StateDict
from lib.networks.unetr import build_unetr
from lib.trainers.completion import complete_labels
from lib.trainers.datasets import build_dataset
from lib.trainers.judging.masks import CaseMasks
from lib.trainers.loop import run_training
from lib.trainers.optimization import build_loss, leave_out_missing
from lib.trainers.run.distillation import DistillationLoss, distilled_targets
from lib.trainers.run.job import TrainingJob
from lib.transforms.preprocess import IMAGE
from tests.tiny import QUIET_AUGMENTATION, tiny_preset, without_core, write_cases

MakeCases = Callable[..., tuple[Case, ...]]
RANDOM = torch.Generator().manual_seed(3)
LOGITS, TEACHERS = torch.randn(2, 2, 4, 2, 2, 2, generator=RANDOM)
LABEL = torch.tensor([0.0, 1, 2, 3, 0, 1, 0, 0]).reshape(1, 1, 2, 2, 2).repeat(2, 1, 1, 1, 1)
# In the first crop a person has drawn class 1 alone, in the second everything.
PREDICTED = torch.tensor([[False, False, True, True], [False, False, False, False]])


def test_targets_are_the_persons_where_drawn_and_the_teachers_elsewhere() -> None:
    targets = distilled_targets(TEACHERS, LABEL, PREDICTED)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(2, 2, 2, 2))
    drawn = LABEL[0, 0] == 1
    assert targets[0][:, drawn].T.tolist() == [[0, 1, 0, 0]] * 2
    shares = TEACHERS[0].softmax(dim=0)
    torch.testing.assert_close(targets[0, 2:][:, ~drawn], shares[2:][:, ~drawn])
    torch.testing.assert_close(targets[0, 0][~drawn], (shares[0] + shares[1])[~drawn])
    assert not targets[0, 1][~drawn].any(), "a person has said where class 1 is"
    torch.testing.assert_close(targets[1], one_hot(LABEL, 4)[1])


def test_loss_of_drawn_labels_is_the_recipes() -> None:
    recipe = Training(dice_weight=0.7, cross_entropy_weight=0.4)
    drawn = DistillationLoss(recipe)(LOGITS, one_hot(LABEL, 4), torch.zeros_like(PREDICTED))
    torch.testing.assert_close(drawn, build_loss(recipe)(LOGITS, LABEL))


def test_dice_is_that_of_drawn_classes() -> None:
    recipe = Training(dice_weight=1, cross_entropy_weight=0)
    targets = distilled_targets(TEACHERS, LABEL, PREDICTED)
    loss = DistillationLoss(recipe)(LOGITS, targets, PREDICTED)
    found, label = LOGITS.softmax(dim=1), one_hot(LABEL, 4)
    expected = []
    for value, crops in ((1, slice(0, 2)), (2, slice(1, 2)), (3, slice(1, 2))):
        p, g = found[crops, value], label[crops, value]
        expected.append(1 - (2 * (p * g).sum() + 1e-5) / (p.sum() + g.sum() + 1e-5))
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_nothing_pulls_at_what_the_teacher_says_where_nothing_new_is_drawn() -> None:
    """Hard pseudo-labels do: each doubt becomes a certainty."""
    teacher = TEACHERS[:1].clone()
    teacher[:, 1] = -40  # it sees nothing of class 1, of which a person has drawn nothing here
    label = teacher.argmax(dim=1, keepdim=True).float()
    logits = teacher.clone().requires_grad_()
    DistillationLoss(Training())(logits, distilled_targets(teacher, label, PREDICTED[:1]), PREDICTED[:1]).backward()
    assert logits.grad is not None and float(logits.grad.abs().max()) < 1e-6
    hard = teacher.clone().requires_grad_()
    build_loss(Training())(hard, label).backward()
    assert hard.grad is not None and float(hard.grad.abs().max()) > 0.01


def test_missing_classes_stay_one_with_the_background() -> None:
    """Class 3 has been learnt by nobody: how background and it share is open, for the teacher as for the network."""
    missing = torch.tensor([[False, False, False, True]]).repeat(2, 1)
    predicted = torch.tensor([[False, False, True, False]]).repeat(2, 1)
    shown, label = leave_out_missing(LOGITS, LABEL, missing)
    targets = distilled_targets(leave_out_missing(TEACHERS, LABEL, missing)[0], label, predicted)
    shares = TEACHERS.softmax(dim=1)
    left = ~(LABEL == 1)
    torch.testing.assert_close(targets[:, 0][left[:, 0]], (1 - shares[:, 2])[left[:, 0]])
    assert not targets[:, 3].any()
    assert torch.isfinite(DistillationLoss(Training())(shown, targets, predicted))


def test_training_in_which_everything_is_the_teachers_learns_nothing(make_cases: MakeCases, tmp_path: Path) -> None:
    """The network is its own teacher, of both structures; with the same labels as a person's it learns."""
    recipe = {"max_epochs": 2, "batch_size": 2, "learning_rate": 4e-3, "precision": "fp32"}
    preset = tiny_preset(training=recipe | {"augmentation": QUIET_AUGMENTATION, "weight_decay": 0.0})
    torch.manual_seed(1)
    weights = build_unetr(preset).state_dict()

    def losses(predicted: tuple[int, ...]) -> tuple[float, ...]:
        cases = tuple(replace(case, predicted=predicted) for case in make_cases(2))
        run_dir = tmp_path / f"run{len(predicted)}"
        job = TrainingJob(preset, cases, (), run_dir, torch.device("cpu"), start=weights, teacher=weights)
        return run_training(job).losses

    own = losses((1, 2))
    assert own == pytest.approx([own[0]] * 2, abs=2e-3)
    drawn = losses(())
    assert drawn[1] < drawn[0] - 0.01


def test_correcting_one_structure_changes_little_of_the_other(tmp_path: Path) -> None:
    """A network that knows box and core goes on with cases of which a person has drawn the box alone."""
    recipe = {"batch_size": 2, "warmup_fraction": 0.1, "max_epochs": 15, "seed": 1, "precision": "fp32"}
    quiet = {"augmentation": QUIET_AUGMENTATION, "crops_per_case": 1}

    def trained(name: str, cases: Sequence[Case], rate: float, **options: Any) -> StateDict:
        preset = tiny_preset(training=recipe | quiet | {"learning_rate": rate})
        return run_training(
            TrainingJob(preset, tuple(cases), (), tmp_path / name, torch.device("cpu"), **options)
        ).weights

    torch.manual_seed(1)
    weights = trained("first", write_cases(tmp_path / "first", 6, first=1001), 8e-3)
    drawn = [without_core(case, tmp_path) for case in write_cases(tmp_path / "corrected", 6, first=1301)]
    preset = tiny_preset()
    segmenter = Segmenter.from_checkpoint(Checkpoint(weights, preset), preset, torch.device("cpu"), "fp32")
    completed = complete_labels(drawn, CaseMasks(segmenter), (), tmp_path / "completed")
    taught = trained("taught", completed, 2e-3, start=weights, teacher=weights)
    alone = trained("alone", drawn, 2e-3, start=weights)

    def cores(state: StateDict) -> torch.Tensor:
        """Probability of the core in the first 16 voxels along each axis of other images."""
        network = build_unetr(preset)
        load_weights(network, state)
        images = build_dataset(write_cases(tmp_path / "others", 4, first=1201), preset, "Dataset", tmp_path)
        crops = torch.stack([images[index][IMAGE][:, :16, :16, :16] for index in range(4)])
        with torch.no_grad():
            return network.eval()(crops).softmax(dim=1)[:, 2]

    changes = [float((cores(state) - cores(weights)).abs().mean()) for state in (taught, alone)]
    assert changes[0] < 0.5 * changes[1], "0.04 and 0.19"
