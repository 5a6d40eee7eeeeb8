"""The only entry for labels, from any route: validated, mapped by name, stored as a version, and announced.

An invalid label is refused with a sentence and stored in quarantine; the last valid label is unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.configs.preset import Preset
from lib.datastore.effort import Effort
from lib.datastore.label_files.label_file import as_label_error, read_segments
from lib.datastore.label_names import is_no_label, parse_label_info
from lib.datastore.predictions import Prediction
from lib.datastore.records import FINAL, INFERENCE, ORIGINAL, LabelVersion, Submission
from lib.datastore.store import VersionedDatastore, submission_of
from lib.datastore.validation import CheckedLabel, as_kept, check_label
from lib.errors import FileKindError, ImageError, InputError, LabelError
from lib.server.http.auth import Role, User
from lib.server.http.bodies import LabelParams
from lib.server.http.errors import ForbiddenError
from lib.server.http.metrics import Metrics
from lib.server.http.names import check_tag
from lib.server.http.parameters import check_fields
from lib.server.http.uploads import check_header, temporary_folder
from lib.server.readers import Readers
from lib.transforms.volume import read_grid

logger = logging.getLogger("unetr.server")

LONGEST_VALUE = 500


@dataclass(frozen=True)
class Submissions:
    """Accepts labels.

    Args:
        store: stores them, with all their versions.
        presets: the served presets, by name.
        image_file: returns the file or folder of an image.
        metrics: metrics that count labels.
        unpacked_limit_mib: size limit in MiB of a mask after decompression.
        models: the preset of each model that a client may name, including those for clicks and scribbles.
        hooks: functions that are called with each label after it has been stored; append to it to be notified.
        readers: limits concurrent reading; a place is held while a label is read, but not while it is written to disk.
    """

    store: VersionedDatastore
    presets: Mapping[str, Preset]
    image_file: Callable[[str], Path]
    metrics: Metrics
    unpacked_limit_mib: int
    models: Mapping[str, str] = field(default_factory=dict)
    hooks: list[Callable[[LabelVersion], None]] = field(default_factory=list)
    readers: Readers = field(default_factory=Readers)

    def submit(
        self, image_id: str, file: Path, tag: str, info: Mapping[str, Any], user: User, source: str
    ) -> LabelVersion:
        """Validate a label and store it as the newest version for its image.

        Args:
            image_id: id of an existing image.
            file: the mask as sent, which is not modified.
            tag: a validated tag.
            info: information sent with it: ``label_info``, ``model``, ``client_id``, ``complete``, ``missing_labels``,
                and more.
            user: the sender.
            source: origin of the label: ``rest``, ``dicom``; ``inference`` if a model on another machine computed it.

        Raises:
            LabelError: if it does not match its image or the preset, with the reason; it is stored in quarantine.
            ConflictError: if a model computed it, and the current label was drawn by a person.
            FileKindError: if its file format is not supported; it is stored in quarantine.
            TooLargeError: if it exceeds the size limit after decompression; it is not stored.
            StorageError: if it cannot be stored; nothing has changed then.
        """
        client = user.client(info.get("client_id"))
        prediction = self.store.predictions.find(client, image_id)
        with temporary_folder() as folder:
            try:
                with self.readers.reading:
                    kept, submission = self._read(image_id, file, tag, info, user, source, prediction, folder)
            except InputError as error:
                self._quarantine(file, str(error), image_id, tag, info, user, source)
                raise error if isinstance(error, LabelError | FileKindError) else LabelError(str(error)) from error
            version = self.store.save_version(kept, submission, None if kept == file else file)
        self.store.effort.finish(image_id, client)
        self._saved(version)
        return version

    def _read(
        self,
        image_id: str,
        file: Path,
        tag: str,
        info: Mapping[str, Any],
        user: User,
        source: str,
        prediction: Prediction | None,
        folder: Path,
    ) -> tuple[Path, Submission]:
        """The file to store for a label, and its description; its voxels are not needed any more.

        Raises:
            InputError: see :meth:`submit`.
        """
        check_fields(LabelParams, info)
        names = names_in(file) if len(self.presets) > 1 else []
        preset = choose_preset(self.presets, info, prediction, names, self.models)
        checked = self._check(image_id, file, preset, info, folder)
        made = source == INFERENCE
        corrected = prediction is not None and not made and prediction.preset == preset.name
        started_from = prediction if corrected else None
        predicted_by: Mapping[str, Any] = info if made else vars(started_from) if started_from else {}
        model_version, engine = (
            str(predicted_by.get(key) or "")[:LONGEST_VALUE] for key in ("model_version", "engine")
        )
        effort = self.store.effort.find(image_id, user.client(info.get("client_id")))
        return checked.file, Submission(
            image_id=image_id,
            tag=tag,
            user=user.name,
            client_id=str(info.get("client_id") or "")[:LONGEST_VALUE],
            preset=preset.name,
            model_version=model_version,
            engine=engine,
            label_map=checked.mapped.label_map,
            # a model's mask is complete: labels without voxels count as absent
            missing_labels=() if made else checked.mapped.missing,
            voxels_changed=self._voxels_changed(started_from, checked, folder),
            prompts_used=_prompts_used(info, effort),
            seconds_spent=effort.seconds,
            source=source,
            notes=checked.notes,
            info=info,
        )

    def keep_prediction(
        self, image_id: str, mask: Path, tag: str, info: Mapping[str, Any], user: User, client_id: str
    ) -> LabelVersion:
        """Store a mask that this server computed, which needs no validation.

        Raises:
            ConflictError: if the current label was drawn by a person.
            StorageError: if it cannot be stored.
        """
        submission = submission_of(image_id, tag, {**info, "user": user.name, "client_id": client_id})
        with temporary_folder() as folder:
            version = self.store.save_version(as_kept(mask, folder) if tag == FINAL else mask, submission)
        self._saved(version)
        return version

    def restore(self, version_id: str, user: User, client_id: str) -> LabelVersion:
        """Add a copy of an older version as the newest one.

        Raises:
            NotFoundError: if there is none with this id.
            StorageError: if it cannot be restored.
        """
        version = self.store.restore_version(version_id, user.name, client_id)
        logger.info("version %s of %s restored by %s", version_id, version.image_id, user.name)
        self._saved(version)
        return version

    def _check(self, image_id: str, file: Path, preset: Preset, info: Mapping[str, Any], folder: Path) -> CheckedLabel:
        try:
            check_header(file, self.unpacked_limit_mib)
        except ImageError as error:
            raise as_label_error(error) from error
        image = self.image_file(image_id)
        try:
            grid = read_grid(image)
        except ImageError as error:
            raise LabelError(f"the label cannot be held against its image: {error}") from error
        return check_label(file, grid, preset, info, folder)

    def _voxels_changed(self, prediction: Prediction | None, checked: CheckedLabel, folder: Path) -> int | None:
        if prediction is None:
            return None
        return self.store.predictions.voxels_changed(prediction, checked.voxels, folder)

    def _saved(self, version: LabelVersion) -> None:
        """After a new version: release its case's lease, count it, and notify subscribers."""
        if version.tag == FINAL:
            self.store.leases.release(version.image_id)
        self.metrics.count_label(version.tag)
        self._tell(version)

    def _quarantine(
        self, file: Path, reason: str, image_id: str, tag: str, info: Mapping[str, Any], user: User, source: str
    ) -> None:
        record = {"image_id": image_id, "tag": tag, "user": user.name, "source": source}
        record |= {key: str(info[key])[:LONGEST_VALUE] for key in ("client_id", "model", "label_info") if key in info}
        try:
            kept = self.store.history.quarantine.keep(file, reason, record)
            logger.warning("label of %s from %s is in quarantine as %s: %s", image_id, user.name, kept.name, reason)
        except OSError as error:
            logger.error("label of %s from %s was refused and could not be kept: %s", image_id, user.name, error)
        self.metrics.count_refused_label()

    def _tell(self, version: LabelVersion) -> None:
        """Call the hooks; their errors do not undo the save."""
        for hook in self.hooks:
            try:
                hook(version)
            except Exception:
                logger.exception("after the save of %s, %r failed", version.version_id, hook)


