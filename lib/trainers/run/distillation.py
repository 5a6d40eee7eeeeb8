"""Distillation: where a label lacks structures, the targets are the probabilities of the weights before the training.

Hard pseudo-labels would turn each doubt of the old weights into a certainty, and so change organs that nobody has
corrected; the gradient of probabilities is 0 at the first step (learning without forgetting, Li and Hoiem 2016, arXiv
1606.09282). Where it sees a structure that a person has drawn elsewhere, the target is background, as in the completed
label (compare MiB, Cermelli et al. 2020, arXiv 2002.00718).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from monai.networks.utils import one_hot
from torch import nn

from lib.configs.preset import Training


class DistillationLoss(nn.Module):
    """Dice and cross-entropy of logits against probabilities; Dice only of structures that a person has drawn.

    For labels without a predicted structure it is the loss of :func:`lib.trainers.optimization.build_loss`.

    Args:
        recipe: weights of both parts.
    """

    def __init__(self, recipe: Training) -> None:
        super().__init__()
        self._recipe = recipe
        self._dice = DiceLoss(include_background=False, batch=True)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """The loss.

        Args:
            logits: shape (batch, classes, X, Y, Z), float32.
            targets: probabilities, of the same shape.
            predicted: shape (batch, classes), true where the targets of a class are a model's.
        """
        # Soft Dice is smallest where the probabilities are sharper than their targets, cross-entropy where they agree.
        drawn = ~predicted[:, :, None, None, None]
        dice: torch.Tensor = self._dice(logits.softmax(dim=1) * drawn, targets * drawn)
        cross_entropy = F.cross_entropy(logits, targets)
        return self._recipe.dice_weight * dice + self._recipe.cross_entropy_weight * cross_entropy


def distilled_targets(logits: torch.Tensor, label: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Target probabilities: the label's where a person has drawn something, the teacher's elsewhere.

    Samples without a predicted structure have the label's everywhere. Elsewhere a predicted structure has the teacher's
    probability, and the background has the rest, with that of all structures that a person has drawn.

    Args:
        logits: the teacher's, shape (batch, classes, X, Y, Z), float32.
        label: values, shape (batch, 1, X, Y, Z); voxels of predicted structures count as not drawn.
        predicted: shape (batch, classes), on the device of the logits.
    """
    drawn = one_hot(label, logits.shape[1])
    guessed = logits.softmax(dim=1) * predicted[:, :, None, None, None]
    guessed[:, 0] = 1 - guessed[:, 1:].sum(dim=1)
    left_open = predicted.clone()
    left_open[:, 0] = predicted.any(dim=1)
    is_open = (drawn * left_open[:, :, None, None, None]).sum(dim=1, keepdim=True) > 0
    return torch.where(is_open, guessed, drawn)
