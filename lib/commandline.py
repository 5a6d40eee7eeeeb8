"""The common part of this project's command lines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import torch

from lib.errors import UnetrError


def run_command(command: Callable[[], None], threads: int | None = None, level: int = logging.INFO) -> int:
    """Run a command; 0 on success, 2 with a sentence if the input was wrong.

    Args:
        command: the function to run.
        threads: number of PyTorch's CPU threads; by default PyTorch's own choice.
        level: log level of the messages on standard error.
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
