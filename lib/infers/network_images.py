"""Images as the network sees them, and its logit margins, in a bounded part of memory for clicks that follow."""

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
    """Preprocessed images and the networks' logit margins; what was used longest ago leaves first.

    Args:
        limit_mib: memory that they may take; 0 keeps none.
    """

    def __init__(self, limit_mib: int) -> None:
        size: Callable[[MetaTensor | LogitMargins], int] = attrgetter("nbytes")
        self._kept: LRUCache[Key, MetaTensor | LogitMargins] = LRUCache(limit_mib * MIB, getsizeof=size)
        self._lock = threading.Lock()

    def put(self, checksum: str, preset: Preset, image: MetaTensor) -> None:
        """Keep an image of shape (channels, X, Y, Z), where it fits at all."""
        on_host = MetaTensor(image.as_subclass(torch.Tensor).cpu(), affine=image.affine.cpu())
        with self._lock:
            if on_host.nbytes <= self._kept.maxsize:
                self._kept[_key(checksum, preset)] = on_host

    def get(self, checksum: str, preset: Preset) -> MetaTensor | None:
        """The image, where it is kept."""
        with self._lock:
            image = self._kept.get(_key(checksum, preset))
        return image if isinstance(image, MetaTensor) else None

    def has_room(self, size_bytes: int) -> bool:
        """Whether margins of that size are kept."""
        return size_bytes <= int(self._kept.maxsize)

    def put_margins(self, checksum: str, preset: Preset, model: Key, margins: LogitMargins) -> None:
        """Keep the margins of an image by the network of these weights, where they fit at all."""
        with self._lock:
            if self.has_room(margins.nbytes):
                self._kept[_margins_key(checksum, preset, model)] = margins

    def margins_of(self, checksum: str, preset: Preset, model: Key) -> LogitMargins | None:
        """The margins of an image by the network of these weights, where they are kept."""
        with self._lock:
            margins = self._kept.get(_margins_key(checksum, preset, model))
        return margins if isinstance(margins, LogitMargins) else None


def _key(checksum: str, preset: Preset) -> Key:
    """All that preprocessing depends on."""
    seen = preset.axcodes, preset.spacing_mm, preset.roi_size, preset.padding, str(preset.intensity)
    return checksum, *seen, str(preset.channels)


def _margins_key(checksum: str, preset: Preset, model: Key) -> Key:
    return (*_key(checksum, preset), "margins", model)
