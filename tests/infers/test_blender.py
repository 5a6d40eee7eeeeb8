"""Sums of windows and what they say, plane by plane."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.infers.blender import SlabBlender, normalized_entropy
from lib.infers.logit_margins import MOST_STEPS, LogitMargins


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [((0.25, 0.25, 0.25, 0.25), 1.0), ((0.5, 0.5, 0.0, 0.0), 0.5), ((1.0, 0.0, 0.0, 0.0), 0.0)],
)
def test_entropy_is_a_share_of_the_largest(probabilities: tuple[float, ...], expected: float) -> None:
    weight = torch.tensor([3.0])
    logits = torch.tensor(probabilities).clamp_min(1e-30).log()
    assert normalized_entropy(logits[None] * weight, weight).item() == pytest.approx(expected, abs=1e-6)


def test_entropy_where_no_window_was_is_none() -> None:
    assert normalized_entropy(torch.zeros(1, 4), torch.zeros(1)).item() == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_two_windows_are_averaged_where_they_overlap(axis: int) -> None:
    shape = [4, 4, 4]
    shape[axis] = 6
    blender = SlabBlender(shape, axis, torch.ones(4, 4, 4), classes=2, entropy=True)
    first, second = torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4)
    first[1], second[0] = 1.0, 3.0
    blender.add([0, 0, 0], first)
    start = [0, 0, 0]
    start[axis] = 2
    blender.advance(2)
    blender.add(start, second)
    labels, entropy = blender.finish()
    assert labels.shape == tuple(shape)
    assert np.moveaxis(labels, axis, 0)[:, 0, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert entropy is not None
    p = 1 / (1 + np.exp(-np.array([1.0, 1.0, 1.0, 1.0, 3.0, 3.0])))  # logits 0 and 1; (3, 1) / 2; 3 and 0
    expected = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    np.testing.assert_allclose(np.moveaxis(entropy, axis, 0)[:, 1, 2], expected, atol=1e-3)


def test_entropy_of_labels_only_is_the_same_there_and_0_elsewhere() -> None:
    random = torch.Generator().manual_seed(3)
    windows = [torch.randn(3, 4, 4, 4, generator=random) for _ in range(2)]
    answers = []
    for of_labels in (False, True):
        blender = SlabBlender((6, 4, 4), 0, torch.ones(4, 4, 4), classes=3, entropy=True, of_labels=of_labels)
        blender.add([0, 0, 0], windows[0])
        blender.advance(2)
        blender.add([2, 0, 0], windows[1])
        answers.append(blender.finish())
    (labels, everywhere), (same, of_labels_only) = answers
    assert everywhere is not None and of_labels_only is not None
    np.testing.assert_array_equal(labels, same)
    assert 0 < (labels > 0).sum() < labels.size and everywhere[labels == 0].min() > 0
    np.testing.assert_array_equal(of_labels_only, np.where(labels > 0, everywhere, 0))


def test_labels_up_to_255_are_kept() -> None:
    blender = SlabBlender((2, 2, 2), 0, torch.ones(2, 2, 2), classes=256)
    logits = torch.zeros(256, 2, 2, 2)
    logits[255] = 1
    blender.add([0, 0, 0], logits)
    assert np.unique(blender.finish()[0]).tolist() == [255]


def test_second_label_and_its_margin_are_those_of_the_averaged_windows() -> None:
    blender = SlabBlender((6, 4, 4), 0, torch.ones(4, 4, 4), classes=3, margins=True)
    first, second = torch.zeros(3, 4, 4, 4), torch.zeros(3, 4, 4, 4)
    first[1], first[2], second[0], second[2] = 1.0, 0.4, 3.0, 2.6
    blender.add([0, 0, 0], first)
    blender.advance(2)
    blender.add([2, 0, 0], second)
    labels, entropy = blender.finish()
    margins = blender.margins
    assert entropy is None and margins is not None
    # logits (0, 1, 0.4); (1.5, 0.5, 1.5), which are equal in the sums; (3, 0, 2.6)
    np.testing.assert_array_equal(margins.labels, labels)
    assert margins.second[[0, 5], 0, 0].tolist() == [2, 2] and margins.margin[[0, 5], 0, 0].tolist() == [6, 4]
    assert margins.margin[3, 0, 0] == 0 and {int(labels[3, 0, 0]), int(margins.second[3, 0, 0])} == {0, 2}


def test_share_grows_with_the_margin_from_half_to_all() -> None:
    steps = np.arange(MOST_STEPS + 1, dtype=np.uint8).reshape(16, 4, 4)
    shares = LogitMargins(np.ones_like(steps), np.zeros_like(steps), steps).shares(255).ravel().astype(int)
    assert (np.diff(shares) >= 0).all() and shares[[0, -1]].tolist() == [130, 255]
    # a margin of 2 at a temperature of 2: odds of e to 1
    assert shares[20] / (255 - shares[20]) == pytest.approx(np.e, rel=0.02)


def test_margin_is_largest_where_no_window_was() -> None:
    blender = SlabBlender((4, 8, 4), 0, torch.ones(4, 4, 4), classes=2, margins=True)
    blender.add([0, 0, 0], torch.stack([torch.zeros(4, 4, 4), torch.ones(4, 4, 4)]))
    labels, _ = blender.finish()
    assert blender.margins is not None
    assert (blender.margins.margin[:, :4] == 10).all() and (blender.margins.margin[:, 4:] == MOST_STEPS).all()
    np.testing.assert_array_equal(blender.margins.second, 0)
    assert (labels[:, :4] == 1).all()
