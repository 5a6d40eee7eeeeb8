"""Answers that are ready: masks that were computed already, or ahead, in a bounded part of memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from lib.errors import ImageError
from lib.imagefiles.compression import pack_quickly, unpack
from lib.imagefiles.opening import open_regular
from lib.storage.bounded_cache import ByStamp
from lib.storage.files import sha256_of_blocks
from lib.transforms.channels import files_of
from lib.transforms.volume import Affine

MIB = 1 << 20
Stamp = tuple[object, ...]
MOST_CHECKSUMS = 10_000


@dataclass(frozen=True)
class CacheKey:
    """What an answer depends on.

    Attributes:
        image: SHA-256 of the image's content.
        preset: the task.
        model: changes with the weights.
        options: those of the request that change the mask.
    """

    image: str
    preset: str
    model: Stamp
    options: Stamp


class CachedMask:
    """A mask with what is said about it, packed: masks are mostly background.

    Args:
        labels: shape (X, Y, Z).
        affine_ras: 4x4, voxel indices to millimetres in RAS.
        payload: plain data of the answer, without its timings.
    """

    def __init__(self, labels: npt.NDArray[np.uint8], affine_ras: Affine, payload: Mapping[str, Any]) -> None:
        # As they lie in memory: turning a large mask takes longer than packing it.
        self._order: Literal["C", "F"] = "F" if labels.flags.fnc else "C"
        as_it_lies = labels.T if self._order == "F" else labels
        self._packed, self._shape = pack_quickly(np.ascontiguousarray(as_it_lies)), labels.shape
        self.affine_ras, self.payload = affine_ras, dict(payload)

    @property
    def labels(self) -> npt.NDArray[np.uint8]:
        """Shape (X, Y, Z)."""
        return np.frombuffer(unpack(self._packed), dtype=np.uint8).reshape(self._shape, order=self._order)

    @property
    def size_bytes(self) -> int:
        """Memory that it takes, about."""
        return len(self._packed) + 4096


class ResultCache:
    """Masks by key; the least recently used are dropped first.

    Args:
        limit_mib: memory that they may take; 0 keeps none.
    """

    def __init__(self, limit_mib: int) -> None:
        size: Callable[[CachedMask], int] = attrgetter("size_bytes")
        self._kept: LRUCache[CacheKey, CachedMask] = LRUCache(limit_mib * MIB, getsizeof=size)
        self._lock = threading.Lock()

    def get(self, key: CacheKey) -> CachedMask | None:
        """The mask of that key, where it is kept. What other weights of the preset said leaves at the same time."""
        with self._lock:
            self._forget_other_models(key)
            return self._kept.get(key)

    def put(self, key: CacheKey, mask: CachedMask) -> None:
        """Keep a mask, where it fits at all."""
        with self._lock:
            self._forget_other_models(key)
            self._kept.pop(key, None)
            if mask.size_bytes <= self._kept.maxsize:
                self._kept[key] = mask

    def __contains__(self, key: CacheKey) -> bool:
        with self._lock:
            return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size_bytes(self) -> int:
        """Memory that all of them take, about."""
        return int(self._kept.currsize)

    @property
    def limit_mib(self) -> int:
        """Memory that they may take."""
        return int(self._kept.maxsize) // MIB

    def _forget_other_models(self, key: CacheKey) -> None:
        stale = [k for k in self._kept if k.preset == key.preset and k.model != key.model]
        for old in stale:
            del self._kept[old]


class Checksums:
    """SHA-256 of images, remembered for as long as size and time of the files do not change."""

    def __init__(self) -> None:
        self._known = ByStamp(MOST_CHECKSUMS)

    def of(self, image: Path) -> str:
        """Checksum of a file, or of all files of a DICOM folder or of a case of several sequences.

        Raises:
            ImageError: when it cannot be read, is no regular file (nothing is opened then), or changes meanwhile.
        """
        try:
            files = sorted(path for path in image.iterdir() if path.is_file()) if image.is_dir() else files_of(image)
            stamp = tuple((path.name, status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()])
        except OSError as error:
            raise ImageError(f"image {image.name!r} cannot be read: {error.strerror or error}") from error
        # an empty file adds nothing, and by itself it is no image
        filled = [path for path, entry in zip(files, stamp, strict=True) if entry[1]]
        read = files if files == [image] else filled
        return self._known.get(image, stamp, lambda: sha256_of_blocks(_contents(read)))


def _contents(files: Iterable[Path]) -> Iterator[bytes]:
    """The content of regular files, one after the other, a mebibyte at a time."""
    for path in files:
        with open_regular(path) as file:
            while block := file.read(MIB):
                yield block
