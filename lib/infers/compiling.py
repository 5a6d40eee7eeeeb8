"""OpenVINO in the place of PyTorch: prepared beside a network that is already answering, and used if it is better."""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass

import torch

from lib.infers.memory import GIB, host_bytes_left, release_memory
from lib.infers.segmenter import Segmenter
from lib.networks.compiled import CompiledForward, has_openvino
from lib.networks.inference import InferenceNetwork
from lib.networks.precision import autocast

logger = logging.getLogger("unetr.plan")

# Root mean square of the difference between two ways to compute logits, in standard deviations of the logits. In bf16
# PyTorch itself is about 0.01 away from fp32.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05}
# The weights once more, and what is in between; of what is left, requests keep at least three quarters.
COPIES_OF_WEIGHTS = 3
LARGEST_SHARE = 1 / 4


def compile_if_faster(segmenter: Segmenter, computing: threading.Lock) -> None:
    """Have OpenVINO compute a segmenter's windows on the CPU, where it says the same in less time.

    Whatever OpenVINO cannot do stays with PyTorch, and the log says why. Seconds of both are measured once for each
    machine and shape of network, and kept in the planner's book.

    Args:
        segmenter: it may be in use, and stays in use.
        computing: held by whoever computes; taken for a few windows at the end.
    """
    network = segmenter.network
    if not isinstance(network, InferenceNetwork) or segmenter.device.type != "cpu" or not has_openvino():
        return
    name = segmenter.preset.name
    weights = sum(parameter.nbytes for parameter in network.parameters())
    left = host_bytes_left(segmenter.planner.budget)
    if COPIES_OF_WEIGHTS * weights > LARGEST_SHARE * left:
        logger.info("%s stays with PyTorch: %.2f GiB of memory are too few for OpenVINO", name, left / GIB)
        return
    with computing:
        pytorch = _try_out(segmenter, network, None)
    try:
        compiled = network.compile((1, *segmenter.preset.roi_size))
    except Exception:  # its frontend raises whatever the tracer, NumPy or C++ raised
        logger.warning("%s stays with PyTorch: OpenVINO cannot compile it", name, exc_info=True)
        return
    release_memory(segmenter.device)
    with computing:
        openvino = _try_out(segmenter, network, compiled)
        apart = openvino.distance(pytorch)
        if not (apart <= TOLERANCES[segmenter.dtype] and openvino.seconds < pytorch.seconds):
            network.use(None)
    logger.info(
        "%s: windows by %s; OpenVINO takes %.3f s for one, PyTorch %.3f s; their logits are %.1e apart",
        *(name, network.engine, openvino.seconds, pytorch.seconds, apart),
    )


@dataclass(frozen=True)
class _Trial:
    """What a window of noise takes, and what the network says to it; no seconds will do if it did not fit."""

    seconds: float
    logits: torch.Tensor

    def distance(self, other: _Trial) -> float:
        """Root mean square of the difference, in standard deviations."""
        return float((self.logits - other.logits).square().mean().sqrt() / other.logits.std())


def _try_out(segmenter: Segmenter, network: InferenceNetwork, compiled: CompiledForward | None) -> _Trial:
    """Compute a window in this way, and go on so."""
    network.use(compiled)
    cost = segmenter.planner.cost(network, segmenter.preset, segmenter.device, segmenter.dtype)
    logits = _logits_of_noise(segmenter)
    network.release_memory()
    release_memory(segmenter.device)
    return _Trial(math.inf if cost is None else cost.seconds, logits)


def _logits_of_noise(segmenter: Segmenter) -> torch.Tensor:
    """What the network says to a window of noise, the same each time."""
    noise = torch.randn(1, 1, *segmenter.preset.roi_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), autocast(segmenter.device, segmenter.dtype):
        logits: torch.Tensor = segmenter.network(noise)
    return logits.float()
