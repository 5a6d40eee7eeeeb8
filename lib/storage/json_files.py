"""JSON files that are replaced atomically, and read defensively."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.storage.files import open_at_once, replacing

MOST_BYTES = 64 * 2**20
DEEPEST = 40
"""Largest nesting depth of a file; it exceeds that of client data, which are stored inside of other objects."""
LARGEST_NUMBER = 2**63


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: if the file does not exist or is not a regular file, since opening a FIFO may block for ever.
        ValueError: if it is not JSON in UTF-8, is larger than ``MOST_BYTES``, is nested too deeply, or holds values
            that cannot be used: see :func:`find_odd`.
    """
    with open_at_once(path) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES // 2**20} MiB")
    try:
        data = json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if (odd := find_odd(data, DEEPEST)) is not None:
        where, value, valid = odd
        raise ValueError(f"{where or 'it'} is {value!r:.80}; valid: {valid}")
    return data


def find_odd(value: object, deepest: int, name: str = "") -> tuple[str, object, str] | None:
    """Find a value in parsed JSON that cannot be sent on, or that breaks computations.

    Such values are NaN, infinities (``1e999``), whole numbers of more than 64 bits, and text that UTF-8 cannot encode.

    Args:
        value: the parsed data.
        deepest: largest nesting depth.
        name: name of the value, for the result.

    Returns:
        The name of the first such value, the value, and the valid range; None if there is none.
    """
    return _find_odd(value, name, deepest, f"at most {deepest} levels")


def _find_odd(value: object, name: str, left: int, too_deep: str) -> tuple[str, object, str] | None:
    if left == 0:
        return name, "...", too_deep
    if isinstance(value, dict | list):
        parts = [(key, name) for key in value]
        if isinstance(value, dict):
            parts += [(item, f"{name}.{key:.40}".strip(".")) for key, item in value.items()]
        return next((odd for part, at in parts if (odd := _find_odd(part, at, left - 1, too_deep)) is not None), None)
    if isinstance(value, float) and not math.isfinite(value):
        return name, value, "finite numbers"
    if isinstance(value, int) and not -LARGEST_NUMBER <= value < LARGEST_NUMBER:
        return name, str(value), "whole numbers of at most 64 bits"
    if isinstance(value, str) and not is_unicode(value):
        return name, value, "Unicode text"
    return None


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode a text: file names in other encodings contain surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing, invalid or not an object."""
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_json(path: Path, data: object) -> None:
    """Write data as JSON atomically; numbers that are not finite become null."""
    with replacing(path) as file:
        file.write((json.dumps(without_nan(data), indent=1) + "\n").encode())


def as_json(data: Mapping[str, Any]) -> bytes:
    """Data as indented JSON; numbers that are not finite become null."""
    return (json.dumps(without_nan(data), indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def without_nan(data: object) -> object:
    """Replace numbers that are not finite by None, since JSON has no NaN."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {str(key): without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_nan(value) for value in data]
    return data
