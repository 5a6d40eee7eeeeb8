"""A model segments each case once, whoever asks for its mask, and again where image, task or weights have changed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lib.cases.labelled import Case
from lib.configs.preset import Preset
from lib.infers.plan import Planner
from lib.infers.segmenter import Segmenter
from lib.networks.checkpoint import Checkpoint
from lib.networks.unetr import build_unetr
from lib.trainers.judging.masks import CaseMasks, digest_of_weights, prune_masks
from tests.tiny import boxes, tiny_preset, write_nifti

CPU = torch.device("cpu")


class Counting(nn.Module):
    """Draws what is above the mean, and counts the windows that it has seen."""

    windows = 0

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        self.windows += len(windows)
        return torch.cat([-windows, windows, torch.full_like(windows, -9)], dim=1)


@pytest.fixture
def case(make_cases: Callable[..., tuple[Case, ...]]) -> Case:
    return make_cases(1)[0]


def masks(network: nn.Module, folder: Path | None, preset: Preset | None = None) -> CaseMasks:
    return CaseMasks(Segmenter(network, preset or tiny_preset(), CPU, "fp32"), folder)


def test_case_is_segmented_once_also_by_the_next_run(case: Case, tmp_path: Path) -> None:
    network = Counting()
    first = masks(network, tmp_path / "kept").of(case)
    seen = network.windows
    again = masks(network, tmp_path / "kept").of(case)
    assert network.windows == seen > 0
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.labels.dtype, again.labels.dtype) == (np.uint8, np.uint8)
    assert first.uncertainty == again.uncertainty
    masks(network, None).of(case)
    assert network.windows == 2 * seen, "without a folder nothing is kept"


def test_other_image_or_task_is_segmented_anew(case: Case, tmp_path: Path) -> None:
    network = Counting()
    masks(network, tmp_path).of(case)
    once = network.windows
    masks(network, tmp_path, tiny_preset(inference={"largest_component": True})).of(case)
    assert network.windows == 2 * once
    write_nifti(case.image, boxes(seed=7)[0])
    changed = masks(network, tmp_path).of(case)
    assert network.windows == 3 * once
    np.testing.assert_array_equal(changed.labels, masks(network, None).of(case).labels)


def test_damaged_file_is_computed_anew(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = Counting()
    kept = masks(network, tmp_path)
    first = kept.of(case)
    for content in (b"", b"half", next(tmp_path.glob("*.npz")).read_bytes()[:200]):
        next(tmp_path.glob("*.npz")).write_bytes(content)
        np.testing.assert_array_equal(kept.of(case).labels, first.labels)
    assert caplog.text.count("is computed anew") == 3


def test_disk_that_takes_nothing_costs_only_time(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        found = masks(Counting(), tmp_path / "file" / "kept").of(case)
    assert found.labels.any()
    assert "could not be kept" in caplog.text


def test_each_weights_have_a_folder_and_those_of_others_go(tmp_path: Path) -> None:
    preset, states = tiny_preset(), []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(dict(build_unetr(preset).state_dict()))
    digests = [digest_of_weights(state) for state in states]
    assert len(set(digests)) == 3
    assert digest_of_weights({key: value.clone() for key, value in reversed(states[0].items())}) == digests[0]
    for state in states:
        folder = CaseMasks.of_weights(Checkpoint(state, preset), preset, CPU, Planner(), tmp_path).folder
        assert folder is not None
        folder.mkdir()
    prune_masks(tmp_path, digests[:2])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(digests[:2])
    prune_masks(tmp_path / "nowhere", [])
