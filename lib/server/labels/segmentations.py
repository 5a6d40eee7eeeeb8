"""Conversion between labels and DICOM SEG: a stored SEG is a submission, and a label of a series is published as a
SEG.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset

from lib.configs.preset import Preset
from lib.datastore.records import FINAL, LabelVersion
from lib.datastore.series import SeriesDatastore
from lib.dicom.segmentation_reader import SegmentedVolume, read_segmentation, referenced_instances, referenced_series
from lib.dicom.segmentation_writer import Origin, write_segmentation
from lib.dicom.sources import FolderSource
from lib.errors import InputError, LabelError, ParameterError
from lib.server.http.auth import User
from lib.server.http.uploads import temporary_folder
from lib.server.labels.submissions import Submissions
from lib.server.presented.cases import PresentedCases
from lib.server.presented.labels import origin_of
from lib.transforms.volume import read_volume

logger = logging.getLogger("unetr.server")

SOURCE = "dicom"
"""Source of a label that was submitted as a DICOM SEG."""


@dataclass(frozen=True)
class Segmentations:
    """Accepts DICOM SEGs as labels, and publishes labels as DICOM SEGs.

    Args:
        series: the datastore with the DICOM series.
        presented: files as series.
        presets: the served presets, by name.
        submissions: accepts labels.
    """

    series: SeriesDatastore
    presented: PresentedCases
    presets: Mapping[str, Preset]
    submissions: Submissions

    def of_mask(
        self,
        image_id: str,
        mask: Path,
        preset: Preset,
        origin: Origin,
        number: int = 1,
        as_presented: bool = False,
    ) -> Dataset:
        """A mask of a series, or of an image presented as a series, as a DICOM SEG.

        Args:
            image_id: id of the image.
            mask: file of the mask.
            preset: preset of its labels.
            origin: how it was created.
            number: number of this segmentation of the series.
            as_presented: whether to refer to the regular series, if the image has one.

        Raises:
            ParameterError: if the image is not a DICOM series.
            ImageError, LabelError: if the series or the mask is not suitable.
        """
        if self.presented.attributes(image_id) or (as_presented and self.presented.regular.has(image_id)):
            labels = np.rint(read_volume(mask).voxels).astype(np.uint8)
            return self.presented.as_segmentation(image_id, labels, preset, origin)
        if not self.series.is_series(image_id):
            raise ParameterError("image", image_id, "a DICOM series, since a DICOM SEG refers to one")
        with temporary_folder() as folder:
            series = self.series.read_series(image_id, folder)
            labels = np.rint(read_volume(mask).voxels).astype(np.uint8)
            if series.even and self.presented.regular.has(image_id):
                return self.presented.as_segmentation(image_id, labels, preset, origin)
            return write_segmentation(labels, series, preset, origin, number)

    def submit(self, user: User, seg: Dataset) -> None:
        """Accept a SEG as the final label of its series, and store it where viewers find it.

        Raises:
            LabelError: if it belongs to no image here, or is not a valid label of it.
            StorageError: if it cannot be stored.
            UpstreamError: if the PACS does not respond.
        """
        case = self.presented.case_of(referenced_series(seg))
        if case is not None:
            with temporary_folder() as folder:
                file, volume = self.presented.mask_of(seg, case, folder)
                version = self.submissions.submit(case, file, FINAL, {"label_info": label_info(volume)}, user, SOURCE)
                self.show(version, of_regular=True)
            return
        with temporary_folder() as folder:
            uid, file, info = unpack_segmentation(self.series, seg, folder)
            self.submissions.submit(uid, file, FINAL, {"label_info": info}, user, SOURCE)
        self.series.source.keep_segmentation(seg, uid)

    def show(self, version: LabelVersion, of_regular: bool = False) -> None:
        """Publish a final label of a series as a DICOM SEG, unless it was submitted as one.

        The SEG refers to the series' own slices, which any program can read; a series with uneven slices gets none.

        Args:
            version: the label version.
            of_regular: whether it was submitted as a SEG of the regular series.

        Raises:
            InputError, UpstreamError: if this is not possible; the label itself has been saved.
        """
        came_as_one = version.source == SOURCE and not version.restored_from and not of_regular
        if version.tag != FINAL or came_as_one or not self.series.is_series(version.image_id):
            return
        number = len(self.series.history.versions(version.image_id))
        preset = self.presets[version.preset]
        mask = self.series.history.mask(version)
        seg = self.of_mask(version.image_id, mask, preset, origin_of(version), number)
        if referenced_series(seg) == version.image_id:
            self.series.source.keep_segmentation(seg, version.image_id)


def segmented_series(store: SeriesDatastore, seg: Dataset) -> str:
    """The image that a SEG segments, by its referenced series or instances, otherwise by its position in space.

    Raises:
        LabelError: if it is none of the images.
    """
    uid, study = referenced_series(seg), str(seg.get("StudyInstanceUID", ""))
    if isinstance(store.source, FolderSource):
        index = store.source.index
        uid = index.name_in(study, uid)  # of two studies with a series of that UID, it is of its own study's
        if uid not in store.series():
            instances = (index.instance(sop, study) or index.instance(sop) for sop in sorted(referenced_instances(seg)))
            uid = next((instance.series for instance in instances if instance), uid)
    if not uid and not referenced_instances(seg):
        return series_in_its_place(store, seg)
    if (of_case := store.series_cases().channel_of(uid)) is not None:
        raise LabelError(f"DICOM SEG is of series {uid}, the channel {of_case[1]!r}; valid: of series {of_case[0]}")
    if uid not in store.series():
        raise LabelError(f"DICOM SEG is of series {uid or '(none)'}, which is none of the images here")
    return uid


def series_in_its_place(store: SeriesDatastore, seg: Dataset) -> str:
    """The only image in the frame of reference of a SEG whose voxels coincide with its frames.

    Raises:
        LabelError: if there is none, or several.
    """
    frame = str(seg.get("FrameOfReferenceUID") or "")
    near = store.source.in_frame_of_reference(frame, str(seg.get("StudyInstanceUID", ""))) if frame else []
    fitting = near if len(near) == 1 else [uid for uid in near if lies_on(store, uid, seg)]
    if len(fitting) == 1:
        logger.info(
            "DICOM SEG %s refers to no series; by its place it is of %s", seg.get("SOPInstanceUID", ""), fitting[0]
        )
        return fitting[0]
    several = ", ".join(fitting) or "none"
    raise LabelError(
        f"DICOM SEG refers to no series, and in its frame of reference {frame or '(none)'} it lies on the voxels of: "
        f"{several}; valid: a reference to its series, or the place of exactly one image"
    )


def lies_on(store: SeriesDatastore, uid: str, seg: Dataset) -> bool:
    """Whether a SEG can be read onto the voxels of a series."""
    with temporary_folder() as folder:
        try:
            read_segmentation(seg, store.read_series(uid, folder))
        except InputError as error:
            logger.info("series %s is not what DICOM SEG %s is of: %s", uid, seg.get("SOPInstanceUID", ""), error)
            return False
    return True


def unpack_segmentation(store: SeriesDatastore, seg: Dataset, folder: Path) -> tuple[str, Path, list[dict[str, Any]]]:
    """A SEG as a mask file.

    Returns:
        The image's id, the file in ``folder``, and its ``label_info``: name and value of every segment with voxels.

    Raises:
        LabelError: if its frames do not match its series.
    """
    uid = segmented_series(store, seg)
    fetched = folder / "series"
    fetched.mkdir()
    series = store.read_series(uid, fetched)
    volume = read_segmentation(seg, series)
    file = folder / "label.nii.gz"
    nib.save(nib.Nifti1Image(volume.labels, series.affine_ras), file)
    return uid, file, label_info(volume)


def label_info(volume: SegmentedVolume) -> list[dict[str, Any]]:
    """Names and values in 3D Slicer's form. An unnamed segment is named by its number, which nothing maps.

    Empty segments are listed too, since the user declared them, so that they are not missing. The background is listed,
    which distinguishes segment numbers from positions in 3D Slicer's list.
    """
    background = [{"name": "background", "idx": 0}]
    return background + [
        {"name": name or f"segment {number}", "idx": number} for number, name in sorted(volume.names.items())
    ]
