"""Progress reports of a training run: log lines, a JSON file and TensorBoard."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
from pydantic import BaseModel, Field
from torch.utils.tensorboard import SummaryWriter

from lib.storage.json_files import read_json, write_json
from lib.trainers.reporting.tracking import Tracking

logger = logging.getLogger("unetr.train")

PROGRESS_FILE = "progress.json"
CURVE_FILE = "curve.csv"
SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_FILES = 1.0
MIB = 2**20
_POINT = re.compile(r"([0-9]{1,18}),(nan|-?inf|-?[0-9.]+(?:e[+-]?[0-9]+)?)")


@dataclass(frozen=True)
class Progress:
    """The progress of a run. Dice values are those of the last validation; memory is in MiB; NaN is written as null.

    ``plan`` describes how steps are computed, and which plans were abandoned when memory ran out.
    """

    epoch: int
    max_epochs: int
    step: int
    total_steps: int
    loss: float
    learning_rate: float
    eta_seconds: float
    dice: Mapping[str, float] = field(default_factory=dict)
    best_mean_dice: float | None = None
    memory: Mapping[str, float] = field(default_factory=dict)
    plan: str = ""

    def describe(self) -> str:
        """A one-line description for users."""
        dice = " ".join(f"{name} {value:.3f}" for name, value in self.dice.items())
        return (
            f"epoch {self.epoch}/{self.max_epochs} step {self.step}/{self.total_steps} loss {self.loss:.4f}"
            f" {'dice ' + dice + ' ' if dice else ''}eta {format_seconds(self.eta_seconds)}"
        )


class ProgressReporter:
    """Writes progress to the log (which MONAI Label shows), to a JSON file, to TensorBoard and to MLflow."""

    def __init__(self, run_dir: Path, tracking: Tracking | None = None) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file, self._curve = run_dir / PROGRESS_FILE, run_dir / CURVE_FILE
        self._board = SummaryWriter(str(run_dir / "tensorboard"))
        self._tracking = tracking or Tracking("", "", {})
        self._last_line = self._last_file = 0.0

    def step(self, progress: Progress) -> None:
        """Report a training step; TensorBoard gets every step, the log only some."""
        self._board.add_scalar("train/loss", progress.loss, progress.step)
        self._board.add_scalar("train/learning_rate", progress.learning_rate, progress.step)
        now, last = time.monotonic(), progress.step == progress.total_steps
        if last or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._say(progress)
        elif now - self._last_file >= SECONDS_BETWEEN_FILES:
            self._write(progress)

    def validation(self, progress: Progress) -> None:
        """Report a validation."""
        for name, value in progress.dice.items():
            self._board.add_scalar(f"validation/dice_{name}", value, progress.step)
        self._tracking.log({f"dice_{name}": value for name, value in progress.dice.items()}, progress.step)
        self._say(progress)

    def close(self) -> None:
        """Flush TensorBoard, and end the run in MLflow."""
        self._board.close()
        self._tracking.close()

    def _say(self, progress: Progress) -> None:
        self._last_line = time.monotonic()
        logger.info("%s", progress.describe())
        self._tracking.log({"loss": progress.loss, "learning_rate": progress.learning_rate}, progress.step)
        self._write(progress)

    def _write(self, progress: Progress) -> None:
        self._last_file = time.monotonic()
        write_json(self._file, asdict(progress))
        with self._curve.open("a", encoding="utf-8") as file:
            file.write(f"{progress.step},{progress.loss:.6g}\n")


Count = Annotated[int, Field(ge=0)]


class _ProgressRecord(BaseModel):
    """The fields of :class:`Progress` in a file, which may contain further ones."""

    epoch: Count
    max_epochs: Count
    step: Count
    total_steps: Count
    loss: float | None = None
    learning_rate: float | None = None
    eta_seconds: float | None = None
    dice: dict[str, float | None] = {}
    best_mean_dice: float | None = None
    memory: dict[str, float | None] = {}
    plan: str = ""


def read_progress(run_dir: Path) -> dict[str, Any]:
    """The progress of a run, with the keys of :class:`Progress`; empty if the file is missing or damaged."""
    try:
        data: dict[str, Any] = read_json(run_dir / PROGRESS_FILE)
        _ProgressRecord.model_validate(data, strict=True)
    except (OSError, ValueError):
        return {}
    return data


def read_curve(run_dir: Path) -> list[tuple[int, float]]:
    """Steps and losses, about one for each second; steps that were repeated after a resume count once, as repeated."""
    path = run_dir / CURVE_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    points = [point for line in text.splitlines() if (point := _POINT.fullmatch(line))]
    return sorted({int(point[1]): float(point[2]) for point in points}.items())


def memory_in_use(device: torch.device) -> dict[str, float]:
    """Memory of this process in MiB: resident memory, and peak tensor memory on its GPU."""
    used = {"resident_mib": psutil.Process().memory_info().rss / MIB}
    if device.type == "cuda":
        used["gpu_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return {name: round(value, 1) for name, value in used.items()}


def format_seconds(seconds: float) -> str:
    """Seconds as 1h02m, 3m05s or 12s."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
