"""A bounded in-memory cache of masks that were computed on request or by prefetching."""

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
    """Everything that a response depends on.

    Attributes:
        image: SHA-256 of the image's content.
        preset: name of the preset.
        model: value that changes with the weights.
        options: the options of the request that change the mask.
    """

    image: str
    preset: str
    model: Stamp
    options: Stamp


class CachedMask:
    """A mask and its description, compressed, since masks consist mostly of background.

    Args:
        labels: shape (X, Y, Z).
        affine_ras: 4x4, voxel indices to millimetres in RAS.
        payload: JSON data of the response, without its latencies.
    """

    def __init__(self, labels: npt.NDArray[np.uint8], affine_ras: Affine, payload: Mapping[str, Any]) -> None:
        # In their order in memory: transposing a large mask takes longer than compressing it.
        self._order: Literal["C", "F"] = "F" if labels.flags.fnc else "C"
        as_it_lies = labels.T if self._order == "F" else labels
        self._packed, self._shape = pack_quickly(np.ascontiguousarray(as_it_lies)), labels.shape
        self.affine_ras, self.payload = affine_ras, dict(payload)

    @property
    def labels(self) -> npt.NDArray[np.uint8]:
        """The mask, shape (X, Y, Z)."""
        return np.frombuffer(unpack(self._packed), dtype=np.uint8).reshape(self._shape, order=self._order)

    @property
    def size_bytes(self) -> int:
        """Approximate number of bytes in memory."""
        return len(self._packed) + 4096


class ResultCache:
    """A cache of masks that evicts the least recently used ones first.

    Args:
        limit_mib: largest memory of the cache; 0 caches nothing.
    """

    def __init__(self, limit_mib: int) -> None:
        size: Callable[[CachedMask], int] = attrgetter("size_bytes")
        self._kept: LRUCache[CacheKey, CachedMask] = LRUCache(limit_mib * MIB, getsizeof=size)
        self._lock = threading.Lock()

    def get(self, key: CacheKey) -> CachedMask | None:
        """The cached mask of a key, if there is one. Entries of other weights of the preset are evicted."""
        with self._lock:
            self._forget_other_models(key)
            return self._kept.get(key)

    def put(self, key: CacheKey, mask: CachedMask) -> None:
        """Cache a mask, if it fits."""
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
        """Approximate number of bytes in memory of all masks."""
        return int(self._kept.currsize)

    @property
    def limit_mib(self) -> int:
        """Largest memory of the cache."""
        return int(self._kept.maxsize) // MIB

    def _forget_other_models(self, key: CacheKey) -> None:
        stale = [k for k in self._kept if k.preset == key.preset and k.model != key.model]
        for old in stale:
            del self._kept[old]


class Checksums:
    """SHA-256 of images, cached until the size or the modification time of a file changes."""

    def __init__(self) -> None:
        self._known = ByStamp(MOST_CHECKSUMS)

    def of(self, image: Path) -> str:
        """Checksum of a file, or of all files of a DICOM folder or of a case of several sequences.

        Raises:
            ImageError: if the image cannot be read, is not a regular file (which is then not opened), or changes while
                it is read.
        """
        try:
            files = sorted(path for path in image.iterdir() if path.is_file()) if image.is_dir() else files_of(image)
            stamp = tuple((path.name, status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()])
        except OSError as error:
            raise ImageError(f"image {image.name!r} cannot be read: {error.strerror or error}") from error
        # an empty file changes no checksum, and is not an image by itself
        filled = [path for path, entry in zip(files, stamp, strict=True) if entry[1]]
        read = files if files == [image] else filled
        return self._known.get(image, stamp, lambda: sha256_of_blocks(_contents(read)))


def _contents(files: Iterable[Path]) -> Iterator[bytes]:
    """The content of regular files, one after the other, in chunks of a mebibyte."""
    for path in files:
        with open_regular(path) as file:
            while block := file.read(MIB):
                yield block
