"""MONAI Label's local datastore with a history of every label, and with files that survive any crash.

The history replaces the single JSON file that stock MONAI Label rewrites at each save. ``datastore_v2.json`` is still
written for other tools, with a delay and in the background, so that the cost of a save does not depend on the number of
cases.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException

from lib.configs.preset import Preset, canonical_name
from lib.datastore.background import Deferred
from lib.datastore.effort import EffortCounter
from lib.datastore.history import LabelHistory
from lib.datastore.images.channel_cases import ChannelCases
from lib.datastore.images.checks import ImageChecks
from lib.datastore.images.events import CaseFolderEvents, FolderEvents, listen, listen_to_folders
from lib.datastore.images.folder import HIDDEN, FolderProblem, ending_of, list_images
from lib.datastore.label_files.found_labels import Problem, label_id
from lib.datastore.label_files.label_folder import Candidate, LabelFolder, temporary_folder
from lib.datastore.label_names import parse_label_info
from lib.datastore.leases import DEFAULT_MINUTES, Leases
from lib.datastore.predictions import DEFAULT_LIMIT_MIB as PREDICTIONS_MIB
from lib.datastore.predictions import Predictions
from lib.datastore.quarantine import DEFAULT_LIMIT_MIB as QUARANTINE_MIB
from lib.datastore.records import FINAL, INFERENCE, LabelVersion, Submission
from lib.datastore.repair import shorten
from lib.datastore.validation import as_kept
from lib.errors import ConfigError, ConflictError, ImageError, LabelError, NotFoundError, StorageError, UpstreamError
from lib.storage.admission import Admission
from lib.storage.files import read_blocks, stage, sync_folder
from lib.storage.full_disk import writing
from lib.storage.sqlite import IN_MEMORY
from lib.transforms.channels import files_of, stem_of

logger = logging.getLogger("unetr.datastore")

MOST_PROBLEMS = 100
COPIED_BYTES = 2**20
HISTORY_FOLDER = "history"
ORIGINAL = "original"
SECONDS_BEFORE_EXPORT = 2.0
SECONDS_BEFORE_REFRESH = 1.0
# A file that has just changed may still be being copied into the folder.
SECONDS_TO_SETTLE = 1.0


class VersionedDatastore(LocalDatastore):
    """A local datastore whose labels are versions.

    A subclass of another datastore of MONAI Label gets the same behaviour by inheriting from both: ``class
    VersionedDicomWeb(DICOMWebDatastore, VersionedDatastore)``.

    Args:
        datastore_path: folder of the studies.
        presets: presets by which labels that are copied into ``labels/final`` are checked; without presets they are
            taken in unchecked. Presets with channels create cases of several sequences.
        place: hidden folder for files derived from images; by default inside of the studies.
        options: options of MONAI Label's datastore.

    Attributes:
        final: the folder of final labels.
        history: all versions of all labels.
        leases: leases of cases to clients.
        effort: annotation effort of clients for their current cases.
        predictions: predictions that clients received, with which corrections are compared.
        channels: the cases of several sequences.
        checks: stored checks of images that cannot be segmented or are unusual.
        problems: files in the folder that look like images but cannot be used.
    """

    def __init__(
        self,
        datastore_path: str,
        presets: Sequence[Preset] = (),
        image_roots: Iterable[Path] = (),
        place: Path | None = None,
        **options: Any,
    ) -> None:
        folder = Path(datastore_path)
        self.channels = ChannelCases(place or folder / HIDDEN, presets)
        self._admission = Admission(folder, (*image_roots, *([place] if place else ())))
        self._left_out: dict[Path, str] = {}
        self._reconciling = threading.RLock()
        self._objects_lock = threading.RLock()
        self._seen: int | None = None  # sequence of the newest version that is listed
        self._config_read = False
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._export = Deferred(self._write_export, SECONDS_BEFORE_EXPORT, "datastore-export")
        self._look_again = Deferred(self.refresh, SECONDS_BEFORE_REFRESH, "datastore-refresh")
        self._follow = Deferred(self.follow_history, SECONDS_BEFORE_REFRESH, "datastore-history")
        labels, adopts = folder / "labels", not presets
        self.history = LabelHistory(folder / HISTORY_FOLDER, labels, adopts, self._admission)
        self.final = LabelFolder(self.history, labels / FINAL, presets)
        read_only = self.history.read_only
        self.leases = Leases(IN_MEMORY if read_only else self.history.folder / "leases.sqlite")
        self.effort = EffortCounter(IN_MEMORY if read_only else self.history.folder / "effort.sqlite")
        self.checks = ImageChecks(IN_MEMORY if read_only else self.history.folder / "checks.sqlite")
        self.problems: tuple[FolderProblem, ...] = ()
        self.predictions = Predictions(self.history.folder / "predictions", admission=self._admission)
        if self.leases.repaired:
            logger.warning("label store: %s", self.leases.repaired)
        if read_only or self._admission.refusal_of_folder(labels) is not None:
            options = options | {"labels_dir": self._labels_elsewhere(labels)}
        try:
            super().__init__(datastore_path=datastore_path, **options)
        except OSError as error:
            raise ConfigError(f"the studies folder {datastore_path!r} cannot be used: {error.strerror}") from error
        self._export.flush()
        self._listen()

    def _listen(self) -> None:
        """Watch only the relevant files, instead of all files as MONAI Label does."""
        observer = getattr(self, "_observer", None)
        if observer is None or not observer.is_alive():
            return
        handler = FolderEvents(self._endings(), self._look_again.ask, self._follow.ask)
        labels = Path(self._datastore.label_path(FINAL)).parent
        try:
            listen(observer, handler, self._datastore.image_path(), str(labels))
            if self.channels.presets:
                folder = Path(self._datastore.image_path())
                listen_to_folders(observer, folder, CaseFolderEvents(folder, self._endings(), self._look_again.ask))
        except OSError as error:
            logger.error("files that others put into the studies are not seen before a restart: %s", error)
        self._look_again.ask()  # events between the end of one watch and the start of the other

    def configure(
        self,
        lease_minutes: float = DEFAULT_MINUTES,
        quarantine_limit_mib: int = QUARANTINE_MIB,
        predictions_limit_mib: int = PREDICTIONS_MIB,
    ) -> None:
        """Set the limits of the administrator's configuration."""
        self.leases.seconds = lease_minutes * 60
        self.history.quarantine.limit_mib = quarantine_limit_mib
        self.predictions.limit_mib = predictions_limit_mib

    def _labels_elsewhere(self, labels: Path) -> str:
        """A folder of labels that MONAI Label may change: the existing one, or one with links to its files.

        It is empty if ``labels`` is a link out of the studies.
        """
        is_own = self._admission.refusal_of_folder(labels) is None
        if is_own and all((labels / tag).is_dir() for tag in (FINAL, ORIGINAL)):
            return str(labels)
        self._temporary = tempfile.TemporaryDirectory(prefix="unetr-labels-", ignore_cleanup_errors=True)
        for tag in labels.iterdir() if is_own and labels.is_dir() else ():
            (Path(self._temporary.name) / tag.name).symlink_to(tag.absolute(), target_is_directory=True)
        return self._temporary.name

    def close(self) -> None:
        """Write pending changes, and stop watching the folder."""
        self._look_again.close()
        self._follow.close()
        self._export.close()
        self.predictions.close()
        self.leases.close()
        self.effort.close()
        self.checks.close()
        self.history.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    # ------------------------------------------------------------------------------------------------ images

    def left_out(self) -> dict[str, str]:
        """Files that are not used, and the reasons: ends of sentences by their path relative to the studies."""
        with self._objects_lock:
            return {self._shown(path): why for path, why in self._left_out.items()}

    def folders_left_out(self) -> dict[str, str]:
        """Folders of labels and of their history that are links out of the studies: why, by their path below these."""
        studies = Path(self._datastore_path)
        labels, history = studies / "labels", self.history
        tags = [labels / tag for tag in {FINAL, ORIGINAL, *history.index.tags()}]
        own = [labels, *tags, history.folder, history.versions_folder, history.sent_folder, history.quarantine.folder]
        reasons = {os.path.relpath(f, studies): self._admission.refusal_of_folder(f) for f in own}
        return {name: why for name, why in reasons.items() if why is not None}

    def why_left_out(self, image_id: str) -> str | None:
        """Why the file of an id is not used, if there is such a file."""
        for name, why in self.left_out().items():
            if os.sep not in name and self._to_id(name)[0] == image_id:
                return why
        return None

    def has_image(self, image_id: str) -> bool:
        """Whether there is an image with this id."""
        return image_id in self._datastore.objects

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Add an image durably; returns its id.

        Raises:
            ConflictError: if a file with this name exists in the studies, whether it is used or not.
            StorageError: if it cannot be written; nothing has changed then.
        """
        own_id, ext = self._to_id(os.path.basename(image_filename))
        image_id = image_id or own_id
        name = self._filename(image_id, ext)
        folder = Path(self._datastore.image_path())
        if os.path.lexists(folder / name):  # the file may be unused, or new
            raise ConflictError(f"there is a file {name!r} in the studies already; choose another id")
        try:
            staged = stage(read_blocks(Path(image_filename)), folder)
            os.replace(staged.path, folder / name)
            sync_folder(folder)
        except OSError as error:
            raise StorageError(
                f"the image {image_id!r} was not kept: {(error.strerror or str(error)).lower()}"
            ) from error
        info = {**(image_info or {}), "ts": int(time.time()), "name": name}
        with self._objects_lock:
            self._datastore.objects[image_id] = ImageLabelModel(image=DataModel(info=info, ext=ext))
        self.history.keep_info(image_id, "", info)
        self._find_channel_cases(folder)  # a 4D file is one
        self._export.ask()
        return image_id

    def add_case(self, image_id: str, files: Mapping[str, Path], info: dict[str, Any]) -> str:
        """Add a case of several sequences durably, as a folder of files named by channel; returns its id.

        Args:
            image_id: id of the new case.
            files: channel to its file.
            info: information on the case.

        Raises:
            ConflictError: if a folder with this name exists.
            StorageError: if it cannot be written; nothing has changed then.
        """
        folder = Path(self._datastore.image_path())
        incoming, target = folder / f".incoming-{image_id}", folder / image_id
        if target.exists():
            raise ConflictError(f"there is a folder {image_id!r} already; choose another id")
        try:
            self._admission.check_folder(incoming)
            incoming.mkdir(exist_ok=True)
            for channel, file in files.items():
                staged = stage(read_blocks(file), incoming)
                os.replace(staged.path, incoming / f"{canonical_name(channel)}{ending_of(file.name, self._endings())}")
            sync_folder(incoming)
            os.replace(incoming, target)
            sync_folder(folder)
        except OSError as error:
            raise StorageError(
                f"the image {image_id!r} was not kept: {(error.strerror or str(error)).lower()}"
            ) from error
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        self.refresh()
        self.update_image_info(image_id, {**info, "ts": int(time.time()), "name": image_id})
        return image_id

    def remove_image(self, image_id: str) -> None:
        """Remove an image, and its labels from ``labels/``; their versions stay in the history.

        Raises:
            ImageNotFoundException: if there is none with this id.
        """
        entry = self._entry(image_id)
        tags = list(entry.labels)
        for tag in tags:
            self.remove_label(image_id, tag)
        with writing(f"the removal of image {image_id!r}"):
            for file in self._own_files(image_id):
                file.unlink(missing_ok=True)
                if file.parent != Path(self._datastore.image_path()) and not any(file.parent.iterdir()):
                    file.parent.rmdir()  # the folder of a case
            if image_id in self.channels:
                self.channels.forget(image_id)
        with self._objects_lock:
            self._datastore.objects.pop(image_id, None)
        self.history.forget_infos(image_id, tags)
        self.leases.release(image_id)
        self.effort.forget(image_id)
        if image_id in self.leases.skipped():
            self.leases.unskip(image_id)  # another image may get its id
        self._export.ask()

    def stamp(self, image_id: str) -> str:
        """A value that changes with the image; empty for one that no longer exists.

        Raises:
            ImageNotFoundException: if there is none with this id.
        """
        entry = self._entry(image_id)
        if image_id in self.channels:
            return self.channels.stamp(image_id)
        try:
            status = Path(self._datastore.image_path(), self._filename(image_id, entry.image.ext)).stat()
        except FileNotFoundError:
            return ""
        return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Add information on an image.

        Raises:
            ImageNotFoundException: if there is none with this id.
        """
        entry = self._entry(image_id)
        with self._objects_lock:
            entry.image.info.update(info)
            known = copy.deepcopy(entry.image.info)
        self.history.keep_info(image_id, "", known)
        self._export.ask()

    # ------------------------------------------------------------------------------------------------ labels

    def save_version(self, file: Path, submission: Submission, sent: Path | None = None) -> LabelVersion:
        """Store a label as the newest version for its image.

        Args:
            file: the mask.
            submission: its description.
            sent: the original file; None if it is the mask's file itself.

        Raises:
            ImageNotFoundException: if there is no such image.
            ConflictError: if it is a model's mask, and the current label was drawn by a person.
            StorageError: if it cannot be stored; nothing has changed then.
        """
        self._entry(submission.image_id)
        version = self.history.append(file, submission, sent)
        self._show(version)
        return version

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Store a mask that a task of MONAI Label computed; labels from clients are saved by ``lib.server``."""
        submission = submission_of(image_id, plain(label_tag), label_info or {})
        with temporary_folder() as folder:
            mask = Path(label_filename)
            self.save_version(as_kept(mask, Path(folder)) if submission.tag == FINAL else mask, submission)
        return image_id

    def get_image_uri(self, image_id: str) -> str:
        """The file of an image; for a case of several sequences, that of the displayed channel.

        Raises:
            NotFoundError: if there is none with this id (any more), for which MONAI Label would return an empty path.
            ImageError: if it is in a 4D file that cannot be read.
        """
        if image_id not in self._datastore.objects:
            raise NotFoundError("image", str(image_id)[:200])
        if image_id in self.channels:
            uri = str(self.channels.get(image_id).absolute())
        else:
            uri = super().get_image_uri(image_id)
        self._check_sources(image_id, Path(uri))
        return uri

    def _check_sources(self, image_id: str, image: Path) -> None:
        """Check the files that are recorded as the other sequences of an image's case.

        Raises:
            ImageError: if one of them does not belong to the studies, whoever wrote the record.
        """
        for file in files_of(image)[1:]:
            if (why := self._admission.refusal(file)) is not None:
                raise ImageError(f"image {image_id!r} names a file for another sequence that {why}")

    def restore_version(self, version_id: str, user: str, client_id: str = "") -> LabelVersion:
        """Add a copy of an older version as the newest one.

        Raises:
            NotFoundError, StorageError: see :meth:`LabelHistory.restore`.
        """
        self._entry(self.history.get(version_id).image_id)
        version = self.history.restore(version_id, user, client_id)
        self._show(version)
        return version

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Remove a label from ``labels/<tag>``; its versions stay in the history."""
        tag = plain(label_tag)
        self.history.remove(label_id, tag)
        with self._objects_lock:
            entry = self._datastore.objects.get(label_id)
            if entry is not None:
                entry.labels.pop(tag, None)
        self._export.ask()

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Add information on a label's newest version, which is itself unchanged; later versions do not inherit it.

        Raises:
            LabelNotFoundException: if there is no such label.
        """
        tag = plain(label_tag)
        label = self._datastore.label(label_id, tag)
        if label is None:
            raise LabelNotFoundException(f"Label: {label_id} Tag: {tag} not found")
        with self._objects_lock:
            label.info.update(info)
            added = {**self.history.index.info(label_id, tag), **info}
        self.history.keep_info(label_id, tag, added)
        self._export.ask()

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Pairs of image and label files; a case of several sequences has the image of its displayed channel."""
        with self._objects_lock:
            pairs: list[dict[str, Any]] = super().datalist(full_path)
            ids = list(self._datastore.filter_by_tag(FINAL))
        entries = []
        for image_id, pair in zip(ids, pairs, strict=True):
            try:
                if image_id in self.channels:
                    pair["image"] = self.get_image_uri(image_id)
                self._check_sources(image_id, Path(pair["image"]))
            except ImageError as error:
                logger.warning("labelled case %s is left out: %s", image_id, error)
                continue
            own = self.channels.files(image_id) if image_id in self.channels else [Path(pair["image"])]
            files = [*own, Path(pair["label"])]
            # a file may have become a link since the folders were scanned
            if all(self._may_be_read(str(file)) for file in files):
                entries.append(pair)
        return entries

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """Information on an image."""
        info: dict[str, Any] = super().get_image_info(image_id)
        return info | {"path": str(self.channels.file(image_id).absolute())} if image_id in self.channels else info

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """A ZIP file with images, labels and information on them, in the folders ``image`` and ``label``.

        Args:
            limit_cases: number of cases to include, from the first on.

        Returns:
            Its path; the caller removes the file. If the disk is full, no file is left.
        """
        pairs = self.datalist()
        with self._objects_lock:
            known = self._datastore.model_dump_json(exclude={"base_path"})
        with tempfile.NamedTemporaryFile(prefix="unetr-dataset-", suffix=".zip", delete=False) as file:
            try:
                with zipfile.ZipFile(file, "w") as archive:
                    for pair in pairs[:limit_cases] if limit_cases and limit_cases > 0 else pairs:
                        members = {path: f"{kind}/{os.path.basename(path)}" for kind, path in pair.items()}
                        for path in files_of(Path(pair["image"]))[1:]:  # the other sequences of the case
                            members[str(path)] = f"channels/{stem_of(Path(pair['image']))}/{path.name}"
                        try:
                            _add_to_archive(archive, members)
                        except FileNotFoundError as error:
                            logger.info("a case is left out of the archive, since it was removed meanwhile: %s", error)
                    archive.writestr("metadata.json", known)
            except BaseException:
                os.unlink(file.name)
                raise
        return file.name

    def label_problems(self) -> list[Problem]:
        """Refused files in ``labels/final``, and the reasons."""
        return self.final.problems(self._datastore.objects)

    def status(self) -> dict[str, Any]:
        """Numbers of images, labels and unused files."""
        with self._objects_lock:
            counts: dict[str, Any] = super().status()
        problems = [asdict(problem) for problem in self.label_problems()[:MOST_PROBLEMS]]
        return counts | ({"label_problems": problems} if problems else {})

    def json(self) -> dict[str, Any]:
        """The whole content, in the form of ``datastore_v2.json``."""
        with self._objects_lock:
            known: dict[str, Any] = super().json()
        return known

    # ------------------------------------------------------------------------- files that others copy into the folders

    def _reconcile_datastore(self) -> None:
        """Update the content to the images on disk and to the history."""
        with self._reconciling:
            with self._objects_lock:
                changed = self._find_images()
                infos = self.history.index.infos() if self._seen is None else {}
                for (image_id, tag), info in infos.items():
                    if tag == "" and image_id in self._datastore.objects:
                        self._datastore.objects[image_id].image.info.update(info)
            changed += self._find_labels()  # without the lock, since reading labels takes time
            with self._objects_lock:
                changed += self._read_history(infos)
        if changed:
            logger.info("the studies changed in %d places", changed)
            self._export.ask()

    def follow_history(self) -> None:
        """List the versions that other processes have saved; the cost depends on the new versions only."""
        with self._objects_lock:
            if self._read_history({}):
                self._export.ask()

    def _find_images(self) -> int:
        folder = Path(self._datastore.image_path())
        taken, incomplete = self._find_channel_cases(folder)
        listing = list_images(folder, self._endings(), taken)
        self._list_files(folder, self._extensions)  # also records unused files and the reasons
        refusals = {f"{i}{end}": self.refusal(folder / f"{i}{end}") for i, end in listing.images.items()}
        refused = [FolderProblem(self._shown(folder / name), why) for name, why in refusals.items() if why is not None]
        files = {i: end for i, end in listing.images.items() if refusals[f"{i}{end}"] is None}
        cases = self.channels.endings()
        doubled = [
            FolderProblem(f"{i}{files[i]}", f"has the same id as the case of several sequences {i!r}; rename it")
            for i in sorted(files.keys() & cases.keys())
        ]
        self._tell((*listing.problems, *incomplete, *doubled), refused)
        files |= cases
        known = self._datastore.objects
        gone = [k for k, entry in known.items() if self._is_file(entry) and files.get(k) != entry.image.ext]
        for image_id in gone:
            logger.info("image %s is no longer there", image_id)
            del known[image_id]
        new = files.keys() - known.keys()
        for image_id in sorted(new):
            info = {"ts": int(time.time()), "name": self._filename(image_id, files[image_id])}
            known[image_id] = ImageLabelModel(image=DataModel(info=info, ext=files[image_id]))
        return len(gone) + len(new)

    def _is_file(self, entry: ImageLabelModel) -> bool:
        """Whether an image is a file or folder of the studies, and is gone when that is."""
        return True

    def _find_channel_cases(self, folder: Path) -> tuple[frozenset[Path], list[FolderProblem]]:
        return self.channels.update(folder, self.refusal) if self.channels.presets else (frozenset(), [])

    def _own_files(self, image_id: str) -> list[Path]:
        """The files in the studies that make up an image."""
        if image_id in self.channels:
            return self.channels.files(image_id)
        return [
            Path(self._datastore.image_path(), self._filename(image_id, self._datastore.objects[image_id].image.ext))
        ]

    def _tell(self, problems: tuple[FolderProblem, ...], reported: Iterable[FolderProblem]) -> None:
        """Record the problems of files, and log those that have not been logged yet."""
        new = [str(problem) for problem in problems if problem not in self.problems]
        self.problems = (*problems, *reported)
        for sentence in shorten(new):
            logger.warning("studies: %s", sentence)

    def _endings(self) -> list[str]:
        """Extensions of image files, in order of preference."""
        return [pattern.replace("*", "").lower() for pattern in self._extensions]

    def _to_id(self, file: str) -> tuple[str, str]:
        """Split a file name into the image's id and the extension, such as ``.nii.gz``, in any case."""
        ending = ending_of(file, self._endings())
        if not ending:
            stock: tuple[str, str] = super()._to_id(file)
            return stock
        return file[: -len(ending)], ending

    def _may_be_read(self, file: str) -> bool:
        path = Path(self._datastore_path, file)
        return not os.path.lexists(path) or self._admission.refusal(path) is None

    def _shown(self, file: Path) -> str:
        """A file's path relative to the studies, as text that can be sent and logged, whatever bytes its name has."""
        return os.path.relpath(file, self._datastore_path).encode("utf-8", "backslashreplace").decode()

    def refusal(self, file: Path) -> str | None:
        """Why a file is not used; the reason is logged once and recorded."""
        why = self._admission.refusal(file)
        with self._objects_lock:
            if why is None:
                self._left_out.pop(file, None)
            elif self._left_out.get(file) != why:
                self._left_out[file] = why
                logger.warning("%s is left out: it %s", self._shown(file), why)
        return why

    def _list_files(self, path: str | Path, patterns: Sequence[str]) -> dict[str, str]:
        """Names of the files of a folder that are used."""
        folder = Path(path)
        names: dict[str, str] = super()._list_files(folder, patterns)
        with self._objects_lock:
            for file in [file for file in self._left_out if file.parent == folder and not os.path.lexists(file)]:
                del self._left_out[file]
        return {name: name for name in names if self.refusal(folder / name) is None}

    def _find_labels(self) -> int:
        """Take in label files that were copied into ``labels/``."""
        if self.history.read_only or self._admission.refusal_of_folder(self.final.folder.parent) is not None:
            return 0
        for sentence in self.history.put_right() if self._seen is not None else ():
            logger.warning("label store: %s", sentence)
        with temporary_folder() as folder:
            candidates = (one for one in map(self._candidate, self.final.files()) if one is not None)
            right, all_seen = self.final.examine(candidates, Path(folder))
            taken = self.final.take_in(right)
        if not all_seen:
            self._look_again.ask()
        labels = [one for tag in self._label_folders() if tag.name != FINAL for one in self._strange_labels(tag)]
        first = [(f, s) for f, s in labels if not self.history.versions(s.image_id, s.tag)]
        changed = [(f, s) for f, s in labels if self.history.versions(s.image_id, s.tag)]
        taken += len(self.history.adopt_all(first))
        taken += sum(self.history.adopt(file, submission) is not None for file, submission in changed)
        if taken:
            logger.info("%d labels were taken in from their folders", taken)
        return taken

    def _label_folders(self) -> list[Path]:
        tags = Path(self._datastore.label_path(None)).iterdir()
        return sorted(path for path in tags if path.is_dir() and self._admission.refusal_of_folder(path) is None)

    def _candidate(self, file: Path) -> Candidate | None:
        """A file in ``labels/final`` that this store did not write, for an existing image."""
        submission = self._strange_label(file, str(label_id(file.name)), FINAL)
        if submission is None:
            return None
        image_id = submission.image_id
        try:
            return Candidate(file, submission, lambda: self._image_file(image_id), self.stamp(image_id))
        except (NotFoundError, UpstreamError, OSError) as error:
            logger.warning("label store: %s is not looked at yet: %s", self._shown(file), error)
            return None

    def _image_file(self, image_id: str) -> Path:
        return self.channels.get(image_id) if image_id in self.channels else self._own_files(image_id)[0]

    def _strange_labels(self, folder: Path) -> Iterator[tuple[Path, Submission]]:
        """Files in ``labels/<tag>`` that this store did not write, for existing images."""
        for name in sorted(self._list_files(folder, self._extensions)):
            submission = self._strange_label(folder / name, self._to_id(name)[0], folder.name)
            if submission is not None:
                yield folder / name, submission

    def _strange_label(self, file: Path, image_id: str, tag: str) -> Submission | None:
        entry = self._datastore.objects.get(image_id)
        try:
            if entry is None or self.history.published.is_ours(image_id, tag, file) or self.refusal(file) is not None:
                return None
            written = file.stat().st_mtime
        except FileNotFoundError:  # it has been removed meanwhile
            return None
        if self._seen is not None and abs(time.time() - written) < SECONDS_TO_SETTLE:
            self._look_again.ask()
            return None
        known = entry.labels.get(tag)
        return submission_of_file(image_id, tag, known.info if known else {})

    def _read_history(self, infos: Mapping[tuple[str, str], Mapping[str, Any]]) -> int:
        """List versions that are new, including those of other processes."""
        index, count = self.history.index, 0
        last = index.last_sequence()
        if self._seen is None:
            for entry in self._datastore.objects.values():
                entry.labels.clear()
            for tag in index.tags():
                for version in self.history.all_latest(tag):
                    count += self._set_label(version, infos.get((version.image_id, tag), {}))
        else:
            for image_id, tag in {(record["image_id"], record["tag"]) for record in index.since(self._seen)}:
                count += self._follow_label(image_id, tag)
        self._seen = last
        return count

    def _follow_label(self, image_id: str, tag: str) -> int:
        """List the newest version of a label, or none if the label was removed."""
        version = self.history.latest(image_id, tag)
        if version is not None:
            return self._set_label(version, {})
        entry = self._datastore.objects.get(image_id)
        return int(entry is not None and entry.labels.pop(tag, None) is not None)

    def _show(self, version: LabelVersion) -> None:
        with self._objects_lock:
            self._set_label(version, {})
        self._export.ask()

    def _set_label(self, version: LabelVersion, info: Mapping[str, Any]) -> bool:
        entry = self._datastore.objects.get(version.image_id)
        shown = entry.labels.get(version.tag) if entry is not None else None
        if entry is None or (shown is not None and shown.info.get("sequence", 0) > version.sequence):
            return False
        entry.labels[version.tag] = DataModel(ext=version.suffix, info={**info, **info_of(version)})
        return True

    # ------------------------------------------------------------------------------------------------ the export

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Read ``datastore_v2.json`` once at the start; a damaged one is renamed, since its content can be rebuilt."""
        if self._config_read or not os.path.exists(self._datastore_config_path):
            return
        path = Path(self._datastore_config_path)
        try:
            self._datastore = LocalDatastoreModel.model_validate_json(path.read_bytes())
        except ValueError:
            aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
            if not self.history.read_only:
                os.replace(path, aside)
            logger.warning("label store: %s was damaged; it is kept as %s and made anew", path.name, aside.name)
        self._datastore.base_path = self._datastore_path
        self._config_read = True

    def _update_datastore_file(self, lock: bool = True) -> None:
        self._export.ask()

    def _write_export(self) -> None:
        """Write ``datastore_v2.json`` atomically, one line for each image."""
        if self.history.read_only:
            return
        with self._objects_lock:
            head = self._datastore.model_dump(exclude={"base_path", "objects"})
            keys = list(self._datastore.objects)
        staged = stage(self._export_blocks(head, keys), Path(self._datastore_path))
        os.replace(staged.path, self._datastore_config_path)

    def _export_blocks(self, head: Mapping[str, Any], keys: list[str]) -> Iterable[bytes]:
        yield json.dumps(head)[:-1].encode() + b', "objects": {'
        separator = b"\n"
        for key in keys:
            with self._objects_lock:
                entry = self._datastore.objects.get(key)
                text = json.dumps(entry.model_dump(), default=str) if entry is not None else ""
            if text:
                yield separator + f"{json.dumps(key)}: {text}".encode()
                separator = b",\n"
        yield b"\n}}\n"

    def _entry(self, image_id: str) -> ImageLabelModel:
        entry = self._datastore.objects.get(image_id)
        if entry is None:
            raise ImageNotFoundException(f"Image {image_id} not found")
        return entry


def _add_to_archive(archive: zipfile.ZipFile, members: Mapping[str, str]) -> None:
    """Add all of some files to a ZIP archive, or none: they are opened before the first is added.

    Args:
        archive: open for writing.
        members: the names in it by the paths of the files.

    Raises:
        FileNotFoundError: when one is gone.
    """
    with ExitStack() as opened:
        files = [(name, opened.enter_context(Path(path).open("rb"))) for path, name in members.items()]
        for name, file in files:
            status = os.fstat(file.fileno())
            member = zipfile.ZipInfo(name, _zip_time(status.st_mtime))
            member.file_size, member.external_attr = status.st_size, (status.st_mode & 0xFFFF) << 16
            with archive.open(member, "w") as out:
                shutil.copyfileobj(file, out, COPIED_BYTES)


def _zip_time(seconds: float) -> tuple[int, int, int, int, int, int]:
    """A time as ZIP can hold it: from 1980 to 2107, whatever a file says of itself."""
    at = time.localtime(min(max(seconds, 0.0), 2**32 - 1))
    year = min(max(at.tm_year, 1980), 2107)
    return year, at.tm_mon, at.tm_mday, at.tm_hour, at.tm_min, at.tm_sec


def submission_of(image_id: str, tag: str, info: Mapping[str, Any]) -> Submission:
    """The submission of a label from a task of MONAI Label: ``model``, and ``params`` of the response."""
    params: Mapping[str, Any] = info["params"] if isinstance(info.get("params"), dict) else {}
    model = params.get("model", {})
    return Submission(
        image_id=image_id,
        tag=tag,
        user=str(info.get("user", "")),
        client_id=str(info.get("client_id", "")),
        preset=str(info.get("model") or ""),
        model_version=str(model.get("version", "")) if isinstance(model, dict) else "",
        engine=str(params.get("engine", "")),
        label_map={str(name): int(value) for name, value in (params.get("label_names") or {}).items()},
        source=INFERENCE,
        info=dict(info),
    )


def submission_of_file(image_id: str, tag: str, info: Mapping[str, Any]) -> Submission:
    """The submission of a label found in the folder, with the information of MONAI Label's own server.

    That server stored Slicer's values unchanged, with the names in a separate record.
    """
    try:
        names = parse_label_info(info.get("label_info")) or {}
    except LabelError as error:
        logger.warning("label %s of %s: %s; its values are taken for the preset's own", tag, image_id, error)
        names = {}
    label_map = {name: value for value, name in names.items()}
    preset = str(info.get("preset") or info.get("model") or "")
    return Submission(image_id=image_id, tag=tag, preset=preset, label_map=label_map, source="folder", info=dict(info))


def info_of(version: LabelVersion) -> dict[str, Any]:
    """Information on a label for clients: additional information, and data of the history."""
    record = {
        name: value for name, value in version.describe().items() if name not in ("info", "file", "image_id", "tag")
    }
    saved = datetime.fromisoformat(version.saved_at).timestamp()
    return {**version.info, **record, "ts": int(saved), "name": f"{version.image_id}{version.suffix}"}


def plain(tag: Any) -> str:
    """A tag as text; MONAI Label passes members of an enumeration too."""
    return str(getattr(tag, "value", tag))
