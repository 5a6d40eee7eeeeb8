"""Tilted stacks on upright grids: every voxel within half a pixel of its place, and back without a change."""

from __future__ import annotations

import numpy as np
import pytest

from lib.dicom.presented.upright import UprightGrid
from tests.tiny import oblique_affine

SHAPE = (9, 7, 6)
VOXELS = np.random.default_rng(3).integers(1, 900, SHAPE).astype(np.uint16)


def tilted(columns: float, rows: float) -> np.ndarray:
    """An oblique affine whose slices wander off by so many millimetres a slice along rows and columns."""
    affine = oblique_affine("LPS")
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    affine[:3, 2] += columns * directions[:, 0] + rows * directions[:, 1]
    return affine


@pytest.mark.parametrize("sideways", [(0.0, 1.3), (-0.7, 0.4), (2.0, -2.6)])
def test_tilted_stack_stands_upright_with_each_voxel_within_half_a_pixel(sideways: tuple[float, float]) -> None:
    affine = tilted(*sideways)
    grid = UprightGrid.of(SHAPE, affine)
    assert grid.is_tilted and not grid.lies_on_file(affine)
    axes = grid.affine_ras[:3, :3] / np.linalg.norm(grid.affine_ras[:3, :3], axis=0)
    np.testing.assert_allclose(np.abs(axes.T @ axes), np.eye(3), atol=1e-9)
    shown = grid.to_series(VOXELS)
    assert shown.shape == grid.shape
    assert (np.count_nonzero(shown), shown.dtype) == (VOXELS.size, VOXELS.dtype), "0 around the slices"
    for index in np.ndindex(grid.shape):
        source = [round(value) for value in grid.index_in_file(index)]
        inside = all(0 <= at < size for at, size in zip(source, SHAPE, strict=True))
        assert shown[index] == (VOXELS[tuple(source)] if inside else 0)
        if inside:
            apart_mm = grid.affine_ras[:3] @ [*index, 1] - affine[:3] @ [*source, 1]
            pixels = np.linalg.inv(affine[:3, :3]) @ apart_mm
            assert np.abs(pixels[:2]).max() <= 0.5 + 1e-9
            assert abs(pixels[2]) < 1e-9
    np.testing.assert_array_equal(grid.to_file(shown), VOXELS)


@pytest.mark.parametrize("sideways", [0.0, 0.01])
def test_upright_stack_is_shown_as_it_is(sideways: float) -> None:
    affine = tilted(0, sideways)
    grid = UprightGrid.of(SHAPE, affine)
    assert not grid.is_tilted and grid.lies_on_file(affine)
    assert grid.to_series(VOXELS) is VOXELS and grid.to_file(VOXELS) is VOXELS
    np.testing.assert_allclose(grid.affine_ras, affine)
