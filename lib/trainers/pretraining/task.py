"""Pretraining as a background task of the server, before the first label arrives."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod

from lib.cases.labelled import case_id
from lib.cases.split import Split, known_split, shipped_split
from lib.configs.preset import Preset
from lib.errors import ParameterError
from lib.networks.precision import resolve_device
from lib.trainers.pretraining.loop import ENCODER_FILE, PretrainingPlan, pretrain, usable_images, write_encoder
from lib.trainers.resume import remove_state

logger = logging.getLogger("unetr.pretrain")

STEPS = 2000
RUN_FOLDER = "pretraining"


class UnetrPretraining(ScoringMethod):
    """Pretrains a preset's encoder on all images of the studies, with or without labels.

    It is registered as a scoring method of MONAI Label, since scoring methods run over all images in a low-priority
    process that yields to inference. Trainings from random weights then start from its encoder.

    Args:
        preset: the preset.
        folder: ``model/<preset>``, to which the encoder is written.
        device: device on which it computes; by default the best one.
    """

    def __init__(self, preset: Preset, folder: Path, device: str = "") -> None:
        super().__init__(f"Learn the encoder of {preset.name} from all images, labelled or not")
        self._preset, self._folder, self._device = preset, folder, device

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Pretrain, or resume an interrupted run with the same images.

        Images of held-out subjects are excluded, so that validation on them stays unbiased.

        Args:
            request: ``steps``, the number of steps with 8 windows each.
            datastore: the studies.

        Returns:
            The numbers of images and steps, and the loss.

        Raises:
            ParameterError: for an invalid number of steps.
            TrainingError: if there is no image that the preset accepts.
        """
        steps = request.get("steps", STEPS)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ParameterError("steps", steps, "a whole number from 1")
        splits = [known_split(self._folder), shipped_split(self._folder) or Split((), ())]
        held_out = {case for split in splits for case in (*split.validation, *split.test)}
        paths = [Path(datastore.get_image_uri(image)) for image in sorted(datastore.list_images())]
        seen = [path for path in paths if case_id(path) not in held_out]
        plan = PretrainingPlan(
            preset=self._preset,
            images=usable_images(seen, self._preset),
            run_dir=self._folder / RUN_FOLDER,
            device=resolve_device(self._device),
            steps=steps,
            resume=True,
        )
        result = pretrain(plan)
        write_encoder(self._folder / ENCODER_FILE, plan, result)
        remove_state(plan.run_dir)
        summary = {"images": len(plan.images), "steps": steps, "loss": round(result.losses[-1], 4)}
        logger.info("%s: %s", self._preset.name, summary)
        return summary
