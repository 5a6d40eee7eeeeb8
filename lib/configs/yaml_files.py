"""Reads YAML files of users: plain values only, with a size limit that holds even if aliases repeat values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from lib.errors import ConfigError

MOST_BYTES = 256 * 1024
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# Number of characters of all values with aliases expanded; a few nested aliases can expand to gigabytes.
MOST_EXPANDED = 16 * MOST_BYTES
LONGEST_NUMBER = 64
"""Largest number of characters of a number; Python refuses to print numbers of thousands of digits."""


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file.

    Args:
        path: the file.
        what: its description in errors.

    Raises:
        ConfigError: in one line: if it cannot be read, is too large, is not YAML, or is too large with aliases
            expanded.
    """
    content = _read_bytes(path, what)
    try:
        return _parse(content.decode("utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not YAML: {_in_one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{what} is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not YAML: its text is not UTF-8") from error
    except (
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
    ) as error:  # PyYAML raises these for ``!!int x`` and similar values
        raise ConfigError(f"{what} is not YAML: a value does not fit its tag") from error


def _read_bytes(path: Path, what: str) -> bytes:
    if path.exists() and not path.is_file():  # opening a FIFO may block for ever
        raise ConfigError(f"{what} is no regular file")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror or error}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{what} is larger than {MOST_BYTES // 1024} KiB")
    return content


def _parse(text: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}) > MOST_EXPANDED:
            raise yaml.YAMLError(f"its aliases (*) come to more than {MOST_EXPANDED} characters when written out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Characters of a node's values with aliases expanded; each node is visited once."""
    if id(node) not in known:
        known[id(node)] = None
        if isinstance(node, yaml.ScalarNode):
            size = len(node.value)
            if size > LONGEST_NUMBER and node.tag in NUMBERS:
                raise yaml.YAMLError(f"a number of {size} characters; valid: at most {LONGEST_NUMBER}")
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
            size = sum(_expanded_size(part, known) for pair in node.value for part in pair)
        else:
            size = sum(_expanded_size(part, known) for part in node.value)
        known[id(node)] = 1 + size
    total = known[id(node)]
    if total is None:
        raise yaml.YAMLError("an alias (*) stands inside of what it names")
    return total


def _check_keys(node: yaml.MappingNode) -> None:
    """Refuse a repeated key, of which PyYAML would silently use the last one."""
    names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
    for name, times in names.most_common(1):
        if times > 1:
            raise yaml.YAMLError(f"the key {name[:40]!r} stands twice")


def _in_one_line(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None)
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1})" if mark is not None else ""
    return f"{problem}{where}" if problem else " ".join(str(error).split())
