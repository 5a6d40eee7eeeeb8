"""A bounded in-memory cache of preprocessed images and logit margins, for the clicks that follow a segmentation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from operator import attrgetter

import torch
from cachetools import LRUCache
from monai.data import MetaTensor

from lib.configs.preset import Preset
from lib.infers.logit_margins import LogitMargins

MIB = 1 << 20
Key = tuple[object, ...]


class NetworkImages:
    """Preprocessed images and logit margins; the least recently used ones are evicted first.

    Args:
        limit_mib: largest memory of the cache; 0 caches nothing.
    """

    def __init__(self, limit_mib: int) -> None:
        size: Callable[[MetaTensor | LogitMargins], int] = attrgetter("nbytes")
        self._kept: LRUCache[Key, MetaTensor | LogitMargins] = LRUCache(limit_mib * MIB, getsizeof=size)
        self._lock = threading.Lock()

    def put(self, checksum: str, preset: Preset, image: MetaTensor) -> None:
        """Cache an image of shape (channels, X, Y, Z), if it fits."""
        on_host = MetaTensor(image.as_subclass(torch.Tensor).cpu(), affine=image.affine.cpu())
        with self._lock:
            if on_host.nbytes <= self._kept.maxsize:
                self._kept[_key(checksum, preset)] = on_host

    def get(self, checksum: str, preset: Preset) -> MetaTensor | None:
        """The cached image; None if there is none."""
        with self._lock:
            image = self._kept.get(_key(checksum, preset))
        return image if isinstance(image, MetaTensor) else None

    def has_room(self, size_bytes: int) -> bool:
        """Whether margins of this size can be cached."""
        return size_bytes <= int(self._kept.maxsize)

    def put_margins(self, checksum: str, preset: Preset, model: Key, margins: LogitMargins) -> None:
        """Cache the margins that a network of these weights has for an image, if they fit."""
        with self._lock:
            if self.has_room(margins.nbytes):
                self._kept[_margins_key(checksum, preset, model)] = margins

    def margins_of(self, checksum: str, preset: Preset, model: Key) -> LogitMargins | None:
        """The cached margins that a network of these weights has for an image; None if there are none."""
        with self._lock:
            margins = self._kept.get(_margins_key(checksum, preset, model))
        return margins if isinstance(margins, LogitMargins) else None


def _key(checksum: str, preset: Preset) -> Key:
    """Everything that preprocessing depends on."""
    seen = preset.axcodes, preset.spacing_mm, preset.roi_size, preset.padding, str(preset.intensity)
    return checksum, *seen, str(preset.channels)


def _margins_key(checksum: str, preset: Preset, model: Key) -> Key:
    return (*_key(checksum, preset), "margins", model)
