"""Validation during a training run: Dice of whole cases, predicted by sliding windows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lib.cases.labelled import MISSING
from lib.cases.metrics import dice_per_label, mean_per_label, without_missing
from lib.infers.blender import LabelArray
from lib.infers.memory import is_out_of_memory, release_memory
from lib.infers.predictor import Prediction, Stitching, predict
from lib.networks.placement import Placement
from lib.transforms.preprocess import IMAGE, LABEL

logger = logging.getLogger("unetr.train")


class Validator:
    """Validates weights on the held-out cases.

    Args:
        items: the preprocessed cases, one by one.
        where: the preset, the device and the number format.
        predictor: predicts one image; by default :func:`lib.infers.predictor.predict`.
    """

    def __init__(
        self,
        items: Iterable[Mapping[str, Any]],
        where: Placement,
        predictor: Callable[..., Prediction] = predict,
    ) -> None:
        self._items, self._where = items, where
        self._predictor = predictor
        self._window_batch = where.preset.inference.window_batch_size

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """Mean Dice of each label over the cases that annotate it."""
        network.eval()
        indices, rows = self._where.preset.label_indices, []
        for item in self._items:
            image, label = item[IMAGE][0], item[LABEL][0, 0].numpy()
            dice = dice_per_label(self._predict(network, image), label, indices)
            rows.append(without_missing(dice, indices, item[MISSING][0].nonzero().ravel().tolist()))
        return mean_per_label(rows)

    def _predict(self, network: nn.Module, image: torch.Tensor) -> LabelArray:
        """Labels of one image; after memory has run out once, with fewer windows at a time."""
        while True:
            try:
                stitching = Stitching(self._window_batch)
                return self._predictor(network, image, self._where, stitching).labels
            except (RuntimeError, MemoryError) as error:
                if self._window_batch == 1 or not is_out_of_memory(error):
                    raise
            self._window_batch //= 2
            release_memory(self._where.device)
            logger.warning("memory ran out in a validation; from now on: %d windows at a time", self._window_batch)
