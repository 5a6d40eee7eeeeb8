"""Informativeness scores of a case: pure functions of class probabilities, of several passes, and of maps of them.

A *map* holds the model's uncertainty at each voxel; a *region* is the set of voxels over which a map is averaged. All
maps range from 0 (certain) to 1, so that presets with few and with many labels are comparable.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch.nn import functional as F

TOP_PATCHES = 4
PATCH_VOXELS = 16
FOREGROUND_MARGIN_VOXELS = 2


def predictive_entropy(probs_cdhw: torch.Tensor) -> torch.Tensor:
    """Entropy of each voxel's class probabilities (Shannon 1948), divided by its largest possible value.

    Args:
        probs_cdhw: probabilities, shape (classes, ...), at least two classes.

    Returns:
        Shape (...), 0 to 1.
    """
    entropy: torch.Tensor = torch.special.entr(probs_cdhw).sum(dim=0) / math.log(len(probs_cdhw))
    return entropy


def mutual_information(passes: torch.Tensor) -> torch.Tensor:
    """Mutual information between prediction and model (BALD, Houlsby 2011, arXiv 1112.5745).

    It is the entropy of the mean prediction minus the mean entropy of the passes: high where the passes are confident
    of different classes, near 0 where all passes are equally uncertain, as along a blurred edge.

    Args:
        passes: probabilities, shape (passes, classes, ...).

    Returns:
        Shape (...), 0 to 1.
    """
    entropies = torch.stack([predictive_entropy(probs) for probs in passes])
    return (predictive_entropy(passes.mean(dim=0)) - entropies.mean(dim=0)).clamp_min(0)


def margin(probs_cdhw: torch.Tensor) -> torch.Tensor:
    """Margin uncertainty (Scheffer 2001): 1 minus the difference between the two largest class probabilities.

    Args:
        probs_cdhw: probabilities, shape (classes, ...), at least two classes.

    Returns:
        Shape (...), 0 to 1.
    """
    first, second = probs_cdhw.topk(2, dim=0).values
    closeness: torch.Tensor = 1 - (first - second)
    return closeness


def pairwise_dice_disagreement(labels: torch.Tensor, classes: int) -> float:
    """Disagreement between the masks of several passes (Nath 2020, arXiv 2101.02323).

    It is 1 minus the mean Dice over all pairs of passes and all labels that are present in either mask of a pair.

    Args:
        labels: label values, shape (passes, ...), at least two passes.
        classes: number of classes including the background, which is not counted.

    Returns:
        0 to 1; 0 where no pass has any label.
    """
    masks = F.one_hot(labels.long().flatten(1), classes)[..., 1:].float()  # (passes, voxels, labels)
    sizes = masks.sum(dim=1)
    disagreements = []
    for a, b in itertools.combinations(range(len(masks)), 2):
        total = sizes[a] + sizes[b]
        dice = 2 * (masks[a] * masks[b]).sum(dim=0) / total.clamp_min(1)
        disagreements.append((1 - dice)[total > 0])
    values = torch.cat(disagreements)
    return float(values.mean()) if values.numel() else 0.0


def class_entropy_sums(probs_cdhw: torch.Tensor) -> torch.Tensor:
    """The sums from which :func:`class_balanced_entropy` is computed; sums of several windows can be added.

    Args:
        probs_cdhw: probabilities, shape (classes, ...).

    Returns:
        Shape (2, classes): the sums over all voxels of entropy x p(class), and of p(class).
    """
    flat = probs_cdhw.flatten(1)
    return torch.stack([(flat * predictive_entropy(flat)).sum(dim=1), flat.sum(dim=1)])


def class_balanced_entropy(sums: torch.Tensor) -> float:
    """Mean over the labels of the entropy within each label, so that small organs count as much as large ones.

    A label's score is the mean entropy of the voxels, weighted with that label's probability, after the
    class-stratified queries of ClaSP PE (Lüth 2026, arXiv 2601.13677).

    Args:
        sums: result of :func:`class_entropy_sums`; background is not counted.

    Returns:
        0 to 1; 0 where no label has any probability.
    """
    weighted, mass = sums[:, 1:]
    per_label = weighted[mass > 0] / mass[mass > 0]
    return float(per_label.mean()) if per_label.numel() else 0.0


def mean_over_volume(uncertainty: torch.Tensor) -> float:
    """Mean of a map, shape (X, Y, Z)."""
    return float(uncertainty.mean())


def mean_over_foreground(uncertainty: torch.Tensor, region: torch.Tensor) -> float:
    """Mean of a map over a region; over the whole volume where the region is empty.

    Most of a volume is background with almost no uncertainty, so that the mean over the volume depends on the size of
    the image more than on the difficulty of the case.

    Args:
        uncertainty: shape (X, Y, Z).
        region: result of :func:`foreground_region`.
    """
    inside = uncertainty[region]
    return float(inside.mean()) if inside.numel() else mean_over_volume(uncertainty)


def foreground_region(labels: torch.Tensor, margin_voxels: int = FOREGROUND_MARGIN_VOXELS) -> torch.Tensor:
    """The predicted foreground with a margin, because missed parts usually lie just outside of the predicted mask.

    Args:
        labels: label values, shape (X, Y, Z).
        margin_voxels: width of the margin along each axis.

    Returns:
        Booleans of shape (X, Y, Z).
    """
    mask = (labels > 0)[None, None].float()
    width = 2 * margin_voxels + 1
    return F.max_pool3d(mask, width, stride=1, padding=margin_voxels)[0, 0] > 0


def top_k_patches(uncertainty: torch.Tensor, k: int = TOP_PATCHES, patch_voxels: int = PATCH_VOXELS) -> float:
    """Mean of the ``k`` most uncertain cubes, so that one difficult place counts, however large the volume is.

    Args:
        uncertainty: map of shape (X, Y, Z).
        k: number of cubes; all cubes if there are fewer.
        patch_voxels: edge length of a cube in voxels. Cubes at the far edges may be smaller.
    """
    means = F.avg_pool3d(uncertainty[None, None], patch_voxels, ceil_mode=True, count_include_pad=False).flatten()
    return float(means.topk(min(k, means.numel())).values.mean())
