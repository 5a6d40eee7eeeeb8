"""The network: its size, and that activation checkpointing changes memory and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lib.configs.catalogue import load_preset
from lib.configs.preset import Preset
from lib.networks.fine_unetr import FineUNETR
from lib.networks.unetr import build_unetr, parameter_count
from tests.tiny import tiny_preset

SMALL = {"feature_size": 4, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4}


def _twins(preset: Preset) -> tuple[nn.Module, nn.Module]:
    """The same weights without and with activation checkpointing."""
    torch.manual_seed(0)
    plain = build_unetr(preset)
    checkpointed = build_unetr(preset, activation_checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict())
    return plain, checkpointed


def _gradients(network: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)  # for dropout
    output = network.train()(image)
    output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradients(dropout_rate: float, patch_size: int) -> None:
    network = SMALL | {"dropout_rate": dropout_rate, "patch_size": patch_size}
    plain, checkpointed = _twins(tiny_preset(network=network, roi_size=[32, 16, 16]))
    image = torch.randn(2, 1, 32, 16, 16, generator=torch.Generator().manual_seed(2))
    output, expected = _gradients(plain, image)
    again, found = _gradients(checkpointed, image)
    torch.testing.assert_close(again, output, rtol=0, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_activation_checkpointing_keeps_fewer_activations() -> None:
    plain, checkpointed = _twins(tiny_preset())
    image = torch.randn(1, 1, 16, 16, 16)

    def kept(network: nn.Module) -> int:
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network.train().vit(image)
        return count

    assert kept(checkpointed) < kept(plain) / 3


def test_activation_checkpointing_keeps_the_names_of_weights() -> None:
    plain, checkpointed = _twins(tiny_preset())
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    assert list(copy.deepcopy(checkpointed).state_dict()) == list(plain.state_dict())


def test_activation_checkpointing_is_not_in_the_way_of_evaluation() -> None:
    plain, checkpointed = _twins(tiny_preset())
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(checkpointed.eval()(image), plain.eval()(image), rtol=0, atol=0)


def test_output_has_a_class_for_each_label_and_background() -> None:
    preset = tiny_preset(roi_size=[16, 32, 16], channels=[{"name": "t1"}, {"name": "flair"}])
    network = build_unetr(preset).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 2, 16, 32, 16)).shape == (1, 3, 16, 32, 16)


@pytest.mark.parametrize("options", [{}, {"norm_name": "batch"}, {"conv_block": False}, {"res_block": False}])
def test_patches_of_8_voxels_make_a_network_of_the_same_outputs(options: dict[str, object]) -> None:
    network = build_unetr(tiny_preset(roi_size=[24, 16, 40], network=SMALL | {"patch_size": 8} | options))
    assert isinstance(network, FineUNETR)
    image = torch.randn(2, 1, 24, 16, 40)
    output = network(image)
    assert output.shape == (2, 3, 24, 16, 40)
    tokens, layers = network.vit(image)
    assert tokens.shape == (2, 3 * 2 * 5, 48) and len(layers) == 12
    output.square().mean().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None]
    assert all("norm_cross_attn" in name for name in unused), "everything else takes part"


def test_a_token_lies_where_its_patch_lies() -> None:
    """What is changed in one corner of the image is what the map of tokens says in that corner."""
    network = build_unetr(tiny_preset(roi_size=[24, 16, 40], network=SMALL | {"patch_size": 8})).eval()
    assert isinstance(network, FineUNETR)
    embedding = network.vit.patch_embedding
    blank, marked = torch.zeros(1, 1, 24, 16, 40), torch.zeros(1, 1, 24, 16, 40)
    marked[..., 16:, :8, 32:] = 1
    with torch.inference_mode():
        changed = (network._as_map(embedding(marked)) - network._as_map(embedding(blank))).abs().sum(dim=1)[0]
    assert changed.shape == (3, 2, 5)
    assert changed.nonzero().tolist() == [[2, 0, 4]]


@pytest.mark.parametrize("patch_size", [8, 16])
def test_norms_have_weights_only_where_asked(patch_size: int) -> None:
    def norms(name: str) -> list[str]:
        network = SMALL | {"patch_size": patch_size, "norm_name": name}
        keys = build_unetr(tiny_preset(network=network)).state_dict()
        return [key for key in keys if key.startswith("decoder2.") and ".norm" in key and key.endswith(".weight")]

    assert norms("instance") == []
    assert len(norms("instance_affine")) == 3


@pytest.mark.parametrize(
    ("name", "millions"),
    # 92.8 M is the UNETR of the paper (table 3: 92.58 M, of 13 outputs and without today's unused norms).
    [("abdomen_ct_base", 92.8), ("abdomen_ct", 8.15), ("hippocampus_mr", 5.34)],
)
def test_parameters_of_a_shipped_preset_are_counted(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = build_unetr(load_preset(name))
    assert round(parameter_count(network) / 1e6, 1 if millions > 10 else 2) == millions


@pytest.mark.parametrize("name", ["abdomen_ct_base", "abdomen_ct", "hippocampus_mr"])
def test_shipped_presets_use_no_dead_cross_attention(name: str) -> None:
    with torch.device("meta"):
        names = list(build_unetr(load_preset(name)).state_dict())
    assert not [n for n in names if ".cross_attn." in n]


def test_parameter_count_leaves_frozen_ones_out() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert parameter_count(layer) == 6
