"""Random movements of a crop: MONAI's affine and elastic ones, in one look."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.layers import GaussianFilter
from monai.transforms import Affine

from lib.transforms.deform import MAGNITUDE_VOXELS, SMOOTHNESS_VOXELS, RandDeformd, sampling_grid

SHAPE = (12, 14, 10)


def _volume(shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((1, *shape), dtype=np.float32))


def _look(volume: torch.Tensor, grid: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    return F.grid_sample(volume[None], grid, mode=mode, padding_mode="border", align_corners=True)[0]


def _deform(seed: int = 0, **changes: Any) -> RandDeformd:
    still = {"affine_probability": 0, "rotation_radians": 0, "zoom": 0, "translation_voxels": 0}
    options = still | {"elastic_probability": 0} | changes
    return RandDeformd(("image", "label"), ("bilinear", "nearest"), **options).set_random_state(seed)


def test_without_a_movement_every_voxel_looks_at_itself() -> None:
    torch.testing.assert_close(_look(_volume(), sampling_grid(SHAPE, np.eye(4), None)), _volume(), rtol=0, atol=1e-5)


def test_a_shift_looks_so_many_voxels_further_and_repeats_the_last() -> None:
    matrix = np.eye(4)
    matrix[1, 3] = 2
    moved = _look(_volume(), sampling_grid(SHAPE, matrix, None))
    torch.testing.assert_close(moved[:, :, :-2], _volume()[:, :, 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[:, :, -1], _volume()[:, :, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_drawn_affine_movements_are_those_of_monai(mode: str) -> None:
    deform = _deform(affine_probability=1, rotation_radians=0.4, zoom=0.2, translation_voxels=2)
    for _ in range(4):
        matrix = deform._draw_affine()
        expected, _ = Affine(affine=torch.from_numpy(matrix), padding_mode="border", mode=mode)(_volume())
        moved = _look(_volume(), sampling_grid(SHAPE, matrix, None), mode)
        differs = (moved - torch.as_tensor(expected)).abs() > 1e-4
        assert differs.float().mean() < 2e-3, "but for ties of the nearest voxel"


def test_a_displacement_comes_before_the_affine_movement() -> None:
    """Two looks one after the other, where none falls between voxels, see what the one look sees."""
    matrix = np.eye(4)
    matrix[:2, :2] = [[0, -1], [1, 0]]
    displacement = torch.zeros(3, 9, 9, 9)
    displacement[0] = 1
    turned = _look(_volume((9, 9, 9)), sampling_grid((9, 9, 9), matrix, None))
    twice = _look(turned, sampling_grid((9, 9, 9), np.eye(4), displacement))
    once = _look(_volume((9, 9, 9)), sampling_grid((9, 9, 9), matrix, displacement))
    torch.testing.assert_close(once[:, :-1], twice[:, :-1], rtol=0, atol=1e-5)


def test_displacements_are_as_large_and_as_smooth_as_those_of_monai() -> None:
    """MONAI's Rand3DElastic smooths noise of every voxel. Away from the ends, where both fade."""
    shape, random = (36, 36, 36), np.random.RandomState(0)
    deform, ours, theirs = _deform(), [], []
    inner = (slice(None), *[slice(10, -10)] * 3)
    for _ in range(30):
        ours.append(deform._draw_displacement(shape)[inner])
        noise = torch.from_numpy(random.uniform(-1, 1, (1, 3, *shape)).astype(np.float32))
        smooth = GaussianFilter(3, random.uniform(*SMOOTHNESS_VOXELS))(noise)[0]
        theirs.append((smooth * random.uniform(*MAGNITUDE_VOXELS))[inner])
    mine, monais = torch.stack(ours), torch.stack(theirs)
    assert 0.75 < mine.std() / monais.std() < 1.15
    steps = [(field.diff(dim=-1).std() / field.std()).item() for field in (mine, monais)]
    assert steps[0] == pytest.approx(steps[1], rel=0.15)
    assert mine.abs().max() < 3


def test_movements_happen_as_often_as_asked_and_the_label_goes_along() -> None:
    deform = _deform(affine_probability=0.5, rotation_radians=0.3)
    label, moved = torch.zeros((1, *SHAPE), dtype=torch.uint8), 0
    label[:, 2:8, 4:11, 3:8] = 1
    for _ in range(200):
        result = deform({"image": label.float(), "label": label})
        moved += not torch.equal(result["label"], label)
        assert result["label"].dtype == torch.uint8
        assert ((result["image"].round() == result["label"]).float().mean()) > 0.95
    assert 75 < moved < 125, "200 draws: the standard deviation is 7"


def test_same_seed_moves_alike_and_another_otherwise() -> None:
    item = {"image": _volume(), "label": _volume()}
    chances = {"affine_probability": 1, "rotation_radians": 0.3, "elastic_probability": 1}
    first, again, other = (_deform(seed, **chances)(item)["image"] for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)
