"""Loss, optimiser, learning-rate schedule and weight averaging of the training recipe."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from monai.losses import DiceCELoss
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lib.configs.preset import Training

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]

# Gives a probability of exactly 0 in float32; infinity would give NaN when multiplied by 0.
LOWEST_LOGIT = -1e4


def build_loss(recipe: Training) -> nn.Module:
    """Dice and cross-entropy of logits (batch, classes, ...) against label values (batch, 1, ...).

    The Dice of the labels (without background) is computed over the whole batch, so that a crop without a small organ
    does not count as a missed organ.
    """
    return DiceCELoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=True,
        lambda_dice=recipe.dice_weight,
        lambda_ce=recipe.cross_entropy_weight,
    )


def leave_out_missing(
    logits: torch.Tensor, label: torch.Tensor, missing: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exclude classes that a label does not annotate from the loss.

    Missing classes and background are merged into one class, since a background voxel of the label may be either
    (marginal loss, Shi et al. 2021, arXiv 2007.03868). All other classes are trained as usual.

    Args:
        logits: (batch, classes, X, Y, Z), float32.
        label: (batch, 1, X, Y, Z), values.
        missing: (batch, classes), true for classes that are not annotated; on the CPU. The background is never missing.

    Returns:
        Logits and label of the same shapes for :func:`build_loss`.
    """
    if not missing.any():
        return logits, label
    missing = missing.to(logits.device)
    hidden = missing[:, :, None, None, None]
    is_background = torch.zeros_like(hidden)
    is_background[:, 0] = True
    merged = logits.masked_fill(~(hidden | is_background), -math.inf).logsumexp(dim=1, keepdim=True)
    shown = torch.where(is_background, merged, logits.masked_fill(hidden, LOWEST_LOGIT))
    of_missing = torch.stack([row[values.long()] for row, values in zip(missing, label, strict=True)])
    return shown, label.masked_fill(of_missing, 0)


def build_optimizer(network: nn.Module, recipe: Training) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); biases and norms have no weight decay."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # the fused implementation takes a quarter of the default's time on a CPU, and three quarters on a GPU
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=fused or None)


def build_schedule(optimizer: AdamW, recipe: Training, total_steps: int) -> LambdaLR:
    """Linear warm-up, then a half cosine to 0 at ``total_steps``.

    It differs from MONAI's ``WarmupCosineSchedule`` in one step: MONAI's begins with a learning rate of 0, which would
    waste the first of the few steps of a fine-tuning.
    """
    warmup = max(1, round(recipe.warmup_fraction * total_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return half_cosine((step - warmup) / max(1, total_steps - warmup))

    return LambdaLR(optimizer, factor)


def half_cosine(part: float, lowest: float = 0.0) -> float:
    """Half a cosine from 1 at ``part`` 0 to ``lowest`` at ``part`` 1 and beyond.

    >>> [round(half_cosine(part, 0.02), 3) for part in (0, 0.5, 1, 2)]
    [1.0, 0.51, 0.02, 0.02]
    """
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def build_average(network: nn.Module, recipe: Training) -> AveragedModel:
    """An exponential moving average of the weights, whose decay grows up to ``ema_decay``.

    A fixed decay of 0.997 would keep the average of a run of a hundred steps near its initial weights.
    """
    return average_weights(network, lambda count: min(recipe.ema_decay, (1 + count) / (10 + count)))


def average_weights(network: nn.Module, decay_after: Callable[[float], float]) -> AveragedModel:
    """An exponential moving average of the weights, whose decay may depend on the number of averaged steps."""

    def average(kept: Tensors, new: Tensors, copied: torch.Tensor | int) -> None:
        """All tensors of one type at once.

        The count is read on the host, since reading a copy on a GPU would wait for all kernels there.
        """
        if kept[0].is_floating_point():
            get_ema_multi_avg_fn(decay_after(float(averaged.n_averaged)))(kept, new, copied)
        else:  # counters, such as batch norm's
            for own, given in zip(kept, new, strict=True):
                own.copy_(given)

    averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    return averaged
