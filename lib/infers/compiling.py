"""OpenVINO in the place of PyTorch: prepared beside a network that is already answering, and used if it is better."""

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
# A tenth of a window's time, at least, for the memory that it takes.
WORTH = 0.9
# The weights once more, and what is in between; of what is left, requests keep at least three quarters.
COPIES_OF_WEIGHTS = 3
LARGEST_SHARE = 1 / 4


@dataclass(frozen=True)
class Compiler:
    """What compiles a network, and the memory that there is for it; a test hands in another.

    Attributes:
        is_installed: whether there is OpenVINO.
        compile_windows: makes a network's forward pass for windows of (channels, X, Y, Z); it raises whatever OpenVINO
            raises.
        memory: says how much is free.
        clock: seconds, by which windows are timed.
    """

    is_installed: Callable[[], bool] = has_openvino
    compile_windows: Callable[[InferenceNetwork, Sequence[int]], CompiledForward] = InferenceNetwork.compile_windows
    memory: MemoryProbe = field(default_factory=MemoryProbe)
    clock: Callable[[], float] = time.perf_counter


def compile_if_faster(segmenter: Segmenter, computing: threading.Lock, compiler: Compiler | None = None) -> None:
    """Have OpenVINO compute a segmenter's windows on the CPU, where it says the same in less time.

    Whatever OpenVINO cannot do stays with PyTorch, and the log says why.

    Args:
        segmenter: it may be in use, and stays in use.
        computing: held by whoever computes; taken for a few windows before, and again after it is compiled.
        compiler: OpenVINO, unless given.
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
    """Say what was chosen, and why."""
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
            # measured once for a machine: here rather than in the next request
            segmenter.planner.cost(network, segmenter.placement)
            network.release_memory()
    return (
        f"windows by {network.engine}; OpenVINO takes {openvino.seconds:.3f} s for one, "
        f"PyTorch {pytorch.seconds:.3f} s; their logits are {apart:.1e} apart"
    )


@dataclass(frozen=True)
class _Trial:
    """What a window of noise takes, and what the network says to it."""

    seconds: float
    logits: torch.Tensor

    def distance(self, other: _Trial) -> float:
        """Root mean square of the difference, in standard deviations."""
        return float((self.logits - other.logits).square().mean().sqrt() / other.logits.std())


def _try_out(
    segmenter: Segmenter, network: InferenceNetwork, compiled: CompiledForward | None, clock: Callable[[], float]
) -> _Trial:
    """Compute a window in this way, and go on so. The fastest of several counts: a disturbance only slows down."""
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
