"""Loss, optimiser, learning-rate schedule and averaged weights of the training recipe."""

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

# A probability of exactly 0 in float32, and no infinity whose product with 0 is not a number.
LOWEST_LOGIT = -1e4


def build_loss(recipe: Training) -> nn.Module:
    """Dice and cross-entropy of logits (batch, classes, ...) against label values (batch, 1, ...).

    The Dice of the labels (not of background) is taken over the whole batch, so that a crop without a small organ
    does not count as a miss of it.
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
    """Let the loss say nothing of the classes that a label does not speak of.

    A missing class and background become one class: what is background in the label may be either (marginal loss, Shi
    et al. 2021, arXiv 2007.03868). The other classes are trained as ever, also to keep off each other's voxels.

    Args:
        logits: (batch, classes, X, Y, Z), float32.
        label: (batch, 1, X, Y, Z), values.
        missing: (batch, classes), true for what is not spoken of; on the CPU. Never background.

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
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); biases and norms are not decayed."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # on a CPU fused takes a quarter of the default's time, on a GPU three quarters
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=fused or None)


def build_schedule(optimizer: AdamW, recipe: Training, total_steps: int) -> LambdaLR:
    """Linear warm-up, then a half cosine to 0 at ``total_steps``.

    As MONAI's ``WarmupCosineSchedule``, but for one step: that one begins with a learning rate of 0, with which the
    first of the few steps of a fine-tuning would be lost.
    """
    warmup = max(1, round(recipe.warmup_fraction * total_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return half_cosine((step - warmup) / max(1, total_steps - warmup))

    return LambdaLR(optimizer, factor)


def half_cosine(part: float, lowest: float = 0.0) -> float:
    """From 1 at the begin (``part`` 0) to ``lowest`` at the end (1) and beyond.

    >>> [round(half_cosine(part, 0.02), 3) for part in (0, 0.5, 1, 2)]
    [1.0, 0.51, 0.02, 0.02]
    """
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def build_average(network: nn.Module, recipe: Training) -> AveragedModel:
    """An exponential moving average of the weights, whose memory grows up to ``ema_decay``.

    A fixed decay of 0.997 would keep a run of a hundred steps near where it started.
    """
    return average_weights(network, lambda count: min(recipe.ema_decay, (1 + count) / (10 + count)))


def average_weights(network: nn.Module, decay_after: Callable[[float], float]) -> AveragedModel:
    """An exponential moving average of the weights, whose decay may depend on how many were averaged before."""

    def average(kept: Tensors, new: Tensors, copied: torch.Tensor | int) -> None:
        """All tensors of one type at once.

        The count is read on the host, where it is kept: to read its copy on a GPU is to wait for all that runs there.
        """
        if kept[0].is_floating_point():
            get_ema_multi_avg_fn(decay_after(float(averaged.n_averaged)))(kept, new, copied)
        else:  # counters, such as batch norm's
            for own, given in zip(kept, new, strict=True):
                own.copy_(given)

    averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    return averaged
