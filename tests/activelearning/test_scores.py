"""Scores against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lib.activelearning import scores


def column(*probs: float) -> torch.Tensor:
    """One voxel's probabilities, shape (classes, 1, 1, 1)."""
    return torch.tensor(probs)[:, None, None, None]


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ((1.0, 0.0), 0.0),
        ((0.5, 0.5), 1.0),
        ((0.25, 0.75), 0.811278),  # in bits, which is the share of the one bit that two classes can have
        ((1 / 3, 1 / 3, 1 / 3), 1.0),
        ((0.5, 0.5, 0.0), math.log(2) / math.log(3)),
    ],
)
def test_entropy(probs: tuple[float, ...], expected: float) -> None:
    assert scores.predictive_entropy(column(*probs)).item() == pytest.approx(expected, abs=1e-6)


def test_mutual_information_is_one_where_certain_passes_contradict_each_other() -> None:
    passes = torch.stack([column(1.0, 0.0), column(0.0, 1.0)])
    assert scores.mutual_information(passes).item() == pytest.approx(1.0)


def test_mutual_information_is_zero_where_all_passes_are_unsure_alike() -> None:
    passes = torch.stack([column(0.5, 0.5), column(0.5, 0.5)])
    assert scores.mutual_information(passes).item() == pytest.approx(0.0, abs=1e-7)


def test_mutual_information_in_between() -> None:
    passes = torch.stack([column(0.25, 0.75), column(0.75, 0.25)])  # H(mean) 1, mean H 0.811278
    assert scores.mutual_information(passes).item() == pytest.approx(1 - 0.811278, abs=1e-6)


@pytest.mark.parametrize(("probs", "expected"), [((0.7, 0.2, 0.1), 0.5), ((0.4, 0.4, 0.2), 1.0), ((0.0, 1.0), 0.0)])
def test_margin(probs: tuple[float, ...], expected: float) -> None:
    assert scores.margin(column(*probs)).item() == pytest.approx(expected)


def test_dice_disagreement_of_two_passes() -> None:
    # label 1: 2 and 2 voxels, 1 in common: Dice 0.5; label 2: the same voxel: Dice 1
    labels = torch.tensor([[1, 1, 0, 2], [0, 1, 1, 2]])
    assert scores.pairwise_dice_disagreement(labels, classes=3) == pytest.approx(0.25)


def test_dice_disagreement_is_the_mean_over_all_pairs() -> None:
    labels = torch.tensor([[1, 0], [1, 0], [0, 1]])  # Dice 1, 0, 0
    assert scores.pairwise_dice_disagreement(labels, classes=2) == pytest.approx(2 / 3)


def test_dice_disagreement_counts_a_label_that_one_pass_lacks_and_not_one_that_both_lack() -> None:
    assert scores.pairwise_dice_disagreement(torch.tensor([[1, 0], [0, 0]]), classes=3) == 1.0
    assert scores.pairwise_dice_disagreement(torch.tensor([[0, 0], [0, 0]]), classes=3) == 0.0


def test_class_balanced_entropy_weighs_entropy_with_each_labels_probability() -> None:
    # voxel 1: entropy 1 (0.5, 0.5, 0) is log 2 / log 3; voxel 2: certain of label 2
    probs = torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.0, 1.0]])[:, :, None, None]
    sums = scores.class_entropy_sums(probs)
    h = math.log(2) / math.log(3)
    assert sums[0].tolist() == pytest.approx([0.5 * h, 0.5 * h, 0.0])
    assert sums[1].tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert scores.class_balanced_entropy(sums) == pytest.approx((h + 0) / 2)


def test_class_balanced_entropy_does_not_drown_a_small_organ_in_a_large_one() -> None:
    large, small = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    probs = torch.stack([large] * 99 + [small], dim=1)[:, :, None, None]
    h = math.log(2) / math.log(3)
    expected = (0.5 * h / 99.5 + h) / 2
    assert scores.class_balanced_entropy(scores.class_entropy_sums(probs)) == pytest.approx(expected, rel=1e-5)
    assert scores.mean_over_volume(scores.predictive_entropy(probs)) == pytest.approx(h / 100, rel=1e-5)


def test_class_balanced_entropy_of_background_alone_is_zero() -> None:
    assert scores.class_balanced_entropy(scores.class_entropy_sums(column(1.0, 0.0, 0.0))) == 0.0


def test_foreground_has_a_margin_along_each_axis() -> None:
    labels = torch.zeros(9, 9, 9, dtype=torch.uint8)
    labels[4, 4, 4] = 2
    assert int(scores.foreground_region(labels, margin_voxels=2).sum()) == 5**3
    assert int(scores.foreground_region(labels, margin_voxels=0).sum()) == 1


def test_means_over_volume_and_foreground() -> None:
    uncertainty = torch.zeros(4, 4, 4)
    uncertainty[0, 0, :2] = torch.tensor([0.5, 1.0])
    region = torch.zeros(4, 4, 4, dtype=torch.bool)
    region[0, 0, :3] = True
    assert scores.mean_over_volume(uncertainty) == pytest.approx(1.5 / 64)
    assert scores.mean_over_foreground(uncertainty, region) == pytest.approx(0.5)


def test_mean_over_a_foreground_that_is_empty_is_that_over_the_volume() -> None:
    uncertainty = torch.full((2, 2, 2), 0.25)
    assert scores.mean_over_foreground(uncertainty, torch.zeros(2, 2, 2, dtype=torch.bool)) == 0.25


def test_top_patches_are_the_mean_of_the_most_uncertain_cubes() -> None:
    uncertainty = torch.zeros(4, 4, 2)
    uncertainty[:2, :2] = 0.8
    uncertainty[2:, 2:] = 0.4
    assert scores.top_k_patches(uncertainty, k=1, patch_voxels=2) == pytest.approx(0.8)
    assert scores.top_k_patches(uncertainty, k=2, patch_voxels=2) == pytest.approx(0.6)
    assert scores.top_k_patches(uncertainty, k=99, patch_voxels=2) == pytest.approx(0.3)


def test_a_patch_that_sticks_out_is_the_mean_of_what_is_inside() -> None:
    uncertainty = torch.zeros(3, 2, 2)
    uncertainty[2] = 0.6
    assert scores.top_k_patches(uncertainty, k=1, patch_voxels=2) == pytest.approx(0.6)
