"""The recipe's numbers: loss, schedule, parameter groups, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from monai.optimizers import WarmupCosineSchedule
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from lib.configs.preset import Training
from lib.networks.unetr import build_unetr
from lib.trainers.optimization import build_average, build_loss, build_optimizer, build_schedule
from tests.tiny import tiny_preset

# Two voxels, three classes: softmax of these logits is (0.7, 0.2, 0.1) and (0.1, 0.3, 0.6).
PROBABILITIES = [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]
LABELS = [0, 2]


def _two_voxels() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.tensor(PROBABILITIES).log().T.reshape(1, 3, 2, 1, 1)
    return logits, torch.tensor(LABELS, dtype=torch.float32).reshape(1, 1, 2, 1, 1)


def test_loss_is_the_weighted_sum_of_dice_and_cross_entropy() -> None:
    logits, label = _two_voxels()
    # Dice over the labels 1 and 2: 1 - 2 |P G| / (|P| + |G|), with 1e-5 above and below.
    dice_1 = 1 - (0 + 1e-5) / (0.2 + 0.3 + 0 + 1e-5)
    dice_2 = 1 - (2 * 0.6 + 1e-5) / (0.1 + 0.6 + 1 + 1e-5)
    cross_entropy = -(math.log(0.7) + math.log(0.6)) / 2
    loss = build_loss(Training(dice_weight=0.7, cross_entropy_weight=0.3))(logits, label)
    assert float(loss) == pytest.approx(0.7 * (dice_1 + dice_2) / 2 + 0.3 * cross_entropy, abs=1e-6)


def test_loss_of_dice_is_taken_over_the_whole_batch() -> None:
    """A crop without an organ is no miss of it, as long as another crop of the batch has it."""
    certain = 40.0
    label = torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1, 1)
    logits = torch.zeros(2, 2, 1, 1, 1)
    logits[0, 1], logits[1, 0] = certain, certain
    assert float(build_loss(Training(dice_weight=1, cross_entropy_weight=0))(logits, label)) == pytest.approx(
        0, abs=1e-6
    )


def test_loss_of_a_perfect_prediction_is_0_and_of_the_opposite_large() -> None:
    label = torch.tensor([0.0, 1.0, 2.0, 1.0]).reshape(1, 1, 4, 1, 1)
    perfect = nn.functional.one_hot(label.long().squeeze(1), 3).movedim(-1, 1).float() * 60
    loss = build_loss(Training())
    assert float(loss(perfect, label)) == pytest.approx(0, abs=1e-5)
    assert float(loss(-perfect, label)) > 1


def test_optimizer_decays_matrices_and_spares_biases_and_norms() -> None:
    network = build_unetr(tiny_preset(network={"feature_size": 4, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4}))
    network.out.requires_grad_(False)
    recipe = Training(learning_rate=3e-4, weight_decay=0.05, betas=(0.9, 0.99))
    decayed, spared = build_optimizer(network, recipe).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert decayed["lr"] == spared["lr"] == 3e-4
    assert decayed["betas"] == (0.9, 0.99)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim <= 1 for p in spared["params"])
    trainable = [p for p in network.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(spared["params"]) == len(trainable)
    assert {id(p) for group in (decayed, spared) for p in group["params"]} == {id(p) for p in trainable}


def test_schedule_warms_up_linearly_and_falls_as_a_half_cosine() -> None:
    recipe = Training(learning_rate=1.0, warmup_fraction=0.1)
    optimizer = build_optimizer(nn.Linear(2, 2), recipe)
    schedule = build_schedule(optimizer, recipe, total_steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    for step in (10, 25, 55, 99):
        assert rates[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 10) / 90)))
    assert rates[55] == pytest.approx(0.5)
    assert max(rates) == 1.0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("total", [1, 2])
def test_schedule_of_a_very_short_run_is_finite(total: int) -> None:
    recipe = Training(warmup_fraction=1.0)
    optimizer = build_optimizer(nn.Linear(2, 2), recipe)
    schedule = build_schedule(optimizer, recipe, total_steps=total)
    for _ in range(total):
        assert optimizer.param_groups[0]["lr"] > 0
        optimizer.step()
        schedule.step()
    assert math.isfinite(optimizer.param_groups[0]["lr"])


def test_average_grows_its_memory_up_to_the_decay() -> None:
    layer = nn.Linear(1, 1, bias=False)
    average = build_average(layer, Training(ema_decay=0.5))
    values, expected = [1.0, 3.0, -2.0, 5.0, 4.0, 8.0, 0.0, 1.0, 1.0, 1.0, 7.0], 0.0
    for count, value in enumerate(values):
        nn.init.constant_(layer.weight, value)
        average.update_parameters(layer)
        decay = min(0.5, (1 + count) / (10 + count))
        expected = value if count == 0 else decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert min(0.5, 11 / 20) == 0.5, "the last step reached the recipe's decay"


def test_average_does_not_read_the_count_from_the_device() -> None:
    """A tensor without values stands for a GPU's, whose values are there only when all that runs is done."""
    layer = nn.Linear(1, 1, bias=False)
    average = build_average(layer, Training(ema_decay=0.5))
    average.n_averaged += 1
    kept, new = [torch.tensor([1.0])], [torch.tensor([3.0])]
    assert average.multi_avg_fn is not None
    average.multi_avg_fn(kept, new, torch.empty((), device="meta"))
    decay = 2 / 11
    assert kept[0].item() == pytest.approx(decay * 1.0 + (1 - decay) * 3.0)


def test_average_takes_batch_norms_running_numbers_with_it() -> None:
    norm = nn.BatchNorm1d(2)
    average = build_average(norm, Training(ema_decay=0.9))
    for step in range(3):
        norm(torch.full((4, 2), float(step)) + torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
        average.update_parameters(norm)
    assert int(average.module.num_batches_tracked) == 3
    assert 0 < float(average.module.running_mean[0]) < float(norm.running_mean[0])


def test_average_leaves_the_trained_weights_alone() -> None:
    layer = nn.Linear(1, 1, bias=False)
    average = build_average(layer, Training())
    nn.init.constant_(layer.weight, 2.0)
    average.update_parameters(layer)
    nn.init.constant_(layer.weight, 4.0)
    average.update_parameters(layer)
    assert layer.weight.item() == 4.0


@pytest.mark.parametrize(("warmup", "total"), [(1, 10), (4, 40), (40, 40)])
def test_schedule_is_that_of_monai_whose_warm_up_begins_a_step_later(warmup: int, total: int) -> None:
    def rates(schedule_of: Callable[[AdamW], LRScheduler]) -> list[float]:
        optimizer = AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule, found = schedule_of(optimizer), list[float]()
        for _ in range(total):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    recipe = Training(warmup_fraction=warmup / total)
    own = rates(lambda optimizer: build_schedule(optimizer, recipe, total))
    monai = rates(lambda optimizer: WarmupCosineSchedule(optimizer, warmup, total))
    assert own[warmup:] == pytest.approx(monai[warmup:])
    assert own[: warmup - 1] == pytest.approx(monai[1:warmup])
    assert (own[0], monai[0]) == (pytest.approx(1 / warmup), 0)
