"""Attribute matching of queries (PS3.4, C.2.2.2, with the keys of PS3.18, 8.3.4)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ANYTHING = ("", "*", '""')
"""Values of universal matching, which also matches entities without the attribute."""
LISTS = ("UI", "CS")
"""VRs whose values contain no comma, so that a comma separates the values of a list."""
RANGES = ("DA", "TM", "DT")
NUMBERS = ("IS", "DS", "US", "UL", "SS", "SL", "UV", "SV", "FL", "FD")
GROUPS = ("Alphabetic", "Ideographic", "Phonetic")
"""Component groups of a person's name, in their order; ``=`` separates them."""


def matches(metadata: Mapping[str, Any], path: Sequence[str], wanted: str, fuzzy: bool = False) -> bool:
    """Whether an attribute matches the value of a query.

    Args:
        metadata: DICOM JSON of an entity.
        path: path of the attribute: its tag, preceded by the tags of enclosing sequences.
        wanted: a value, a list, a range of dates or times, or a text with the wildcards ``*`` and ``?``; case is
            ignored.
        fuzzy: whether a person's name also matches if each word of the query is the begin of one of its words;
            diacritics are ignored.
    """
    if wanted in ANYTHING:
        return True
    return any(_matches_item(item, wanted, fuzzy) for item in _items(metadata, path))


def _items(metadata: Mapping[str, Any], path: Sequence[str]) -> Iterable[Mapping[str, Any]]:
    item = metadata.get(path[0])
    if item is None:
        return []
    if len(path) == 1:
        return [item]
    return [nested for below in item.get("Value") or [] for nested in _items(below, path[1:])]


def _matches_item(item: Mapping[str, Any], wanted: str, fuzzy: bool) -> bool:
    vr, values = item.get("vr", ""), [value for value in item.get("Value") or [] if value is not None]
    if vr == "PN":
        return any(_matches_name(value, wanted, fuzzy) for value in values)
    texts = [str(value).strip() for value in values]
    if vr in RANGES and "-" in wanted:
        low, high = (part.strip() for part in wanted.split("-", 1))
        return any((not low or text >= low) and (not high or text[: len(high)] <= high) for text in texts)
    alternatives = [part.strip() for part in re.split(r"[\\,]" if vr in LISTS else r"\\", wanted)]
    if vr == "UI":
        return bool(set(alternatives) & set(texts))
    if vr in NUMBERS:
        numbers = {number for part in alternatives if (number := _number(part)) is not None}
        return any(_number(text) in numbers for text in texts)
    return any(has_pattern(text, part) for part in alternatives for text in texts)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def has_pattern(text: str, pattern: str) -> bool:
    """Whether a text matches a pattern as a whole; only ``*`` and ``?`` are special.

    >>> has_pattern("A[1]B", "a[1]*")
    True
    """
    plain = _plain(text)
    first, *others = re.split(r"\*+", _plain(pattern))
    if not others:
        return _piece(first).fullmatch(plain) is not None
    *between, last = others
    end = len(plain) - len(last)
    if len(first) > end or _piece(first).match(plain) is None or _piece(last).fullmatch(plain, end) is None:
        return False
    # each piece matches at its leftmost position, which leaves most room for the next one; one regular expression for
    # the whole pattern would need backtracking
    at = len(first)
    for piece in between:
        place = _piece(piece).search(plain, at, end)
        if place is None:
            return False
        at = place.end()
    return True


def _piece(text: str) -> re.Pattern[str]:
    """A regular expression for the text between two ``*``; ``?`` is any character."""
    return re.compile("".join("." if letter == "?" else re.escape(letter) for letter in text), re.DOTALL)


def _plain(text: str) -> str:
    """Without differences of case, and composed: an accent is one character with its letter."""
    return unicodedata.normalize("NFC", text.casefold())


def _matches_name(name: Any, wanted: str, fuzzy: bool) -> bool:
    groups = [str(name.get(group, "")) if isinstance(name, Mapping) else str(name) for group in GROUPS]
    groups = [_trimmed(group) for group in groups]
    asked = [_trimmed(part) for part in wanted.split("=")]
    if len(asked) == 1:
        fits = any(group and has_pattern(group, asked[0]) for group in groups)
    else:
        pairs = zip(asked, groups, strict=False)
        fits = all(part in ANYTHING or has_pattern(group, part) for part, group in pairs)
    return fits or (fuzzy and _has_words(groups, wanted))


def _trimmed(group: str) -> str:
    """A name without padding: spaces around components, and empty components at the end."""
    return "^".join(component.strip() for component in group.split("^")).rstrip("^")


def _has_words(groups: Sequence[str], wanted: str) -> bool:
    """Whether every word of the query begins a word of a name or a part of one, as ``brien`` in O'Brien-Yamada."""
    words = {
        part for group in groups for word in _words(group) for part in (_bare(word), *re.split(r"['\u2019.\-]+", word))
    }
    asked = [_bare(word) for word in _words(wanted) if _bare(word)]
    return bool(asked) and all(any(word.startswith(part) for word in words) for part in asked)


def _words(text: str) -> list[str]:
    decomposed = unicodedata.normalize("NFD", text.casefold())
    without_accents = "".join(character for character in decomposed if not unicodedata.combining(character))
    return [word for word in re.split(r"[\^=\s,*?]+", without_accents) if word]


def _bare(word: str) -> str:
    return re.sub(r"['\u2019.\-]", "", word)
