"""A network's preset, device and number format."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from lib.configs.preset import Preset
from lib.networks.precision import autocast


@dataclass(frozen=True)
class Placement:
    """A preset's network on a device.

    Attributes:
        preset: the preset.
        device: the device on which it computes.
        dtype: number format of matrix products and convolutions.
    """

    preset: Preset
    device: torch.device
    dtype: torch.dtype

    @property
    def precision(self) -> str:
        """The number format's name, such as ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision in ``dtype``; does nothing for fp32."""
        return autocast(self.device, self.dtype)
