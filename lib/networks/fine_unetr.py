"""A UNETR with patches of 8 voxels, built from the blocks of MONAI's UNETR, whose patches are fixed at 16 voxels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
from monai.networks.nets import ViT
from torch import nn

PATCH_SIZE_VOXELS = 8
LAYERS = 12


class FineUNETR(nn.Module):
    """The UNETR (Hatamizadeh et al. 2021, arXiv 2103.10504) for small structures.

    As in the paper, the decoder receives layers 3, 6, 9 and 12 of the ViT and the image itself. From a patch of 8
    voxels to full resolution it needs three upsampling steps instead of four: layer 3 joins at 1/2 and layer 6 at 1/4
    of the resolution, and the decoder starts from layers 9 and 12 together at 1/8. Unlike in the paper, the convolved
    image also joins at 1/2, next to layer 3, because a border is recognised from a few voxels and not from tokens.
    Modules are named as in MONAI's UNETR.

    Args:
        in_channels, out_channels: channels of the image and of the logits.
        img_size: shape of the window in voxels, multiples of 8.
        feature_size: channels of the decoder at full resolution, which double at each coarser level.
        hidden_size, mlp_dim, num_heads, proj_type, qkv_bias, dropout_rate: see ``monai.networks.nets.ViT``.
        norm_name: normalisation of the convolution blocks, by MONAI's name.
        conv_block, res_block: kind of the blocks, see MONAI's UNETR.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_size: Sequence[int],
        feature_size: int,
        hidden_size: int,
        mlp_dim: int,
        num_heads: int,
        proj_type: str,
        norm_name: tuple[str, dict[str, bool]] | str,
        conv_block: bool,
        res_block: bool,
        dropout_rate: float,
        qkv_bias: bool,
    ) -> None:
        super().__init__()
        self.tokens = tuple(edge // PATCH_SIZE_VOXELS for edge in img_size)
        self.vit = ViT(
            in_channels=in_channels,
            img_size=img_size,
            patch_size=PATCH_SIZE_VOXELS,
            hidden_size=hidden_size,
            mlp_dim=mlp_dim,
            num_layers=LAYERS,
            num_heads=num_heads,
            proj_type=proj_type,
            dropout_rate=dropout_rate,
            qkv_bias=qkv_bias,
        )
        full, half, quarter, eighth = (feature_size * 2**step for step in range(4))
        conv: dict[str, Any] = {"spatial_dims": 3, "kernel_size": 3, "norm_name": norm_name, "res_block": res_block}
        up = conv | {"upsample_kernel_size": 2}
        of_layer = up | {"stride": 1, "conv_block": conv_block}
        self.encoder1 = UnetrBasicBlock(in_channels=in_channels, out_channels=full, stride=1, **conv)
        self.encoder1_half = UnetResBlock(3, full, half, kernel_size=3, stride=2, norm_name=norm_name)
        self.encoder2 = UnetrPrUpBlock(in_channels=hidden_size, out_channels=half, num_layer=1, **of_layer)
        self.encoder3 = UnetrPrUpBlock(in_channels=hidden_size, out_channels=quarter, num_layer=0, **of_layer)
        self.encoder4 = UnetrBasicBlock(in_channels=2 * hidden_size, out_channels=eighth, stride=1, **conv)
        self.decoder4 = UnetrUpBlock(in_channels=eighth, out_channels=quarter, **up)
        self.decoder3 = UnetrUpBlock(in_channels=quarter, out_channels=half, **up)
        self.decoder2 = UnetrUpBlock(in_channels=half, out_channels=full, **up)
        self.out = UnetOutBlock(spatial_dims=3, in_channels=full, out_channels=out_channels)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits of (batch, ``out_channels``, X, Y, Z) for an image of (batch, ``in_channels``, X, Y, Z)."""
        last, layers = self.vit(image)
        deepest = self.encoder4(torch.cat((self._as_map(layers[8]), self._as_map(last)), dim=1))
        quarter = self.decoder4(deepest, self.encoder3(self._as_map(layers[5])))
        convolved = self.encoder1(image)
        half = self.decoder3(quarter, self.encoder2(self._as_map(layers[2])) + self.encoder1_half(convolved))
        logits: torch.Tensor = self.out(self.decoder2(half, convolved))
        return logits

    def _as_map(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of shape (batch, tokens, hidden) as a feature map of shape (batch, hidden, X / 8, Y / 8, Z / 8)."""
        grid: torch.Tensor = tokens.transpose(1, 2).unflatten(2, self.tokens)
        return grid
