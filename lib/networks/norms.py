"""Instance norm that preserves ``channels_last_3d``, the memory format in which 3D convolutions in bf16 are fast on a
CPU.

PyTorch's own instance norm converts each feature map to the default format and back, which takes a third of a window's
time in bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lib.networks.replacement import replace_modules


class ChannelsLastInstanceNorm(nn.InstanceNorm3d):
    """An instance norm, computed as the batch norm of a single sample in training mode; gradients are equal too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise each channel of each sample; shape (batch, channels, X, Y, Z)."""
        if torch.jit.is_tracing():  # a traced model is computed by another engine
            return F.instance_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)
        samples = [
            F.batch_norm(sample, None, None, self.weight, self.bias, training=True, eps=self.eps)
            for sample in input.split(1)
        ]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


def keep_channels_last(module: nn.Module) -> None:
    """Replace each instance norm by one that preserves channels last."""
    replace_modules(module, _to_channels_last)


def _to_channels_last(module: nn.Module) -> nn.Module | None:
    if type(module) is not nn.InstanceNorm3d or module.track_running_stats:
        return None
    return ChannelsLastInstanceNorm(module.num_features, module.eps, affine=module.affine)
