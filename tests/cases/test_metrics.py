"""Dice and HD95 against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from lib.cases.metrics import dice_per_label, mean_known, mean_per_label, surface_per_label

LABELS = {"a": 1, "b": 2}


def _volume(*boxes: tuple[int, tuple[slice, slice, slice]]) -> np.ndarray:
    volume = np.zeros((20, 20, 20), dtype=np.uint8)
    for index, box in boxes:
        volume[box] = index
    return volume


def _box(x: int, y: int, z: int, size: int = 4) -> tuple[slice, slice, slice]:
    return slice(x, x + size), slice(y, y + size), slice(z, z + size)


def test_dice_of_boxes_that_half_overlap() -> None:
    predicted, reference = _volume((1, _box(0, 0, 0))), _volume((1, _box(2, 0, 0)))
    assert dice_per_label(predicted, reference, LABELS)["a"] == 2 * 32 / (64 + 64)


def test_dice_is_of_each_label_by_itself() -> None:
    predicted = _volume((1, _box(0, 0, 0)), (2, _box(8, 8, 8)))
    reference = _volume((2, _box(0, 0, 0)), (2, _box(8, 8, 8)))
    assert dice_per_label(predicted, reference, LABELS) == {"a": 0.0, "b": 2 * 64 / (64 + 128)}


def test_dice_of_a_label_in_neither_is_unknown_and_in_one_is_0() -> None:
    empty, full = _volume(), _volume((1, _box(0, 0, 0)))
    assert math.isnan(dice_per_label(empty, empty, LABELS)["a"])
    assert dice_per_label(full, empty, LABELS)["a"] == 0
    assert dice_per_label(empty, full, LABELS)["a"] == 0


def _hd95(predicted: np.ndarray, reference: np.ndarray, spacing_mm: tuple[float, float, float] = (1, 1, 1)) -> float:
    return surface_per_label(predicted, reference, LABELS, spacing_mm, tolerance_mm=1)[0]["a"]


def _nsd(predicted: np.ndarray, reference: np.ndarray, tolerance_mm: float, spacing_mm: tuple = (1, 1, 1)) -> float:
    return surface_per_label(predicted, reference, LABELS, spacing_mm, tolerance_mm)[1]["a"]


@pytest.mark.parametrize(
    ("shift", "spacing_mm", "expected"),
    [
        ((3, 0, 0), (1, 1, 1), 3.0),
        ((3, 0, 0), (0.5, 1, 1), 1.5),
        ((0, 2, 0), (1, 2.5, 1), 5.0),
        ((0, 0, 0), (1, 1, 1), 0),
    ],
)
def test_hd95_of_two_voxels_is_their_distance_in_millimetres(
    shift: tuple[int, int, int], spacing_mm: tuple[float, float, float], expected: float
) -> None:
    predicted, reference = _volume((1, _box(5, 5, 5, 1))), _volume((1, _box(*(5 + s for s in shift), 1)))
    assert _hd95(predicted, reference, spacing_mm) == pytest.approx(expected)


def test_hd95_forgives_a_twentieth_of_the_surface() -> None:
    """A plate of 100 voxels and the same with one voxel far away: the 95th percentile does not see it."""
    reference = np.zeros((30, 30, 30), dtype=np.uint8)
    reference[10:20, 10:20, 5] = 1
    predicted = reference.copy()
    predicted[15, 15, 25] = 1
    assert _hd95(predicted, reference) == 0
    predicted[10:20, 15, 25] = 1
    assert _hd95(predicted, reference) == 20


def test_hd95_takes_the_larger_of_both_directions() -> None:
    reference = _volume((1, _box(0, 0, 0)))
    predicted = _volume((1, _box(0, 0, 0)), (1, _box(12, 0, 0)))
    forth = _hd95(predicted, reference)
    back = _hd95(reference, predicted)
    assert forth == back == pytest.approx(12, abs=0.5)


def test_hd95_at_the_edge_of_the_volume_is_no_smaller() -> None:
    inner = _hd95(_volume((1, _box(8, 8, 8))), _volume((1, _box(10, 8, 8))))
    outer = _hd95(_volume((1, _box(14, 16, 16))), _volume((1, _box(16, 16, 16))))
    assert inner == outer == 2


@pytest.mark.parametrize("both_ways", [False, True])
def test_hd95_where_a_mask_is_empty_is_unknown(both_ways: bool) -> None:
    pair = (_volume(), _volume((1, _box(0, 0, 0))))
    predicted, reference = pair[::-1] if both_ways else pair
    assert math.isnan(_hd95(predicted, reference))


def test_nsd_counts_the_surface_of_both_within_the_tolerance() -> None:
    """Ten voxels in a row against the same row with two more at its end: 10 of 10 and 10, 11 or 12 of 12 are near."""
    reference = np.zeros((20, 5, 5), dtype=np.uint8)
    reference[2:12, 2, 2] = 1
    predicted = reference.copy()
    predicted[12:14, 2, 2] = 1
    assert _nsd(predicted, reference, 0) == pytest.approx(20 / 22)
    assert _nsd(predicted, reference, 1) == pytest.approx(21 / 22)
    assert _nsd(predicted, reference, 2) == 1
    assert _nsd(reference, predicted, 1) == _nsd(predicted, reference, 1), "it has no direction"
    assert _nsd(predicted, reference, 1, (2, 1, 1)) == pytest.approx(20 / 22), "in millimetres, not in voxels"


def test_nsd_of_two_plates_depends_on_their_distance_alone() -> None:
    reference, predicted = (np.zeros((12, 12, 12), dtype=np.uint8) for _ in range(2))
    reference[2:10, 2:10, 3] = 1
    predicted[2:10, 2:10, 6] = 1
    assert [_nsd(predicted, reference, mm) for mm in (2.9, 3.0)] == [0, 1]


def test_nsd_where_masks_are_empty() -> None:
    empty, full = _volume(), _volume((1, _box(0, 0, 0)))
    assert (_nsd(full, empty, 5), _nsd(empty, full, 5)) == (0, 0)
    assert math.isnan(_nsd(empty, empty, 5))


def test_means_leave_the_unknown_out() -> None:
    assert mean_known([0.5, math.nan, 1.0]) == 0.75
    assert math.isnan(mean_known([math.nan]))
    assert math.isnan(mean_known([]))
    assert mean_per_label([{"a": 0.5, "b": math.nan}, {"a": 1.0, "b": 0.25}]) == {"a": 0.75, "b": 0.25}
    assert mean_per_label([]) == {}


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")  # of MONAI by itself
def test_surface_distances_are_those_of_monai() -> None:
    """MONAI's as the reference: it takes one mask at a time, and warns and answers infinity where one is empty."""
    numbers, spacing = np.random.default_rng(5), (1.0, 1.5, 2.5)
    smooth = [ndimage.gaussian_filter(numbers.normal(size=(24, 20, 18)), 2) for _ in range(2)]
    predicted, reference = (np.pad(volume > 0, 2).astype(np.uint8) for volume in smooth)
    masks = [torch.from_numpy(mask)[None, None].float() for mask in (predicted, reference)]
    hd95, nsd = surface_per_label(predicted, reference, {"a": 1}, spacing, tolerance_mm=2.0)
    expected = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=list(spacing))
    assert hd95["a"] == pytest.approx(float(expected), abs=1e-4)
    share = compute_surface_dice(*masks, class_thresholds=[2.0], include_background=True, spacing=list(spacing))
    assert nsd["a"] == pytest.approx(float(share), abs=1e-4)
