"""The editor network: a UNETR that is shown an image, one structure's mask and the prompts, and corrects that mask.

It sees one structure at a time, so that its cost does not grow with the labels of a preset, and so that a structure
that nobody has trained can be drawn. It predicts what is to be added to the mask's own logit: untrained, it gives the
mask back. Prompts are maps that fall off with the distance to the nearest prompt, as in DeepIGeoS (Wang et al. 2018,
arXiv 1707.00652).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import nn

from lib.configs.preset import Preset
from lib.errors import CheckpointError
from lib.networks.checkpoint import Checkpoint, load_weights, read_checkpoint
from lib.networks.precision import autocast, place, resolve_precision
from lib.networks.unetr import build_unetr
from lib.transforms.volume import FloatArray

MaskArray = npt.NDArray[np.bool_]
Points = npt.NDArray[np.int64]
Window = tuple[int, int, int]

CHANNELS = 4
"""Image, mask, positive prompts, negative prompts."""
STRUCTURE = "structure"
FALL_OFF_VOXELS = 3.0
"""At this distance from a prompt its map has fallen to 1/e."""
MASK_LOGIT = 2.0
"""How sure the mask counts before anything is added."""
ZOOMS = (1, 2)
"""Voxels of the volume that one voxel of the window spans on each axis, in the order in which they are tried."""


def build_editor(preset: Preset) -> nn.Module:
    """An editor of the size of ``preset``'s network, with random weights but for its last layer, which gives 0.

    Its input is (batch, 4, *``preset.roi_size``), its output (batch, 2, *roi), of which the second less the first is
    added to the mask's logit.
    """
    network = build_unetr(editor_preset(preset), in_channels=CHANNELS)
    for parameter in network.out.parameters():
        nn.init.zeros_(parameter)
    return network


def editor_preset(preset: Preset) -> Preset:
    """``preset`` with one label, the structure that is corrected."""
    return preset if [label.name for label in preset.labels] == [STRUCTURE] else preset.with_labels([STRUCTURE])


def start_from(network: nn.Module, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Copy a preset's weights where they fit; channels that the preset's network does not have begin at 0.

    Returns:
        Names of what was not copied.
    """
    own, left = network.state_dict(), []
    for name, value in own.items():
        given = weights.get(name)
        if name.startswith("out.") or given is None:
            left.append(name)
        elif given.shape == value.shape:
            value.copy_(given)
        elif given.ndim == 5 and given.shape[1] == 1 and value.shape == (given.shape[0], CHANNELS, *given.shape[2:]):
            value.zero_()
            value[:, :1] = given
        elif given.ndim == 2 and value.shape == (given.shape[0], CHANNELS * given.shape[1]):
            value.zero_()  # patches as rows, in which the channels of a voxel follow one another
            value[:, ::CHANNELS] = given
        else:
            left.append(name)
    return left


def prompt_map(points: Points, shape: Sequence[int]) -> FloatArray:
    """1 at the points, falling off with the distance in voxels; 0 everywhere without points.

    Args:
        points: voxels, shape (n, 3); those outside of the map are left out.
        shape: of the map.
    """
    inside = points[np.all((points >= 0) & (points < np.array(shape)), axis=1)]
    if not len(inside):
        return np.zeros(shape, dtype=np.float32)
    away = np.ones(shape, dtype=bool)
    away[tuple(inside.T)] = False
    distance: FloatArray = ndimage.distance_transform_edt(away)
    falling: FloatArray = np.exp(-distance / FALL_OFF_VOXELS).astype(np.float32)
    return falling


def stack_input(image: FloatArray, mask: FloatArray, positive: Points, negative: Points) -> FloatArray:
    """The network's input, (4, X, Y, Z), of an image and a mask of shape (X, Y, Z)."""
    maps = [prompt_map(points, image.shape) for points in (positive, negative)]
    return np.stack([image.astype(np.float32), mask.astype(np.float32) * 2 - 1, *maps])


