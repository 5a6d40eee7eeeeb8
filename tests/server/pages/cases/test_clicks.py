"""A click on a picture means the voxel that is seen there."""

from __future__ import annotations

import numpy as np
import pytest

from lib.server.pages.cases.clicks import Click, voxel_of
from lib.server.pages.cases.slices import AXES, PLANES, Plane, reorient
from lib.transforms.volume import Grid
from tests.tiny import axis_affine, oblique_affine


@pytest.mark.parametrize("affine", [np.eye(4), axis_affine("LPS"), axis_affine("SLA"), oblique_affine("AIR")])
@pytest.mark.parametrize("plane", PLANES)
def test_click_is_on_the_voxel_that_is_seen(affine: np.ndarray, plane: Plane) -> None:
    volume = np.arange(5 * 6 * 7).reshape(5, 6, 7)
    turned = reorient(volume, affine)
    picture = np.take(turned, 3, axis=AXES[plane]).T[::-1, ::-1]
    rows, columns = picture.shape
    for row in range(rows):
        for column in range(columns):
            place = {"across": (column + 0.5) / columns, "down": (row + 0.5) / rows}
            one = Click(plane=plane, index=3, label="core", **place)
            assert volume[tuple(voxel_of(one, turned.shape, Grid((5, 6, 7), affine)))] == picture[row, column]
