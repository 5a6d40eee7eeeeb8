"""Mask requests, parsed and validated once, before they wait for a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from fastapi import UploadFile

from lib.datastore.series import SeriesDatastore
from lib.errors import ParameterError
from lib.infers.request import InferRequest, parse_boolean
from lib.server.http.auth import Role, User
from lib.server.http.errors import ForbiddenError
from lib.server.http.names import safe_file_name
from lib.server.images import Images
from lib.server.labels.submissions import tag_for_prediction
from lib.server.presented.cases import PresentedCases
from lib.server.tasks import InferenceTask, TasksByName

# Keys that a client must not set through ``params``, since they determine which file is read.
NOT_FROM_PARAMS = (
    "model", "image", "label", "session", "file", "description", "label_file", "label_name", "start_from"
)  # fmt: skip


class Output(str, Enum):
    """The parts of the response that the client requests."""

    image = "image"
    json = "json"
    all = "all"
    dicom_seg = "dicom_seg"


@dataclass(frozen=True)
class Asked:
    """A validated request.

    Attributes:
        model: name of the model.
        task: its inference task.
        request: its parameters. The file of an image of the studies is looked up again when a device is free; the file
            of an upload is only a name until then.
        image_id: id in the studies; None for an uploaded image and for that of a session.
        upload: an uploaded image, which is copied when a device is free.
        label: an uploaded mask.
        client_id: name by which the client identifies itself.
        tag: tag with which the mask is saved as the image's label; "" if it is not saved.
        output: requested parts of the response.
        on_series: whether the image was named by the series that presents it, whose grid the response has then.
    """

    model: str
    task: InferenceTask
    request: InferRequest
    image_id: str | None
    upload: UploadFile | None
    label: UploadFile | None
    client_id: str
    tag: str
    output: Output
    on_series: bool


@dataclass(frozen=True)
class RequestChecks:
    """Validates everything that does not require reading the image, so that invalid requests do not wait.

    Args:
        tasks: all inference tasks, including those for clicks and scribbles.
        images: finds the images of the studies.
        store: the studies.
        presented: files as series.
        session_image: returns the file of a session's image.
    """

    tasks: TasksByName[InferenceTask]
    images: Images
    store: SeriesDatastore
    presented: PresentedCases
    session_image: Callable[[str], Path]

    def check(
        self,
        user: User,
        model: str,
        image: str,
        session_id: str,
        params: dict[str, Any],
        upload: UploadFile | None,
        label: UploadFile | None,
        output: Output,
    ) -> Asked:
        """Parse and validate a request.

        Raises:
            NotFoundError: for an unknown model, image or session.
            ParameterError: for an invalid parameter, or if no image is given.
            ForbiddenError: without permission.
        """
        task = self.tasks.find(model)
        image_id, upload = None, None if session_id else upload
        if session_id:
            file = self.session_image(session_id)
        elif upload is not None:  # its name determines the default of result_extension
            file = Path(safe_file_name(upload.filename, "image.nii.gz"))
        else:
            image_id, file = self._choose_image(image, params)
        kept = {key: value for key, value in params.items() if key not in NOT_FROM_PARAMS}
        on_series = image_id is not None and self.presented.case_of(str(params.get("image") or image)) is not None
        if on_series:
            kept = self.presented.on_file(str(image_id), kept)
        saves = (
            bool(parse_boolean("save_label", {"save_label": params.get("save_label") or False}, False))
            and image_id is not None
        )
        if task.takes_prompts:
            kept["label_name"] = params.get("label")
            if saves:
                kept["all_labels"] = True  # saved masks have all labels
        request = task.parse({**kept, "image": str(file)})
        tag = self._check_tag(user, str(image_id), params) if saves else ""
        if output is Output.dicom_seg:
            self._check_dicom_seg(image_id)
        client_id = str(params.get("client_id") or "")
        return Asked(model, task, request, image_id, upload, label, client_id, tag, output, on_series)

    def _choose_image(self, image: str, params: Mapping[str, Any]) -> tuple[str, Path]:
        """The image's id and file; as in MONAI Label, the id may also be in ``params``, and is validated there too."""
        wanted = params.get("image") or image
        if not isinstance(wanted, str) or not wanted:
            raise ParameterError("image", wanted, "an image id, or else a session_id or an uploaded part 'file'")
        file = self.images.file(wanted)
        return self.images.known_id(wanted), file

    def _check_tag(self, user: User, image_id: str, params: Mapping[str, Any]) -> str:
        """The tag with which a user may save the mask."""
        if user.role < Role.ANNOTATOR:
            raise ForbiddenError("save_label needs the role annotator")
        tag = tag_for_prediction(user, params)
        self.store.history.check_replaceable(image_id, tag)
        return tag

    def _check_dicom_seg(self, image_id: str | None) -> None:
        """Refuse a DICOM SEG if there are no DICOM images to refer to."""
        shown = image_id is not None and bool(self.presented.attributes(image_id))
        if image_id is None or not (shown or self.store.is_series(image_id)):
            raise ParameterError("output", "dicom_seg", "image, json or all, since the image is no DICOM series")
