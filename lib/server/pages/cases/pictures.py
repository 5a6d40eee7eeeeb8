"""The data of case pictures: image, masks and uncertainty, each read or computed once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread
import numpy as np
import numpy.typing as npt

from lib.datastore.history import LabelHistory
from lib.drawing.contours import Line
from lib.errors import NotFoundError, ParameterError
from lib.infers.request import InferRequest
from lib.infers.task import UnetrInferTask
from lib.server.pages.cases.models import CaseModels
from lib.server.pages.cases.slices import Contour, Plane, Stack, draw_slice, reorient
from lib.server.pages.cases.view import as_mask, mask_of, stack_of, stamp_of
from lib.server.tasks import TasksByName
from lib.server.work.prefetch import PrefetchKey
from lib.server.work.queue import InferenceQueue
from lib.storage.bounded_cache import BoundedCache
from lib.trainers.task import UnetrTrainTask

SHARE_OF_EDITS = 32
LEAST_EDITS = 8
LINES: Mapping[str, Line] = {"edit": "solid", "prediction": "solid", "label": "dashed", "compared": "dotted"}


@dataclass(frozen=True)
class Subject:
    """The image to draw."""

    image: str
    path: Path
    stack: Stack
    model: str


class Pictures:
    """Reads and computes the data of pictures. Predictions are computed one at a time, since three planes request one.

    Args:
        history: label versions.
        models: chooses the model of an image, and finds the image.
        trainers: the training task of each model, which knows the live version.
        inferences: the queue of inference requests.
        most_bytes: memory limit of volumes and masks.

    Attributes:
        volumes: cache of images, labels and predictions.
        edits: cache of masks corrected by clicks, which are displayed only briefly.
    """

    def __init__(
        self,
        history: LabelHistory,
        models: CaseModels,
        trainers: TasksByName[UnetrTrainTask],
        inferences: InferenceQueue,
        most_bytes: int,
    ) -> None:
        self.history, self.models, self.inferences = history, models, inferences
        self.volumes, self.edits = BoundedCache(most_bytes), BoundedCache(most_bytes // SHARE_OF_EDITS, LEAST_EDITS)
        self._trainers = trainers
        self._computing = asyncio.Lock()

    def subject(self, image: str, channel: str = "") -> Subject:
        """Read an image of the studies, or a channel of it.

        Raises:
            NotFoundError, ForbiddenError: if there is no such image.
            ImageError: if it cannot be read.
            ParameterError: if it has no such channel.
        """
        image = self.models.images.check(image)
        path = self.models.images.file(image)
        model = self.models.for_prediction(image, self.history.latest(image))
        return Subject(image, path, self._stack(path, channel), model)

    def plain_slice(self, image: str, channel: str, plane: Plane, index: int) -> bytes:
        """A slice of an image of the studies, or of a channel of it, as a PNG without layers.

        Raises:
            NotFoundError, ForbiddenError, ImageError, ParameterError: see :meth:`subject`.
        """
        return draw_slice(self._stack(self.models.images.file(self.models.images.check(image)), channel), plane, index)

    def _stack(self, path: Path, channel: str) -> Stack:
        return stack_of(self.volumes, path, self.models.presets.values(), channel)

    def outline(self, subject: Subject, mask: npt.NDArray[np.uint8], layer: str) -> Contour:
        """A mask's contour in its preset's colours."""
        model = subject.model or self.models.for_clicks(subject.image, None)
        colors = {label.index: label.color for label in self.models.presets[model].labels}
        return Contour(mask, colors, LINES[layer])

    def label_outline(self, subject: Subject, layer: str) -> Contour:
        """The contour of a version of the image's label, named ``label:<version>`` or ``compared:<version>``.

        Raises:
            ParameterError: for another name.
            NotFoundError: for an unknown version.
        """
        kind, _, version_id = layer.partition(":")
        if kind not in ("label", "compared") or not version_id:
            raise ParameterError("layers", layer[:200], "prediction, uncertainty, label:<version>, compared:<version>")
        version, presets = self.history.get(version_id), self.models.presets
        preset = presets.get(version.preset) or presets.get(subject.model)
        named = {label.index: label.color for label in preset.labels} if preset is not None else {}
        colors = {value: named.get(value, (255, 255, 255)) for value in version.label_map.values()}
        mask = mask_of(self.volumes, self.history.mask(version), subject.path, subject.stack.voxels.shape)
        return Contour(mask, colors, LINES[kind])

    def edited(self, image: str, name: str) -> npt.NDArray[np.uint8]:
        """The mask corrected by clicks.

        Raises:
            NotFoundError: if it is no longer cached.
        """
        mask: npt.NDArray[np.uint8] | None = self.edits.peek((name, image))
        if mask is None:
            raise NotFoundError("corrected mask", name[:100])
        return mask

    def kept_prediction(self, subject: Subject) -> npt.NDArray[np.uint8] | None:
        """The live model's cached mask, reoriented like the image; None if there is none."""
        task = self.models.automatic.find(subject.model)
        kept = task.kept(task.parse(fields_for(subject)))
        return None if kept is None else reorient(kept.labels, kept.affine_ras)

    async def computed(self, subject: Subject, kind: str) -> Any:
        """A prediction or its uncertainty, from the cache, or computed when the device is free.

        Raises:
            ParameterError: if there is no model for the image.
            ModelNotReadyError, CheckpointError, ImageError: see an inference.
        """
        if not subject.model:
            raise ParameterError("layers", kind, "label:<version>, since no model has weights")
        served = self._trainers.find(subject.model).serving()[0]
        key = (kind, subject.model, served, subject.path, stamp_of(subject.path))
        async with self._computing:
            kept = self.volumes.peek(key)
            if kept is not None:
                return kept
            task = self.models.automatic.find(subject.model)
            request = task.parse(fields_for(subject))
            wanted = PrefetchKey(subject.model, subject.image)
            forecast = await anyio.to_thread.run_sync(self.inferences.forecast, task, request)
            async with self.inferences.slot(what=wanted, forecast=forecast) as slot:
                made = await slot.run(lambda: compute(task, request, kind))
            return self.volumes.get(key, lambda: made, lambda array: array.nbytes)


def compute(task: UnetrInferTask, request: InferRequest, kind: str) -> Any:
    """Run the network."""
    if kind == "uncertainty":
        return take_turned(task.map_uncertainty(request), np.float32)
    return take_turned(Path(task.segment(request)[0]))


def fields_for(subject: Subject) -> dict[str, Any]:
    """The fields of the inference request for pictures, equal to those of 3D Slicer, so that both share the cache."""
    return {"image": str(subject.path), "result_extension": ".nii"}


def take_turned(file: Path, dtype: type = np.uint8) -> Any:
    """Read the file of a response, remove it, and reorient the mask like the pictures."""
    try:
        values, affine_ras = as_mask(file, dtype)
    finally:
        file.unlink(missing_ok=True)
    return reorient(values, affine_ras)
