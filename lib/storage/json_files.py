"""Plain data as JSON files, replaced as a whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from lib.storage.files import replacing


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
