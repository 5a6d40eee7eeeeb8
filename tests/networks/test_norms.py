"""Norms that keep the layout train what PyTorch's own train."""

from __future__ import annotations

import copy

import torch

from lib.networks.norms import ChannelsLastInstanceNorm
from lib.networks.precision import place_for_training
from lib.networks.unetr import build_unetr
from tests.tiny import tiny_preset

CPU = torch.device("cpu")


def test_gradients_with_norms_that_keep_the_layout_are_those_of_the_plain_network() -> None:
    torch.manual_seed(0)
    plain = build_unetr(tiny_preset(roi_size=[32, 32, 32])).train().double()
    ours = copy.deepcopy(plain)
    place_for_training(ours, CPU)
    assert sum(isinstance(module, ChannelsLastInstanceNorm) for module in ours.modules()) > 20
    assert list(ours.state_dict()) == list(plain.state_dict())
    image = torch.randn(2, 1, 32, 32, 32, dtype=torch.float64)
    gradients = []
    for network in (plain, ours):
        network(image).square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-6, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_norm_keeps_the_layout_that_it_is_given() -> None:
    features = torch.randn(2, 8, 6, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    found = ChannelsLastInstanceNorm(8)(features)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(found, torch.nn.InstanceNorm3d(8)(features), rtol=1e-5, atol=1e-5)
