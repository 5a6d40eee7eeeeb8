"""YAML files of people: what would take memory or time without end is refused before it does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib.configs.catalogue import read_preset
from lib.configs.yaml_files import MOST_BYTES, read_yaml
from lib.errors import ConfigError


def nested_aliases(levels: int, merge: bool = False) -> str:
    """Ten to the power of ``levels`` values in a few lines."""
    lines = ["a0: &a0 {k: lol}" if merge else "a0: &a0 [lol, lol]"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{aliases}], k{level}: 1}}" if merge else f"[{aliases}]"))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nested_aliases(9), "aliases (*) come to more than"),
        (nested_aliases(9, merge=True), "aliases (*) come to more than"),
        ("labels: &a [*a]", "inside of what it names"),
        ("x: " + "[" * 5000, "nested too deeply"),
        ("x: " + "a" * MOST_BYTES, "larger than 256 KiB"),
        ("x: !!python/object/apply:os.system ['true']", "tag:yaml.org,2002:python/object/apply:os.system' (line 1)"),
        ("x: !!int much", "does not fit its tag"),
        ("x: !!int ''", "does not fit its tag"),
        ("x: !!bool maybe", "does not fit its tag"),
        ("x: !!timestamp never", "does not fit its tag"),
        ("x: " + "9" * 5000, "a number of 5000 characters"),
        ("x: 0x" + "f" * 5000, "a number of 5002 characters"),
        ("x: 1" + ":1" * 5000, "a number of 10001 characters"),
        ("x: 1" + ":1" * 5000 + ".5", "a number of 10003 characters"),
        ("name: a\nlabels: []\nname: b", "the key 'name' stands twice"),
    ],
)
def test_hostile_preset_file_is_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        read_preset(path)
    assert message in str(refused.value) and "mine.yaml" in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_a_few_aliases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}\n", encoding="utf-8")
    assert read_yaml(path, "it") == {"a": {"x": 1}, "b": [{"x": 1}, {"x": 1}], "c": {"x": 1, "y": 2}}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs on this system")
def test_fifo_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match="is no regular file"):
        read_preset(tmp_path / "mine.yaml")


def test_value_of_a_refused_key_is_quoted_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: hippocampus_mr\nroi_size: " + "a" * 100_000, encoding="utf-8")
    with pytest.raises(ConfigError, match="'roi_size' is 'aaaa") as refused:
        read_preset(path)
    assert len(str(refused.value)) < 1000
