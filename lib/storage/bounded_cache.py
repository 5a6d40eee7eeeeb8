"""Caches with bounded memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from cachetools import Cache, LRUCache

Value = TypeVar("Value")


class BoundedCache:
    """A thread-safe cache that evicts the least recently used values first.

    Args:
        most: largest total size of the values, in the unit of the caller's sizes.
        least: number of values that are kept whatever their size.
    """

    def __init__(self, most: int, least: int = 1) -> None:
        self._most, self._least = most, least
        self._kept: LRUCache[Hashable, tuple[Any, int]] = LRUCache(math.inf, getsizeof=itemgetter(1))
        self._lock = threading.Lock()

    def peek(self, key: Hashable) -> Any:
        """The cached value of a key; None if there is none. It does not count as use."""
        with self._lock:
            return Cache.__getitem__(self._kept, key)[0] if key in self._kept else None

    def get(self, key: Hashable, make: Callable[[], Value], size: Callable[[Value], int] = lambda _: 1) -> Value:
        """The cached value of a key; it is made if there is none."""
        with self._lock:
            if key in self._kept:
                kept: Value = self._kept[key][0]
                return kept
        made = make()
        entry = made, size(made)
        with self._lock:
            self._kept[key] = entry
            while len(self._kept) > self._least and self._kept.currsize > self._most:
                self._kept.popitem()
        return made


class ByStamp:
    """A value for each of many files, cached until the file's stamp (for example its size and time) changes.

    Args:
        most: number of files; the least recently used ones are evicted first.
    """

    def __init__(self, most: int) -> None:
        self._known: LRUCache[Path, tuple[Hashable, Any]] = LRUCache(most)
        self._lock = threading.Lock()

    def get(self, file: Path, stamp: Hashable, make: Callable[[], Value]) -> Value:
        """The cached value of a file with this stamp; it is made again if the stamp has changed."""
        with self._lock:
            known = self._known.get(file)
        if known is not None and known[0] == stamp:
            remembered: Value = known[1]
            return remembered
        made = make()
        with self._lock:
            self._known[file] = (stamp, made)
        return made
