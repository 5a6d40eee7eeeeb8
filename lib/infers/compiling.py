"""OpenVINO as a replacement for PyTorch on the CPU: compiled in the background, and used if it is faster and agrees."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from lib.infers.memory import GIB, MemoryProbe, release_memory
from lib.infers.segmenter import Segmenter
from lib.networks.compiled import CompiledForward, has_openvino
from lib.networks.inference import InferenceNetwork
from lib.networks.precision import autocast

logger = logging.getLogger("unetr.plan")

# Root mean square of the difference between two ways to compute logits, in standard deviations of the logits. In bf16
# PyTorch itself is about 0.01 away from fp32.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05}
TRIES = 3
# OpenVINO must save at least a tenth of a window's time, since it takes memory.
WORTH = 0.9
# Compilation needs another copy of the weights and intermediate data; requests keep at least three quarters of the free
# memory.
COPIES_OF_WEIGHTS = 3
LARGEST_SHARE = 1 / 4


@dataclass(frozen=True)
class Compiler:
    """The compiler of a network, the available memory and the clock; tests pass others.

    Attributes:
        is_installed: whether OpenVINO is installed.
        compile_windows: compiles the forward pass for windows of (channels, X, Y, Z); it may raise any exception of
            OpenVINO.
        memory: probe of the free memory.
        clock: clock in seconds that times the windows.
    """

    is_installed: Callable[[], bool] = has_openvino
    compile_windows: Callable[[InferenceNetwork, Sequence[int]], CompiledForward] = InferenceNetwork.compile_windows
    memory: MemoryProbe = field(default_factory=MemoryProbe)
    clock: Callable[[], float] = time.perf_counter


def compile_if_faster(segmenter: Segmenter, computing: threading.Lock, compiler: Compiler | None = None) -> None:
    """Let OpenVINO compute a segmenter's windows on the CPU, if its logits agree and it is faster.

    If OpenVINO cannot compile the network, PyTorch remains in use and the log states the reason.

    Args:
        segmenter: the segmenter, which stays usable all the time.
        computing: lock of the device; it is held for a few windows before and after the compilation.
        compiler: the compiler; by default OpenVINO.
    """
    network, compiler = segmenter.network, compiler or Compiler()
    if not isinstance(network, InferenceNetwork) or segmenter.device.type != "cpu" or not compiler.is_installed():
        return
    name = segmenter.preset.name
    weights = sum(parameter.nbytes for parameter in network.parameters())
    left = compiler.memory.of_host(segmenter.planner.budget)
    if COPIES_OF_WEIGHTS * weights > LARGEST_SHARE * left:
        logger.info("%s stays with PyTorch: %.2f GiB of memory are too few for OpenVINO", name, left / GIB)
        return
    try:
        logger.info("%s: %s", name, _compile_and_choose(segmenter, network, computing, compiler))
    except Exception:  # OpenVINO raises whatever the tracer, NumPy or C++ raised
        logger.warning("%s stays with PyTorch: OpenVINO cannot compute it", name, exc_info=True)


def _compile_and_choose(
    segmenter: Segmenter, network: InferenceNetwork, computing: threading.Lock, compiler: Compiler
) -> str:
    """Compile, choose the faster engine, and return a sentence that explains the choice."""
    with computing:
        pytorch = _try_out(segmenter, network, None, compiler.clock)
    shape = (segmenter.preset.in_channels, *segmenter.preset.roi_size)
    compiled = compiler.compile_windows(network, shape)
    release_memory(segmenter.device)
    with computing:
        try:
            openvino = _try_out(segmenter, network, compiled, compiler.clock)
        finally:
            network.use(None)
        apart = openvino.distance(pytorch)
        if apart <= TOLERANCES[segmenter.dtype] and openvino.seconds < WORTH * pytorch.seconds:
            network.use(compiled)
            # measured once on each machine, here instead of in the next request
            segmenter.planner.cost(network, segmenter.placement)
            network.release_memory()
    return (
        f"windows by {network.engine}; OpenVINO takes {openvino.seconds:.3f} s for one, "
        f"PyTorch {pytorch.seconds:.3f} s; their logits are {apart:.1e} apart"
    )


@dataclass(frozen=True)
class _Trial:
    """The time of a window of noise, and the logits that the network computes for it."""

    seconds: float
    logits: torch.Tensor

    def distance(self, other: _Trial) -> float:
        """Root mean square of the difference between the logits, in standard deviations of the logits."""
        return float((self.logits - other.logits).square().mean().sqrt() / other.logits.std())


def _try_out(
    segmenter: Segmenter, network: InferenceNetwork, compiled: CompiledForward | None, clock: Callable[[], float]
) -> _Trial:
    """Time a window with this engine and leave it active. The fastest of several runs counts."""
    network.use(compiled)
    noise = torch.randn(
        1, segmenter.preset.in_channels, *segmenter.preset.roi_size, generator=torch.Generator().manual_seed(0)
    )
    fastest = math.inf
    with torch.inference_mode(), autocast(segmenter.device, segmenter.dtype):
        for _ in range(TRIES):
            start = clock()
            logits = network(noise)
            fastest = min(fastest, clock() - start)
    network.release_memory()
    release_memory(segmenter.device)
    return _Trial(fastest, logits.float())
