"""A forward pass that OpenVINO compiled for this CPU; it computes one window at a time in preallocated memory.

PyTorch executes one operation at a time, each with its own output memory. OpenVINO stores feature maps in blocks of
channels, as its convolutions read them, and fuses a convolution with the following operations. OpenVINO's converter has
telemetry and is not used; the frontend, which is used, opens no connection.
"""

from __future__ import annotations

import copy
import importlib.util
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

PRECISIONS = {torch.float32: ("f32", "FP32"), torch.bfloat16: ("bf16", "BF16")}
"""OpenVINO's names for each number format and for the CPU capability that it requires."""


def has_openvino() -> bool:
    """Whether OpenVINO is installed; it is not available for every machine on which PyTorch runs."""
    return importlib.util.find_spec("openvino") is not None


class CompiledForward:
    """Computes fp32 logits of shape (batch, classes, X, Y, Z) for windows of one shape.

    Args:
        network: in evaluation mode, on the CPU. It is traced, which runs it once.
        shape: (channels, X, Y, Z) of a window.
        dtype: number format of the computation: fp32, or bf16 where the CPU has instructions for it.

    Raises:
        ImportError, OSError: if OpenVINO cannot be loaded.
        RuntimeError: if it does not support an operation of the network, or this number format.
    """

    def __init__(self, network: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> None:
        # OpenVINO rounds the weights itself; for weights in bf16 its result is NaN
        exact = network if dtype is torch.float32 else copy.deepcopy(network).float()
        self._compiled = _compile(exact, (1, *shape), dtype)
        self._request: Any = None
        self._lock = threading.Lock()

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Compute the windows of (batch, channels, X, Y, Z) one after the other."""
        with self._lock:
            if self._request is None:
                self._request = self._compiled.create_infer_request()
            logits = [self._infer(window) for window in windows.float().split(1)]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def release_memory(self) -> None:
        """Free the memory of the feature maps until the next window."""
        with self._lock:
            self._request = None
            self._compiled.release_memory()

    def _infer(self, window: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._request.infer({0: window.contiguous().numpy()}, share_inputs=True)[0])


def _compile(network: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> Any:
    import openvino
    from openvino import properties
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    core, device = openvino.Core(), "CPU"
    precision, capability = PRECISIONS.get(dtype, (str(dtype), ""))
    if capability not in core.get_property(device, properties.device.capabilities):
        raise RuntimeError(f"OpenVINO does not compute in {precision} on this CPU")
    example = torch.zeros(*shape)
    with torch.no_grad(), warnings.catch_warnings():
        # Tracing makes shapes constant, as intended; a model of torch.export takes several times as long to convert.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(network, example, check_trace=False)
    frontend, decoder = FrontEndManager().load_by_framework("pytorch"), TorchScriptPythonDecoder(traced)
    model = frontend.convert(frontend.load(decoder))  # the model keeps no reference to the decoder
    model.reshape(list(shape))
    options = {
        properties.hint.performance_mode: properties.hint.PerformanceMode.LATENCY,
        properties.hint.inference_precision: getattr(openvino.Type, precision),
        properties.inference_num_threads: torch.get_num_threads(),
        properties.hint.enable_cpu_pinning: False,  # a training may run at the same time
    }
    return core.compile_model(model, device, options)
