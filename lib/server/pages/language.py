"""The interface's language: one YAML file each, chosen by what the browser asks for.

>>> language_for("zh-CN,zh;q=0.9,en;q=0.8").code
'zh'
>>> language_for("fr")("pool.total", count=3)
'3 cases'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent / "languages"
DEFAULT = "en"
MOST_RANGES = 20
"""Number of entries of an Accept-Language header that are considered."""


@dataclass(frozen=True)
class Language:
    """The texts of one language by key; calling it with a key and values returns the text."""

    code: str
    texts: Mapping[str, str]

    def __call__(self, key: str, **values: object) -> str:
        """The text for a key.

        Raises:
            KeyError: for a key that the language's file lacks, or a value that its text needs.
        """
        return self.texts[key].format(**values) if values else self.texts[key]


def language_for(accepted: str | None) -> Language:
    """The available language that a browser's ``Accept-Language`` header prefers; English by default."""
    return read_language(next((code for code in preferred(accepted or "") if code in codes()), DEFAULT))


def preferred(accepted: str) -> list[str]:
    """Language codes of an ``Accept-Language`` header (RFC 9110, 12.5.4) without regions, most preferred first.

    >>> preferred("de;q=0.5, zh-TW, *;q=0.1")
    ['zh', 'de', '*']
    """
    weighted = []
    for part in accepted.split(",")[:MOST_RANGES]:
        name, _, quality = part.strip().partition(";q=")
        try:
            weight = float(quality or 1)
        except ValueError:
            weight = 0.0
        if name and weight > 0:
            weighted.append((weight, name.split("-")[0].lower()))
    return [name for _, name in sorted(weighted, key=lambda pair: -pair[0])]


@lru_cache(maxsize=1)
def codes() -> frozenset[str]:
    """The available languages."""
    return frozenset(path.stem for path in FOLDER.glob("*.yaml"))


@lru_cache(maxsize=8)
def read_language(code: str) -> Language:
    """Read one of :func:`codes`."""
    texts = yaml.safe_load((FOLDER / f"{code}.yaml").read_text(encoding="utf-8"))
    return Language(code, {f"{group}.{key}": text for group, keys in texts.items() for key, text in keys.items()})
