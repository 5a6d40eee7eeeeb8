"""The one way by which a label enters, from whatever route: checked, mapped by name, kept as a version, announced.

What is wrong is refused with a sentence and kept in quarantine; the last good label stays as it is.
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
    """Takes labels in.

    Args:
        store: keeps them, with all their versions.
        presets: those that are served, by name.
        image_file: gives the file or folder of an image's id.
        metrics: where labels are counted.
        unpacked_limit_mib: most MiB of a mask once it is unpacked.
        models: the preset of each model that a client may name, those that take clicks and scribbles among them.
        hooks: called with each label that has been saved, after it is safe; append to it to hear of them.
        readers: of which one is taken while a label is read; not for as long as the disk takes to keep it.
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
        """Check a label and keep it as the newest version of its image's.

        Args:
            image_id: an image that there is.
            file: the mask as it came, which is left as it is.
            tag: a checked tag.
            info: what came with it: ``label_info``, ``model``, ``client_id``, ``complete``, ``missing_labels``, more.
            user: who sent it.
            source: the way by which it came: ``rest``, ``dicom``; ``inference`` where a model made it elsewhere.

        Raises:
            LabelError: with the reason, when it does not belong to its image or to the preset; it is in quarantine.
            ConflictError: when a model made it, and a person drew the label that there is.
            FileKindError: when its file is of a format that is not read here; it is in quarantine then.
            TooLargeError: when it unpacks to more than the limit; it is not kept.
            StorageError: when the disk does not take it; then nothing has changed.
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
        """The file that is to be kept of a label, and what is to be known of it; its voxels are not needed any more.

        Raises:
            InputError: as :meth:`submit`.
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
            # what a model does not find is not there, by what it says
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
        """Keep a mask of the server's own making, which needs no checking.

        Raises:
            ConflictError: when a person drew the label that there is.
            StorageError: when the disk does not take it.
        """
        submission = submission_of(image_id, tag, {**info, "user": user.name, "client_id": client_id})
        with temporary_folder() as folder:
            version = self.store.save_version(as_kept(mask, folder) if tag == FINAL else mask, submission)
        self._saved(version)
        return version

    def restore(self, version_id: str, user: User, client_id: str) -> LabelVersion:
        """Make an older version the newest one.

        Raises:
            NotFoundError: when there is none of that id.
            StorageError: when it cannot be restored.
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
        """Call the hooks; what goes wrong there does not undo the save."""
        for hook in self.hooks:
            try:
                hook(version)
            except Exception:
                logger.exception("after the save of %s, %r failed", version.version_id, hook)


def tag_for_prediction(user: User, params: Mapping[str, Any]) -> str:
    """The tag under which a model's mask is to be kept: ``label_tag``, or ``original``.

    ``final``, which people draw and trainings learn from, is for reviewers.

    Raises:
        ParameterError: unless it is a plain folder name.
        ForbiddenError: naming the role that is needed.
    """
    tag = check_tag(str(params.get("label_tag") or ORIGINAL))
    if tag == FINAL and user.role < Role.REVIEWER:
        raise ForbiddenError(
            f"the role {user.role.name.lower()} may not save a model's mask as the label {FINAL!r}; "
            "valid: the role reviewer, or another label_tag, such as original"
        )
    return tag


def names_in(file: Path) -> list[str]:
    """The names of labels that a mask's file has in its header.

    Raises:
        LabelError: when the header contradicts itself.
    """
    return [segment.name for segment in read_segments(file) if not is_no_label(segment.name)]


def choose_preset(
    presets: Mapping[str, Preset],
    info: Mapping[str, Any],
    prediction: Prediction | None,
    names_in_file: Sequence[str] = (),
    models: Mapping[str, str] | None = None,
) -> Preset:
    """The task that a label is for: the one that the client names, the only one, or the one that has its names.

    A segment of a name that no task has decides nothing; the mask that the client was given then does.

    Args:
        presets: those that are served, by name.
        info: what came with the label.
        prediction: what the client was given for this image.
        names_in_file: as from :func:`names_in`; they count more than ``label_info``.
        models: the preset of each model that a client may name, those that take clicks and scribbles among them.

    Raises:
        LabelError: when several are served and nothing says which.
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
    """As the client counts them itself, or else the server."""
    counted = info.get("prompts_used")
    return counted if isinstance(counted, int) and not isinstance(counted, bool) and counted >= 0 else effort.prompts
