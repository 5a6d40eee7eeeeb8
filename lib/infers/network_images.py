"""Images as the network sees them, kept in a bounded part of memory for clicks that follow a segmentation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from operator import attrgetter

import torch
from cachetools import LRUCache
from monai.data import MetaTensor

from lib.configs.preset import Preset

MIB = 1 << 20
Key = tuple[object, ...]


class NetworkImages:
    """Preprocessed images by checksum and preset; those used longest ago leave first.

    Args:
        limit_mib: memory that they may take; 0 keeps none.
    """

    def __init__(self, limit_mib: int) -> None:
        size: Callable[[MetaTensor], int] = attrgetter("nbytes")
        self._kept: LRUCache[Key, MetaTensor] = LRUCache(limit_mib * MIB, getsizeof=size)
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
            image: MetaTensor | None = self._kept.get(_key(checksum, preset))
            return image


def _key(checksum: str, preset: Preset) -> Key:
    """All that preprocessing depends on."""
    seen = preset.axcodes, preset.spacing_mm, preset.roi_size, preset.padding, str(preset.intensity)
    return checksum, *seen, str(preset.channels)
