"""The stored state of a run, from which an interrupted run resumes with the same result."""

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
# These keys change how a step is computed, but not its result: a run that ran out of memory may resume with others.
NOT_OF_THE_RUN = {"training": {"activation_checkpointing"}}


def fingerprint(preset: Preset, train: list[str], validation: list[str], max_steps: int | None) -> str:
    """Identifies a run: a state is only used by the run that wrote it."""
    task = preset.model_dump_json(exclude=NOT_OF_THE_RUN)
    return hashlib.sha256(repr((task, train, validation, max_steps)).encode()).hexdigest()


def write_state(run_dir: Path, state: Mapping[str, Any]) -> bool:
    """Replace the stored state; False if it cannot be written, since the run can continue without it."""
    try:
        with replacing(run_dir / STATE_FILE, durable=True) as file:
            torch.save(dict(state), file)
    except (OSError, RuntimeError) as error:  # torch writes archives in C++, which raises its own errors
        logger.warning("the run's state could not be written, and the run goes on without: %s", error)
        return False
    return True


def read_state(run_dir: Path, wanted: str) -> dict[str, Any] | None:
    """The stored state of a run with this fingerprint; None if there is no usable one, with the reason in the log."""
    path = run_dir / STATE_FILE
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        fingerprint = state["fingerprint"]
    except Exception as error:  # noqa: BLE001 - a damaged file can raise many types
        logger.warning("starting anew: the run's state is damaged: %s", error)
        return None
    if fingerprint != wanted:
        logger.warning("starting anew: the run's state is of another recipe or other cases")
        return None
    return state


def remove_state(run_dir: Path) -> None:
    """Remove the state of a finished run."""
    (run_dir / STATE_FILE).unlink(missing_ok=True)
