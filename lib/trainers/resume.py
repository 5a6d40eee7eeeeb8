"""The state of a run on disk, from which a run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lib.configs.preset import Preset
from lib.storage.files import replacing

logger = logging.getLogger("unetr.train")

STATE_FILE = "state.pt"
# They change how a step is computed, not what it computes: a run that ran out of memory goes on with others.
NOT_OF_THE_RUN = {"training": {"activation_checkpointing"}}


def fingerprint(preset: Preset, train: list[str], validation: list[str], max_steps: int | None) -> str:
    """Tells runs apart: a state is only for the run that wrote it."""
    task = preset.model_dump_json(exclude=NOT_OF_THE_RUN)
    return hashlib.sha256(repr((task, train, validation, max_steps)).encode()).hexdigest()


def write_state(run_dir: Path, state: Mapping[str, Any]) -> bool:
    """Replace the state; False where the disk does not take it, since a run is worth more than its state."""
    try:
        with replacing(run_dir / STATE_FILE, durable=True) as file:
            torch.save(dict(state), file)
    except (OSError, RuntimeError) as error:  # torch writes archives in C++, which has errors of its own
        logger.warning("the run's state could not be written, and the run goes on without: %s", error)
        return False
    return True


def read_state(run_dir: Path, wanted: str) -> dict[str, Any] | None:
    """The saved state of a run with this fingerprint; None where none can be used, with the reason in the log."""
    path = run_dir / STATE_FILE
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        fingerprint = state["fingerprint"]
    except Exception as error:  # noqa: BLE001 - a damaged file ends in any of a dozen kinds
        logger.warning("starting anew: the run's state is damaged: %s", error)
        return None
    if fingerprint != wanted:
        logger.warning("starting anew: the run's state is of another recipe or other cases")
        return None
    return state


def remove_state(run_dir: Path) -> None:
    """Remove the state of a run that has ended."""
    (run_dir / STATE_FILE).unlink(missing_ok=True)
