"""Estimates the Dice of a mask from the model's uncertainty.

The estimate is a linear regression over the validation cases, for which both quantities are known. Its error is
reported with it; it is the leave-one-out error of the regression.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lib.storage.json_files import read_json
from lib.transforms.volume import FloatArray

logger = logging.getLogger("unetr.publish")

CALIBRATION_FILE = "calibration.json"
FEWEST_CASES = 8
MARGIN_VOXELS = 2


@dataclass(frozen=True)
class Calibration:
    """The linear regression from uncertainty to Dice.

    Attributes:
        intercept: Dice of a mask without uncertainty.
        slope: change of Dice with the uncertainty; negative if the uncertainty is informative.
        error: root mean square of the leave-one-out errors on the ``cases`` cases.
        cases: number of cases.
    """

    intercept: float
    slope: float
    error: float
    cases: int

    def estimate(self, uncertainty: float) -> dict[str, float | int] | None:
        """Dice and its error, for the JSON of a response; None for a mask without any label."""
        if math.isnan(uncertainty):
            return None
        dice = min(1.0, max(0.0, self.intercept + self.slope * uncertainty))
        return {"estimated_dice": round(dice, 3), "error": round(self.error, 3), "calibrated_on": self.cases}

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), indent=1) + "\n"


def fit(pairs: Sequence[tuple[float, float]]) -> Calibration | None:
    """Fit the regression by least squares.

    Args:
        pairs: uncertainty and mean Dice of each validation case; pairs with NaN are ignored.

    Returns:
        The calibration; None for fewer than eight cases, or if all cases have the same uncertainty.
    """
    known = np.array([pair for pair in pairs if not any(map(math.isnan, pair))]).reshape(-1, 2)
    if len(known) < FEWEST_CASES or np.ptp(known[:, 0]) == 0:
        return None
    x = np.stack([np.ones(len(known)), known[:, 0]], axis=1)
    hat = x @ np.linalg.pinv(x)
    # the leave-one-out error follows from the residual and the leverage of each case (Cook 1982)
    left_out = (known[:, 1] - hat @ known[:, 1]) / (1 - np.diag(hat)).clip(1e-9)
    intercept, slope = np.linalg.lstsq(x, known[:, 1], rcond=None)[0]
    return Calibration(float(intercept), float(slope), float(np.sqrt((left_out**2).mean())), len(known))


def foreground_uncertainty(entropy: FloatArray, labels: npt.NDArray[np.uint8]) -> float:
    """Mean entropy over a mask and a margin of two voxels around it; NaN for an empty mask.

    Args:
        entropy: 0 to 1, shape (X, Y, Z).
        labels: shape (X, Y, Z).
    """
    boxes = ndimage.find_objects((labels > 0).astype(np.uint8))
    if not boxes:
        return math.nan
    reach = (slice(max(0, part.start - MARGIN_VOXELS), part.stop + MARGIN_VOXELS) for part in boxes[0])
    x, y, z = reach
    around = ndimage.binary_dilation(labels[x, y, z] > 0, iterations=MARGIN_VOXELS)
    return float(entropy[x, y, z][around].mean())


def calibration_file(weights: Path) -> Path:
    """The calibration's file for a weights file: next to it, with the weights' name if they share a folder."""
    return weights.with_name(CALIBRATION_FILE if weights.name == "weights.pt" else f"{weights.stem}.{CALIBRATION_FILE}")


def read_calibration(weights: Path) -> Calibration | None:
    """The calibration of a weights file; None if there is none, or if it is damaged, which is logged.

    Weights can be used without it; responses then have no expected Dice.
    """
    try:
        data = read_json(calibration_file(weights))
        numbers = {name: float(data[name]) for name in ("intercept", "slope", "error")}
        return Calibration(cases=int(data["cases"]), **numbers)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        logger.error("the calibration of %r cannot be used: %s", weights.name, error)
        return None
