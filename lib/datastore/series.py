"""A datastore with image files and DICOM series; the id of a series is its Series Instance UID.

Labels and their history are in the folder, whether the series come from there or from a PACS.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from monailabel.config import settings
from monailabel.datastore.local import DataModel, ImageLabelModel

from lib.configs.preset import Preset
from lib.datastore.images.channel_series import SeriesCases
from lib.datastore.images.folder import HIDDEN, NOT_SCANNED
from lib.datastore.label_files.found_labels import label_id
from lib.datastore.store import VersionedDatastore
from lib.dicom.index import DicomIndex
from lib.dicom.remote import RemoteSource, connect
from lib.dicom.series import Series
from lib.dicom.sources import FolderSource, SeriesInfo, SeriesSource
from lib.dicom.volumes import VolumeCache
from lib.errors import InputError, NotFoundError, ParameterError
from lib.storage.admission import Admission
from lib.transforms.channels import ChannelSources, read_stamp, record_of, write_sources

logger = logging.getLogger("unetr.datastore")
KEPT = ("volumes", "channels")
"""Folders of what is made of images, beside the index."""


class SeriesDatastore(VersionedDatastore):
    """Images of a folder, and DICOM series of a source.

    Args:
        folder: folder of image files and of labels.
        source: source of the series.
        place: folder for converted series; by default next to the labels.
        options: options of :class:`VersionedDatastore`.
    """

    def __init__(self, folder: Path, source: SeriesSource, place: Path | None = None, **options: Any) -> None:
        self.source = source
        self.volumes = VolumeCache(source, (place or folder / HIDDEN) / "volumes", self._kept_series)
        self._cases: tuple[dict[str, SeriesInfo], SeriesCases] | None = None
        super().__init__(str(folder), place=place, **options)

    def series(self) -> dict[str, SeriesInfo]:
        """The current series, by UID; new ones are added to the datastore.

        Raises:
            UpstreamError: if a PACS does not respond.
        """
        known = self.source.series()
        if not known.keys() <= self._datastore.objects.keys():
            with self._objects_lock:
                self._admit([info for uid, info in known.items() if uid not in self._datastore.objects])
        return known

    def series_cases(self) -> SeriesCases:
        """The assignment of series to the channels of cases.

        Raises:
            UpstreamError: if a PACS does not respond.
        """
        known = self.series()
        if self._cases is None or self._cases[0] is not known:  # the source returns a new dictionary after a change
            self._cases = known, SeriesCases(self.channels.presets, known)
        return self._cases[1]

    def read_series(self, uid: str, folder: Path) -> Series:
        """A series with its headers; files that are downloaded for it are written to ``folder``.

        Raises:
            NotFoundError, UpstreamError, ImageError: if it is unavailable or is not a volume.
        """
        return self.volumes.read_series(uid, folder)

    def is_series(self, image_id: str) -> bool:
        """Whether an image is a DICOM series."""
        self.series()
        entry = self._datastore.objects.get(image_id)
        return entry is not None and not entry.image.ext

    def has_image(self, image_id: str) -> bool:
        """Whether an image with this id exists now."""
        if self.series_cases().channel_of(image_id) is not None:
            return False
        return super().has_image(image_id) and (image_id in self.series() or not self.is_series(image_id))

    def list_images(self) -> list[str]:
        """Files, followed by the current series, with each case of several series listed once."""
        known, cases = self.series(), self.series_cases()
        files = [image for image, entry in list(self._datastore.objects.items()) if entry.image.ext]
        return [*files, *(uid for uid in known if cases.channel_of(uid) is None)]

    def get_image_uri(self, image_id: str) -> str:
        """The path of an image; a series is converted to NIfTI, together with the channels of its case.

        Raises:
            NotFoundError, UpstreamError, ImageError: if a series is unavailable or is not a volume.
        """
        if self.is_series(image_id):
            file = self.volumes.get(image_id)
            self._gather_channels(image_id, file)
            self._check_sources(image_id, file)
            return str(file)
        uri: str = super().get_image_uri(image_id)
        return uri

    def stamp(self, image_id: str) -> str:
        """A value that changes with the image."""
        if not self.is_series(image_id):
            return super().stamp(image_id)
        others = sorted(self.series_cases().series_of(image_id))
        return "-".join(self.source.stamp(uid) for uid in (image_id, *others))

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """Information on an image; for a series also UIDs, patient, date and modality, as OHIF shows them."""
        series = self.series().get(image_id)
        info: dict[str, Any] = super().get_image_info(image_id)
        if series is None:
            return info
        notes = self.volumes.notes(image_id)
        return {**info, **series.attributes, **({"notes": notes} if notes else {})}

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Images with a final label, without series that no longer exist."""
        there = set(self.list_images())
        return [image for image in super().get_labeled_images(label_tag, labels) if image in there]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Images without a final label, without series that no longer exist."""
        there = set(self.list_images())
        return [image for image in super().get_unlabeled_images(label_tag, labels) if image in there]

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Image and label pairs for training, of existing images; series are converted if necessary."""
        broken = set()
        for image in self.get_labeled_images():
            if self.is_series(image):
                try:
                    self.get_image_uri(image)
                except (InputError, NotFoundError) as error:  # not a volume, or deleted meanwhile
                    logger.warning("labelled series %s is left out of the training: %s", image, error)
                    broken.add(str(self.volumes.file(image).resolve()))
        pairs = super().datalist(full_path)
        return [pair for pair in pairs if os.path.exists(pair["image"]) and pair["image"] not in broken]

    def remove_image(self, image_id: str) -> None:
        """Remove an image file.

        Raises:
            ParameterError: for a series, whose files belong to the folder or the PACS.
        """
        if self.is_series(image_id):
            raise ParameterError("id", image_id, "an image that is a file; remove a DICOM series in its folder or PACS")
        super().remove_image(image_id)

    def status(self) -> dict[str, Any]:
        """Numbers of images, and the progress of the index."""
        return {**super().status(), "dicom": self.source.status()}

    def json(self) -> dict[str, Any]:
        """The data list with information on each image; a case of several series is listed under its displayed one."""
        images = set(self.list_images())  # this comes first, since it adds new series
        known = super().json()
        return known | {"objects": {image: one for image, one in known["objects"].items() if image in images}}

    def _gather_channels(self, uid: str, file: Path) -> None:
        """Convert the other series of a case and record them; a series that is not a volume is reported."""
        by_preset = self.series_cases().of(uid)
        if not by_preset:
            record_of(file).unlink(missing_ok=True)
            return
        sources = {}
        for name, case in by_preset.items():
            files, problem = {}, case.problem
            for channel, other in case.series.items():
                try:
                    files[channel] = file if other == uid else self.volumes.get(other)
                except (InputError, NotFoundError) as error:
                    problem = problem or f"has no volume for the channel {channel!r}: {error}"
            sources[name] = ChannelSources(uid, files, case.missing, problem, case.notes, shown=file)
        stamp = hashlib.sha256(repr(sources).encode()).hexdigest()[:16]
        if read_stamp(file) != stamp:
            write_sources(file, sources, stamp)

    def _kept_series(self) -> set[str]:
        """The series that a training may read."""
        labelled = super().get_labeled_images()
        cases = self.series_cases()
        return {uid for image in labelled for uid in (image, *cases.series_of(image))}

    def _admit(self, series: list[SeriesInfo]) -> None:
        """Add series to the datastore, with their stored labels and information."""
        infos = self.history.index.infos()
        for info in series:
            kept = {**info.attributes, **infos.get((info.uid, ""), {})}
            self._datastore.objects[info.uid] = ImageLabelModel(image=DataModel(info=kept))
            for tag in self.history.index.tags():
                version = self.history.latest(info.uid, tag)
                if version is not None:
                    self._set_label(version, infos.get((info.uid, tag), {}))
        labelled = {label_id(file.name) for file in self.final.files()}
        if labelled & {info.uid for info in series}:
            self._look_again.ask()  # labels may have been copied there

    def _image_file(self, image_id: str) -> Path:
        return self.volumes.get(image_id) if self.is_series(image_id) else super()._image_file(image_id)

    def _entry(self, image_id: str) -> ImageLabelModel:
        self.series()
        return super()._entry(image_id)

    def _is_file(self, entry: ImageLabelModel) -> bool:
        """Series stay listed, since their files are made on demand."""
        return bool(entry.image.ext)

    def _filename(self, id: str, ext: str) -> str:
        """A series id has no extension: its file is the converted one."""
        return f"{id}{ext}" if ext else str(self.volumes.file(id).absolute())


