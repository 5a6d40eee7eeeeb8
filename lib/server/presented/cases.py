"""Presents cases that viewers cannot show as DICOM series, which are generated on demand and never written to disk.

A series is generated from a NIfTI or NRRD file. A tilted, uneven or mixed DICOM series is supplemented by a series of
the volume in which it is segmented.
"""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import ExplicitVRLittleEndian

from lib.configs.preset import Preset
from lib.datastore.label_files.label_file import read_label
from lib.datastore.series import SeriesDatastore
from lib.datastore.validation import to_grid
from lib.dicom.attributes import Json, dump, element, to_json
from lib.dicom.index import DicomIndex, SeriesEntry
from lib.dicom.presented.grid import SeriesGrid
from lib.dicom.presented.instances import (
    as_series,
    describe_case,
    describe_series,
    make_header,
    name_of,
    own_elements,
    rescale,
    store,
    uid_of,
)
from lib.dicom.presented.upright import UprightGrid
from lib.dicom.retrieve import Part, whole_file
from lib.dicom.segmentation_reader import SegmentedVolume, read_segmentation
from lib.dicom.segmentation_writer import Origin, write_segmentation
from lib.errors import ImageError, InputError, LabelError, NotFoundError, ParameterError
from lib.imagefiles.reading import read_planes
from lib.server.presented.labels import PresentedLabels
from lib.server.presented.regular import RegularSeries
from lib.storage.bounded_cache import BoundedCache
from lib.storage.json_files import read_json, write_json
from lib.transforms.intensity_range import MOST_SAMPLES, range_warning
from lib.transforms.volume import Grid, Volume, read_grid

logger = logging.getLogger("unetr.server")
SOFT_TISSUE_HU = (40.0, 400.0)
SHOWN_PERCENTILES = (1.0, 99.0)
BYTES_A_HEADER = 10 * 2**10
"""Approximate memory of a header and its DICOM JSON (measured: 8.1 kB, since shared elements are stored once)."""
BY_CASE = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID", "StudyDescription")


@dataclass(frozen=True)
class OpenedCase:
    """A case whose file has been read.

    Attributes:
        grid: grid of its series.
        affine_ras: affine of the file.
        described: the elements that all headers share.
        headers: headers of its instances, in the order of the slices; they refer to the elements of ``described``.
        stored: stored values (columns, rows, slices), as in Pixel Data.
    """

    grid: SeriesGrid | UprightGrid
    affine_ras: npt.NDArray[np.float64]
    described: Dataset
    headers: list[FileDataset]
    stored: npt.NDArray[np.uint16]

    @cached_property
    def metadata_texts(self) -> dict[str, str]:
        """The headers as DICOM JSON, by SOP Instance UID: as text, of which a garbage collection sees nothing."""
        alike = to_json(self.described)
        own = {str(header.SOPInstanceUID): to_json(own_elements(header, self.described)) for header in self.headers}
        return {uid: dump(dict(sorted({**alike, **data}.items()))).decode() for uid, data in own.items()}

    @property
    def size_bytes(self) -> int:
        """Approximate memory; for small slices, most of it is that of the headers."""
        return self.stored.nbytes + BYTES_A_HEADER * len(self.headers)


