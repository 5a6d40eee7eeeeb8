"""What this project's command lines have in common."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import torch

from lib.errors import UnetrError


def run_command(command: Callable[[], None], threads: int | None = None, level: int = logging.INFO) -> int:
    """Run it; 0 when it succeeded, 2 with a sentence when the input was wrong.

    Args:
        command: what is run.
        threads: of PyTorch on the CPU; its default if not given.
        level: from which the log goes to the standard error.
    """
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    if threads:
        torch.set_num_threads(threads)
    try:
        command()
    except UnetrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
