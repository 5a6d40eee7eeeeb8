"""The network made ready for inference says what the plain one says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lib.networks.convolutions import OneDNNConv3d
from lib.networks.graphs import WARM_UP_PASSES, GraphedForward
from lib.networks.inference import InferenceNetwork
from lib.networks.norms import ChannelsLastInstanceNorm
from lib.networks.unetr import build_unetr
from tests.tiny import tiny_preset

CPU = torch.device("cpu")
FINE = {"patch_size": 8, "norm_name": "instance_affine", "proj_type": "conv"}


def _network(**network: object) -> nn.Module:
    torch.manual_seed(0)
    plain = tiny_preset().network.model_dump()
    return build_unetr(tiny_preset(roi_size=[32, 32, 32], network=plain | network)).eval()


@pytest.mark.parametrize("options", [{}, {"norm_name": "batch"}, {"dropout_rate": 0.3}, {"res_block": False}, FINE])
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_in_fp32_are_those_of_the_plain_network(options: dict[str, object], batch: int) -> None:
    network, windows = _network(**options), torch.randn(batch, 1, 32, 32, 32)
    with torch.inference_mode():
        expected = network(windows)
        found = InferenceNetwork(copy.deepcopy(network), CPU, torch.float32)(windows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"norm_name": "batch"}, FINE])
def test_logits_in_bf16_are_close_to_those_in_fp32(options: dict[str, object]) -> None:
    network, windows = _network(**options), torch.randn(2, 1, 32, 32, 32)
    with torch.inference_mode():
        expected = network(windows)
        found = InferenceNetwork(copy.deepcopy(network), CPU, torch.bfloat16)(windows)
    assert found.dtype is torch.bfloat16
    error = (found.float() - expected).abs()
    assert error.mean() / expected.std() < 0.02
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.97


def test_channels_last_instance_norm_is_pytorchs_and_keeps_the_layout() -> None:
    plain, ours = nn.InstanceNorm3d(6, affine=True), ChannelsLastInstanceNorm(6, affine=True)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ours.load_state_dict(plain.state_dict())
    maps = torch.randn(2, 6, 5, 4, 3).contiguous(memory_format=torch.channels_last_3d)
    found = ours(maps)
    torch.testing.assert_close(found, plain(maps), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)


def test_convolutions_of_one_small_window_are_onednns() -> None:
    """PyTorch's own choice for a single window is ten of its slow kernels."""
    network, window = _network(**FINE), torch.randn(1, 1, 32, 32, 32)
    with torch.inference_mode(), torch.profiler.profile() as plain:
        network(window)
    prepared = InferenceNetwork(network, CPU, torch.float32)
    with torch.inference_mode(), torch.profiler.profile() as ours:
        prepared(window)
    slow = "aten::slow_conv3d_forward"
    assert slow in {event.key for event in plain.key_averages()}
    counts = {event.key: event.count for event in ours.key_averages()}
    convolutions = sum(type(module) is OneDNNConv3d for module in prepared.modules())
    assert convolutions >= 15 and counts["aten::mkldnn_convolution"] == convolutions and slow not in counts


def test_weights_keep_their_names_and_are_held_in_the_computations_format() -> None:
    network = _network()
    names = list(network.state_dict())
    ready = InferenceNetwork(network, CPU, torch.bfloat16)
    assert list(ready.network.state_dict()) == names
    assert {p.dtype for p in ready.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in ready.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_on_a_gpu_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    network, windows = _network(), torch.randn(2, 1, 32, 32, 32)
    with torch.inference_mode():
        expected = network(windows)
        ready = InferenceNetwork(copy.deepcopy(network), torch.device("cuda"), dtype)
        found = ready(windows.cuda()).float().cpu()
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.97


class Doubled:
    """Counts how often it is called."""

    calls = 0

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 2 * windows


def test_cuda_graphs_are_for_gpus_only() -> None:
    network, windows = _network(), torch.randn(1, 1, 32, 32, 32)
    plain = InferenceNetwork(copy.deepcopy(network), CPU, torch.float32)
    asked = InferenceNetwork(network, CPU, torch.float32, cuda_graphs=True)
    with torch.inference_mode():
        torch.testing.assert_close(asked(windows), plain(windows), rtol=0, atol=0)


@pytest.mark.gpu
def test_recorded_kernels_say_what_the_network_says_for_each_shape() -> None:
    doubled = Doubled()
    graphed = GraphedForward(doubled)
    for batch in (1, 2, 1, 2, 1):
        windows = torch.randn(batch, 1, 8, 8, 8, device="cuda")
        torch.testing.assert_close(graphed(windows), 2 * windows)
    assert doubled.calls == 2 * (WARM_UP_PASSES + 1)


@pytest.mark.gpu
def test_logits_of_recorded_kernels_are_those_of_the_network() -> None:
    network, device = _network(), torch.device("cuda")
    plain = InferenceNetwork(copy.deepcopy(network), device, torch.bfloat16)
    graphed = InferenceNetwork(network, device, torch.bfloat16, cuda_graphs=True)
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(3):
            windows = torch.randn(2, 1, 32, 32, 32, device=device)
            torch.testing.assert_close(graphed(windows), plain(windows), rtol=1e-2, atol=1e-2)
