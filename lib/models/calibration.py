"""How good a mask probably is: Dice, estimated from how unsure the model was of it.

The estimate is a straight line through the validation cases, of whom both are known. Its error comes with it, measured
on each case with the line that the others give: a promise of Dice without it would be worth nothing.
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
    """The line from uncertainty to Dice.

    Attributes:
        intercept: Dice of a mask that the model is sure of.
        slope: change of Dice with the uncertainty, which is below 0 where the model knows what it does not know.
        error: root mean square of the differences from the Dice measured on ``cases`` cases, each left out of its line.
        cases: how many.
    """

    intercept: float
    slope: float
    error: float
    cases: int

    def estimate(self, uncertainty: float) -> dict[str, float | int] | None:
        """Dice and its error, for an answer's JSON; None for a mask without any label, of which nothing is known."""
        if math.isnan(uncertainty):
            return None
        dice = min(1.0, max(0.0, self.intercept + self.slope * uncertainty))
        return {"estimated_dice": round(dice, 3), "error": round(self.error, 3), "calibrated_on": self.cases}

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def fit(pairs: Sequence[tuple[float, float]]) -> Calibration | None:
    """Fit the line by least squares.

    Args:
        pairs: uncertainty and mean Dice of each validation case; pairs with NaN do not count.

    Returns:
        The calibration; None for fewer than eight cases, or cases that are all alike.
    """
    known = np.array([pair for pair in pairs if not any(map(math.isnan, pair))]).reshape(-1, 2)
    if len(known) < FEWEST_CASES or np.ptp(known[:, 0]) == 0:
        return None
    x = np.stack([np.ones(len(known)), known[:, 0]], axis=1)
    hat = x @ np.linalg.pinv(x)
    # the difference of a case from the line of all others follows from the one line (Cook 1982, leverage)
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
    """Where the calibration of a file of weights is: beside it, under its name unless it has a folder of its own."""
    return weights.with_name(CALIBRATION_FILE if weights.name == "weights.pt" else f"{weights.stem}.{CALIBRATION_FILE}")


def read_calibration(weights: Path) -> Calibration | None:
    """The calibration of a file of weights; None where it has none, or a damaged one, which the log says.

    Weights segment without it; only what is expected of a mask is not told then.
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