def structure_logit(network: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """The logit of the structure, (batch, X, Y, Z), for inputs of (batch, 4, X, Y, Z)."""
    output = network(given)
    added: torch.Tensor = output[:, 1].float() - output[:, 0].float()
    return added + MASK_LOGIT * given[:, 1]


class Editor:
    """Corrects masks with one network.

    Args:
        network: of :func:`build_editor`.
        preset: whose window it sees.
        device: where it computes.
    """

    def __init__(self, network: nn.Module, preset: Preset, device: torch.device) -> None:
        self.network, self.window, self.device = place(network, device).eval(), preset.roi_size, device
        self.dtype = resolve_precision("auto", device)

    @classmethod
    def from_file(cls, path: Path, device: torch.device) -> Editor:
        """Read an editor's checkpoint.

        Raises:
            CheckpointError: when it is damaged, or holds no editor.
        """
        return cls.from_checkpoint(read_checkpoint(path), device, path.name)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, device: torch.device, name: str = "editor") -> Editor:
        """An editor with the weights of ``checkpoint``.

        Raises:
            CheckpointError: when they are no editor's.
        """
        if checkpoint.preset is None or [label.name for label in checkpoint.preset.labels] != [STRUCTURE]:
            raise CheckpointError(f"checkpoint {name!r} holds no editor; valid: one with the label {STRUCTURE!r} alone")
        network = build_editor(checkpoint.preset)
        load_weights(network, {key: value.float() for key, value in checkpoint.model.items()})
        return cls(network, checkpoint.preset, device)

    def probability(self, image: FloatArray, mask: MaskArray, positive: Points, negative: Points) -> FloatArray:
        """How likely each voxel belongs to the structure; 1 and 0, as in the mask, where no window lies.

        Args:
            image: shape (X, Y, Z), with the preset's intensities.
            mask: of the structure, as it is.
            positive, negative: prompts, voxels of shape (n, 3).
        """
        result = mask.astype(np.float32)
        waiting = np.concatenate([positive, negative])
        while len(waiting):
            box, found = self._look(image, mask, positive, negative, waiting[0])
            result[box] = found
            low, high = np.array([part.start for part in box]), np.array([part.stop for part in box])
            waiting = waiting[~np.all((waiting >= low) & (waiting < high), axis=1)]
        return result

    def _look(
        self, image: FloatArray, mask: MaskArray, positive: Points, negative: Points, centre: Points
    ) -> tuple[tuple[slice, ...], FloatArray]:
        """One window around ``centre``, wider while the change touches its border: where it lies and what it gives."""
        kept: tuple[tuple[slice, ...], FloatArray] | None = None
        for zoom in ZOOMS:
            box = _window(centre, [size * zoom for size in self.window], mask.shape)
            found = self._infer(
                image[box], mask[box], *(p - [part.start for part in box] for p in (positive, negative))
            )
            if kept is not None:  # the window at full resolution is right inside; the wider one adds what lies around
                inner = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(kept[0], box, strict=True))
                found[inner] = kept[1]
            kept = box, found
            if not _touches_border((found > 0.5) != mask[box], box, mask.shape):
                break
        assert kept is not None
        return kept

    def _infer(self, image: FloatArray, mask: MaskArray, positive: Points, negative: Points) -> FloatArray:
        """The network on a part of a volume that is at most as large as the window, or is made as small."""
        factor = np.maximum(1, np.ceil(np.array(image.shape) / self.window)).astype(int)
        spare = [(0, int(size * f - n)) for size, f, n in zip(self.window, factor, image.shape, strict=True)]
        padded, drawn = np.pad(image, spare, mode="edge"), np.pad(mask.astype(np.float32), spare)
        tensors = torch.from_numpy(np.stack([padded, drawn]).astype(np.float32))[None]
        if (factor > 1).any():
            tensors = nn.functional.avg_pool3d(tensors, tuple(int(f) for f in factor))
        small = tensors[0].numpy()
        given = stack_input(small[0], small[1], positive // factor, negative // factor)
        with torch.inference_mode(), autocast(self.device, self.dtype):
            logit = structure_logit(self.network, torch.from_numpy(given)[None].to(self.device))[None]
        if (factor > 1).any():
            logit = nn.functional.interpolate(logit, size=padded.shape, mode="trilinear")
        found: FloatArray = torch.sigmoid(logit[0, 0].float()).cpu().numpy()
        return found[tuple(slice(0, n) for n in image.shape)].copy()


class SharedEditor:
    """An editor that is read from its file when it is first needed.

    Args:
        path: its checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._editors: dict[str, Editor] = {}

    @classmethod
    def if_there(cls, path: Path) -> SharedEditor | None:
        """The editor of that file; None where there is none."""
        return cls(path) if path.is_file() else None

    def on(self, device: torch.device) -> Editor:
        """The editor on a device.

        Raises:
            CheckpointError: when the file is damaged, or holds no editor.
        """
        with self._lock:
            if str(device) not in self._editors:
                self._editors[str(device)] = Editor.from_file(self.path, device)
            return self._editors[str(device)]


def _window(centre: Points, size: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """A part of at most ``size`` around ``centre`` that lies in the volume."""
    starts = [int(np.clip(c - s // 2, 0, max(0, n - s))) for c, s, n in zip(centre, size, shape, strict=True)]
    return tuple(slice(a, min(a + s, n)) for a, s, n in zip(starts, size, shape, strict=True))


def _touches_border(changed: MaskArray, box: Sequence[slice], shape: Sequence[int]) -> bool:
    """Whether a change reaches a side of the window that is not the volume's own."""
    for axis, (part, size) in enumerate(zip(box, shape, strict=True)):
        side = np.moveaxis(changed, axis, 0)
        if (part.start > 0 and side[0].any()) or (part.stop < size and side[-1].any()):
            return True
    return False
