"""Convolutions for the CPU are PyTorch's, faster."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lib.networks.convolutions import OneDNNConv3d, PointwiseConv3d, convolve_with_onednn, multiply_pointwise


@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_is_pytorchs_forward_and_backward_and_keeps_the_layout(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv3d(6, 4, 1, bias=bias))
    ours = copy.deepcopy(plain)
    multiply_pointwise(ours)
    assert type(ours[0]) is PointwiseConv3d and ours.state_dict().keys() == plain.state_dict().keys()
    maps = torch.randn(2, 6, 5, 4, 3).contiguous(memory_format=torch.channels_last_3d)
    weights = torch.randn(2, 4, 5, 4, 3)
    gradients = []
    for network in (plain, ours):
        input = maps.clone().requires_grad_()
        found = network(input)
        (found * weights).sum().backward()
        gradients.append([found, input.grad, *(parameter.grad for parameter in network.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)
    assert gradients[1][0].is_contiguous(memory_format=torch.channels_last_3d)


OTHERS = [
    nn.Conv3d(4, 4, 1, stride=2),
    nn.Conv3d(4, 4, 1, groups=2),
    nn.Conv3d(4, 4, 1, padding=1),
    nn.Conv3d(4, 4, 3, padding=1),
    nn.Conv3d(4, 4, 1, padding="same"),
    nn.ConvTranspose3d(4, 4, 1),
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_what_is_no_product_of_voxels_stays(other: nn.Module) -> None:
    network = nn.Sequential(copy.deepcopy(other))
    multiply_pointwise(network)
    assert type(network[0]) is type(other)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"groups": 2}, {"dilation": 2}, {"bias": False}, {"padding": (0, 1, 2)}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_onednns_is_pytorchs(options: dict[str, object], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv3d(4, 6, 3, **options)).to(dtype)  # type: ignore[arg-type]
    ours = copy.deepcopy(plain)
    convolve_with_onednn(ours)
    assert type(ours[0]) is OneDNNConv3d
    maps = torch.randn(1, 4, 9, 8, 7, dtype=dtype)
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-4
    with torch.inference_mode():
        torch.testing.assert_close(ours(maps), plain(maps), rtol=1e-4, atol=tolerance)


def test_convolution_that_pads_otherwise_than_with_zeros_stays() -> None:
    network = nn.Sequential(nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"), nn.Conv3d(2, 2, 3, padding="same"))
    convolve_with_onednn(network)
    assert {type(module) for module in network} == {nn.Conv3d}
