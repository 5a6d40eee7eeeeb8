"""The editor network, which corrects the mask of one structure from the image, the mask and the prompts.

It processes one structure at a time, so that its cost does not grow with the number of labels, and so that it can
segment structures that it was not trained on. Its output is added to the logit of the mask. Prompts are encoded as maps
that decay with the distance to the nearest prompt, as in DeepIGeoS (Wang et al. 2018, arXiv 1707.00652). The network is
a convolutional U-Net (as in nnU-Net, Isensee et al. 2021), so that a click has an effect at every scale.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.networks.nets import DynUNet
from scipy import ndimage
from torch import nn

from lib.errors import CheckpointError
from lib.networks.checkpoint import load_weights, read_data
from lib.networks.precision import autocast, place_for_training, resolve_precision
from lib.storage.files import replacing, sha256_of
from lib.storage.full_disk import writing
from lib.transforms.volume import FloatArray

MaskArray = npt.NDArray[np.bool_]
Points = npt.NDArray[np.int64]
Window = tuple[int, int, int]

CHANNELS = 4
"""Image, mask, positive prompts, negative prompts."""
FALL_OFF_VOXELS = 3.0
"""Distance from a prompt at which its map has fallen to 1/e."""
MASK_LOGIT = 2.0
"""Absolute logit of the mask before the network's output is added."""
MARGIN_VOXELS = 8
"""A prompt that is nearer than this to a side of a window gets a window of its own."""
BYTES_A_WINDOW_VOXEL, BYTES_A_PADDED_VOXEL, BYTES_A_VOXEL = 420, 24, 13
"""Measured for the shipped design in bf16, for the network, and counted, for the arrays around it."""
FORMAT = "unetr_radiology_editor/1"
ZOOMS = (1, 2)
"""Voxels of the volume for each voxel of the window along each axis, in the order in which they are tried."""


@dataclass(frozen=True)
class EditorDesign:
    """The architecture of an editor network.

    Attributes:
        filters: number of feature maps at each scale; each scale has half the resolution of the one before.
        window: largest input of the network, in voxels.
    """

    filters: tuple[int, ...] = (16, 32, 64, 128)
    window: Window = (48, 48, 48)

    def __post_init__(self) -> None:
        if len(self.filters) < 3 or min(self.filters) < 1 or any(size % self.step for size in self.window):
            raise CheckpointError(f"an editor of {self.filters} filters cannot see windows of {self.window} voxels")

    @property
    def step(self) -> int:
        """The number of voxels of which each side of a window must be a multiple."""
        return int(2 ** (len(self.filters) - 1))


@dataclass(frozen=True)
class EditorWeights:
    """The weights of an editor network and their description.

    Attributes:
        model: state dict.
        design: architecture of the network.
        presets: presets for which clicks scored better with these weights than by region growing; empty for all.
        info: plain data about the training.
    """

    model: Mapping[str, torch.Tensor]
    design: EditorDesign
    presets: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


def build_editor(design: EditorDesign) -> nn.Module:
    """An editor network with random weights.

    Its input has shape (batch, 4, X, Y, Z); its output has shape (batch, 1, X, Y, Z) and is added to the mask's logit.
    """
    scales = len(design.filters)
    strides = [1] + [2] * (scales - 1)
    return DynUNet(
        3, CHANNELS, 1, [3] * scales, strides, strides[1:], filters=list(design.filters),
        norm_name=("INSTANCE", {"affine": True}),
    )  # fmt: skip


def write_editor(path: Path, weights: EditorWeights) -> None:
    """Write the weights of an editor in half precision; the file is replaced atomically.

    Raises:
        StorageError: if the file cannot be written.
    """
    state = {k: v.detach().cpu().half() if v.is_floating_point() else v.cpu() for k, v in weights.model.items()}
    data = {"format": FORMAT, "design": asdict(weights.design), "model": state, "info": dict(weights.info)}
    data["presets"] = list(weights.presets)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(f"editor {path.name!r}"), replacing(path, durable=True) as file:
        torch.save(data, file)


