"""Writes a mask as a DICOM Segmentation (PS3.3, A.51), with segments, creator and references to the source images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from lib.configs.preset import Code, Label, Preset, canonical_name
from lib.dicom.attributes import TYPE_2
from lib.dicom.files import reading
from lib.dicom.series import UNEVEN, Series
from lib.errors import ImageError, LabelError

MANUFACTURER = "monailabel-unetr"
OWN_SCHEME = "99UNETR"
"""Private coding scheme (PS3.16, 8) for labels without a code in the preset."""
ANATOMICAL_STRUCTURE = Code(value="123037004", meaning="Anatomical Structure")
ARTIFICIAL_INTELLIGENCE = Code(value="123110", meaning="Artificial Intelligence", scheme="DCM")
SERIES_NUMBER = 300
D65 = np.array([0.95047, 1.0, 1.08883])
SRGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


@dataclass(frozen=True)
class Origin:
    """How a mask was created.

    Attributes:
        kind: computed by a network, corrected by a person, or drawn by a person.
        model_version: version of the network.
        creator: the person, if there was one.
    """

    kind: Literal["AUTOMATIC", "SEMIAUTOMATIC", "MANUAL"] = "AUTOMATIC"
    model_version: str = "unknown"
    creator: str = ""

    @property
    def description(self) -> str:
        """Series Description; at most 64 characters."""
        creator = person_name(self.creator).removesuffix("^")
        words = {"AUTOMATIC": "UNETR", "SEMIAUTOMATIC": "UNETR, corrected", "MANUAL": "Drawn by hand"}
        return words[self.kind] + (f" by {creator}" if creator and self.kind != "AUTOMATIC" else "")


def write_segmentation(
    labels: npt.NDArray[np.generic], series: Series, preset: Preset, origin: Origin, number: int = 1
) -> Dataset:
    """Create a binary SEG with a segment for each label of the preset, with or without voxels.

    Args:
        labels: shape (columns, rows, slices) of ``series``; values of the preset, 0 is background.
        series: the segmented series.
        preset: provides names, codes and colours.
        origin: how the mask was created.
        number: number of this segmentation of the series; part of the Series Number.

    Returns:
        A data set that is ready to be saved or sent. An empty mask yields empty frames.

    Raises:
        LabelError: for another shape, or values that the preset does not have.
        ImageError: for a series that lacks attributes required by a SEG, or whose slices are unevenly spaced.
    """
    if series.even:
        raise ImageError(f"series {series.uid} {UNEVEN}")
    if labels.shape != series.shape:
        raise LabelError(f"mask of shape {labels.shape} is not on its series' grid; valid: {series.shape}")
    unknown = sorted(set(np.unique(labels).tolist()) - {0, *preset.label_indices.values()})
    if unknown:
        raise LabelError(f"mask has the values {unknown[:8]}; valid: {preset.label_indices} and 0")
    with reading(f"series {series.uid} cannot be referred to by a DICOM SEG"):
        seg = hd.seg.Segmentation(
            source_images=[_complete(header) for header in series.sources],
            pixel_array=_planes_as_stored(labels, series),
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[_describe_segment(label, series, preset, origin) for label in preset.labels],
            series_instance_uid=str(generate_uid()),
            series_number=SERIES_NUMBER + number,
            sop_instance_uid=str(generate_uid()),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=preset.name,
            software_versions=origin.model_version[:64],
            device_serial_number="1",
            content_label="SEGMENTATION",
            content_description=preset.description[:64] or preset.name,
            content_creator_name=person_name(origin.creator) or None,
            omit_empty_frames=bool(labels.any()),
        )
    seg.SpecificCharacterSet = "ISO_IR 192"  # label names may be in any script
    seg.SeriesDescription = origin.description[:64]
    return seg


def person_name(text: str) -> str:
    """A user's name as a PN value with one component, without delimiters; "" for none."""
    name = "".join(c for c in text if c.isprintable() and c not in "\\^=")[:63].strip()
    return f"{name}^" if name else ""


def cielab(color: Sequence[int]) -> list[int]:
    """sRGB, 0 to 255, as defined in PS3.3 C.10.7.1.1: L*, a*, b* (D65) scaled to 16 bits.

    >>> cielab((255, 255, 255))
    [65535, 32896, 32896]
    """
    rgb = np.array(color[:3]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = SRGB_TO_XYZ @ linear / D65
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lab = np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
    scaled = np.rint((lab + np.array([0, 128, 128])) / [100, 255, 255] * 65535)
    return [int(value) for value in np.clip(scaled, 0, 65535)]


def _planes_as_stored(labels: npt.NDArray[np.generic], series: Series) -> npt.NDArray[np.uint8]:
    """Planes (frames, rows, columns) in the order of the source images, or of the frames of a multi-frame image."""
    planes = np.ascontiguousarray(labels.T.astype(np.uint8))
    if len(series.sources) == len(series.frames):
        return planes
    if len(series.sources) > 1:
        raise ImageError(f"series {series.uid} is spread over several multi-frame images; valid: one such image")
    ordered = np.zeros((int(series.header.NumberOfFrames), *planes.shape[1:]), dtype=np.uint8)
    ordered[[frame.number for frame in series.frames]] = planes
    return ordered


def _complete(header: Dataset) -> Dataset:
    """The header with all required attributes, which are copied to the SEG."""
    missing = [keyword for keyword in TYPE_2 if keyword not in header]
    if not missing:
        return header
    completed = Dataset(header)
    for keyword in missing:
        setattr(completed, keyword, "")
    return completed


def _describe_segment(label: Label, series: Series, preset: Preset, origin: Origin) -> hd.seg.SegmentDescription:
    algorithm = hd.AlgorithmIdentificationSequence(
        name=f"UNETR {preset.name}"[:64], family=_coded(ARTIFICIAL_INTELLIGENCE), version=origin.model_version[:64]
    )
    segment = hd.seg.SegmentDescription(
        segment_number=label.index,
        segment_label=label.name,
        segmented_property_category=_coded(ANATOMICAL_STRUCTURE),
        segmented_property_type=_coded(label.code or _code_of_our_own(label)),
        algorithm_type=origin.kind,
        algorithm_identification=None if origin.kind == "MANUAL" else algorithm,
        # the same organ of the same image keeps its tracking UID across versions
        tracking_uid=str(generate_uid(entropy_srcs=[f"{series.uid}|", f"{preset.name}|", label.name])),
        tracking_id=f"{preset.name} {label.name}"[:64],
    )
    if label.modifier:
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
            _coded(label.modifier)
        ]
    segment.RecommendedDisplayCIELabValue = cielab(label.color)
    return segment


def _coded(code: Code) -> hd.sr.CodedConcept:
    return hd.sr.CodedConcept(code.value, code.scheme, code.meaning)


def _code_of_our_own(label: Label) -> Code:
    """A private code for a label without a terminology code: its name, or a digest of an invalid name."""
    name = canonical_name(label.name).upper()
    fits = name.isascii() and len(name) <= 16
    value = name if fits else hashlib.sha256(name.encode()).hexdigest()[:16].upper()
    return Code(value=value, meaning=label.name, scheme=OWN_SCHEME)
