"""Limits of ``component_entropy`` suit the weights: what a young network finds is not thrown away."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.cases.labelled import Case, read_case
from lib.configs.preset import Preset
from lib.errors import MemoryBudgetError
from lib.infers.plan import Plan, Planner
from lib.infers.segmenter import Segmenter
from lib.networks.checkpoint import Checkpoint
from lib.networks.layouts import StateDict
from lib.networks.unetr import build_unetr
from lib.trainers.judging.certainty import MARGIN, NO_LIMIT, entropy_of_right_component, is_sure, suit_limits_of_weights
from lib.trainers.loop import run_training
from lib.trainers.run.job import TrainingJob
from tests.tiny import QUIET_AUGMENTATION, tiny_preset, write_cases

CPU = torch.device("cpu")
STRICT = 1e-6


def _preset(limits: dict[str, float]) -> Preset:
    recipe = {"max_epochs": 40, "batch_size": 2, "learning_rate": 8e-3, "augmentation": QUIET_AUGMENTATION}
    return tiny_preset(training=recipe | {"warmup_fraction": 0.1}, inference={"component_entropy": limits})


def _segmenter(weights: StateDict, preset: Preset) -> Segmenter:
    return Segmenter.from_checkpoint(Checkpoint(weights, preset), preset, CPU, "fp32")


@pytest.fixture(scope="module")
def young(tmp_path_factory: pytest.TempPathFactory) -> tuple[StateDict, tuple[Case, ...]]:
    """Weights after few steps, which find both structures; and the cases, of which the first six were trained on."""
    torch.set_num_threads(1)  # as every test does
    folder = tmp_path_factory.mktemp("young")
    cases = write_cases(folder, 8)
    job = TrainingJob(_preset({}), cases[:6], (), folder / "run", CPU)
    return run_training(job).weights, cases


def test_structures_of_young_weights_are_left_out_by_limits_for_old_ones_and_kept_by_suited_ones(
    young: tuple[StateDict, tuple[Case, ...]],
) -> None:
    weights, cases = young
    strict, free = _preset({"Left Box": STRICT, "core": STRICT}), _preset({})
    suited = suit_limits_of_weights(strict, weights, cases[:6], CPU)
    limits = dict(suited.inference.component_entropy)
    assert list(limits) == ["Left Box", "core"]
    assert all(STRICT < limit < NO_LIMIT for limit in limits.values())
    for case in cases[6:]:
        volume, label = read_case(case, strict)
        assert not _segmenter(weights, strict).segment(volume).labels.any()
        found = _segmenter(weights, suited).segment(volume).labels
        everything = _segmenter(weights, free).segment(volume).labels
        for index in (1, 2):
            kept, all_of_it = ((mask == index) & (label == index) for mask in (found, everything))
            assert kept.sum() == all_of_it.sum() > 50


def test_limit_is_a_multiple_of_the_least_certain_right_structure(
    young: tuple[StateDict, tuple[Case, ...]],
) -> None:
    weights, cases = young
    seen = []
    for case in cases[:2]:
        volume, label = read_case(case, _preset({}))
        found = _segmenter(weights, _preset({})).segment(volume, entropy=True)
        assert found.entropy is not None
        seen.append(entropy_of_right_component(found.labels == 2, label == 2, found.entropy))
    suited = suit_limits_of_weights(_preset({"core": STRICT}), weights, cases[:2], CPU)
    assert suited.component_entropies[2] == pytest.approx(MARGIN * max(seen), rel=1e-6)
    easy = 0.9
    assert suit_limits_of_weights(_preset({"core": easy}), weights, cases[:2], CPU) == _preset({"core": easy}), (
        "never lowered"
    )


def test_label_that_was_not_learnt_has_no_limit(young: tuple[StateDict, tuple[Case, ...]]) -> None:
    torch.manual_seed(0)
    random = dict(build_unetr(_preset({})).state_dict())
    suited = suit_limits_of_weights(_preset({"core": STRICT}), random, young[1][:2], CPU)
    assert suited.component_entropies == {2: NO_LIMIT}


def test_preset_without_limits_needs_no_look_at_any_case(tmp_path: Path) -> None:
    nowhere = Case("gone", tmp_path / "gone.nii.gz", tmp_path / "gone.nii.gz")
    assert suit_limits_of_weights(_preset({}), {}, [nowhere], CPU) == _preset({})


class FirstTooLarge(Planner):
    """Finds no memory for the first image, and notes the name of each."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def plan(self, *arguments: Any, **options: Any) -> Plan:
        self.names.append(arguments[-1])
        if len(self.names) == 1:
            raise MemoryBudgetError("no room for this one")
        return super().plan(*arguments, **options)


def test_at_most_four_cases_are_looked_at_each_once(young: tuple[StateDict, tuple[Case, ...]]) -> None:
    weights, cases = young
    planner = FirstTooLarge()
    suited = suit_limits_of_weights(_preset({"core": STRICT}), weights, [*cases, *cases[:3]], CPU, planner)
    assert planner.names == ["case_001", "case_003", "case_005", "case_007"]
    assert STRICT < suited.component_entropies[2] < NO_LIMIT, "the others tell it"


ENTROPY = np.linspace(0, 0.99, 100, dtype=np.float32).reshape(1, 1, 100)


@pytest.mark.parametrize(
    ("found", "truth", "expected"),
    [
        (slice(0, 20), slice(0, 40), 0.01),  # the second of twenty in order
        (slice(0, 20), slice(10, 40), 0.01),  # half of it is right
        (slice(0, 20), slice(11, 40), math.inf),
        (slice(60, 61), slice(0, 100), 0.60),
        (slice(0, 0), slice(0, 100), math.inf),
    ],
)
def test_entropy_is_of_the_most_certain_tenth_of_what_is_right(found: slice, truth: slice, expected: float) -> None:
    masks = [np.zeros(ENTROPY.shape, dtype=bool) for _ in range(2)]
    masks[0][..., found], masks[1][..., truth] = True, True
    assert entropy_of_right_component(masks[0], masks[1], ENTROPY) == pytest.approx(expected)


def test_entropy_is_of_the_largest_right_component() -> None:
    found, truth = np.zeros(ENTROPY.shape, dtype=bool), np.zeros(ENTROPY.shape, dtype=bool)
    found[..., :40], found[..., 50:61], found[..., 70:75] = True, True, True
    truth[..., 50:80] = True
    assert entropy_of_right_component(found, truth, ENTROPY) == pytest.approx(0.51)


@pytest.mark.parametrize(
    ("start", "sure"),
    [
        (None, False),
        ({"core": 0.03}, True),
        ({"core": 0.02}, True),
        ({}, True),
        ({"core": 0.2}, False),
        ({"core": 0.03, "Left Box": 0.5}, True),  # which is not configured any more
    ],
)
def test_weights_are_sure_if_no_limit_of_theirs_was_raised(start: dict[str, float] | None, sure: bool) -> None:
    own = None if start is None else _preset(start)
    assert is_sure(own, _preset({"core": 0.03})) == sure
