"""A CT that is not in Hounsfield units, and an MR that is, are told."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from torso_phantom import draw_torso, grid_affine, render

from lib.transforms.intensity_range import misfit, range_warning

SHAPE = (64, 52, 40)
FAULTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "0 to 1": (lambda hu: (hu - hu.min()) / (hu.max() - hu.min()), "scaled to a small range"),
    "plus 1024": (lambda hu: hu + 1024, "1024 added"),
    "plus 1024 with padding": (lambda hu: np.where(hu < -990, -1024, hu + 1024), "1024 added"),
    "0 to 255": (lambda hu: np.clip((hu + 160) / 400, 0, 1) * 255, "neither air nor fat"),
    "z-score": (lambda hu: (hu - hu.mean()) / hu.std(), "scaled to a small range"),
    "minus 1024": (lambda hu: hu - 1024, "offset subtracted twice"),
}


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    affine = grid_affine(SHAPE, (6.0, 6.0, 8.0))
    return render(draw_torso(3), SHAPE, affine).image_hu.astype(np.float32)


def test_ct_in_hounsfield_units_is_nothing_odd_also_clipped(hu: np.ndarray) -> None:
    assert range_warning(hu, "CT") == ""
    assert range_warning(hu.astype(np.int16), "CT") == ""
    assert range_warning(np.clip(hu, -125, 275), "CT") == ""


@pytest.mark.parametrize("name", FAULTS)
def test_ct_in_other_units_is_told(hu: np.ndarray, name: str) -> None:
    change, expected = FAULTS[name]
    assert expected in range_warning(change(hu).astype(np.float32), "CT")


def test_ct_for_an_mr_model_is_told_and_any_other_range_is_not(hu: np.ndarray) -> None:
    assert "look like Hounsfield units" in range_warning(hu, "MR")
    for scale in (1.0, 4096.0, 1.7e6):
        mr = np.random.default_rng(0).random(SHAPE).astype(np.float32) * scale
        assert range_warning(mr, "MR") == range_warning((mr - mr.mean()) / mr.std(), "MR") == ""


def test_image_is_for_the_preset_whose_modality_it_looks_like(hu: np.ndarray) -> None:
    mr = np.random.default_rng(0).random(SHAPE).astype(np.float32) * 400
    assert "looks like CT, for which another preset is served" in misfit(hu, "MR", ["MR", "CT"])
    assert "looks like MR, for which another preset is served" in misfit(mr, "CT", ["MR", "CT"])
    assert misfit(hu, "CT", ["MR", "CT"]) == misfit(mr, "MR", ["MR", "CT"]) == ""
    assert misfit(mr, "CT", ["CT"]) == "", "nothing else is served: it is only warned about"
