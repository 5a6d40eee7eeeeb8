"""Plain data as JSON files, replaced as a whole, and read whatever somebody made of them."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.storage.files import replacing

MOST_BYTES = 64 * 2**20
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def read_json(path: Path) -> Any:
    """Read plain data.

    Raises:
        OSError: when there is no such file, or what lies there is none: to open a FIFO may never end.
        ValueError: when it is no JSON in UTF-8, is larger than ``MOST_BYTES``, or is nested too deeply.
    """
    with os.fdopen(os.open(path, _FLAGS), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES // 2**20} MiB")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or something else."""
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_json(path: Path, data: object) -> None:
    """Write plain data so that no reader sees half of it; numbers that are not finite become null."""
    with replacing(path) as file:
        file.write((json.dumps(without_nan(data), indent=1) + "\n").encode())


def without_nan(data: object) -> object:
    """Return plain data with numbers that are not finite as None: JSON has no NaN."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {str(key): without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_nan(value) for value in data]
    return data
