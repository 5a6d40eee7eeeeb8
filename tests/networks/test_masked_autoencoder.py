"""The masked autoencoder's targets are the patches behind its tokens."""

from __future__ import annotations

import pytest
import torch

from lib.errors import TrainingError
from lib.networks.masked_autoencoder import MaskedAutoencoder, hidden_patch_loss
from tests.tiny import tiny_preset


def _network(patch_size: int = 8, proj_type: str = "perceptron") -> MaskedAutoencoder:
    size = {"patch_size": patch_size, "feature_size": 4, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
    torch.manual_seed(0)
    return MaskedAutoencoder(tiny_preset(roi_size=[32, 16, 48], network=size | {"proj_type": proj_type}))


def test_targets_are_the_patches_in_the_order_of_the_tokens() -> None:
    network, windows = _network(), torch.randn(2, 1, 32, 16, 48)
    cut = network.autoencoder.patch_embedding.patch_embeddings[0](windows)  # MONAI's own cutting into patches
    expected = (cut - cut.mean(-1, keepdim=True)) / (cut.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(network._targets(windows), expected)


def test_loss_is_that_of_hidden_patches_only() -> None:
    network, windows = _network(), torch.randn(1, 1, 32, 16, 48)
    targets = network._targets(windows)
    hidden = torch.zeros(targets.shape[:2])
    hidden[:, :6] = 1
    drawn = targets.clone()
    drawn[:, :3] += 2.0  # half of the hidden ones are off by 2 everywhere
    drawn[:, 6:] += 100.0  # what was shown does not count
    assert hidden_patch_loss(drawn, targets, hidden).item() == pytest.approx(2.0)


def test_network_answers_with_the_loss_of_what_its_autoencoder_draws() -> None:
    network, windows = _network(), torch.randn(2, 1, 32, 16, 48)
    torch.manual_seed(1)
    drawn, hidden = network.autoencoder(windows)
    torch.manual_seed(1)
    expected = hidden_patch_loss(drawn, network._targets(windows), hidden)
    torch.testing.assert_close(network(windows), expected)


@pytest.mark.parametrize("proj_type", ["perceptron", "conv"])
@pytest.mark.parametrize("patch_size", [8, 16])
def test_encoder_has_every_weight_that_a_unetr_reads(patch_size: int, proj_type: str) -> None:
    names = set(_network(patch_size, proj_type).encoder())
    assert {name.split(".")[0] for name in names} == {"vit"}
    assert {f"vit.blocks.{layer}.attn.qkv.weight" for layer in range(12)} < names
    assert {"vit.norm.weight", "vit.patch_embedding.position_embeddings"} < names
    assert not [name for name in names if "cls_token" in name or "decoder" in name]


def test_window_of_a_single_patch_is_refused() -> None:
    with pytest.raises(TrainingError, match="'tiny' is a single patch"):
        MaskedAutoencoder(tiny_preset())
