"""What OpenVINO compiled says what the network says."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from lib.networks.compiled import CompiledForward, has_openvino
from lib.networks.inference import InferenceNetwork
from lib.networks.precision import cpu_computes_bf16
from lib.networks.unetr import build_unetr
from tests.forks import run_code
from tests.tiny import tiny_preset

pytestmark = pytest.mark.skipif(not has_openvino(), reason="there is no OpenVINO for this machine")

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
SHAPE = (1, 32, 32, 32)
FINE = {"patch_size": 8, "norm_name": "instance_affine", "proj_type": "conv"}
# OpenVINO's import and all that comes after it, and whether any of it opens a connection or starts another program.
WATCHED = """
import sys, torch
assert not [name for name in sys.modules if name.startswith("openvino")]
from lib.networks.compiled import CompiledForward
from lib.networks.unetr import build_unetr
from tests.tiny import tiny_preset
network, said = build_unetr(tiny_preset()).eval(), []
watched = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system")
sys.addaudithook(lambda event, given: said.append((event, given)) if event in watched else None)
logits = CompiledForward(network, (1, 16, 16, 16), torch.float32)(torch.randn(1, 1, 16, 16, 16))
print(tuple(logits.shape), said)
"""


def _network(**network: object) -> nn.Module:
    torch.manual_seed(0)
    plain = tiny_preset().network.model_dump()
    return build_unetr(tiny_preset(roi_size=[32, 32, 32], network=plain | network)).eval()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return _network(**FINE)


@pytest.fixture(scope="module")
def compiled(network: nn.Module) -> CompiledForward:
    return CompiledForward(network, SHAPE, FP32)


@pytest.mark.parametrize("options", [{}, {"norm_name": "batch"}, {"dropout_rate": 0.3}, {"res_block": False}, FINE])
def test_logits_are_those_of_the_network(options: dict[str, object]) -> None:
    """Compiled from the network as it is made ready, whose convolutions and norms OpenVINO does not know."""
    network, windows = _network(**options), torch.randn(3, *SHAPE)
    ready = InferenceNetwork(copy.deepcopy(network), CPU, FP32)
    ready.use(ready.compile_windows(SHAPE))
    with torch.inference_mode():
        expected, found = network(windows), ready(windows)
    assert ready.engine == "openvino"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_network_that_moves_computes_with_pytorch_again(network: nn.Module, compiled: CompiledForward) -> None:
    ready = InferenceNetwork(copy.deepcopy(network), CPU, FP32)
    ready.use(compiled)
    ready.move(CPU, BF16)
    assert ready.engine == "pytorch" and ready(torch.randn(1, *SHAPE)).dtype is BF16


def test_windows_of_another_layout_and_format_are_taken(network: nn.Module, compiled: CompiledForward) -> None:
    windows = torch.randn(2, *SHAPE).to(BF16)
    with torch.inference_mode():
        expected = network(windows.float())
    found = compiled(windows.contiguous(memory_format=torch.channels_last_3d))
    assert found.dtype is FP32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_answer_stays_when_the_next_window_is_computed(compiled: CompiledForward) -> None:
    first = compiled(torch.zeros(1, *SHAPE))
    before = first.clone()
    compiled(torch.ones(1, *SHAPE))
    assert torch.equal(first, before)


def test_memory_that_was_released_is_taken_again(compiled: CompiledForward) -> None:
    window = torch.randn(1, *SHAPE)
    before = compiled(window)
    compiled.release_memory()
    compiled.release_memory()
    assert torch.equal(compiled(window), before)


def test_threads_get_their_own_answers(compiled: CompiledForward) -> None:
    windows = [torch.full((1, *SHAPE), float(number)) + torch.randn(1, *SHAPE) for number in range(8)]
    alone = [compiled(window) for window in windows]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(compiled, windows))
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


@pytest.mark.skipif(not cpu_computes_bf16(), reason="this CPU has no instructions for bf16")
def test_logits_in_bf16_are_close_to_those_in_fp32(network: nn.Module) -> None:
    ready, windows = InferenceNetwork(copy.deepcopy(network), CPU, BF16), torch.randn(2, *SHAPE)
    with torch.inference_mode():
        expected = network(windows)
    found = ready.compile_windows(SHAPE)(windows)
    assert (found - expected).square().mean().sqrt() / expected.std() < 0.05


@pytest.mark.skipif(cpu_computes_bf16(), reason="this CPU computes in bf16")
def test_format_that_the_cpu_lacks_is_refused(network: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="OpenVINO does not compute in bf16 on this CPU"):
        CompiledForward(copy.deepcopy(network).to(BF16), SHAPE, BF16)


def test_format_that_openvino_lacks_is_refused(network: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"OpenVINO does not compute in torch\.float16 on this CPU"):
        CompiledForward(copy.deepcopy(network), SHAPE, torch.float16)


def test_nothing_is_sent_anywhere(tmp_path: Path) -> None:
    """The converter that OpenVINO comes with reports how it is used; ours does without it."""
    assert run_code(WATCHED, tmp_path).splitlines()[-1] == "(1, 3, 16, 16, 16) []"
