"""Synthetic hippocampi: the same by seed, sane labels, and images that are like real ones."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage
from synthetic_hippocampus import (
    LABELS,
    MARGIN_VOXELS,
    SyntheticCase,
    draw_case,
    draw_cases,
    labels_from_distances,
    load_model,
    warp,
)

from lib.cases.metrics import dice_per_label
from lib.configs.catalogue import load_preset
from lib.infers.segmenter import Segmenter
from lib.models.weights import WeightsLocator, preset_for
from lib.networks.checkpoint import read_checkpoint
from lib.transforms.volume import Volume

MODELS = Path(__file__).resolve().parents[2] / "model"
COUNT = 32


@pytest.fixture(scope="module")
def drawn() -> list[SyntheticCase]:
    return list(draw_cases(COUNT, seed=0))


def neighbour_correlations(image: npt.NDArray[np.float32]) -> list[float]:
    """Of each voxel with the next one, along each axis."""
    steps = [(np.delete(image, -1, axis), np.delete(image, 0, axis)) for axis in range(3)]
    return [float(np.corrcoef(here.ravel(), there.ravel())[0, 1]) for here, there in steps]


def z_scored(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    clipped = np.clip(image, *np.percentile(image, (0.5, 99.5)))
    return (clipped - clipped.mean()) / clipped.std()


def test_case_is_the_same_however_many_are_drawn(drawn: list[SyntheticCase]) -> None:
    for index in (5, 0):
        again = draw_case(index, seed=0)
        assert again.case_id == f"synthetic_hippocampus_{index:04d}"
        np.testing.assert_array_equal(again.image, drawn[index].image)
        np.testing.assert_array_equal(again.label, drawn[index].label)
        np.testing.assert_array_equal(again.affine_ras, drawn[index].affine_ras)
    np.testing.assert_array_equal(next(draw_cases(1, seed=0, first=5)).image, drawn[5].image)


def test_other_seeds_and_numbers_are_other_cases(drawn: list[SyntheticCase]) -> None:
    images = [drawn[0].image, drawn[1].image, draw_case(0, seed=1).image]
    assert len({image.tobytes() for image in images}) == 3


def test_labels_are_one_piece_each_with_the_anterior_in_front(drawn: list[SyntheticCase]) -> None:
    low, high = load_model().volume_range_voxels
    for case in drawn:
        assert case.label.dtype == np.uint8 and set(np.unique(case.label)) == {0, *LABELS.values()}
        pieces = [ndimage.label(case.label == index)[1] for index in LABELS.values()]
        assert pieces == [1, 1], case.case_id
        front, back = (np.argwhere(case.label == index)[:, 1].mean() for index in LABELS.values())
        assert 10 < front - back < 26, case.case_id
        volumes = [np.count_nonzero(case.label == index) for index in LABELS.values()]
        # a crop does not cut the labels, so the range that is_plausible checks holds for it as well
        assert all(low <= volumes) and all(volumes <= high), case.case_id


def test_crop_leaves_room_around_the_labels(drawn: list[SyntheticCase]) -> None:
    for case in drawn:
        places = np.argwhere(case.label)
        assert places.min() >= MARGIN_VOXELS - 1
        assert (np.array(case.label.shape) - 1 - places.max(axis=0)).min() >= MARGIN_VOXELS - 1
    sizes = np.array([case.image.shape for case in drawn])
    assert (sizes.min(axis=0) >= [30, 38, 24]).all() and (sizes.max(axis=0) <= [40, 56, 44]).all()
    assert len(np.unique(sizes, axis=0)) > COUNT / 2


def test_grid_is_one_millimetre_around_a_left_hippocampus(drawn: list[SyntheticCase]) -> None:
    for case in drawn:
        np.testing.assert_array_equal(case.affine_ras[:3, :3], np.eye(3))
        centre = np.argwhere(case.label).mean(axis=0) + case.affine_ras[:3, 3]
        np.testing.assert_allclose(centre, (-27, -23, -14), atol=8)


def test_image_is_textured_as_real_ones_are(drawn: list[SyntheticCase]) -> None:
    # Means over 60 real cases: 0.884, 0.915, 0.865; a Laplacian of 1.41
    correlations = np.mean([neighbour_correlations(case.image) for case in drawn], axis=0)
    np.testing.assert_allclose(correlations, (0.884, 0.915, 0.865), atol=0.02)
    sharpness = np.mean([ndimage.laplace(z_scored(case.image)).std() for case in drawn])
    assert sharpness == pytest.approx(1.41, abs=0.12)


def test_hippocampus_is_darker_than_its_surroundings(drawn: list[SyntheticCase]) -> None:
    for case in drawn:
        image = z_scored(case.image)
        ring = ndimage.binary_dilation(case.label > 0, iterations=2) & (case.label == 0)
        assert image[ring].mean() - image[case.label > 0].mean() > 0.15, case.case_id


def test_raw_intensities_are_of_many_scales_and_not_negative(drawn: list[SyntheticCase]) -> None:
    images = [case.image for case in drawn]
    assert all(image.dtype == np.float32 and image.min() >= 0 for image in images)
    deviations = [image.std() for image in images]
    assert max(deviations) > 100 * min(deviations)


def test_shipped_model_segments_synthetic_cases(drawn: list[SyntheticCase]) -> None:
    checkpoint = read_checkpoint(WeightsLocator(MODELS / "hippocampus_mr").shipped)
    preset = preset_for(checkpoint, load_preset("hippocampus_mr"))
    segmenter = Segmenter.from_checkpoint(checkpoint, preset, torch.device("cpu"), "fp32")
    scores = []
    for case in drawn[:10]:
        predicted = segmenter.segment(Volume(case.image, case.affine_ras)).labels
        scores.append(np.mean(list(dice_per_label(predicted, case.label, LABELS).values())))
    assert np.mean(scores) > 0.85 and min(scores) > 0.75


def test_statistics_are_those_of_real_cases(shared_data: Path, drawn: list[SyntheticCase]) -> None:
    labels = sorted((shared_data / "hippocampus_mr" / "labels").glob("*.nii.gz"))[::5]
    if not labels:
        pytest.skip("needs hippocampus_mr in the folder of real data")
    real = [np.asarray(nib.load(path.parents[1] / "images" / path.name).dataobj, dtype=np.float32) for path in labels]
    counts = [np.bincount(np.asarray(nib.load(path).dataobj).astype(int).ravel(), minlength=3)[1:] for path in labels]
    volumes = np.mean([np.bincount(case.label.ravel(), minlength=3)[1:] for case in drawn], axis=0)
    np.testing.assert_allclose(volumes, np.mean(counts, axis=0), rtol=0.1)
    expected = np.mean([neighbour_correlations(image) for image in real], axis=0)
    found = np.mean([neighbour_correlations(case.image) for case in drawn], axis=0)
    np.testing.assert_allclose(found, expected, atol=0.02)
    steps = (0.05, 0.25, 0.5, 0.75, 0.95)
    expected = np.mean([np.quantile(z_scored(image), steps) for image in real], axis=0)
    found = np.mean([np.quantile(z_scored(case.image), steps) for case in drawn], axis=0)
    np.testing.assert_allclose(found, expected, atol=0.08)


def test_case_with_another_label_shape_is_refused() -> None:
    image = np.zeros((4, 4, 4), dtype=np.float32)
    with pytest.raises(ValueError, match=r"image \(4, 4, 4\) and label \(4, 4, 5\)"):
        SyntheticCase("x", image, np.zeros((4, 4, 5), dtype=np.uint8), np.eye(4))
    with pytest.raises(ValueError, match="affine_ras must be 4x4"):
        SyntheticCase("x", image, np.zeros((4, 4, 4), dtype=np.uint8), np.eye(3))


@pytest.mark.parametrize("numbers", [(-1, 0, 0), (1, -1, 0), (1, 0, -1)])
def test_negative_numbers_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        draw_cases(*numbers)


def test_labels_keep_their_largest_piece_only() -> None:
    distances = np.full((2, 12, 4, 4), 5, dtype=np.float32)
    distances[0, 0:4] = -1
    distances[0, 6] = -1
    distances[1, 8:11] = -1
    labels = labels_from_distances(distances)
    assert labels[:, 0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 2, 2, 2, 0]


def test_warp_samples_at_the_displaced_place() -> None:
    volume = np.arange(10, dtype=np.float32)[:, None, None] * np.ones((10, 6, 6), dtype=np.float32)
    field = np.zeros((3, 10, 6, 6), dtype=np.float32)
    field[0] = 1.5
    np.testing.assert_allclose(warp(volume, field, order=1)[2:8, 3, 3], np.arange(2, 8) + 1.5, atol=1e-5)
