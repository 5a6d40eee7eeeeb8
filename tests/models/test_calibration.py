"""Estimated Dice: the line, its error, and when there is none."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lib.models.calibration import (
    Calibration,
    calibration_file,
    fit,
    foreground_uncertainty,
    read_calibration,
)


def test_line_through_exact_points_has_no_error() -> None:
    found = fit([(x, 1.0 - 2 * x) for x in np.linspace(0.01, 0.2, 10)])
    assert found is not None
    assert (found.intercept, found.slope, found.cases) == (pytest.approx(1.0), pytest.approx(-2.0), 10)
    assert found.error == pytest.approx(0.0, abs=1e-9)


def test_error_is_measured_on_cases_that_are_left_out() -> None:
    random = np.random.default_rng(0)
    x = random.uniform(0.02, 0.2, 20)
    y = 0.95 - x + random.normal(0, 0.03, 20)
    found = fit(list(zip(x.tolist(), y.tolist(), strict=True)))
    differences = []
    for i in range(20):
        others = np.delete(np.arange(20), i)
        slope, intercept = np.polyfit(x[others], y[others], 1)
        differences.append(y[i] - (intercept + slope * x[i]))
    assert found is not None
    assert found.error == pytest.approx(math.sqrt(np.mean(np.square(differences))), rel=1e-6)
    assert found.error > np.std(y - np.polyval(np.polyfit(x, y, 1), x))


def test_too_few_or_equal_cases_give_no_calibration() -> None:
    assert fit([(0.1 * i, 0.5) for i in range(7)]) is None
    assert fit([(0.1, 0.5)] * 20) is None
    assert fit([(0.1 * i, 0.5) for i in range(7)] + [(math.nan, 0.9), (0.2, math.nan)]) is None


def test_estimate_stays_a_dice_and_says_its_error() -> None:
    line = Calibration(1.02, -2.0, 0.0341, 45)
    assert line.estimate(0.1) == {"estimated_dice": 0.82, "error": 0.034, "calibrated_on": 45}
    assert line.estimate(0.0)["estimated_dice"] == 1.0
    assert line.estimate(0.9)["estimated_dice"] == 0.0
    assert line.estimate(math.nan) is None


def test_uncertainty_is_the_mean_over_mask_and_margin() -> None:
    labels = np.zeros((9, 9, 9), dtype=np.uint8)
    labels[4, 4, 4] = 1
    entropy = np.zeros((9, 9, 9), dtype=np.float32)
    entropy[4, 4, 4], entropy[4, 4, 6], entropy[0, 0, 0] = 1.0, 0.5, 1.0
    # the voxel, its 6 neighbours, and the 18 places two steps away
    assert foreground_uncertainty(entropy, labels) == pytest.approx(1.5 / 25)
    assert math.isnan(foreground_uncertainty(entropy, np.zeros_like(labels)))


def test_uncertainty_at_the_edge_of_the_volume() -> None:
    labels = np.ones((3, 3, 3), dtype=np.uint8)
    assert foreground_uncertainty(np.full((3, 3, 3), 0.25, dtype=np.float32), labels) == 0.25


def test_calibration_is_kept_beside_its_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert calibration_file(Path("v0001/weights.pt")) == Path("v0001/calibration.json")
    shipped = tmp_path / "shipped.pt"
    assert calibration_file(shipped).name == "shipped.calibration.json"
    assert read_calibration(shipped) is None
    line = Calibration(1.0, -2.0, 0.03, 45)
    calibration_file(shipped).write_text(line.to_json(), encoding="utf-8")
    assert read_calibration(shipped) == line
    calibration_file(shipped).write_text('{"slope": "steep"}', encoding="utf-8")
    assert read_calibration(shipped) is None
    assert "calibration of 'shipped.pt' cannot be used" in caplog.text
