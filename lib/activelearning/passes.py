"""Several opinions on one image: test-time augmentation, an ensemble, or dropout left on."""

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
"""Of the noise that is added, as a share of the window's own deviation."""
INTENSITY_SCALE = 0.15


class Passes(Protocol):
    """Several predictions of the same windows: MC dropout, an ensemble, or test-time augmentation."""

    name: str

    def __call__(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits of each pass, shape (batch, classes, X, Y, Z), for windows of shape (batch, 1, X, Y, Z)."""
        ...


class TestTimeAugmentation:
    """Test-time augmentation (Wang 2019, arXiv 1807.07356): shifts, intensity scaling, noise, mirroring where allowed.

    A shift alone changes what a vision transformer sees, since the image is cut into patches at other places.

    Args:
        network: in evaluation mode.
        preset: says along which axes a case may be mirrored.
        count: number of passes.
        seed: of the changes; the same for every case, so that cases compare.
    """

    __test__ = False  # not a test, whatever pytest thinks of the name
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
    """Networks that were trained apart (Lakshminarayanan 2017, arXiv 1612.01474), such as the last published versions.

    Args:
        networks: at least two, in evaluation mode.

    Raises:
        ParameterError: for fewer.
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
    """The same network with its dropout left on (Gal and Ghahramani 2016, arXiv 1506.02142).

    Args:
        network: in evaluation mode; it is left so.
        preset: the task.
        count: number of passes.
        seed: of the units that are dropped.

    Raises:
        ParameterError: when the network has no dropout: its passes would all be the same.
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
    """The sentence with which MC dropout is refused for a network that has no dropout."""
    return f"the network of {preset.name!r} has no dropout (dropout_rate 0), so that all its passes would be the same"


def choose_passes(name: str, preset: Preset, networks: Sequence[nn.Module]) -> Passes:
    """The passes of that name; ``auto``: dropout where there is any, else an ensemble of two or more, else tta.

    Args:
        name: ``auto``, ``tta``, ``ensemble`` or ``dropout``.
        preset: the task.
        networks: the one in use first, then those before it.

    Raises:
        ParameterError: for another name, and for passes that this preset cannot make.
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
    """Move the content of (batch, channels, X, Y, Z) by whole voxels; what comes in repeats the edge."""
    result = volume
    for axis, step in enumerate(steps, start=2):
        size = result.shape[axis]
        source = (torch.arange(size, device=result.device) - step).clamp(0, size - 1)
        result = result.index_select(axis, source)
    return result


@contextmanager
def _dropping(network: nn.Module) -> Iterator[None]:
    """Dropout layers as in training; everything else as it is."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Dropout) and not layer.training]
    try:
        for layer in layers:
            layer.train()
        yield
    finally:
        for layer in layers:
            layer.eval()
