"""Memory of a training step: computed from shapes, measured on the device, and limited by computing the step in parts.

A part is one or more crops whose activations are dropped after the forward pass and recomputed in the backward pass
(Chen et al. 2016, arXiv 1604.06174), so that the activations of only one part exist at a time. Unlike with ordinary
gradient accumulation, the loss is computed over all crops at once, because the Dice of a batch is not the mean of the
Dices of its parts.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib.configs.preset import Preset
from lib.infers.costs import WindowCost
from lib.infers.memory import PeakMemory, release_memory
from lib.networks.placement import Placement
from lib.networks.precision import place_for_training
from lib.networks.unetr import build_unetr
from lib.trainers.optimization import build_loss

FLOAT_BYTES = 4


@lru_cache(maxsize=64)
def count_kept_bytes(preset: Preset, checkpointing: bool) -> tuple[int, int]:
    """Bytes of fp32 activations that one crop stores for the backward pass, and bytes of the weights.

    The network runs on PyTorch's ``meta`` device, which computes shapes only.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = build_unetr(preset, checkpointing).train()
        crop = torch.zeros(1, preset.in_channels, *preset.roi_size)
    own = {id(parameter) for parameter in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in own and not isinstance(tensor, nn.Parameter):
            # a view of a stored tensor takes no additional memory
            kept[id(tensor if tensor._base is None else tensor._base)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(crop)
    weights = sum(parameter.numel() * FLOAT_BYTES for parameter in network.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values()), weights


def measure_step(where: Placement, crops: int, checkpointing: bool) -> WindowCost:
    """Bytes besides the weights, and seconds, of a forward and backward pass with random weights.

    Only the first pass shows its memory in measurements from outside the process: later ones reuse memory that the
    process has kept.

    Raises:
        RuntimeError, MemoryError: if it does not fit.
    """
    preset, device = where.preset, where.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        network, loss_of = build_unetr(preset, checkpointing).train(), build_loss(preset.training)
        place_for_training(network, device)
        image = torch.randn(crops, preset.in_channels, *preset.roi_size, device=device)
        label = torch.zeros(crops, 1, *preset.roi_size, device=device)
        release_memory(device)
        start = time.perf_counter()
        with PeakMemory(device) as peak:
            with where.autocast():
                logits = network(image.contiguous(memory_format=torch.channels_last_3d))
            loss_of(logits.float(), label).backward()
        seconds = time.perf_counter() - start
    del network, image, label, logits
    release_memory(device)
    return WindowCost(peak.bytes, round(seconds, 4))


def forward_in_parts(network: nn.Module, image: torch.Tensor, at_once: int) -> torch.Tensor:
    """Logits of all crops, computed in parts of ``at_once`` crops whose activations are recomputed.

    Args:
        network: in training mode.
        image: shape (crops, channels, X, Y, Z).
        at_once: number of crops of a part.
    """
    if at_once >= len(image):
        whole: torch.Tensor = network(image)
        return whole
    return torch.cat([checkpoint(network, part, use_reentrant=False) for part in image.split(at_once)])
