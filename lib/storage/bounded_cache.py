"""Values in a bounded part of memory."""

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
    """Values by key, for several threads; those used longest ago leave first.

    Args:
        most: size that all values together may have, in the unit in which the caller gives the size of each.
        least: how many are kept whatever their size.
    """

    def __init__(self, most: int, least: int = 1) -> None:
        self._most, self._least = most, least
        self._kept: LRUCache[Hashable, tuple[Any, int]] = LRUCache(math.inf, getsizeof=itemgetter(1))
        self._lock = threading.Lock()

    def peek(self, key: Hashable) -> Any:
        """What is kept under a key; None where nothing is. It does not count as use."""
        with self._lock:
            return Cache.__getitem__(self._kept, key)[0] if key in self._kept else None

    def get(self, key: Hashable, make: Callable[[], Value], size: Callable[[Value], int] = lambda _: 1) -> Value:
        """What is kept under a key; made where it is not."""
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
    """A value for each of many files, remembered for as long as the file's stamp (its size and time, say) is the same.

    Args:
        most: how many files are remembered; those used longest ago are forgotten first.
    """

    def __init__(self, most: int) -> None:
        self._known: LRUCache[Path, tuple[Hashable, Any]] = LRUCache(most)
        self._lock = threading.Lock()

    def get(self, file: Path, stamp: Hashable, make: Callable[[], Value]) -> Value:
        """What is remembered of a file with this stamp; made where that is another one, which is forgotten then."""
        with self._lock:
            known = self._known.get(file)
        if known is not None and known[0] == stamp:
            remembered: Value = known[1]
            return remembered
        made = make()
        with self._lock:
            self._known[file] = (stamp, made)
        return made
