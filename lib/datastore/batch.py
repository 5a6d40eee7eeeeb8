"""A batch inference: none of the labels that a person drew is replaced, and no image holds the others up."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, TimeoutError
from contextlib import AbstractContextManager
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.exception import MONAILabelException
from monailabel.interfaces.tasks.batch_infer import BatchInferTask

from lib.datastore.records import ORIGINAL
from lib.datastore.store import VersionedDatastore, plain
from lib.errors import ImageError, UnetrError

logger = logging.getLogger("unetr.datastore")

CASE_SECONDS = 30 * 60.0
Infer = Callable[[Mapping[str, Any], Datastore], dict[str, Any]]
Interruptible = Callable[[Callable[[], None]], AbstractContextManager[None]]


class DrawnLabelsStay(BatchInferTask):
    """A batch inference that leaves out images whose label under its tag a person drew.

    The store refuses to replace such a label in any case; here nothing is computed for it. An image that cannot be
    segmented, or takes too long, is one sentence in the log, and ``error`` in the result.

    Args:
        case_seconds: longest time of one image, for each worker (they wait for each other).
        interruptible: runs a check now and then in what is computed inside; the check ends it by raising.
    """

    def __init__(
        self, case_seconds: float = CASE_SECONDS, interruptible: Interruptible = lambda _: contextlib.nullcontext()
    ) -> None:
        self._case_seconds = case_seconds
        self._interruptible = interruptible

    def get_images(self, request: Mapping[str, Any], datastore: Datastore) -> list[str]:
        """The ids of the images to be segmented."""
        images: list[str] = list(super().get_images(request, datastore))
        if not isinstance(datastore, VersionedDatastore):
            return images
        tag = plain(request.get("label_tag") or ORIGINAL)
        drawn = {version.image_id for version in datastore.history.all_latest(tag) if version.is_drawn}
        kept = [image for image in images if image in drawn]
        if kept:
            logger.info("%d images keep their label %r, which a person drew", len(kept), tag)
        return [image for image in images if image not in drawn]

    def __call__(self, request: Mapping[str, Any], datastore: Datastore, infer: Infer) -> dict[str, Any]:
        """Segment the images.

        Returns:
            What is said of each image, by its id; ``{"error": sentence}`` for one that could not be segmented.

        Raises:
            ImageError: when there were images, and none of them could be segmented.
        """
        seconds = self._case_seconds * max(1, int(request.get("max_workers") or 1))

        def infer_one(one: Mapping[str, Any], store: Datastore) -> dict[str, Any]:
            try:
                return self._within(seconds, infer, one, store)
            except (UnetrError, MONAILabelException, OSError) as error:
                sentence = " ".join(str(getattr(error, "msg", None) or error).split())
                logger.warning("%r was left out: %s", one["image"], sentence)
                return {"error": sentence}

        result: dict[str, Any] = super().__call__(request, datastore, infer_one)
        failures = [said["error"] for said in result.values() if said and "error" in said]
        if failures and len(failures) == len([said for said in result.values() if said is not None]):
            raise ImageError(f"none of {len(failures)} images could be segmented; the first: {failures[0]}")
        return result

    def _within(self, seconds: float, infer: Infer, one: Mapping[str, Any], store: Datastore) -> dict[str, Any]:
        """Run one inference, and stop waiting for it in time; reading from a broken disk cannot be interrupted."""
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
