"""What the case page keeps in memory, and how much of it."""

from __future__ import annotations

from lib.server.pages.case_view import Volumes


def keep(volumes: Volumes, *keys: str, size: int = 10) -> None:
    for key in keys:
        volumes.get(key, lambda key=key: key.upper(), lambda _: size)  # type: ignore[misc]


def kept(volumes: Volumes, keys: str) -> str:
    return "".join(key for key in keys if volumes.peek(key) is not None)


def test_what_was_used_longest_ago_leaves_first() -> None:
    volumes = Volumes(30)
    keep(volumes, "a", "b", "c", "a", "d")
    assert kept(volumes, "abcd") == "acd"


def test_what_is_made_again_counts_once() -> None:
    volumes = Volumes(30)
    keep(volumes, "a", "b", "a", "b", "a", "b", "c")
    assert kept(volumes, "abc") == "abc"


def test_the_least_number_is_kept_whatever_it_takes() -> None:
    volumes = Volumes(30, least=2)
    keep(volumes, "a", "b", "c", size=100)
    assert kept(volumes, "abc") == "bc"
    keep(volumes, "d", size=1)
    assert kept(volumes, "abcd") == "cd"
