"""All scores of one case, which the background scoring stores and the simulation uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from lib.activelearning import scores
from lib.activelearning.embedding import AnyUnetr, FloatArray, embed, tile_starts, window_at
from lib.activelearning.passes import Passes
from lib.networks.placement import Placement

REGIONS = ("foreground", "volume", "patches")
MAP_MEASURES = ("entropy", "margin", "bald")
"""Measures that are voxel maps, averaged over each region."""
CASE_MEASURES = ("class_balanced_entropy", "dice_disagreement")
"""Measures that are one number for the whole case."""
MEASURES = (*MAP_MEASURES, *CASE_MEASURES)
NEED_PASSES = ("bald", "dice_disagreement")
MOST_WINDOWS_FOR_PASSES = 8
"""Number of windows with several passes: those with the highest uncertainty in the foreground."""


@dataclass(frozen=True)
class CaseScores:
    """A model's scores of an unlabelled case.

    Attributes:
        values: ``measure/region`` for map measures, ``measure`` for the others.
        foreground_voxels: voxels predicted to be any label, at the preset's spacing.
        embedding: shape (hidden_size,).
    """

    values: Mapping[str, float] = field(default_factory=dict)
    foreground_voxels: float = float("nan")
    embedding: FloatArray | None = None


def score_name(measure: str, region: str) -> str:
    """The key under which a measure is stored.

    >>> score_name("entropy", "foreground"), score_name("dice_disagreement", "foreground")
    ('entropy/foreground', 'dice_disagreement')
    """
    return f"{measure}/{region}" if measure in MAP_MEASURES else measure


def score_case(
    network: AnyUnetr,
    image: torch.Tensor,
    where: Placement,
    passes: Passes | None = None,
) -> CaseScores:
    """Score a preprocessed image.

    Windows do not overlap, and only a few of them are computed in several passes, because the scores rank a pool of
    thousands of cases, for which an approximate mask is sufficient.

    Args:
        network: in evaluation mode on ``device``.
        image: shape (1, X, Y, Z), at least as large as the preset's window on every axis.
        where: the preset, the device and the number format.
        passes: for the measures that compare several predictions; without passes, these measures are omitted.
    """
    windows = _WindowScores(network, image, where)
    windows.once()
    if passes is not None:
        windows.again(passes)
    embedding = embed(network, image, where)
    return CaseScores(windows.values(), float(int((windows.labels > 0).sum())), embedding)


class _WindowScores:
    """Uncertainty maps of one case, computed window by window."""

    def __init__(self, network: AnyUnetr, image: torch.Tensor, where: Placement) -> None:
        self._network, self._where, preset = network, where, where.preset
        self._image = image.as_subclass(torch.Tensor)
        shape = tuple(image.shape[1:])
        self._tiles = [_Tile(start, preset.roi_size) for start in tile_starts(shape, preset.roi_size)]
        self._settle_overlaps()
        self.labels = torch.zeros(shape, dtype=torch.uint8)
        self._maps = {name: torch.zeros(shape) for name in ("entropy", "margin")}
        self._class_sums = torch.zeros(2, preset.out_channels)
        self._interest: list[float] = []
        self._disagreement = float("nan")
        self._seen_again: torch.Tensor | None = None

    def once(self) -> None:
        """Compute the labels and the maps that one forward pass for each window gives: entropy and margin."""
        for tile in self._tiles:
            with torch.inference_mode(), self._where.autocast():
                logits = self._network(self._window(tile))
            probs = torch.softmax(logits[0].float(), dim=0)[tile.own(1)]
            entropy = scores.predictive_entropy(probs)
            self._maps["entropy"][tile.place] = entropy.cpu()
            self._maps["margin"][tile.place] = scores.margin(probs).cpu()
            self.labels[tile.place] = probs.argmax(dim=0).to(torch.uint8).cpu()
            self._class_sums += scores.class_entropy_sums(probs).cpu()
            self._interest.append(float((entropy * (1 - probs[0])).sum()))

    def again(self, passes: Passes) -> None:
        """Compute the maps that need several passes (BALD), in the windows with the most uncertain foreground."""
        order = np.argsort(self._interest)[::-1][:MOST_WINDOWS_FOR_PASSES]
        self._maps["bald"] = torch.zeros(self.labels.shape)
        self._seen_again = torch.zeros(self.labels.shape, dtype=torch.bool)
        votes = []
        for tile in (self._tiles[i] for i in order):
            with torch.inference_mode(), self._where.autocast():
                logits = torch.stack([one[0] for one in passes(self._window(tile))])
            probs = torch.softmax(logits.float(), dim=1)[tile.own(2)]
            self._maps["bald"][tile.place] = scores.mutual_information(probs).cpu()
            self._seen_again[tile.place] = True
            votes.append(probs.argmax(dim=1).flatten(1).cpu())
        self._disagreement = scores.pairwise_dice_disagreement(torch.cat(votes, dim=1), self._where.preset.out_channels)

    def values(self) -> dict[str, float]:
        """Mean of each uncertainty map over each region, named by :func:`score_name`, and scores of the whole case."""
        region = scores.foreground_region(self.labels)
        values = {"class_balanced_entropy": scores.class_balanced_entropy(self._class_sums)}
        for name, uncertainty in self._maps.items():
            seen = region if name != "bald" or self._seen_again is None else region & self._seen_again
            values[score_name(name, "foreground")] = scores.mean_over_foreground(uncertainty, seen)
            values[score_name(name, "volume")] = scores.mean_over_volume(uncertainty)
            values[score_name(name, "patches")] = scores.top_k_patches(uncertainty)
        if self._seen_again is not None:
            values["dice_disagreement"] = self._disagreement
        return values

    def _window(self, tile: _Tile) -> torch.Tensor:
        window = window_at(self._image, tile.start, self._where.preset.roi_size)[None].to(self._where.device)
        return window.contiguous(memory_format=torch.channels_last_3d)

    def _settle_overlaps(self) -> None:
        """Count each voxel in only one window, since the last window of an axis overlaps the one before it."""
        edges = [sorted({tile.start[axis] for tile in self._tiles}) for axis in range(3)]
        for tile in self._tiles:
            for axis, roi in enumerate(self._where.preset.roi_size):
                position = edges[axis].index(tile.start[axis])
                if position:
                    tile.skip[axis] = max(0, edges[axis][position - 1] + roi - tile.start[axis])


class _Tile:
    """A window, and the part of it that no other window counts."""

    def __init__(self, start: tuple[int, ...], roi: tuple[int, ...]) -> None:
        self.start, self._roi, self.skip = start, roi, [0, 0, 0]

    def own(self, leading: int) -> tuple[slice, ...]:
        """The voxels of the window that no other window counts, as slices after ``leading`` axes, such as channels."""
        return (slice(None),) * leading + tuple(slice(skipped, None) for skipped in self.skip)

    @property
    def place(self) -> tuple[slice, ...]:
        """The same voxels, as slices of the volume."""
        axes = zip(self.start, self.skip, self._roi, strict=True)
        return tuple(slice(first + skipped, first + edge) for first, skipped, edge in axes)
