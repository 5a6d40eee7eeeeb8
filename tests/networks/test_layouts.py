"""Checkpoints of older MONAI versions and of the research code load, and segment as they did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lib.configs.preset import Preset
from lib.errors import CheckpointError
from lib.networks.checkpoint import load_weights, read_checkpoint
from lib.networks.layouts import StateDict, strip_wrappers, to_current_layout
from lib.networks.unetr import build_unetr
from tests.tiny import tiny_preset


def _network(preset: Preset) -> nn.Module:
    torch.manual_seed(0)
    network = build_unetr(preset).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)  # zero biases would hide a lost one
    return network


def as_monai_0_8(state: StateDict) -> StateDict:
    """The keys of MONAI 0.6 to 0.8, which are those of the published BTCV checkpoint.

    Compared key by key with what MONAI 0.8.1 itself writes: a ``cls_token`` in the patch embedding, no
    ``norm_cross_attn``, and ``conv3`` in every residual block, used only where the number of channels changes.
    """
    old = {key: value for key, value in state.items() if "norm_cross_attn" not in key}
    hidden = state["vit.norm.weight"].shape[0]
    old["vit.patch_embedding.cls_token"] = torch.randn(1, 1, hidden)
    for key in list(old):
        block = key.removesuffix(".conv1.conv.weight")
        if block != key and f"{block}.conv3.conv.weight" not in old:
            channels = old[key].shape[0]
            old[f"{block}.conv3.conv.weight"] = torch.randn(channels, channels, 1, 1, 1)
            old[f"{block}.norm3.weight"] = torch.randn(channels)  # with affine norms; instance norm has none
    return old


def as_monai_1_4(state: StateDict) -> StateDict:
    """The keys of MONAI 1.3 to 1.5: a ``cross_attn`` in each transformer block that is never called."""
    old = dict(state)
    hidden = state["vit.norm.weight"].shape[0]
    for block in range(12):
        for name in ("out_proj.weight", "to_q.weight", "to_k.weight", "to_v.weight"):
            old[f"vit.blocks.{block}.cross_attn.{name}"] = torch.randn(hidden, hidden)
        old[f"vit.blocks.{block}.cross_attn.out_proj.bias"] = torch.randn(hidden)
    return old


def _wrapped(prefix: str) -> Callable[[StateDict], StateDict]:
    return lambda state: {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("proj_type", ["perceptron", "conv"])
@pytest.mark.parametrize("layout", [dict, as_monai_0_8, as_monai_1_4], ids=["today", "0.6 to 0.8", "1.3 to 1.5"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "network.", "model."])
def test_older_layout_segments_as_it_did(
    tmp_path: Path, layout: Callable[[StateDict], StateDict], proj_type: str, prefix: str
) -> None:
    size = {"feature_size": 4, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4, "proj_type": proj_type}
    preset = tiny_preset(network=size)
    original = _network(preset)
    # As the research code saves it, with a NumPy number for the accuracy.
    content = {
        "epoch": 4999,
        "best_acc": np.float64(0.82),
        "state_dict": _wrapped(prefix)(layout(original.state_dict())),
    }
    torch.save(content, tmp_path / "model.pt")

    checkpoint = read_checkpoint(tmp_path / "model.pt")
    assert checkpoint.preset is None
    loaded = build_unetr(preset).eval()
    load_weights(loaded, checkpoint.model)

    image = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image), original(image), rtol=0, atol=0)


def test_conv3_where_channels_change_is_never_dropped() -> None:
    """It takes part in the forward pass there; without it, the load must fail and name it."""
    preset = tiny_preset()
    state = as_monai_0_8(_network(preset).state_dict())
    del state["decoder2.conv_block.conv3.conv.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: decoder2\.conv_block\.conv3\.conv\.weight"):
        load_weights(build_unetr(preset), state)


def test_keys_that_no_layout_has_are_left_for_the_strict_load() -> None:
    reference = _network(tiny_preset()).state_dict()
    state = dict(reference) | {"vit.extra.weight": torch.zeros(1)}
    assert to_current_layout(state, reference).keys() - reference.keys() == {"vit.extra.weight"}


def test_strip_wrappers_takes_only_what_every_key_has() -> None:
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert strip_wrappers(mixed) == mixed
    assert list(strip_wrappers({"module.model.a": torch.zeros(1), "module.model.b": torch.zeros(1)})) == ["a", "b"]
    assert strip_wrappers({}) == {}
