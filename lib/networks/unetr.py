"""The UNETR of a preset (Hatamizadeh et al. 2021, arXiv 2103.10504): MONAI's own, or one built from its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from monai.networks.nets import UNETR
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib.configs.preset import Preset
from lib.networks.checkpoint import load_weights
from lib.networks.fine_unetr import FineUNETR

Unetr = UNETR | FineUNETR
Builder = Callable[[Preset, bool], nn.Module]
"""Builds a network for a preset, with or without activation checkpointing."""
ENCODER = "vit."
# MONAI's instance norm has no weights by default.
NORMS: dict[str, Any] = {"instance_affine": ("instance", {"affine": True})}


def build_unetr(preset: Preset, activation_checkpointing: bool = False) -> Unetr:
    """Build the network of ``preset`` with random weights.

    Its input is (batch, ``preset.in_channels``, *``preset.roi_size``), its output logits of (batch, labels + 1, *roi).

    Args:
        activation_checkpointing: whether to recompute the ViT blocks in the backward pass instead of keeping their
            activations. Weights, outputs and gradients are the same; a training step needs less memory and takes
            longer.
    """
    size = preset.network.model_dump(exclude={"patch_size"})
    size["norm_name"] = NORMS.get(preset.network.norm_name, preset.network.norm_name)
    kind = FineUNETR if preset.network.patch_size == 8 else UNETR
    network = kind(in_channels=preset.in_channels, out_channels=preset.out_channels, img_size=preset.roi_size, **size)
    if activation_checkpointing:
        recompute_blocks(network)
    return network


def recompute_blocks(network: nn.Module) -> None:
    """Recompute the ViT blocks, if there are any, in the backward pass from now on; parameter names do not change."""
    if isinstance(network, Unetr) and not isinstance(network.vit.blocks, CheckpointedBlocks):
        network.vit.blocks = CheckpointedBlocks(network.vit.blocks)


def load_encoder(network: nn.Module, encoder: Mapping[str, torch.Tensor]) -> None:
    """Load a pretrained encoder strictly; the decoder keeps its weights.

    Args:
        network: a UNETR.
        encoder: weights whose names begin with ``vit.``.

    Raises:
        CheckpointError: naming the keys that do not match.
    """
    decoder = {key: value for key, value in network.state_dict().items() if not key.startswith(ENCODER)}
    load_weights(network, decoder | dict(encoder))


class CheckpointedBlocks(nn.ModuleList):
    """Transformer blocks that are recomputed in the backward pass (Chen et al. 2016, arXiv 1604.06174).

    MONAI's ViT only iterates over its blocks, so checkpointing is added in the iterator, which changes no module name:
    the state dict stays that of the plain network.
    """

    def __iter__(self) -> Iterator[Any]:
        for block in super().__iter__():
            yield _Recomputed(block) if self.training and torch.is_grad_enabled() else block


class _Recomputed:
    """One block as a callable that stores only its input for the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = checkpoint(self._block, tokens, use_reentrant=False)
        return output


def parameter_count(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