def read_editor(path: Path) -> EditorWeights:
    """Read an editor's weights.

    Raises:
        CheckpointError: when the file is missing, damaged, or holds no editor.
    """
    data = read_data(path)
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path.name!r} holds no editor; valid: a file of format {FORMAT!r}")
    try:
        x, y, z = (int(size) for size in data["design"]["window"])
        design = EditorDesign(tuple(int(n) for n in data["design"]["filters"]), (x, y, z))
        presets = tuple(str(name) for name in data["presets"])
        return EditorWeights({k: v.float() for k, v in data["model"].items()}, design, presets, data.get("info", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path.name!r} holds no editor that can be used: {error!r}") from error


def prompt_map(points: Points, shape: Sequence[int]) -> FloatArray:
    """An encoding of points: 1 at each point, decaying with the distance in voxels; all 0 without points.

    Args:
        points: voxels, shape (n, 3); points outside of the map are ignored.
        shape: shape of the map.
    """
    inside = points[np.all((points >= 0) & (points < np.array(shape)), axis=1)]
    if not len(inside):
        return np.zeros(shape, dtype=np.float32)
    away = np.ones(shape, dtype=bool)
    away[tuple(inside.T)] = False
    distance: FloatArray = ndimage.distance_transform_edt(away)
    falling: FloatArray = np.exp(-distance / FALL_OFF_VOXELS).astype(np.float32)
    return falling


def stack_input(image: FloatArray, mask: MaskArray, positive: Points, negative: Points) -> FloatArray:
    """The network's input, shape (4, X, Y, Z), for an image and a mask of shape (X, Y, Z)."""
    maps = [prompt_map(points, image.shape) for points in (positive, negative)]
    return np.stack([image.astype(np.float32), mask.astype(np.float32) * 2 - 1, *maps])


def structure_logit(network: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """The logit of the structure, shape (batch, X, Y, Z), for inputs of shape (batch, 4, X, Y, Z)."""
    added: torch.Tensor = network(given)[:, 0].float()
    return added + MASK_LOGIT * given[:, 1]


class Editor:
    """Corrects masks with one editor network.

    Args:
        network: a network from :func:`build_editor`.
        design: its architecture.
        device: the device on which it computes.
    """

    def __init__(self, network: nn.Module, design: EditorDesign, device: torch.device) -> None:
        place_for_training(network, device)
        self.network, self.design, self.device = network.eval(), design, device
        self.dtype = resolve_precision("auto", device)

    @classmethod
    def from_file(cls, path: Path, device: torch.device) -> Editor:
        """Read an editor's weights.

        Raises:
            CheckpointError: when the file is damaged, or holds no editor.
        """
        return cls.from_weights(read_editor(path), device)

    @classmethod
    def from_weights(cls, weights: EditorWeights, device: torch.device) -> Editor:
        """Build an editor from weights.

        Raises:
            CheckpointError: if the weights do not match their design.
        """
        network = build_editor(weights.design)
        load_weights(network, weights.model)
        return cls(network, weights.design, device)

    def bytes_for(self, shape: Sequence[int]) -> int:
        """Peak memory of :meth:`probability` for a volume: a window in the network, a zoomed one, and the sums."""
        window = math.prod(self.design.window)
        widest = min(max(ZOOMS) ** 3 * window, math.prod(shape))
        return BYTES_A_WINDOW_VOXEL * window + BYTES_A_PADDED_VOXEL * widest + BYTES_A_VOXEL * math.prod(shape)

    def probability(self, image: FloatArray, mask: MaskArray, positive: Points, negative: Points) -> FloatArray:
        """The probability of each voxel to belong to the structure; outside of all windows, 1 and 0 as in the mask.

        Args:
            image: shape (X, Y, Z), with the preset's intensities.
            mask: the structure before the correction.
            positive, negative: voxels of the prompts, shape (n, 3).
        """
        total, weight = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.float32)
        # A negative prompt outside of the structure has no effect by itself, so it needs no window of its own.
        waiting = np.concatenate([positive, negative[mask[tuple(negative.T)]]])
        while len(waiting):
            box, predicted, sure = self._predict_window(image, mask, positive, negative, waiting[0])
            total[box] += predicted * sure
            weight[box] += sure
            waiting = waiting[~_well_inside(waiting, box, mask.shape)]
        return np.where(weight > 0, total / np.maximum(weight, 1e-6), mask).astype(np.float32)

    def _predict_window(
        self, image: FloatArray, mask: MaskArray, positive: Points, negative: Points, centre: Points
    ) -> tuple[tuple[slice, ...], FloatArray, FloatArray]:
        """One window around ``centre``, enlarged while the change touches its border: its box, output and weight."""
        kept: tuple[tuple[slice, ...], FloatArray, FloatArray] | None = None
        for zoom in ZOOMS:
            box = _window(centre, [size * zoom for size in self.design.window], mask.shape)
            probability = self._infer(
                image[box], mask[box], *(p - [part.start for part in box] for p in (positive, negative))
            )
            sure = np.full(probability.shape, zoom**-3.0, np.float32)
            if kept is not None:  # the wider window only adds the surroundings
                inner = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(kept[0], box, strict=True))
                probability[inner], sure[inner] = kept[1], kept[2]
            kept = box, probability, sure
            if not _touches_border((probability > 0.5) != mask[box], box, mask.shape):
                break
        assert kept is not None
        return kept

    def _infer(self, image: FloatArray, mask: MaskArray, positive: Points, negative: Points) -> FloatArray:
        """Apply the network to a part of a volume, which is resampled if it is larger than the window."""
        factor = int(max(1, np.ceil(np.max(np.array(image.shape) / self.design.window))))
        step = factor * self.design.step
        spare = [(0, -n % step) for n in image.shape]
        padded, drawn = np.pad(image, spare, mode="edge"), np.pad(mask.astype(np.float32), spare)
        tensors = torch.from_numpy(np.stack([padded, drawn]).astype(np.float32))[None]
        if factor > 1:
            tensors = nn.functional.avg_pool3d(tensors, factor)
        small = tensors[0].numpy()
        given = stack_input(small[0], small[1] > 0.5, positive // factor, negative // factor)
        with torch.inference_mode(), autocast(self.device, self.dtype):
            logit = structure_logit(self.network, torch.from_numpy(given)[None].to(self.device))[None]
        if factor > 1:
            logit = nn.functional.interpolate(logit, size=padded.shape, mode="trilinear")
        probability: FloatArray = torch.sigmoid(logit[0, 0].float()).cpu().numpy()
        return probability[tuple(slice(0, n) for n in image.shape)].copy()


class SharedEditor:
    """An editor that is read from its file on first use.

    Args:
        path: file of its weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._read: tuple[str, EditorWeights] | None = None
        self._editors: dict[str, Editor] = {}

    @classmethod
    def if_there(cls, path: Path) -> SharedEditor | None:
        """The editor of a file; None if the file does not exist."""
        return cls(path) if path.is_file() else None

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights' file, computed when the file was read.

        Raises:
            CheckpointError: when the file is damaged, or holds no editor.
        """
        with self._lock:
            return self._weights()[0]

    def serves(self, preset: str) -> bool:
        """Whether this editor is used for clicks on masks of a preset.

        Raises:
            CheckpointError: when the file is damaged, or holds no editor.
        """
        with self._lock:
            presets = self._weights()[1].presets
        return not presets or preset in presets

    def on(self, device: torch.device) -> Editor:
        """The editor on a device.

        Raises:
            CheckpointError: when the file is damaged, or holds no editor.
        """
        with self._lock:
            if str(device) not in self._editors:
                self._editors[str(device)] = Editor.from_weights(self._weights()[1], device)
            return self._editors[str(device)]

    def _weights(self) -> tuple[str, EditorWeights]:
        if self._read is None:
            weights = read_editor(self.path)
            self._read = sha256_of(self.path), weights
        return self._read


def _window(centre: Points, size: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """A box of at most ``size`` around ``centre`` that lies inside the volume."""
    starts = [int(np.clip(c - s // 2, 0, max(0, n - s))) for c, s, n in zip(centre, size, shape, strict=True)]
    return tuple(slice(a, min(a + s, n)) for a, s, n in zip(starts, size, shape, strict=True))


def _well_inside(points: Points, box: Sequence[slice], shape: Sequence[int]) -> MaskArray:
    """Which points lie in a window and at least the margin away from its sides."""
    inside = np.ones(len(points), dtype=bool)
    for axis, (part, size) in enumerate(zip(box, shape, strict=True)):
        margin = min(MARGIN_VOXELS, (part.stop - part.start) // 4)
        low = part.start + (margin if part.start > 0 else 0)
        high = part.stop - (margin if part.stop < size else 0)
        inside &= (points[:, axis] >= low) & (points[:, axis] < high)
    return inside


def _touches_border(changed: MaskArray, box: Sequence[slice], shape: Sequence[int]) -> bool:
    """Whether a change reaches a side of the window that is not a side of the volume."""
    for axis, (part, size) in enumerate(zip(box, shape, strict=True)):
        side = np.moveaxis(changed, axis, 0)
        if (part.start > 0 and side[0].any()) or (part.stop < size and side[-1].any()):
            return True
    return False
