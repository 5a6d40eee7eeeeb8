"""Masks come back to the image's own grid, and are measured there."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from lib.transforms.postprocess import (
    FULL_WEIGHT,
    SecondLabels,
    boxes_after_restoring,
    drop_uncertain_components,
    interpolate_to_grid,
    keep_largest_components,
    measure_labels,
    restore_by_interpolation,
    restore_to_grid,
)
from lib.transforms.preprocess import IMAGE, LABEL, as_meta_tensor, build_preprocessing, preprocess_volume
from lib.transforms.volume import Volume
from tests.tiny import axis_affine, oblique_affine, tiny_preset

PAIRS = ("RL", "AP", "SI")
ORIENTATIONS = ["".join(letters) for order in itertools.permutations(PAIRS) for letters in itertools.product(*order)]
SHEAR = np.array([[1, 0, 0.2, 0], [0, 1, 0.1, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def _grid(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """World position of every voxel, shape (X, Y, Z, 3)."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return indices @ affine[:3, :3].T + affine[:3, 3]


def test_orientations_are_all_48() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
@pytest.mark.parametrize("network_axcodes", ["RAS", "PIL"])
def test_round_trip_at_equal_spacing_is_exact_in_every_orientation(axcodes: str, network_axcodes: str) -> None:
    preset = tiny_preset(axcodes=network_axcodes)
    labels = np.random.default_rng(0).integers(0, 3, (9, 18, 21)).astype(np.uint8)  # 9 is padded to 16
    for affine in (axis_affine(axcodes, origin=(3.5, -40, 5)), oblique_affine(axcodes)):
        chain = build_preprocessing(preset, (IMAGE, LABEL))
        seen = chain({IMAGE: as_meta_tensor(labels.astype(np.float32), affine), LABEL: as_meta_tensor(labels, affine)})
        assert seen[LABEL].shape == seen[IMAGE].shape
        restored = restore_to_grid(
            seen[LABEL][0].numpy().astype(np.uint8), seen[IMAGE].affine.numpy(), labels.shape, affine
        )
        np.testing.assert_array_equal(restored, labels)
        assert restored.flags.f_contiguous, "as files have them: else it is turned when it is written"


