"""A file's voxels as a DICOM series and back: right-handed, at right angles, voxel for voxel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib.dicom.presented.grid import SeriesGrid
from lib.dicom.presented.instances import as_series, describe_case, describe_series, make_header, rescale, store, uid_of
from tests.tiny import axis_affine, oblique_affine

SHAPE = (7, 6, 5)
SHEARED = np.array([[1.0, 0.1, 0, 5], [0, 1.0, 0, -3], [0, 0.05, 2, 7], [0, 0, 0, 1]])
AFFINES = {
    "RAS": axis_affine("RAS"),
    "LAS": axis_affine("LAS", (1, 2, 3), (10, -20, 30)),
    "RPI": axis_affine("RPI", (0.7, 0.7, 4.0)),
    "PIR": axis_affine("PIR", (1, 1, 5)),
    "AIL": axis_affine("AIL", (1, 1, 1.2)),
    "oblique": oblique_affine("LPS", (0.9, 0.9, 2.5)),
    "oblique, left-handed": oblique_affine("LAS"),
}


@pytest.mark.parametrize("name", [*AFFINES, "sheared"])
def test_mask_comes_back_voxel_for_voxel(name: str) -> None:
    voxels = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    grid = SeriesGrid.of(SHAPE, AFFINES.get(name, SHEARED))
    assert grid.to_series(voxels).shape == grid.shape
    np.testing.assert_array_equal(grid.to_file(grid.to_series(voxels)), voxels)
    steps = grid.affine_lps[:3, :3]
    assert np.linalg.det(steps) > 0
    directions = steps / np.linalg.norm(steps, axis=0)
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("name", AFFINES)
def test_point_in_the_series_is_the_same_voxel_in_the_file(name: str) -> None:
    voxels = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    grid = SeriesGrid.of(SHAPE, AFFINES[name])
    index = (1, 0, 3)
    assert voxels[tuple(map(int, grid.index_in_file(index)))] == grid.to_series(voxels)[index]


@pytest.mark.parametrize("name", AFFINES)
def test_each_voxel_lies_where_the_file_says(name: str) -> None:
    affine = AFFINES[name]
    grid = SeriesGrid.of(SHAPE, affine)
    places = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"))
    in_file = np.einsum("ij,jxyz->ixyz", affine[:3, :3], places) + affine[:3, 3].reshape(3, 1, 1, 1)
    columns = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"))
    in_series = np.einsum("ij,jxyz->ixyz", grid.affine_ras[:3, :3], columns) + grid.affine_ras[:3, 3].reshape(
        3, 1, 1, 1
    )
    for axis in range(3):
        np.testing.assert_allclose(in_series[axis], grid.to_series(in_file[axis]), atol=1e-9)


def test_thick_slices_stay_slices_and_axial_ones_look_as_radiologists_see_them() -> None:
    assert SeriesGrid.of(SHAPE, AFFINES["PIR"]).order[2] == 2
    axial = SeriesGrid.of(SHAPE, axis_affine("RAS"))
    np.testing.assert_allclose(axial.affine_lps[:3, :3], np.eye(3), atol=1e-12)


def test_headers_say_the_grid_again_as_a_reader_finds_it() -> None:
    grid = SeriesGrid.of(SHAPE, AFFINES["oblique, left-handed"])
    alike = describe_series(describe_case("case", "MR"), grid, (0.5, 1.0), (1.0, 0.0))
    headers = [make_header(alike, uid_of("case", f"instance {n + 1}"), grid, n) for n in range(grid.shape[2])]
    series = as_series(headers, Path("case.nii"))
    assert series.shape == grid.shape
    np.testing.assert_allclose(series.affine_lps, grid.affine_lps, atol=1e-9)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.5, 1.7e6), (-3.2e-5, 4.1e-5), (5.0, 5.0)])
def test_values_are_kept_to_a_ten_thousandth_of_their_range(low: float, high: float) -> None:
    values = np.linspace(low, high, 1001).reshape(7, 11, 13).astype(np.float32)
    slope, intercept = rescale(float(values.min()), float(values.max()), False)
    back = store(values, slope, intercept) * slope + intercept
    assert np.abs(back - values).max() <= 1e-4 * (high - low) + 1e-9 * abs(high)


def test_whole_numbers_are_kept_exactly() -> None:
    values = np.arange(-1024, 3072).reshape(16, 16, 16).astype(np.float32)
    slope, intercept = rescale(-1024, 3071, True)
    np.testing.assert_array_equal(store(values, slope, intercept) * slope + intercept, values)


def test_uids_follow_from_the_case() -> None:
    assert uid_of("case_0", "series") == uid_of("case_0", "series") != uid_of("case_1", "series")
    assert uid_of("case_0", "series") != uid_of("case_0", "study")
    assert all(len(uid_of(f"case_{n}", "series")) <= 64 for n in range(50))
