"""A masked autoencoder (He et al. 2022, arXiv 2111.06377) whose encoder is that of a preset's UNETR."""

from __future__ import annotations

import math

import torch
from monai.networks.nets import MaskedAutoEncoderViT
from torch import nn

from lib.configs.preset import Preset
from lib.errors import TrainingError
from lib.networks.layouts import StateDict
from lib.networks.unetr import ENCODER

LAYERS = 12
MASKED_SHARE = 0.75


class MaskedAutoencoder(nn.Module):
    """MONAI's masked autoencoder around the preset's encoder.

    Its loss is the squared error on masked patches, each of which is normalised separately, so that the encoder learns
    structure and not the brightness of a patch.

    Raises:
        TrainingError: if the preset's window is a single patch.
    """

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        size = preset.network
        width = 48 * max(2, round(size.hidden_size / 96))
        self.patch_size = size.patch_size
        tokens = math.prod(edge // size.patch_size for edge in preset.roi_size)
        if tokens < 2:
            raise TrainingError(f"the window of {preset.name!r} is a single patch: there is nothing to hide in it")
        self.autoencoder = MaskedAutoEncoderViT(
            in_channels=preset.in_channels,
            img_size=preset.roi_size,
            patch_size=size.patch_size,
            hidden_size=size.hidden_size,
            mlp_dim=size.mlp_dim,
            num_layers=LAYERS,
            num_heads=size.num_heads,
            masking_ratio=min(MASKED_SHARE, 1 - 1 / tokens),  # at least one patch stays visible
            decoder_hidden_size=width,
            decoder_mlp_dim=2 * width,
            decoder_num_layers=2,
            decoder_num_heads=width // 24,
            proj_type=size.proj_type,
            pos_embed_type="learnable",
            decoder_pos_embed_type="learnable",
            qkv_bias=size.qkv_bias,
        )

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean loss over the masked patches of windows of shape (batch, channels, X, Y, Z)."""
        drawn, hidden = self.autoencoder(windows)
        return hidden_patch_loss(drawn.float(), self._targets(windows), hidden)

    def encoder(self) -> StateDict:
        """The encoder's weights, with the names of a UNETR."""
        renamed = {}
        for key, value in self.autoencoder.state_dict().items():
            if key.startswith(("blocks.", "patch_embedding.")):
                # MONAI's autoencoder counts its last norm as another block
                name = key.replace(f"blocks.{LAYERS}.", "norm.")
                renamed[ENCODER + name] = value.detach().cpu().clone()
        return renamed

    def _targets(self, windows: torch.Tensor) -> torch.Tensor:
        """Patches in the order of the tokens, shape (batch, tokens, channels * voxels).

        Each channel of each patch has mean 0 and standard deviation 1.
        """
        edge = self.patch_size
        cut = windows.unfold(2, edge, edge).unfold(3, edge, edge).unfold(4, edge, edge)
        patches = cut.flatten(2, 4).flatten(3).transpose(1, 2)
        mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
        return ((patches - mean) / (variance + 1e-6).sqrt()).flatten(2)


def hidden_patch_loss(drawn: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the masked patches only.

    Args:
        drawn: the decoder's reconstruction of each patch, (batch, tokens, channels * voxels).
        targets: the patches, of the same shape.
        hidden: 1 for a masked patch, 0 for a visible one; (batch, tokens).
    """
    error = (drawn - targets).square().mean(dim=-1)
    return (error * hidden).sum() / hidden.sum()
