"""A case's scores, put together from windows, are those of the whole volume."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lib.activelearning import scores
from lib.activelearning.case_scores import MAP_MEASURES, REGIONS, score_case, score_name
from lib.activelearning.embedding import MOST_WINDOWS, embed, tile_starts
from lib.activelearning.passes import TestTimeAugmentation
from lib.networks.inference import InferenceNetwork
from lib.networks.placement import Placement
from lib.networks.unetr import build_unetr
from tests.tiny import tiny_preset

CPU, FP32 = torch.device("cpu"), torch.float32
PRESET = tiny_preset()


class Voxelwise(nn.Module):
    """A network whose logits at a voxel depend on that voxel alone, with a ViT that returns the window's mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(x), x, 2 * x - 1], dim=1)

    def vit(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return torch.stack([x.mean(), x.std(), torch.tensor(1.0)])[None, None], []


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 16, 16), (20, 33, 16), (40, 17, 31)])
def test_windows_add_up_to_the_volume(shape: tuple[int, int, int]) -> None:
    picture, network = image(*shape), Voxelwise()
    found = score_case(network, picture, Placement(PRESET, CPU, FP32))
    probs = torch.softmax(network(picture[None])[0], dim=0)
    entropy, margin = scores.predictive_entropy(probs), scores.margin(probs)
    region = scores.foreground_region(probs.argmax(dim=0))
    assert found.values["entropy/volume"] == pytest.approx(float(entropy.mean()), rel=1e-5)
    assert found.values["entropy/foreground"] == pytest.approx(float(entropy[region].mean()), rel=1e-5)
    assert found.values["margin/patches"] == pytest.approx(scores.top_k_patches(margin), rel=1e-5)
    expected = scores.class_balanced_entropy(scores.class_entropy_sums(probs))
    assert found.values["class_balanced_entropy"] == pytest.approx(expected, rel=1e-5)
    assert found.foreground_voxels == int((probs.argmax(dim=0) > 0).sum())


def test_passes_add_their_measures() -> None:
    torch.manual_seed(0)
    network = build_unetr(PRESET).eval()
    picture = image(20, 18, 16)
    without = score_case(network, picture, Placement(PRESET, CPU, FP32))
    found = score_case(network, picture, Placement(PRESET, CPU, FP32), TestTimeAugmentation(network, PRESET))
    assert "bald/foreground" not in without.values
    names = {score_name(m, r) for m in MAP_MEASURES for r in REGIONS} | {"class_balanced_entropy", "dice_disagreement"}
    assert set(found.values) == names
    assert all(0 <= value <= 1 for value in found.values.values())
    assert found.values["bald/volume"] > 0
    assert found.values["dice_disagreement"] > 0


def test_tiles_cover_without_overlap_where_they_can() -> None:
    assert tile_starts((32, 16, 20), (16, 16, 16)) == [(0, 0, 0), (0, 0, 4), (16, 0, 0), (16, 0, 4)]


def test_embedding_has_length_one_and_tells_cases_apart() -> None:
    torch.manual_seed(0)
    network = build_unetr(PRESET).eval()
    a, again, b = (embed(network, image(20, 18, 16, seed=s), Placement(PRESET, CPU, FP32)) for s in (0, 0, 1))
    assert a.shape == (48,) and a.dtype == np.float32
    assert np.linalg.norm(a) == pytest.approx(1.0, abs=1e-5)
    assert np.array_equal(a, again)
    assert np.linalg.norm(a - b) > 1e-3


def test_embedding_of_a_large_volume_looks_at_a_few_windows() -> None:
    network, seen = Voxelwise(), []
    pooled = network.vit
    network.vit = lambda x: (seen.append(1), pooled(x))[1]  # type: ignore[method-assign]
    vector = embed(network, image(16 * 5, 16 * 5, 16), Placement(PRESET, CPU, FP32))
    assert len(seen) == MOST_WINDOWS
    assert math.isclose(float(np.linalg.norm(vector)), 1.0, rel_tol=1e-5)


def test_embedding_of_the_network_for_inference_is_that_of_the_plain_one() -> None:
    torch.manual_seed(0)
    network = build_unetr(PRESET).eval()
    plain = embed(network, image(20, 18, 16), Placement(PRESET, CPU, FP32))
    ready = InferenceNetwork(network, CPU, FP32)
    np.testing.assert_allclose(embed(ready, image(20, 18, 16), Placement(PRESET, CPU, FP32)), plain, atol=1e-4)
