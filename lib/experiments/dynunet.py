"""The convolutional network with which a UNETR is compared: MONAI's DynUNet, nnU-Net's architecture."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets import DynUNet

from lib.configs.preset import Preset


def build_dynunet(preset: Preset, activation_checkpointing: bool = False, *, filters: Sequence[int]) -> DynUNet:
    """Build a DynUNet (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z) with random weights.

    Args:
        preset: provides the number of classes.
        activation_checkpointing: has no effect, since there are no transformer blocks.
        filters: number of channels of each level, from full resolution down by half each time.
    """
    levels = len(filters)
    return DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=preset.out_channels,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=list(filters),
        norm_name=("instance", {"affine": True}),
    )
