"""Several predictions for one image: test-time augmentation, an ensemble, or Monte Carlo dropout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from lib.configs.preset import Preset
from lib.errors import ParameterError

PASSES = 4
LARGEST_SHIFT_VOXELS = 4
NOISE_STD = 0.1
"""Standard deviation of the added noise, as a share of the window's own standard deviation."""
INTENSITY_SCALE = 0.15


class Passes(Protocol):
    """Several predictions of the same windows: MC dropout, an ensemble, or test-time augmentation."""

    name: str

    def __call__(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits of each pass, shape (batch, classes, X, Y, Z), for windows of shape (batch, 1, X, Y, Z)."""
        ...


class TestTimeAugmentation:
    """Test-time augmentation (Wang 2019, arXiv 1807.07356): shifts, intensity scaling, noise, flips where allowed.

    A shift alone changes the input of a vision transformer, since the image is divided into other patches.

    Args:
        network: in evaluation mode.
        preset: states along which axes a case may be flipped.
        count: number of passes.
        seed: seed of the changes; the same for every case, so that scores are comparable.
    """

    __test__ = False  # keeps pytest from collecting this class as a test
    name = "tta"

    def __init__(self, network: nn.Module, preset: Preset, count: int = PASSES, seed: int = 0) -> None:
        self._network, self._axes, self._count, self._seed = network, preset.mirror_axes, count, seed

    def __call__(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """See :class:`Passes`."""
        random = torch.Generator().manual_seed(self._seed)
        for number in range(self._count):
            mirrored = [2 + axis for i, axis in enumerate(self._axes) if number >> i & 1]
            high = LARGEST_SHIFT_VOXELS + 1
            shift = torch.randint(-LARGEST_SHIFT_VOXELS, high, (3,), generator=random).tolist()
            scale = 1 + INTENSITY_SCALE * (2 * torch.rand(1, generator=random).item() - 1)
            noise = torch.randn(windows.shape, generator=random).to(windows) * windows.std() * NOISE_STD
            changed = shifted(windows * scale + noise, shift).flip(mirrored)
            logits = self._network(changed.contiguous(memory_format=torch.channels_last_3d))
            yield shifted(logits.float().flip(mirrored), [-step for step in shift])


class Ensemble:
    """Separately trained networks (Lakshminarayanan 2017, arXiv 1612.01474), such as the latest published versions.

    Args:
        networks: at least two, in evaluation mode.

    Raises:
        ParameterError: for fewer than two.
    """

    name = "ensemble"

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        if len(networks) < 2:
            raise ParameterError("passes", self.name, "tta, until there are two published versions to compare")
        self._networks = networks

    def __call__(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """See :class:`Passes`."""
        for network in self._networks:
            yield network(windows).float()


class MonteCarloDropout:
    """Monte Carlo dropout: the same network with active dropout layers (Gal and Ghahramani 2016, arXiv 1506.02142).

    Args:
        network: in evaluation mode, which is restored afterwards.
        preset: the preset.
        count: number of passes.
        seed: seed of the dropped units.

    Raises:
        ParameterError: if the network has no dropout, so that all passes would be equal.
    """

    name = "dropout"

    def __init__(self, network: nn.Module, preset: Preset, count: int = PASSES, seed: int = 0) -> None:
        if not has_dropout(preset):
            raise ParameterError("passes", self.name, f"tta or ensemble: {no_dropout(preset)}")
        self._network, self._count, self._seed = network, count, seed

    def __call__(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """See :class:`Passes`."""
        devices = [windows.device] if windows.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _dropping(self._network):
            torch.manual_seed(self._seed)
            passes = [self._network(windows).float() for _ in range(self._count)]
        yield from passes


def has_dropout(preset: Preset) -> bool:
    """Whether passes with dropout would differ."""
    return preset.network.dropout_rate > 0


def no_dropout(preset: Preset) -> str:
    """The error sentence for Monte Carlo dropout with a network that has no dropout."""
    return f"the network of {preset.name!r} has no dropout (dropout_rate 0), so that all its passes would be the same"


def choose_passes(name: str, preset: Preset, networks: Sequence[nn.Module]) -> Passes:
    """The passes of this name; ``auto``: dropout if the network has it, else an ensemble of two or more, else tta.

    Args:
        name: ``auto``, ``tta``, ``ensemble`` or ``dropout``.
        preset: the preset.
        networks: the live network first, then its predecessors.

    Raises:
        ParameterError: for an unknown name, and for passes that are impossible with this preset.
    """
    if name == "auto":
        name = "dropout" if has_dropout(preset) else "ensemble" if len(networks) > 1 else "tta"
    if name == TestTimeAugmentation.name:
        return TestTimeAugmentation(networks[0], preset)
    if name == Ensemble.name:
        return Ensemble(networks)
    if name == MonteCarloDropout.name:
        return MonteCarloDropout(networks[0], preset)
    raise ParameterError("passes", name, "auto, tta, ensemble, dropout")


def shifted(volume: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
    """Shift the content of (batch, channels, X, Y, Z) by whole voxels; edge voxels are repeated."""
    result = volume
    for axis, step in enumerate(steps, start=2):
        size = result.shape[axis]
        source = (torch.arange(size, device=result.device) - step).clamp(0, size - 1)
        result = result.index_select(axis, source)
    return result


@contextmanager
def _dropping(network: nn.Module) -> Iterator[None]:
    """Set dropout layers to training mode, and leave all other layers unchanged."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Dropout) and not layer.training]
    try:
        for layer in layers:
            layer.train()
        yield
    finally:
        for layer in layers:
            layer.eval()