class PresentedCases:
    """Presents the file cases of a studies folder, and DICOM series that viewers cannot show, as series.

    Args:
        store: the studies.
        file_of: returns the file of a case, after a check that it lies inside the studies.
        presets: the served presets, by name. A case gets the first of their modalities that matches its intensities
            when it is opened, and the first of all before that.
        most_bytes: memory limit of opened cases; the case in use is kept whatever its size.
        enabled: whether cases are presented.
        index: index of the DICOM files of the folder.
        memory: file that stores the determined modalities for the next start; None for none.
    """

    def __init__(
        self,
        store: SeriesDatastore,
        file_of: Callable[[str], Path],
        presets: Mapping[str, Preset],
        most_bytes: int,
        enabled: bool = True,
        index: DicomIndex | None = None,
        memory: Path | None = None,
    ) -> None:
        self._store, self._file_of, self._enabled = store, file_of, enabled
        self.regular = RegularSeries(store, index if enabled else None)
        self.labels = PresentedLabels(self, store, presets)
        modalities: tuple[str, ...] = tuple(preset.modality for preset in presets.values())
        self._modalities, self._memory = modalities, memory if enabled else None
        self._modality_of = _remembered(self._memory)
        self._lock = threading.Lock()
        self._by_uid: dict[str, str] = {}
        self._listed: dict[str, SeriesEntry] = {}
        self._opened = BoundedCache(most_bytes)
        self._templates = {modality: to_json(describe_case("template", modality)) for modality in modalities}

    # ----------------------------------------------------------------------------------------------- which there are

    def entries(self) -> list[SeriesEntry]:
        """The series of all presented cases; none of them is opened."""
        if not self._enabled:
            return []
        cases = [image for image in self._store.list_images() if not self._store.is_series(image)]
        with self._lock:
            for gone in self._listed.keys() - set(cases):
                entry = self._listed.pop(gone)
                self._modality_of.pop(gone, None)
                for uid in (entry.study, entry.series):
                    self._by_uid.pop(uid, None)
            for case in cases:
                if case not in self._listed:
                    self._listed[case] = self._entry(case)
                    self._by_uid[self._listed[case].study] = self._by_uid[self._listed[case].series] = case
            return [*(self._listed[case] for case in cases), *self.regular.entries()]

    def case_of(self, uid: str) -> str | None:
        """The case whose study or series has this UID; None if there is none.

        The study of a regular series is that of its source, which is not one of these studies.
        """
        if not self._enabled or not uid.startswith("2.25."):
            return None
        source = self.regular.source_of(uid)
        if source is not None:
            return source
        if uid not in self._by_uid:
            self.entries()
        case = self._by_uid.get(uid)
        return case if case is not None and self._store.has_image(case) else None

    def attributes(self, image_id: str) -> dict[str, str]:
        """DICOM attributes of a case for clients; empty for a DICOM series."""
        if not self._enabled or not self._store.has_image(image_id) or self._store.is_series(image_id):
            return {}
        uids = {"StudyInstanceUID": uid_of(image_id, "study"), "SeriesInstanceUID": uid_of(image_id, "series")}
        return uids | {"PatientID": image_id, "Modality": self._modality(image_id)}

    def describe(self, case: str) -> Dataset:
        """The attributes that all instances of a case's series share, determined without opening its file.

        Raises:
            NotFoundError: if it is a DICOM series that viewers can show.
        """
        if self._store.is_series(case):
            return self.regular.describe(case)
        return describe_case(case, self._modality(case))

    def is_presented(self, image_id: str) -> bool:
        """Whether a series is generated from an image."""
        return self.regular.has(image_id) or bool(self.attributes(image_id))

    def _entry(self, case: str) -> SeriesEntry:
        study, series, frame = (uid_of(case, what) for what in ("study", "series", "frame"))
        summary: Json = dict(self._templates[self._modality(case)])
        for keyword, value in zip(BY_CASE, (study, series, frame, case[:64], case[:64]), strict=True):
            summary |= element(keyword, value)
        summary |= element("SOPInstanceUID", uid_of(case, "instance 1"))
        summary |= element("PatientName", {"Alphabetic": name_of(case)})
        return SeriesEntry(study, series, summary, 1, 1)

    # ----------------------------------------------------------------------------------------------- what is in them

    def metadata(self, study: str = "", series: str = "", sop: str = "", summary: bool = False) -> list[Json]:
        """DICOM JSON of the instances; ``summary`` is accepted and has no effect.

        Raises:
            NotFoundError: if there is none.
            ImageError: if the file cannot be read.
        """
        return [json.loads(text) for text in self.metadata_texts(study, series, sop)]

    def metadata_texts(self, study: str = "", series: str = "", sop: str = "") -> list[str]:
        """The cached JSON text of the instances' metadata.

        Raises:
            NotFoundError, ImageError: see :meth:`metadata`.
        """
        headers = self.headers(study, series, sop)
        texts = self.open(str(self.case_of(series or study))).metadata_texts
        return [texts[str(header.SOPInstanceUID)] for header in headers]

    def first(self, study: str, series: str = "", sop: str = "") -> Json:
        """DICOM JSON of a study or a series for a query, made without opening its file.

        Raises:
            NotFoundError, ImageError: see :meth:`metadata`, for one instance.
        """
        case = self.case_of(series or study)
        if sop or case is None:
            return self.metadata(study, series, sop)[0]
        return to_json(self.describe(case))

    def beside(self, study: str) -> list[FileDataset]:
        """The instances of a study's regular series, without pixels, and the labels on them.

        A series whose source is damaged is left out, so that the rest of the study can be sent.
        """
        instances: list[FileDataset] = []
        for case in self.regular.sources(study):
            try:
                label = self.labels.of_case(case)
                instances += [*self.open(case).headers, *([self.labels.instance(label)] if label is not None else [])]
            except (InputError, NotFoundError) as error:
                logger.warning("study %s is answered without the regular series of %s: %s", study, case, error)
        return instances

    def headers(self, study: str, series: str = "", sop: str = "") -> list[FileDataset]:
        """The instances that an address names, without pixels.

        Raises:
            NotFoundError, ImageError: see :meth:`metadata`.
        """
        case = self.case_of(series or study)
        if case is None or study not in ("", str(self.describe(case).StudyInstanceUID)):
            raise NotFoundError("instance below", "/".join(filter(None, (study, series, sop))))
        named = [header for header in self.open(case).headers if sop in ("", header.SOPInstanceUID)]
        if not named:
            raise NotFoundError("instance below", "/".join(filter(None, (study, series, sop))))
        return named

    def open(self, case: str) -> OpenedCase:
        """Open a case, unless it is cached.

        Raises:
            NotFoundError, ForbiddenError, ImageError: if this is not possible.
        """
        key = case, self._store.stamp(case)
        return self._opened.get(key, lambda: self._read(case), lambda opened: opened.size_bytes)

    def _read(self, case: str) -> OpenedCase:
        """Read a case's file twice, plane by plane: for the range of its values, and to store them."""
        file = self._file_of(case)
        placed = read_grid(file)
        is_series = self._store.is_series(case)
        kind = UprightGrid if is_series else SeriesGrid
        grid: SeriesGrid | UprightGrid = kind.of(placed.shape, placed.affine_ras)
        seen = _survey(file, placed.shape)
        scale = rescale(seen.lowest, seen.highest, seen.whole)
        if not is_series:
            self._learn_modality(case, seen.sample)
        described = self.describe(case)
        window = self._window(seen.sample, described.Modality)
        name = "regular instance" if is_series else "instance"
        uids = [uid_of(case, f"{name} {number + 1}") for number in range(grid.shape[2])]
        alike = describe_series(described, grid, window, scale)
        headers = [make_header(alike, uid, grid, number) for number, uid in enumerate(uids)]
        stored = np.empty(placed.shape, dtype=np.uint16, order="F")
        for index, plane in enumerate(_planes(file, placed.shape)):
            stored[:, :, index] = store(plane, *scale)
        return OpenedCase(grid, placed.affine_ras, alike, headers, grid.to_series(stored))  # type: ignore[arg-type]

    def _modality(self, case: str) -> str:
        known, stamp = self._modality_of.get(case, ("", ""))
        is_known = known in self._modalities and stamp == self._store.stamp(case)
        return known if is_known else self._modalities[0]

    def _learn_modality(self, case: str, sample: npt.NDArray[np.float32]) -> None:
        """Determine the first served modality that matches a case's intensities, and use it from then on."""
        fitting = (modality for modality in self._modalities if not range_warning(sample, modality))
        modality = next(fitting, self._modalities[0])
        learnt = modality, self._store.stamp(case)
        with self._lock:
            if self._modality_of.get(case) == learnt:
                return
            self._modality_of[case] = learnt
            self._listed.pop(case, None)
            if self._memory is not None:
                _remember(self._memory, self._modality_of)

    @staticmethod
    def _window(sample: npt.NDArray[np.float32], modality: str) -> tuple[float, float]:
        if modality == "CT":
            return SOFT_TISSUE_HU
        low, high = np.percentile(sample, SHOWN_PERCENTILES)
        return float(low + high) / 2, float(high - low)

    def pixels(self, header: FileDataset) -> bytes:
        """Pixel Data of an instance: its rows, as little-endian numbers."""
        opened = self.open(str(self.case_of(str(header.SeriesInstanceUID))))
        return opened.stored[:, :, int(header.InstanceNumber) - 1].T.astype("<u2").tobytes()

    def frame(self, header: FileDataset, numbers: tuple[int, ...]) -> list[Part]:
        """The only frame of an instance.

        Raises:
            ParameterError: for another frame number.
        """
        wrong = [number for number in numbers if number != 1]
        if wrong:
            raise ParameterError("frames", wrong[0], "1")
        kind = f"application/octet-stream; transfer-syntax={ExplicitVRLittleEndian}"
        return [Part(kind, self.pixels(header)) for _ in numbers]

    def with_pixels(self, header: FileDataset) -> FileDataset:
        """A complete instance."""
        # a data set made from the header would share its elements, and every header would keep its pixels
        whole = FileDataset("", {}, file_meta=header.file_meta, preamble=header.preamble)
        whole.update(header)
        whole.is_little_endian, whole.is_implicit_VR = True, False
        content = self.pixels(header)
        whole.PixelData = content + bytes(len(content) % 2)
        whole["PixelData"].VR = "OW"
        return whole

    def file(self, header: FileDataset) -> Part:
        """An instance as a PS3.10 file."""
        if "PixelData" in header:
            return whole_file(header)
        buffer = io.BytesIO()
        self.with_pixels(header).save_as(buffer, write_like_original=False)
        return Part(f"application/dicom; transfer-syntax={ExplicitVRLittleEndian}", buffer.getvalue())

    # ------------------------------------------------------------------------------------------------------- masks

    def mask_of(self, seg: Dataset, case: str, folder: Path) -> tuple[Path, SegmentedVolume]:
        """A SEG of a presented series as a mask file on the case's own grid.

        Raises:
            LabelError: if its frames do not match the series.
        """
        opened = self.open(case)
        volume = read_segmentation(seg, as_series(opened.headers, self._file_of(case)))
        file = folder / "label.nii.gz"
        nib.save(nib.Nifti1Image(np.ascontiguousarray(opened.grid.to_file(volume.labels)), opened.affine_ras), file)
        return file, volume

    def submitted_on_file(self, case: str, file: Path, folder: Path) -> Path:
        """A mask submitted for a case's series, as a file for :meth:`Submissions.submit`.

        If the axes of the case's file are orthogonal, series and file coincide, and the mask is returned unchanged,
        with the names in its header.

        Raises:
            ImageError, LabelError: see :meth:`label_on_file`.
        """
        opened = self.open(case)
        return file if opened.grid.lies_on_file(opened.affine_ras) else self.label_on_file(case, file, folder)

    def label_on_file(self, case: str, file: Path, folder: Path) -> Path:
        """A mask on the grid of a case's series, transferred voxel by voxel to the grid of the case's file.

        Raises:
            ImageError, LabelError: if the case or the mask cannot be read, or if the mask has another grid.
        """
        opened = self.open(case)
        label = read_label(file)
        if label.layered:
            raise LabelError("the label has several layers; valid for an image shown as a DICOM series: one layer")
        voxels = to_grid(label.volume, Grid(opened.grid.shape, opened.grid.affine_ras))[0].voxels
        turned = np.ascontiguousarray(opened.grid.to_file(voxels))
        nib.save(nib.Nifti1Image(turned, opened.affine_ras), folder / "on-file.nii.gz")
        return folder / "on-file.nii.gz"

    def on_file(self, case: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters with points converted from a viewer's (column, row, slice) to indices of the file.

        A list of triples of numbers is a list of points; ``roi`` has three pairs. Other values are unchanged, and are
        validated when they are parsed.
        """
        changed = dict(params)
        places = {name: value for name, value in params.items() if _is_place(name, value)}
        if not places:
            return changed  # the file need not be read
        grid = self.open(case).grid
        for name, value in places.items():
            if name == "roi":
                ends = [grid.index_in_file(value[start::2]) for start in (0, 1)]
                changed[name] = [end for pair in zip(*ends, strict=True) for end in pair]
            else:
                changed[name] = [grid.index_in_file(point) for point in value]
        return changed

    def as_segmentation(self, case: str, labels: npt.NDArray[Any], preset: Preset, origin: Origin) -> Dataset:
        """A mask on the case's own grid as a SEG of the series that presents it.

        Raises:
            ImageError, LabelError: see :func:`write_segmentation`.
        """
        series = as_series(self.open(case).headers, self._file_of(case))
        return write_segmentation(self.on_series(case, labels).voxels, series, preset, origin)

    def on_series(self, case: str, labels: npt.NDArray[Any]) -> Volume:
        """A mask on the case's own grid, on the grid of its series."""
        opened = self.open(case)
        return Volume(np.ascontiguousarray(opened.grid.to_series(labels)), opened.grid.affine_ras)


def _remembered(memory: Path | None) -> dict[str, tuple[str, str]]:
    """Stored modality and stamp of the cases; empty if the file is damaged."""
    try:
        kept = read_json(memory) if memory is not None else {}
        return {str(case): (str(modality), str(stamp)) for case, (modality, stamp) in kept.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is made anew: %s", memory, error)
        return {}


def _remember(memory: Path, modalities: Mapping[str, tuple[str, str]]) -> None:
    """Store the modalities for the next start; if this fails, they are determined again."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, dict(modalities))
    except OSError as error:
        logger.warning("the modalities of cases are not kept: %s", error)


@dataclass(frozen=True)
class _Survey:
    """Statistics of a file's values, which are computed before they are stored.

    Attributes:
        lowest: smallest value.
        highest: largest value.
        whole: whether all values are whole numbers.
        sample: evenly spaced values of the file.
    """

    lowest: float
    highest: float
    whole: bool
    sample: npt.NDArray[np.float32]


def _survey(file: Path, shape: tuple[int, int, int]) -> _Survey:
    step = max(1, int(np.prod(shape)) // MOST_SAMPLES)
    lows, highs, drawn, whole, done = [], [], [], True, 0
    for plane in _planes(file, shape):
        lows.append(float(plane.min()))
        highs.append(float(plane.max()))
        whole = whole and np.array_equal(plane, np.rint(plane))
        drawn.append(plane.ravel(order="F")[-done % step :: step])
        done += plane.size
    return _Survey(min(lows), max(highs), whole, np.concatenate(drawn))


def _planes(file: Path, shape: tuple[int, int, int]) -> Iterator[npt.NDArray[np.float32]]:
    """The planes of a file whose header has been read, without NaN and infinity.

    Raises:
        ImageError: if the file cannot be read, or was replaced.
    """
    count = 0
    for plane in read_planes(file):
        if plane.shape != shape[:2] or count == shape[2]:
            raise ImageError(f"image {file.name!r} was replaced while it was read; try again")
        yield np.nan_to_num(plane)
        count += 1
    if count != shape[2]:
        raise ImageError(f"image {file.name!r} was replaced while it was read; try again")


def _is_place(name: str, value: Any) -> bool:
    """Whether a parameter is a box or a list of points."""
    if name == "roi":
        return _are_numbers(value, 6)
    return isinstance(value, list) and bool(value) and all(_are_numbers(point, 3) for point in value)


def _are_numbers(value: Any, count: int) -> bool:
    numbers = isinstance(value, list) and len(value) == count
    return numbers and all(isinstance(one, int | float) and not isinstance(one, bool) for one in value)


class Searched:
    """Searches an index of files and the presented series as one.

    Args:
        index: index of DICOM files.
        presented: presented files.
    """

    def __init__(self, index: Any, presented: PresentedCases) -> None:
        self._index, self._presented = index, presented

    def entries(self) -> list[SeriesEntry]:
        """All series."""
        return [*self._index.entries(), *self._presented.entries(), *self._presented.labels.entries()]

    def metadata(self, study: str = "", series: str = "", sop: str = "", summary: bool = False) -> list[Json]:
        """DICOM JSON of the instances of a study, a series, or one instance."""
        label = self._presented.labels.find(series)
        if label is not None:
            return [to_json(self._presented.labels.instance(label, study, sop))]
        case = self._presented.case_of(series or study)
        if case is not None:
            of_case = self._presented.metadata(study, series, sop, summary)
            beside = None if series else self._presented.labels.of_case(case)
            return of_case + ([] if beside is None else [to_json(self._presented.labels.instance(beside))])
        instances: list[Json] = self._index.metadata(study, series, sop, summary)
        if study and not series and not sop:
            instances = instances + [to_json(instance) for instance in self._presented.beside(study)]
        return instances

    def first(self, study: str, series: str = "", sop: str = "") -> Json:
        """DICOM JSON of the first instance of a study, a series, or of one instance; no presented file is opened."""
        label = self._presented.labels.find(series)
        if label is not None and not sop:
            return self._presented.labels.first(label)
        if label is not None:
            return to_json(self._presented.labels.instance(label, study, sop))
        if self._presented.case_of(series or study) is not None:
            return self._presented.first(study, series, sop)
        instance: Json = self._index.first(study, series, sop)
        return instance
