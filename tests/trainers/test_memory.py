"""Steps in parts have the gradients of whole steps; what a step keeps is counted and measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lib.configs.catalogue import load_preset
from lib.infers.memory import GIB
from lib.networks.placement import Placement
from lib.networks.unetr import build_unetr
from lib.trainers.memory import count_kept_bytes, forward_in_parts, measure_step
from lib.trainers.optimization import build_loss
from tests.forks import run_code
from tests.tiny import tiny_preset

SMALL = {"feature_size": 4, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
CPU, FP32 = torch.device("cpu"), torch.float32


def _gradients(network: nn.Module, image: torch.Tensor, label: torch.Tensor, at_once: int) -> list[torch.Tensor]:
    network.zero_grad()
    torch.manual_seed(1)
    build_loss(tiny_preset().training)(forward_in_parts(network, image, at_once), label).backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_gradients_of_a_step_in_parts_are_those_of_the_whole_step(at_once: int) -> None:
    torch.manual_seed(0)
    network = build_unetr(tiny_preset()).train()
    image, label = torch.randn(4, 1, 16, 16, 16), torch.randint(0, 3, (4, 1, 16, 16, 16)).float()
    whole = _gradients(network, image, label, 4)
    parts = _gradients(network, image, label, at_once)
    assert len(whole) == len(parts) > 50
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


ONE_PASS = """
import psutil
import torch
from lib.infers.memory import release_memory
from lib.networks.unetr import build_unetr
from tests.tiny import tiny_preset

torch.set_num_threads(1)
network, crop = build_unetr(tiny_preset(roi_size=[64, 64, 64])), torch.zeros(1, 1, 64, 64, 64)
network(crop)  # the first pass pays for what is made only once
release_memory(crop.device)  # what it has freed would be taken again unseen
before = psutil.Process().memory_info().rss
output = network(crop)
assert output.requires_grad
release_memory(crop.device)  # what is held is what the gradient needs
print("bytes", psutil.Process().memory_info().rss - before)
"""


def test_counted_activations_are_those_that_are_kept(tmp_path: Path) -> None:
    """A convolution keeps its input for the weight's gradient; the count of the whole grows with the window.

    They are measured in a process of its own, whose memory no other test has used.
    """
    small, _ = count_kept_bytes(tiny_preset(roi_size=[32, 32, 32]), False)
    large, weights = count_kept_bytes(tiny_preset(roi_size=[64, 64, 64]), False)
    assert 6 < large / small < 10
    network = build_unetr(tiny_preset(roi_size=[64, 64, 64]))
    assert weights == sum(p.numel() * 4 for p in network.parameters())
    taken = int(run_code(ONE_PASS, tmp_path).rpartition("bytes")[2])
    assert 0.4 * large < taken < 4 * large


def test_smaller_patches_keep_more_of_the_transformer() -> None:
    """Eight times the tokens: what checkpointing can drop grows with them."""
    coarse, fine = (tiny_preset(roi_size=[48, 48, 48], network=SMALL | {"patch_size": size}) for size in (16, 8))
    dropped = [count_kept_bytes(p, False)[0] - count_kept_bytes(p, True)[0] for p in (coarse, fine)]
    assert 8 <= dropped[1] / dropped[0] < 8**2


def test_checkpointing_keeps_fewer_bytes() -> None:
    preset = load_preset("abdomen_ct_base")
    kept, weights = count_kept_bytes(preset, False)
    checkpointed, _ = count_kept_bytes(preset, True)
    assert 0.05 * GIB < kept - checkpointed < GIB
    assert weights == pytest.approx(92.8e6 * 4, rel=0.01)


def test_step_is_measured_without_a_trace_in_the_random_numbers() -> None:
    network = {"feature_size": 16, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
    preset = tiny_preset(roi_size=[64, 64, 64], network=network)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    cost = measure_step(Placement(preset, CPU, FP32), 1, False)
    assert torch.equal(torch.rand(1), expected)
    kept, _ = count_kept_bytes(preset, False)
    assert 0.5 * kept < cost.bytes < 5 * kept
    assert 0 < cost.seconds < 60
