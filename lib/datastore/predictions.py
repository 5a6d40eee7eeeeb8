"""Stores the predictions that clients received, so that a correction can be compared with its initial mask.

The latest prediction of each client and image is stored, compressed, within a size limit. A separate thread writes it,
so that the client does not wait.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from pydantic import TypeAdapter

from lib.datastore.validation import MaskArray
from lib.errors import UnetrError
from lib.imagefiles.compression import BROKEN_GZIP, pack_gzip
from lib.storage.admission import Admission
from lib.storage.disk import MIB, make_room
from lib.storage.files import replacing
from lib.storage.json_files import read_json
from lib.transforms.volume import read_volume

logger = logging.getLogger("unetr.datastore")

DEFAULT_LIMIT_MIB = 1024
Suffix = Literal[".nii.gz", ".nii", ".nrrd"]


@dataclass(frozen=True)
class Prediction:
    """A prediction that a client received.

    Attributes:
        client: the client.
        image_id: id of the image.
        preset: name of the model.
        model_version: version of its weights.
        engine: engine that computed it; empty if unknown.
        extension: extension of the mask's file.
        at: time in seconds since 1970.
    """

    client: str
    image_id: str
    preset: str
    model_version: str
    extension: Suffix
    at: float
    engine: str = ""


_PREDICTION = TypeAdapter(Prediction)


class Predictions:
    """The predictions of a store.

    Args:
        folder: folder, which is created with the first prediction.
        limit_mib: size limit; beyond it, the oldest predictions are removed.
        admission: judges the folder, which may have become a link.
    """

    def __init__(self, folder: Path, limit_mib: int = DEFAULT_LIMIT_MIB, admission: Admission | None = None) -> None:
        self.folder = folder
        self._admission = admission or Admission(folder.parent)
        self.limit_mib = limit_mib
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="predictions")
        self._latest: Future[None] | None = None

    def remember(
        self, client: str, image_id: str, preset: str, version: str, name: str, mask: bytes, engine: str = ""
    ) -> None:
        """Store the mask that a client receives, in the background; ``name`` is its file name."""
        suffix: Suffix = next((s for s in get_args(Suffix) if name.endswith(s)), ".nii.gz")
        prediction = Prediction(client, image_id, preset, version, suffix, time.time(), engine)
        self._latest = self._writer.submit(self._write, prediction, mask)

    def find(self, client: str, image_id: str) -> Prediction | None:
        """The latest prediction that a client received for an image; None if it is no longer stored."""
        self._wait()
        side_car = self._side_car(client, image_id)
        try:
            return _PREDICTION.validate_python(read_json(side_car))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("prediction %s cannot be read: %s", side_car.name, error)
            return None

    def voxels_changed(self, prediction: Prediction, label: MaskArray, folder: Path) -> int | None:
        """Number of voxels in which a label differs from a prediction; None if they cannot be compared.

        Args:
            prediction: result of :meth:`find`.
            label: label values of the preset on the image's grid.
            folder: for a temporary file.
        """
        packed = self._mask(prediction)
        unpacked = folder / f"prediction{prediction.extension}"
        try:
            content = packed.read_bytes()
            unpacked.write_bytes(content if prediction.extension == ".nii.gz" else gzip.decompress(content))
            predicted = read_volume(unpacked).voxels
        except (OSError, *BROKEN_GZIP, UnetrError) as error:
            logger.warning("prediction %s cannot be compared: %s", packed.name, error)
            return None
        finally:
            unpacked.unlink(missing_ok=True)
        return int(np.count_nonzero(predicted != label)) if predicted.shape == label.shape else None

    def close(self) -> None:
        """Write all pending predictions."""
        self._writer.shutdown(wait=True)

    def _wait(self) -> None:
        if self._latest is not None:
            self._latest.result()

    def _write(self, prediction: Prediction, mask: bytes) -> None:
        side_car, packed = self._side_car(prediction.client, prediction.image_id), self._mask(prediction)
        content = mask if prediction.extension == ".nii.gz" else pack_gzip(mask)
        try:
            self._admission.check_folder(self.folder)
        except OSError as error:
            logger.warning("a prediction for %r was not remembered: %s", prediction.image_id, error.strerror)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path, data in ((packed, content), (side_car, json.dumps(asdict(prediction)).encode())):
                with replacing(path) as file:
                    file.write(data)
            self._make_room()
        except OSError as error:
            logger.warning("a prediction for %r was not remembered: %s", prediction.image_id, error)
            packed.unlink(missing_ok=True)
            side_car.unlink(missing_ok=True)

    def _make_room(self) -> None:
        masks = sorted(self.folder.glob("*.mask"), key=lambda path: path.stat().st_mtime)
        make_room([(mask.with_suffix(".json"), mask) for mask in masks], self.limit_mib * MIB)

    def _side_car(self, client: str, image_id: str) -> Path:
        key = json.dumps([client, image_id]).encode()
        return self.folder / f"{hashlib.sha256(key).hexdigest()[:32]}.json"

    def _mask(self, prediction: Prediction) -> Path:
        return self._side_car(prediction.client, prediction.image_id).with_suffix(".mask")
