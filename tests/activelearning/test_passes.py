"""Passes really differ, undo what they did to the image, and refuse where they could not differ."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib.activelearning.passes import (
    Ensemble,
    MonteCarloDropout,
    TestTimeAugmentation,
    choose_passes,
    shifted,
)
from lib.errors import ParameterError
from lib.networks.unetr import build_unetr
from tests.tiny import preset_data, tiny_preset

DROPPING = tiny_preset(network=preset_data()["network"] | {"dropout_rate": 0.3})


class Identity(nn.Module):
    """Logits that are the image, and its negative."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, -x], dim=1)


def windows(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0, preset=DROPPING) -> nn.Module:
    torch.manual_seed(seed)
    return build_unetr(preset).eval()


def test_dropout_without_dropout_is_refused_with_a_sentence() -> None:
    preset = tiny_preset()
    with pytest.raises(
        ParameterError, match=r"'dropout'; valid: tta or ensemble: the network of 'tiny' has no dropout"
    ):
        MonteCarloDropout(network(preset=preset), preset)


def test_dropout_passes_differ_repeat_and_leave_the_network_as_it_was() -> None:
    net = network()
    passes = MonteCarloDropout(net, DROPPING, count=3, seed=5)
    with torch.inference_mode():
        state = torch.random.get_rng_state()
        a, b, c = passes(windows())
        again = list(passes(windows()))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not torch.allclose(a, b) and not torch.allclose(b, c)
        assert torch.equal(a, again[0])
        assert torch.equal(net(windows()), net(windows()))
    assert not any(layer.training for layer in net.modules())


def test_augmented_passes_differ_and_repeat_by_seed() -> None:
    net, preset = network(preset=tiny_preset()), tiny_preset()
    with torch.inference_mode():
        first = list(TestTimeAugmentation(net, preset, count=3, seed=1)(windows()))
        same = list(TestTimeAugmentation(net, preset, count=3, seed=1)(windows()))
        other = list(TestTimeAugmentation(net, preset, count=3, seed=2)(windows()))
    assert not torch.allclose(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("axes", [[], [0], [0, 2]])
def test_augmented_passes_come_back_to_where_the_image_is(axes: list[int]) -> None:
    image = torch.zeros(1, 1, 16, 16, 16)
    image[0, 0, 5:8, 6:11, 9] = 100.0
    for logits in TestTimeAugmentation(Identity(), tiny_preset(mirror_axes=axes), count=4)(image):
        bright = (logits[0, 0] > 40).nonzero()
        assert bright.min(dim=0).values.tolist() == [5, 6, 9]
        assert bright.max(dim=0).values.tolist() == [7, 10, 9]


def test_ensemble_needs_two() -> None:
    nets = [network(0), network(1)]
    with torch.inference_mode():
        a, b = Ensemble(nets)(windows())
    assert not torch.allclose(a, b)
    with pytest.raises(ParameterError, match="two published versions"):
        Ensemble(nets[:1])


def test_shift_repeats_the_edge() -> None:
    line = torch.arange(4.0)[None, None, :, None, None]
    assert shifted(line, [1, 0, 0]).flatten().tolist() == [0, 0, 1, 2]
    assert shifted(line, [-2, 0, 0]).flatten().tolist() == [2, 3, 3, 3]


@pytest.mark.parametrize(
    ("preset", "networks", "expected"),
    [(DROPPING, 1, "dropout"), (tiny_preset(), 2, "ensemble"), (tiny_preset(), 1, "tta")],
)
def test_auto_takes_what_there_is(preset, networks: int, expected: str) -> None:
    nets = [network(i, preset) for i in range(networks)]
    assert choose_passes("auto", preset, nets).name == expected


def test_unknown_passes_are_refused() -> None:
    with pytest.raises(ParameterError, match="auto, tta, ensemble, dropout"):
        choose_passes("guess", DROPPING, [])
