"""Pretraining from the command line.

python -m lib.trainers.pretraining --preset hippocampus_mr --images DIR --leave-out split.json --out encoder.pt
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lib.cases.labelled import case_id
from lib.cases.split import read_split
from lib.commandline import run_command
from lib.configs.catalogue import find_preset
from lib.networks.precision import resolve_device
from lib.trainers.pretraining.loop import PretrainingPlan, find_images, pretrain, usable_images, write_encoder
from lib.trainers.resume import remove_state

logger = logging.getLogger("unetr.pretrain")

SECONDS_BETWEEN_LINES = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Pretrain and write the encoder; 0 on success, 2 with a sentence if the input was wrong."""
    options = build_parser().parse_args(arguments)
    return run_command(functools.partial(_pretrain, options), options.threads)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.trainers.pretraining", description="Pretrain a preset's encoder on images without labels."
    )
    parser.add_argument("--preset", required=True, help="name of a shipped preset, or a YAML file")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, labelled or not")
    parser.add_argument("--leave-out", type=Path, help="split (JSON) whose held-out images are not looked at")
    parser.add_argument("--out", type=Path, required=True, help="file of the encoder")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/pretraining"), help="state and cache")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted in --run-dir")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; the best there is by default")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's default if not given")
    return parser


def _pretrain(options: argparse.Namespace) -> None:
    plan = _plan(options)
    result = pretrain(plan, _Lines(plan.steps))
    write_encoder(options.out, plan, result)
    remove_state(plan.run_dir)
    print(f"{len(plan.images)} images, {plan.steps} steps, loss {result.losses[-1]:.3f} -> {options.out}")


def _plan(options: argparse.Namespace) -> PretrainingPlan:
    preset, paths = find_preset(options.preset), find_images(options.images)
    if options.leave_out:
        split = read_split(options.leave_out)
        paths = [path for path in paths if case_id(path) not in {*split.validation, *split.test}]
    return PretrainingPlan(
        preset=preset,
        images=usable_images(paths, preset),
        run_dir=options.run_dir,
        device=resolve_device(options.device),
        steps=options.steps,
        batch_size=options.batch_size,
        resume=options.resume,
    )


class _Lines:
    """Logs the progress of a run from time to time."""

    def __init__(self, steps: int) -> None:
        self._steps, self._last = steps, 0.0

    def __call__(self, step: int, loss: float) -> None:
        if step == self._steps or time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            logger.info("step %d/%d loss %.4f", step, self._steps, loss)


if __name__ == "__main__":
    sys.exit(main())
