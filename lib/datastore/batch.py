"""Which images a batch inference segments: none whose label a person drew."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferTask

from lib.datastore.records import ORIGINAL
from lib.datastore.store import VersionedDatastore, plain

logger = logging.getLogger("unetr.datastore")


class DrawnLabelsStay(BatchInferTask):
    """A batch inference that leaves out images whose label under its tag a person drew.

    The store refuses to replace such a label in any case; here nothing is computed for it.
    """

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
