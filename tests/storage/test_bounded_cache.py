"""What a bounded cache keeps, and how much of it."""

from __future__ import annotations

from pathlib import Path

from lib.storage.bounded_cache import BoundedCache, ByStamp


def keep(cache: BoundedCache, *keys: str, size: int = 10) -> None:
    for key in keys:
        cache.get(key, lambda key=key: key.upper(), lambda _: size)  # type: ignore[misc]


def kept(cache: BoundedCache, keys: str) -> str:
    return "".join(key for key in keys if cache.peek(key) is not None)


def test_what_was_used_longest_ago_leaves_first() -> None:
    cache = BoundedCache(30)
    keep(cache, "a", "b", "c", "a", "d")
    assert kept(cache, "abcd") == "acd"


def test_what_is_made_again_counts_once() -> None:
    cache = BoundedCache(30)
    keep(cache, "a", "b", "a", "b", "a", "b", "c")
    assert kept(cache, "abc") == "abc"


def test_the_least_number_is_kept_whatever_it_takes() -> None:
    cache = BoundedCache(30, least=2)
    keep(cache, "a", "b", "c", size=100)
    assert kept(cache, "abc") == "bc"
    keep(cache, "d", size=1)
    assert kept(cache, "abcd") == "cd"


def test_value_of_a_file_is_made_again_for_another_stamp_and_once_it_was_forgotten() -> None:
    made: list[str] = []
    known = ByStamp(2)

    def look(name: str, stamp: int) -> str:
        value = f"{name}{stamp}"
        return known.get(Path(name), stamp, lambda: made.append(value) or value)  # type: ignore[func-returns-value]

    assert [look("a", 1), look("a", 1), look("a", 2), look("a", 1)] == ["a1", "a1", "a2", "a1"]
    assert made == ["a1", "a2", "a1"], "of a file the newest is remembered alone"
    assert [look("b", 1), look("c", 1), look("b", 1), look("a", 1)] == ["b1", "c1", "b1", "a1"]
    assert made[3:] == ["b1", "c1", "a1"], "two files are remembered"
