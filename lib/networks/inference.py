"""Prepares a network for inference: weights in the number format of the computation, and no conversion of layouts.

Without this, MONAI's UNETR under autocast converts its 93 M weights for every batch of windows, and its instance norms
change the memory format (``lib.networks.norms``). Names and values of the weights stay those of the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks.selfattention import SABlock
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.networks.compiled import CompiledForward
from lib.networks.convolutions import convolve_with_onednn
from lib.networks.graphs import GraphedForward
from lib.networks.norms import ChannelsLastInstanceNorm, keep_channels_last


class InferenceNetwork(nn.Module):
    """A network for inference only, which accepts images of any floating-point type.

    Args:
        network: a UNETR; it is modified and must not be trained any more.
        device: the device on which it computes.
        dtype: number format of weights and activations.
        cuda_graphs: whether to replay recorded kernels on a GPU.
    """

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype, cuda_graphs: bool = False) -> None:
        super().__init__()
        keep_channels_last(network)
        convolve_with_onednn(network)
        _fuse_attention(network)
        self.network = network
        self._cuda_graphs = cuda_graphs
        self.requires_grad_(False).eval()
        self.move(device, dtype)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the network to a device and a number format; earlier recordings and compiled models are dropped."""
        self.network.to(device=device, dtype=dtype, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        _keep_statistics_in_fp32(self.network)
        self._dtype = dtype
        # a recording refers to the addresses of the weights
        recorded = self._cuda_graphs and device.type == "cuda"
        self._graphed = GraphedForward(self.network) if recorded else None
        self._compiled: CompiledForward | None = None

    @property
    def engine(self) -> str:
        """The engine that computes the windows: ``pytorch`` or ``openvino``."""
        return "pytorch" if self._compiled is None else "openvino"

    def compile_windows(self, shape: Sequence[int]) -> CompiledForward:
        """Compile a forward pass for :meth:`use`, which takes seconds; the network stays usable meanwhile.

        Args:
            shape: (channels, X, Y, Z) of a window.

        Raises:
            As :class:`CompiledForward`.
        """
        return CompiledForward(self.network, shape, self._dtype)

    def use(self, compiled: CompiledForward | None) -> None:
        """Compute with the compiled model from now on, until the network moves; None returns to PyTorch."""
        self._compiled = compiled

    def release_memory(self) -> None:
        """Free buffers that are kept between windows."""
        if self._compiled is not None:
            self._compiled.release_memory()

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits of (batch, classes, X, Y, Z)."""
        if self._compiled is not None:
            return self._compiled(windows)
        typed = windows.to(dtype=self._dtype, memory_format=torch.channels_last_3d)
        logits: torch.Tensor = self.network(typed) if self._graphed is None else self._graphed(typed)
        return logits

    def vit(self, windows: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The outputs of the encoder: its last tokens, shape (batch, tokens, hidden size), and those of each block."""
        encoded: tuple[torch.Tensor, list[torch.Tensor]] = self.network.get_submodule("vit")(
            windows.to(dtype=self._dtype)
        )
        return encoded


def _fuse_attention(module: nn.Module) -> None:
    """Use fused attention, without dropout only: MONAI's call of it would apply dropout in evaluation mode too."""
    for block in module.modules():
        if isinstance(block, SABlock) and block.dropout_rate == 0 and not block.save_attn:
            block.use_flash_attention = True


def _keep_statistics_in_fp32(module: nn.Module) -> None:
    """Keep batch norms in fp32: bf16 is too coarse for the running variance; they accept half-precision inputs."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) or (isinstance(norm, ChannelsLastInstanceNorm) and norm.affine):
            norm.float()
