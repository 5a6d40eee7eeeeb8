"""Memory of a training step of the editor, counted from shapes, and the number of voxels that fit into one step."""

from __future__ import annotations

import torch
from torch import nn

from lib.errors import MemoryBudgetError
from lib.infers.memory import GIB
from lib.interaction.editor import CHANNELS, EditorDesign, build_editor

FLOAT_BYTES = 4
MARGIN = 1.5
"""Times the activations that are kept: gradients of the largest ones and the arrays of sessions come to that."""
OPTIMISER_COPIES = 6
"""Of the weights: gradients, two moments, the average, the state on its way to disk, and themselves."""
MATERIAL_SHARE = 0.25
"""Of the memory that is left, for the cases of a training or of its gate."""


def step_bytes(design: EditorDesign, voxels: int) -> int:
    """Peak bytes of a step on ``voxels`` voxels, which are rounded up to at least one window.

    The network runs on PyTorch's ``meta`` device, so that nothing is computed.
    """
    x, y, z = design.window
    kept: dict[int, int] = {}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = build_editor(design).train()
        own = {id(parameter) for parameter in network.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in own and not isinstance(tensor, nn.Parameter):
                held = tensor if tensor._base is None else tensor._base
                kept[id(held)] = held.numel() * held.element_size()
                alive.append(held)
            return tensor

        alive: list[torch.Tensor] = []  # Python reuses the id of a tensor that is freed
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.zeros(1, CHANNELS, x, y, z))
    weights = sum(parameter.numel() * FLOAT_BYTES for parameter in network.parameters())
    windows = max(1.0, voxels / (x * y * z))
    return int(MARGIN * windows * sum(kept.values()) + OPTIMISER_COPIES * weights)


def fitting_voxels(design: EditorDesign, most: int, bytes_left: int) -> int:
    """The number of voxels in a training step that fits into half of the remaining memory, found by halving.

    Args:
        design: architecture of the network.
        most: largest number of voxels.
        bytes_left: remaining bytes of host memory.

    Raises:
        MemoryBudgetError: if not even one window fits.
    """
    x, y, z = design.window
    voxels, left = most, bytes_left // 2
    while step_bytes(design, voxels) > left:
        if voxels <= x * y * z:
            raise MemoryBudgetError(
                f"the editor's training needs {step_bytes(design, voxels) / GIB:.2f} GiB of memory on the host for one "
                f"window; there are {left / GIB:.2f} GiB; valid: a larger --conf memory_budget"
            )
        voxels //= 2
    return voxels
