"""Images as the network sees them, kept in a bounded part of memory for clicks that follow a segmentation."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
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
        self._limit_bytes = limit_mib * MIB
        self._kept: OrderedDict[Key, MetaTensor] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, checksum: str, preset: Preset, image: MetaTensor) -> None:
        """Keep an image of shape (1, X, Y, Z), where it fits at all."""
        on_host = MetaTensor(image.as_subclass(torch.Tensor).cpu(), affine=image.affine.cpu())
        with self._lock:
            self._kept[_key(checksum, preset)] = on_host
            self._kept.move_to_end(_key(checksum, preset))
            while self._kept and sum(kept.nbytes for kept in self._kept.values()) > self._limit_bytes:
                self._kept.popitem(last=False)

    def get(self, checksum: str, preset: Preset) -> MetaTensor | None:
        """The image, where it is kept."""
        with self._lock:
            key = _key(checksum, preset)
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)


def _key(checksum: str, preset: Preset) -> Key:
    """All that preprocessing depends on."""
    return checksum, preset.axcodes, preset.spacing_mm, preset.roi_size, preset.padding, str(preset.intensity)
