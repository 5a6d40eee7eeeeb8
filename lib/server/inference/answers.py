"""Responses to mask requests: from the cache or computed, counted, remembered, and saved on request."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from lib.configs.preset import Preset
from lib.datastore.records import LabelVersion
from lib.datastore.series import SeriesDatastore
from lib.dicom.segmentation_writer import Origin
from lib.errors import CheckpointError, ModelNotReadyError, UnetrError
from lib.infers.request import InferRequest
from lib.infers.task import ReadImage, StartedRequest, UnetrInferTask
from lib.infers.writer import EXTENSIONS, write_mask
from lib.server.http.auth import User
from lib.server.http.metrics import Metrics
from lib.server.http.uploads import check_header, receive
from lib.server.images import Images
from lib.server.inference.requests import Asked, Output
from lib.server.labels.segmentations import Segmentations
from lib.server.work.modality import warnings_for
from lib.transforms.volume import read_volume


@dataclass(frozen=True)
class Answer:
    """A mask as bytes, and its JSON."""

    name: str
    content: bytes
    params: dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """Answers mask requests.

    Args:
        images: finds the images of the studies.
        store: the studies, with the predictions that clients received.
        segmentations: DICOM SEGs, presented files, and submissions of labels.
        metrics: metrics that count inferences.
        unpacked_limit_mib: size limit in MiB of an uploaded file after decompression.
    """

    images: Images
    store: SeriesDatastore
    segmentations: Segmentations
    metrics: Metrics
    unpacked_limit_mib: int

    def recall(self, asked: Asked, user: User) -> Answer | None:
        """The cached response, if there is one; no device is needed.

        Raises:
            NotFoundError, ForbiddenError: if the image no longer exists, or must not be read.
        """
        if asked.upload is not None or asked.label is not None:
            return None
        kept = asked.task.recall(self.located(asked, user))
        return None if kept is None else self.finish(asked, user, Path(kept[0]), kept[1])

    def start(self, asked: Asked, user: User, folder: Path) -> Inference:
        """Start a request.

        Args:
            asked: the validated request.
            user: the user.
            folder: folder of its files, which the caller removes at the end in any case.
        """
        return Inference(self, asked, user, folder)

    def located(self, asked: Asked, user: User) -> InferRequest:
        """The request with the image's current file, and the label version from which a correction starts."""
        if asked.image_id is None:
            return asked.request
        saved = self._own_version(asked, user) if asked.task.takes_prompts and asked.label is None else None
        return replace(asked.request, image=self.images.file(asked.image_id), saved=saved)

    def _own_version(self, asked: Asked, user: User) -> LabelVersion | None:
        """The newest version of the image's label, if this client saved it."""
        newest = self.store.history.latest(str(asked.image_id))
        own = newest is not None and newest.user == user.name and newest.client_id == asked.client_id
        if newest is None or not own or newest.preset not in ("", asked.task.preset.name):
            return None
        self.store.history.mask(newest)  # raises if the file has changed
        return newest

    def with_uploads(self, asked: Asked, request: InferRequest, folder: Path) -> InferRequest:
        """The request with its uploads copied into ``folder``."""
        if asked.upload is not None:
            uploaded = receive(asked.upload, folder)
            check_header(uploaded, self.unpacked_limit_mib)
            request = replace(request, image=uploaded)
        if asked.label is not None:
            inside = folder / "label"
            inside.mkdir()
            label = receive(asked.label, inside, "label.nii.gz")
            check_header(label, self.unpacked_limit_mib)
            if asked.on_series:
                label = self.segmentations.presented.label_on_file(str(asked.image_id), label, inside)
            request = replace(request, label_file=label)
        return request

    def finish(self, asked: Asked, user: User, mask: Path, params: dict[str, Any]) -> Answer:
        """Count a response, load it into memory, and remove its file."""
        hit = bool(params["cache"]["hit"])
        self.metrics.count_ready(asked.model, hit)
        if not hit:
            self.metrics.count_inference(asked.model, params["latencies_ms"])
        try:
            return self._keep(asked, user, mask, params)
        finally:
            mask.unlink(missing_ok=True)

    def _keep(self, asked: Asked, user: User, mask: Path, params: dict[str, Any]) -> Answer:
        """Load the mask into memory, remember the client that receives it, and save it as a label if requested."""
        content, preset = mask.read_bytes(), asked.task.preset
        if asked.image_id is not None:
            client, model = user.client(asked.client_id), params["model"]
            if asked.task.takes_prompts:
                # a submitted label is compared with the automatic mask
                self.store.effort.count_prompt(asked.image_id, client)
            else:
                name, version, engine = model["preset"], model["version"], str(params["engine"])
                self.store.predictions.remember(client, asked.image_id, name, version, mask.name, content, engine)
            self.store.leases.renew(client)
        submissions = self.segmentations.submissions
        if asked.image_id is not None and asked.tag:
            info = {"model": asked.model, "params": params}
            submissions.keep_prediction(asked.image_id, mask, asked.tag, info, user, asked.client_id)
        warnings = warnings_for(submissions.presets, self.store, asked.model, asked.image_id)
        params = {**params, "warnings": [*warnings, *params.get("warnings", [])]}
        if asked.output is not Output.dicom_seg:
            return Answer(mask.name, self._as_shown(asked, mask) if asked.on_series else content, params)
        # PyTorch and OpenVINO may differ in single voxels, so the engine is stored with the mask
        origin = Origin("AUTOMATIC", f"{params['model']['version']} ({params['engine']})")
        return Answer(f"{asked.image_id}.dcm", self._as_segmentation(asked, mask, preset, origin), params)

    def _as_segmentation(self, asked: Asked, mask: Path, preset: Preset, origin: Origin) -> bytes:
        """The mask as the bytes of a DICOM SEG."""
        seg = self.segmentations.of_mask(str(asked.image_id), mask, preset, origin, as_presented=asked.on_series)
        packed = io.BytesIO()
        seg.save_as(packed, write_like_original=False)
        return packed.getvalue()

    def _as_shown(self, asked: Asked, mask: Path) -> bytes:
        """The mask on the grid of the series that presents its image, in a viewer's order of voxels."""
        labels = np.rint(read_volume(mask).voxels).astype(np.uint8)
        shown = self.segmentations.presented.on_series(str(asked.image_id), labels)
        suffix = max((end for end in EXTENSIONS if mask.name.endswith(end)), key=len)
        request, voxels = asked.request, shown.voxels.astype(np.uint8)
        file = write_mask(voxels, shown.affine_ras, asked.task.preset, suffix, request.dtype, request.compress)
        try:
            return file.read_bytes()
        finally:
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Inference:
    """A running request: its image is read while it waits, and its response is completed off the device.

    Args:
        answers: answers the request.
        asked: the validated request.
        user: the user.
        folder: folder of its files.
    """

    answers: Answers
    asked: Asked
    user: User
    folder: Path

    def read_ahead(self) -> ReadImage | None:
        """The image, if it can be read in advance; errors are reported later."""
        asked, task = self.asked, self.asked.task
        if asked.upload is not None or asked.label is not None or not isinstance(task, UnetrInferTask):
            return None
        try:
            return task.read_ahead(self.answers.located(asked, self.user))
        except UnetrError:
            return None

    def begin(self, ahead: ReadImage | None) -> StartedRequest | Answer:
        """Compute in the thread of the device.

        Raises:
            ImageError: if the image cannot be segmented.
            ModelNotReadyError: if there are no usable weights.
        """
        asked, task, answers = self.asked, self.asked.task, self.answers
        request = answers.with_uploads(asked, answers.located(asked, self.user), self.folder)
        with self._counting():
            if isinstance(task, UnetrInferTask):
                return task.begin(request, ahead)
            mask, params = task.segment(request)
        return answers.finish(asked, self.user, Path(mask), params)

    def complete(self, begun: StartedRequest | Answer) -> Answer:
        """Do the rest of the request, which needs no device.

        Raises:
            MemoryBudgetError: if memory runs out.
        """
        if isinstance(begun, Answer):
            return begun
        with self._counting():
            mask, params = cast(UnetrInferTask, self.asked.task).complete(begun)
        return self.answers.finish(self.asked, self.user, Path(mask), params)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        model, metrics = self.asked.model, self.answers.metrics
        try:
            yield
        except CheckpointError as error:
            metrics.count_failure(model, error)
            raise ModelNotReadyError(f"the weights of {model!r} cannot be used: {error}") from error
        except Exception as error:
            metrics.count_failure(model, error)
            raise