def open_datastore(
    studies: str, modalities: Collection[str], presets: Sequence[Preset] = (), image_roots: Sequence[Path] = ()
) -> SeriesDatastore:
    """The datastore of a folder, or of a DICOMweb server given by its address, with MONAI Label's settings.

    Links out of the folder are followed into ``image_roots`` only. Nothing is downloaded or scanned yet. Series of a
    channel's own modality (PT in addition to CT) are included.
    """
    channels = [channel for preset in presets for channel in preset.channels]
    modalities = {*modalities, *(channel.series.Modality for channel in channels if channel.series.Modality)}
    if studies.startswith(("http://", "https://")):
        user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
        prefixes = {
            "qido": settings.MONAI_LABEL_QIDO_PREFIX,
            "wado": settings.MONAI_LABEL_WADO_PREFIX,
            "stow": settings.MONAI_LABEL_STOW_PREFIX,
        }
        folder = _cache_folder() / _key(studies.rstrip("/"))
        place = folder / HIDDEN
        source: SeriesSource = RemoteSource(connect(studies, user, password, prefixes), modalities)
    else:
        folder = Path(studies)
        admission = Admission(folder, image_roots)
        inside = can_write_below(folder, admission)
        place = folder / HIDDEN if inside else _cache_folder() / _key(str(folder.resolve()))
        index = DicomIndex(folder, place / "index.sqlite", NOT_SCANNED, admission)
        source = FolderSource(index, modalities, admission)
    return SeriesDatastore(
        folder,
        source,
        place=place,
        presets=presets,
        image_roots=image_roots,
        extensions=settings.MONAI_LABEL_DATASTORE_FILE_EXT,
        auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
        read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
    )


def can_write_below(folder: Path, admission: Admission) -> bool:
    """Whether the index and converted series can be stored in a folder of studies, not behind a link out of it."""
    try:
        for place in (folder / HIDDEN, *(folder / HIDDEN / name for name in KEPT)):
            admission.check_folder(place)
        (folder / HIDDEN).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / HIDDEN):
            return True
    except OSError as error:
        logger.warning("%s cannot be written to (%s): converted series are kept elsewhere", folder, error.strerror)
        return False


def _key(studies: str) -> str:
    return hashlib.sha256(studies.encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    """The folder of labels and converted series of a DICOMweb server."""
    given = settings.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip()
    return Path(given) if given else Path.home() / ".cache" / "monailabel" / "dicom"