def tag_for_prediction(user: User, params: Mapping[str, Any]) -> str:
    """The tag with which a model's mask is stored: ``label_tag``, or ``original``.

    ``final``, the tag of labels drawn by people and used for training, requires a reviewer.

    Raises:
        ParameterError: unless it is a valid folder name.
        ForbiddenError: naming the required role.
    """
    tag = check_tag(str(params.get("label_tag") or ORIGINAL))
    if tag == FINAL and user.role < Role.REVIEWER:
        raise ForbiddenError(
            f"the role {user.role.name.lower()} may not save a model's mask as the label {FINAL!r}; "
            "valid: the role reviewer, or another label_tag, such as original"
        )
    return tag


def names_in(file: Path) -> list[str]:
    """The label names in the header of a mask's file.

    Raises:
        LabelError: if the header contradicts itself.
    """
    return [segment.name for segment in read_segments(file) if not is_no_label(segment.name)]


def choose_preset(
    presets: Mapping[str, Preset],
    info: Mapping[str, Any],
    prediction: Prediction | None,
    names_in_file: Sequence[str] = (),
    models: Mapping[str, str] | None = None,
) -> Preset:
    """The preset of a label: the one that the client names, the only one, or the one that has the label's names.

    If a name belongs to no preset, the prediction that the client received decides.

    Args:
        presets: the served presets, by name.
        info: information sent with the label.
        prediction: the prediction that the client received for this image.
        names_in_file: result of :func:`names_in`, which takes precedence over ``label_info``.
        models: the preset of each model that a client may name, including those for clicks and scribbles.

    Raises:
        LabelError: if several presets are served and nothing determines one.
    """
    named = next((info[key] for key in ("model", "preset") if isinstance(info.get(key), str) and info[key]), None)
    named = (models or {}).get(str(named), named)
    if named in presets:
        return presets[str(named)]
    if len(presets) == 1:
        return next(iter(presets.values()))
    candidates = list(presets.values())
    if prediction is not None and prediction.preset in presets:
        candidates.sort(key=lambda preset: preset.name != prediction.preset)
    names = list(names_in_file or (parse_label_info(info.get("label_info")) or {}).values())
    fitting = [preset for preset in candidates if all(preset.find_label(name) for name in names)]
    if fitting and (names or prediction is not None):
        return fitting[0]
    if prediction is not None and prediction.preset in presets:
        return presets[prediction.preset]  # with a segment of another name, which need not have a voxel
    raise LabelError(f"nothing says which of the tasks {', '.join(presets)} this label is for; send model: its name")


def _prompts_used(info: Mapping[str, Any], effort: Effort) -> int:
    """Number of prompts as counted by the client, or otherwise by the server."""
    counted = info.get("prompts_used")
    return counted if isinstance(counted, int) and not isinstance(counted, bool) and counted >= 0 else effort.prompts
