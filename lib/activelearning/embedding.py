"""Embedding of a case as one vector: the pooled tokens of the UNETR's encoder, a by-product of the forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lib.infers.predictor import window_starts
from lib.networks.inference import InferenceNetwork
from lib.networks.placement import Placement
from lib.networks.unetr import Unetr

FloatArray = npt.NDArray[np.float32]
AnyUnetr = Unetr | InferenceNetwork
"""A UNETR for training, or one prepared for inference."""
MOST_WINDOWS = 8
"""Number of windows of an embedding, evenly spaced in larger volumes."""


def embed(network: AnyUnetr, image: torch.Tensor, where: Placement) -> FloatArray:
    """Pool the ViT's last tokens over a preprocessed image.

    Args:
        network: in evaluation mode on ``device``. Random weights give an embedding too: a random projection of the
            image's patches, which distinguishes cases before anything is trained.
        image: shape (1, X, Y, Z), at least as large as the preset's window on every axis.
        where: the preset, the device and the number format.

    Returns:
        Shape (hidden_size,), of length 1, so that distances compare directions.
    """
    starts = tile_starts(image.shape[1:], where.preset.roi_size)
    if len(starts) > MOST_WINDOWS:
        starts = [starts[i] for i in np.linspace(0, len(starts) - 1, MOST_WINDOWS).round().astype(int)]
    pooled = []
    plain = image.as_subclass(torch.Tensor)
    with torch.inference_mode():
        for start in starts:
            window = window_at(plain, start, where.preset.roi_size)[None].to(where.device)
            with where.autocast():
                tokens, _ = network.vit(window)
            pooled.append(tokens.float().mean(dim=1)[0].cpu())
    mean = torch.stack(pooled).mean(dim=0)
    vector: FloatArray = (mean / mean.norm().clamp_min(1e-12)).numpy()
    return vector


def tile_starts(shape: Sequence[int], roi: Sequence[int]) -> list[tuple[int, ...]]:
    """First voxels of windows that cover a volume with the smallest overlap."""
    return list(itertools.product(*(window_starts(size, edge, 0.0) for size, edge in zip(shape, roi, strict=True))))


def window_at(image: torch.Tensor, start: Sequence[int], roi: Sequence[int]) -> torch.Tensor:
    """The window of shape (channels, X, Y, Z) that begins at ``start``."""
    box = [slice(None), *(slice(first, first + edge) for first, edge in zip(start, roi, strict=True))]
    window: torch.Tensor = image[tuple(box)]
    return window
