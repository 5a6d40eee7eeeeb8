"""Batch inference that replaces no label drawn by a person, and is not held up by single images."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, TimeoutError
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.exception import MONAILabelException
from monailabel.interfaces.tasks.batch_infer import BatchInferTask

from lib.datastore.records import ORIGINAL, MadeMask
from lib.datastore.store import VersionedDatastore, plain
from lib.errors import ImageError, UnetrError

logger = logging.getLogger("unetr.datastore")

CASE_SECONDS = 30 * 60.0
Infer = Callable[[Mapping[str, Any], Datastore], dict[str, Any]]
Elsewhere = Callable[[str, Iterator[tuple[str, Path]]], Iterator[MadeMask]]
Interruptible = Callable[[Callable[[], None]], AbstractContextManager[None]]


class DrawnLabelsStay(BatchInferTask):
    """Batch inference that skips images whose label with the requested tag was drawn by a person.

    The store refuses to replace such a label in any case; here, its computation is avoided. An image that cannot be
    segmented, or takes too long, is logged in one sentence and has an ``error`` in the result.

    Args:
        case_seconds: time limit of one image, multiplied by the number of workers, which wait for each other.
        interruptible: runs a check at intervals within a computation; an exception from the check ends the computation.
        elsewhere: segments images on other machines instead of in this process.
    """

    def __init__(
        self,
        case_seconds: float = CASE_SECONDS,
        interruptible: Interruptible = lambda _: contextlib.nullcontext(),
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._case_seconds = case_seconds
        self._interruptible = interruptible
        self._elsewhere = elsewhere

    def get_images(self, request: Mapping[str, Any], datastore: Datastore) -> list[str]:
        """The ids of the images to segment; a resumed batch (``begun_at``) excludes the images that are done."""
        images: list[str] = list(super().get_images(request, datastore))
        if not isinstance(datastore, VersionedDatastore):
            return images
        tag = plain(request.get("label_tag") or ORIGINAL)
        newest = list(datastore.history.all_latest(tag))
        drawn = {version.image_id for version in newest if version.is_drawn}
        kept = [image for image in images if image in drawn]
        if kept:
            logger.info("%d images keep their label %r, which a person drew", len(kept), tag)
        begun_at = str(request.get("begun_at") or "")
        done = {version.image_id for version in newest if begun_at and version.saved_at >= begun_at} - drawn
        if done:
            logger.info("%d images have their mask from this batch already, which goes on", len(done))
        most = int(request.get("max_batch_size") or 0)
        left = sorted(image for image in images if image not in drawn | done)
        return left[: max(0, most - len(done))] if most else left

    def __call__(self, request: Mapping[str, Any], datastore: Datastore, infer: Infer) -> dict[str, Any]:
        """Segment the images.

        Returns:
            The response for each image, by its id; ``{"error": sentence}`` for one that could not be segmented.

        Raises:
            ImageError: if there were images, but none of them could be segmented.
        """
        if self._elsewhere is not None:
            return checked(_made_elsewhere(self._elsewhere, request, self.get_images(request, datastore), datastore))
        seconds = self._case_seconds * max(1, int(request.get("max_workers") or 1))
        # MONAI Label assigns images to devices in advance; here each image uses the first free device
        device = request.get("device") or ""

        def infer_one(one: Mapping[str, Any], store: Datastore) -> dict[str, Any]:
            try:
                return self._within(seconds, infer, {**one, "device": device}, store)
            except (UnetrError, MONAILabelException, OSError) as error:
                return _left_out(one["image"], error)

        return checked(super().__call__({**request, "multi_gpu": False}, datastore, infer_one))

    def _within(self, seconds: float, infer: Infer, one: Mapping[str, Any], store: Datastore) -> dict[str, Any]:
        """Run one inference with a time limit; reading from a broken disk is not interrupted, but no longer awaited."""
        late, done = threading.Event(), Future[dict[str, Any]]()
        sentence = f"image {one['image']!r} took longer than {seconds:g} s, the most for one image of a batch"

        def check() -> None:
            if late.is_set():
                raise ImageError(sentence)

        def run() -> None:
            try:
                with self._interruptible(check):
                    done.set_result(infer(one, store))
            except BaseException as error:  # noqa: BLE001 - handed on to the thread that waits
                done.set_exception(error)

        threading.Thread(target=run, name="batch case", daemon=True).start()  # does not keep the process from ending
        try:
            return done.result(seconds)
        except TimeoutError as error:
            if done.done():
                raise  # the inference's own
            late.set()
            raise ImageError(sentence) from error


def checked(result: dict[str, Any]) -> dict[str, Any]:
    """The result of each image of a batch, unless all of them failed.

    Raises:
        ImageError: if there were images, but none of them could be segmented.
    """
    failures = [answer["error"] for answer in result.values() if answer and "error" in answer]
    if failures and len(failures) == len([answer for answer in result.values() if answer is not None]):
        raise ImageError(f"none of {len(failures)} images could be segmented; the first: {failures[0]}")
    return result


def _made_elsewhere(
    elsewhere: Elsewhere, request: Mapping[str, Any], images: list[str], datastore: Datastore
) -> dict[str, Any]:
    """The response for each image; each mask is stored here as soon as it arrives."""
    result: dict[str, Any] = dict.fromkeys(images)
    model, tag = str(request["model"]), plain(request.get("label_tag") or ORIGINAL)

    def files() -> Iterator[tuple[str, Path]]:
        for image in images:
            try:
                yield image, Path(datastore.get_image_uri(image))  # a series is converted now
            except (UnetrError, MONAILabelException, OSError) as error:
                result[image] = _left_out(image, error)

    for number, made in enumerate(elsewhere(model, files()), 1):
        try:
            result[made.image_id] = _keep(made, model, tag, datastore)
            logger.info("%s => %d / %d", made.image_id, number, len(images))
        except (UnetrError, MONAILabelException, OSError) as error:
            result[made.image_id] = _left_out(made.image_id, error)
    return result


def _keep(made: MadeMask, model: str, tag: str, datastore: Datastore) -> dict[str, Any]:
    if made.problem:
        raise ImageError(made.problem)
    with tempfile.TemporaryDirectory(prefix="unetr-") as folder:
        file = Path(folder) / "mask.nii.gz"
        file.write_bytes(made.mask)
        label = datastore.save_label(made.image_id, str(file), tag, {"model": model, "params": dict(made.params)})
    return {"label": label, "tag": tag, "params": dict(made.params)}


def _left_out(image: str, error: Exception) -> dict[str, Any]:
    """A one-line description of the failure of an image."""
    sentence = " ".join(str(getattr(error, "msg", None) or error).split())
    logger.warning("%r was left out: %s", image, sentence)
    return {"error": sentence}