@pytest.mark.parametrize(
    "affine",
    [
        axis_affine("PIR", (0.7, 1.3, 2.1), (3, 4, 5)),
        axis_affine("LPS", (0.5, 0.5, 5.0)),
        oblique_affine("PIR", (0.7, 1.3, 2.1)),
        oblique_affine("ASL", (0.9, 0.8, 1.6), degrees=(40, 30, -44)),
        oblique_affine("RAS", (0.7, 1.3, 2.1)) @ SHEAR,
    ],
    ids=["axes", "thick slices", "oblique", "far oblique", "sheared"],
)
def test_round_trip_at_another_spacing_moves_no_voxel_by_more_than_half(affine: np.ndarray) -> None:
    preset = tiny_preset(spacing_mm=[1.1, 0.9, 1.6], axcodes="LPS", roi_size=[32, 32, 32])
    shape = (24, 20, 14)
    image = Volume(np.random.default_rng(0).normal(size=shape).astype(np.float32), affine)
    seen = preprocess_volume(image, preset)
    seen_affine, seen_shape = seen.affine.numpy(), seen.shape[1:]
    exact = (_grid(shape, affine) - seen_affine[:3, 3]) @ np.linalg.inv(seen_affine[:3, :3]).T
    for axis in range(3):
        index_along_axis = np.indices(seen_shape, dtype=np.uint8)[axis]
        restored = restore_to_grid(index_along_axis, seen_affine, shape, affine)
        assert np.abs(restored - exact[..., axis]).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("spacing_mm", [0.6, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("size", [60, 61, 62, 63])
def test_round_trip_leaves_no_plane_of_the_image_outside(spacing_mm: float, size: int) -> None:
    preset = tiny_preset(spacing_mm=[spacing_mm] * 3, intensity={"kind": "window", "lower": -1, "upper": 1})
    shape, affine = (size, 20, 17), oblique_affine("LPS")
    seen = preprocess_volume(Volume(np.zeros(shape, dtype=np.float32), affine), preset)
    everywhere = np.ones(seen.shape[1:], dtype=np.uint8)
    assert restore_to_grid(everywhere, seen.affine.numpy(), shape, affine).all()


def test_restore_of_a_smaller_volume_is_background_outside_it() -> None:
    labels = np.full((2, 3, 4), 7, dtype=np.uint8)
    restored = restore_to_grid(labels, axis_affine("RAS", origin=(1, 1, 1)), (5, 5, 6), np.eye(4))
    expected = np.zeros((5, 5, 6), dtype=np.uint8)
    expected[1:3, 1:4, 1:5] = 7
    np.testing.assert_array_equal(restored, expected)


def test_largest_component_counts_corner_neighbours_as_connected() -> None:
    labels = np.zeros((8, 8, 8), dtype=np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[2, 2, 2] = 1  # three voxels that touch at corners
    labels[6, 6, 5:7] = 1
    kept = keep_largest_components(labels)
    assert kept.sum() == 3
    assert kept[0, 0, 0] == kept[1, 1, 1] == kept[2, 2, 2] == 1


def test_components_of_half_the_largest_are_kept_where_asked() -> None:
    labels = np.zeros((12, 4, 4), dtype=np.uint8)
    labels[0:4, 0, 0], labels[6:8, 0, 0], labels[9, 0, 0] = 1, 1, 1
    kept = keep_largest_components(labels, share=0.5)
    assert np.flatnonzero(kept[:, 0, 0]).tolist() == [0, 1, 2, 3, 6, 7]
    alone = keep_largest_components(labels)
    assert np.flatnonzero(alone[:, 0, 0]).tolist() == [0, 1, 2, 3]


def test_largest_component_is_chosen_for_each_label_by_itself() -> None:
    labels = np.zeros((10, 4, 4), dtype=np.uint8)
    labels[0:3], labels[3:5], labels[7], labels[9] = 1, 2, 1, 2
    kept = keep_largest_components(labels)
    expected = labels.copy()
    expected[7], expected[9] = 0, 0
    np.testing.assert_array_equal(kept, expected)
    assert labels[7].all(), "the given volume is left as it was"


def test_largest_component_of_a_label_inside_anothers_box_is_not_lost() -> None:
    labels = np.zeros((9, 9, 3), dtype=np.uint8)
    labels[0], labels[8], labels[0:9, 0] = 1, 1, 1  # a U around label 3; there is no label 2
    labels[3:6, 3:6] = 3
    np.testing.assert_array_equal(keep_largest_components(labels), labels)


def test_component_is_judged_by_its_most_certain_tenth() -> None:
    labels, entropy = np.zeros((30, 3, 3), dtype=np.uint8), np.full((30, 3, 3), 0.5, dtype=np.float16)
    labels[0:20, 1, 1], labels[22:30, 1, 1] = 1, 1
    entropy[5:7, 1, 1] = 0.01  # two of twenty voxels
    entropy[22:30, 1, 1] = 0.04
    labels[0:10, 0, 0], labels[12, 0, 0] = 2, 2
    entropy[3, 0, 0], entropy[12, 0, 0] = 0.03, 0.02  # one of ten, and the only one
    expected = labels.copy()
    expected[22:30, 1, 1] = 0
    np.testing.assert_array_equal(drop_uncertain_components(labels, entropy, {1: 0.03, 2: 0.03}), expected)
    entropy[6, 1, 1], expected[0:20, 1, 1] = 0.5, 0  # one of twenty is less than a tenth
    np.testing.assert_array_equal(drop_uncertain_components(labels, entropy, {1: 0.03, 2: 0.03}), expected)
    assert labels[22:30, 1, 1].all(), "the given volume is left as it was"
    np.testing.assert_array_equal(drop_uncertain_components(labels, entropy, {2: 0.03}), labels)
    empty = np.zeros((3, 3, 3), dtype=np.uint8)
    assert not drop_uncertain_components(empty, entropy[:3], {1: 0.03}).any()


def test_largest_component_of_an_empty_mask_is_empty() -> None:
    assert not keep_largest_components(np.zeros((3, 3, 3), dtype=np.uint8)).any()


def test_measures_are_those_of_a_hand_calculation() -> None:
    labels = np.zeros((10, 10, 10), dtype=np.uint8)
    labels[2:4, 5, 6:9] = 1
    affine = axis_affine("LPS", (0.5, 2.0, 3.0), origin=(100, 50, -20))
    measures = measure_labels(labels, affine, tiny_preset())
    assert list(measures) == ["Left Box"], "a label that is not there is not measured"
    assert measures["Left Box"] == {
        "voxels": 6,
        "volume_ml": 0.018,  # 6 voxels of 0.5 * 2 * 3 mm
        "centroid_voxels": [2.5, 5.0, 7.0],
        # L and P are the negative directions of RAS
        "centroid_ras_mm": [100 - 2.5 * 0.5, 50 - 5 * 2.0, -20 + 7 * 3.0],
    }


@pytest.mark.parametrize("order", ["C", "F", "neither"])
def test_measures_are_those_of_a_list_of_voxels_however_the_mask_lies_in_memory(order: str) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (20, 24, 28)).astype(np.uint8)
    labels[:3] = labels[:, -2:] = 0
    labels = {"C": labels, "F": np.asfortranarray(labels), "neither": labels.transpose(1, 2, 0)}[order]
    measures = measure_labels(labels, np.eye(4), tiny_preset())
    for index, measured in enumerate(measures.values(), start=1):
        places = np.argwhere(labels == index)
        assert measured["voxels"] == len(places)
        np.testing.assert_allclose(np.array(measured["centroid_voxels"]), places.mean(0), atol=0.0051)
    assert len(measures) == 2


def test_centroid_of_an_oblique_image_is_turned_with_it() -> None:
    labels = np.zeros((10, 10, 10), dtype=np.uint8)
    labels[4, 5, 6] = 2
    affine = oblique_affine(spacing_mm=(1, 2, 3))
    centroid = measure_labels(labels, affine, tiny_preset())["core"]["centroid_ras_mm"]
    np.testing.assert_allclose(centroid, (affine @ [4, 5, 6, 1])[:3], atol=0.005)


def test_landmark_comes_back_where_it_was() -> None:
    """The whole way of a label: a blob's centre in millimetres before and after the network's grid."""
    preset = tiny_preset(spacing_mm=[1.5, 1.5, 2.0], roi_size=[32, 32, 32])
    affine, shape = oblique_affine("LIA", (0.8, 1.1, 2.5)), (60, 44, 30)
    centre = affine[:3, :3] @ [30, 20, 14] + affine[:3, 3]
    blob = (np.linalg.norm(_grid(shape, affine) - centre, axis=-1) < 9).astype(np.uint8)
    chain = build_preprocessing(preset, (IMAGE, LABEL))
    seen = chain({IMAGE: as_meta_tensor(blob.astype(np.float32), affine), LABEL: as_meta_tensor(blob, affine)})
    restored = restore_to_grid(seen[LABEL][0].numpy().astype(np.uint8), seen[LABEL].affine.numpy(), shape, affine)
    moved = np.linalg.norm(_grid(shape, affine)[restored == 1].mean(0) - _grid(shape, affine)[blob == 1].mean(0))
    assert moved < 0.5
    overlap = 2 * (restored & blob).sum() / (restored.sum() + blob.sum())
    assert overlap > 0.9


@pytest.mark.parametrize(
    "affine",
    [
        axis_affine("PIR", (0.7, 1.3, 2.1), (3, 4, 5)),
        oblique_affine("ASL", (0.9, 0.8, 1.6), degrees=(40, 30, -44)),
        oblique_affine("RAS", (0.7, 1.3, 2.1)) @ SHEAR,
    ],
    ids=["axes", "far oblique", "sheared"],
)
def test_interpolated_map_keeps_a_plane_of_values_where_it_is(affine: np.ndarray) -> None:
    preset = tiny_preset(spacing_mm=[1.1, 1.0, 0.9])
    shape = (40, 30, 24)
    seen = preprocess_volume(Volume(np.random.default_rng(0).random(shape).astype(np.float32), affine), preset)
    slope, network_affine = np.array([0.003, -0.002, 0.004]), seen.affine.numpy()
    values = (_grid(tuple(seen.shape[1:]), network_affine) @ slope + 0.5).astype(np.float16)
    found = interpolate_to_grid(values, network_affine, shape, affine)
    expected = _grid(shape, affine) @ slope + 0.5
    assert (found.shape, found.dtype) == (shape, np.float32)
    inner = (slice(4, -4),) * 3
    np.testing.assert_allclose(found[inner], expected[inner], atol=2e-3)


def _two_balls(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Two balls of radius 12 mm that touch, labels 1 and 2."""
    world = _grid(shape, affine)
    labels = np.zeros(shape, dtype=np.uint8)
    for index, middle in ((1, (30, 30, 30)), (2, (53, 30, 30))):
        labels[np.linalg.norm(world - middle, axis=-1) <= 12] = index
    return labels


def test_interpolated_borders_lie_nearer_to_the_structure_than_nearest_ones() -> None:
    coarse, fine = np.diag([3.0, 3.0, 3.0, 1]), np.diag([0.8, 0.8, 0.8, 1])
    coarse[:3, 3] = fine[:3, 3] = 1
    seen, truth = _two_balls((28, 20, 20), coarse), _two_balls((100, 70, 70), fine)
    dice = {}
    for restore in (restore_to_grid, restore_by_interpolation):
        found = restore(seen, coarse, truth.shape, fine)
        assert found.flags.f_contiguous
        assert set(np.unique(found)) == {0, 1, 2}
        dice[restore] = [
            2 * ((found == i) & (truth == i)).sum() / ((found == i).sum() + (truth == i).sum()) for i in (1, 2)
        ]
    nearest, linear = dice[restore_to_grid], dice[restore_by_interpolation]
    assert min(nearest) > 0.90
    assert min(new - old for new, old in zip(linear, nearest, strict=True)) > 0.01
    assert min(linear) > 0.94


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIR", "SAL"])
def test_interpolated_labels_are_those_of_the_nearest_neighbour_on_the_same_grid(axcodes: str) -> None:
    labels = np.random.default_rng(0).integers(0, 4, (9, 11, 7)).astype(np.uint8)
    affine = axis_affine("RAS")
    image = np.empty(labels.shape)
    turned = axis_affine(axcodes)
    extent = np.linalg.inv(turned[:3, :3]) @ affine[:3, :3] @ (np.array(labels.shape) - 1)
    shape = tuple(int(edge) for edge in np.abs(np.rint(extent)) + 1)
    corners = _grid((2, 2, 2), affine @ np.diag([*(np.array(image.shape) - 1), 1])).reshape(-1, 3)
    offset = (np.linalg.inv(turned[:3, :3]) @ corners.T).min(axis=1)
    turned[:3, 3] = turned[:3, :3] @ offset
    expected = restore_to_grid(labels, affine, shape, turned)
    assert (expected > 0).any()
    np.testing.assert_array_equal(restore_by_interpolation(labels, affine, shape, turned), expected)
    second = _any_second(labels.shape)
    np.testing.assert_array_equal(restore_by_interpolation(labels, affine, shape, turned, second), expected)


def _any_second(shape: tuple[int, ...]) -> SecondLabels:
    random = np.random.default_rng(2)
    labels, shares = random.integers(0, 4, shape), random.integers(FULL_WEIGHT // 2 + 3, FULL_WEIGHT + 1, shape)
    return SecondLabels(labels.astype(np.uint8), shares.astype(np.uint8))


@pytest.mark.parametrize("with_second", [False, True])
def test_interpolation_in_slabs_gives_what_one_slab_gives(with_second: bool) -> None:
    labels = np.random.default_rng(1).integers(0, 3, (6, 7, 8)).astype(np.uint8)
    second = _any_second(labels.shape) if with_second else None
    arguments = (labels, np.diag([3.0, 3, 3, 1]), (17, 20, 23), np.diag([1.0, 1, 1, 1]), second)
    whole = restore_by_interpolation(*arguments)
    np.testing.assert_array_equal(restore_by_interpolation(*arguments, chunk_numbers=700), whole)


def test_second_labels_place_borders_nearer_to_the_structure() -> None:
    """Two balls of which each voxel of 3 mm knows what part of it lies inside."""
    coarse, fine = np.diag([3.0, 3.0, 3.0, 1]), np.diag([0.75, 0.75, 0.75, 1])
    coarse[:3, 3], fine[:3, 3] = 1.5, 0.375  # their first corners coincide
    truth = _two_balls((112, 80, 80), fine)
    parts = np.stack([(truth == i).reshape(28, 4, 20, 4, 20, 4).mean(axis=(1, 3, 5)) for i in range(3)])
    labels = parts.argmax(axis=0).astype(np.uint8)
    others = np.sort(parts, axis=0)
    shares = np.clip(FULL_WEIGHT * others[2] / (others[2] + others[1]), FULL_WEIGHT // 2 + 3, FULL_WEIGHT)
    second = SecondLabels(np.argsort(parts, axis=0)[1].astype(np.uint8), shares.astype(np.uint8))
    wrong = [
        float((restore_by_interpolation(labels, coarse, truth.shape, fine, given) != truth).mean())
        for given in (None, second)
    ]
    assert wrong[1] < 0.6 * wrong[0]


def test_second_label_far_from_its_structure_is_never_drawn() -> None:
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[2:5, 2:5, 2:5] = 1
    second = SecondLabels(np.ones_like(labels), np.full_like(labels, FULL_WEIGHT // 2 + 3))
    fine = np.diag([0.5, 0.5, 0.5, 1])
    found = restore_by_interpolation(labels, np.eye(4), (24, 24, 24), fine, second)
    assert not found[10:].any() and found[4:9, 4:9, 4:9].all()


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("spacing_mm", [(3.0, 3.0, 3.0), (0.8, 0.8, 5.0), (4.0, 0.7, 1.0)])
@pytest.mark.parametrize("restore", [restore_to_grid, restore_by_interpolation])
def test_measures_within_boxes_of_the_coarse_grid_are_those_of_the_whole_mask(
    axcodes: str, spacing_mm: tuple[float, float, float], restore: Callable[..., np.ndarray]
) -> None:
    preset = tiny_preset()
    labels = np.zeros((14, 16, 12), dtype=np.uint8)
    labels[2:5, 3:9, 1:4] = labels[10, 12, 9] = 1  # one part far away from the other
    labels[13, 15, 11] = labels[6:8, 4:6, 4:9] = 2  # at the far corner of the grid
    coarse, fine = axis_affine("RAS", (3, 3, 3), (5, 6, 7)), axis_affine(axcodes, spacing_mm)
    corners = _grid((2, 2, 2), coarse @ np.diag([13, 15, 11, 1])).reshape(-1, 3)
    extent = corners @ np.linalg.inv(fine[:3, :3]).T
    fine[:3, 3] = fine[:3, :3] @ extent.min(axis=0)
    shape = tuple(int(edge) for edge in np.rint(np.ptp(extent, axis=0)) + 1)
    mask = restore(labels, coarse, shape, fine)
    assert set(np.unique(mask)) == {0, 1, 2}
    boxes = boxes_after_restoring(labels, coarse, shape, fine, 2)
    assert boxes is not None
    assert measure_labels(mask, fine, preset, boxes) == measure_labels(mask, fine, preset)
    for index, box in enumerate(boxes, start=1):
        assert box is not None
        assert (mask[box] == index).sum() == (mask == index).sum()


def test_box_of_a_label_without_voxels_or_outside_of_the_image_is_none() -> None:
    labels = np.zeros((9, 9, 9), dtype=np.uint8)
    labels[0, 0, 0] = 1
    labels[8, 8, 8] = 3
    boxes = boxes_after_restoring(labels, np.eye(4), (4, 4, 4), np.eye(4), 4)
    assert boxes == [(slice(0, 1),) * 3, None, None, None]


def test_boxes_on_a_sheared_grid_are_not_known() -> None:
    labels = np.ones((4, 4, 4), dtype=np.uint8)
    assert boxes_after_restoring(labels, np.eye(4), (4, 4, 4), oblique_affine("RAS") @ SHEAR, 1) is None
