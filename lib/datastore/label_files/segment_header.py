"""Parses the segments in the header of 3D Slicer's ``.seg.nrrd``, and merges its layers into one mask.

Keys are ``Segment0_Name``, ``Segment0_LabelValue``, ``Segment0_Layer`` and so on, in the order of Slicer's list (see
"Segmentation file format" in the 3D Slicer documentation). Files of Slicer before 4.11 have a layer for each segment
and no ``LabelValue``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.configs.preset import canonical_name
from lib.datastore.label_names import LARGEST_VALUE, LONGEST_NAME, MOST_NAMES, NamedValue, is_no_label
from lib.errors import LabelError

_KEY = re.compile(r"Segment(\d{1,6})_(Name|ID|LabelValue|Layer)")


@dataclass(frozen=True)
class Segment:
    """A segment as the header describes it.

    Attributes:
        name: the name that the user chose.
        value: value of its voxels in its layer.
        layer: index of its layer; segments of different layers may overlap.
    """

    name: str
    value: int
    layer: int = 0


def parse_segments(header: Mapping[str, str]) -> tuple[Segment, ...]:
    """The segments in an NRRD header's key-value pairs, in the order of Slicer's list; empty for other files.

    Raises:
        LabelError: if a segment has no name or no value, or if two names share a value.
    """
    fields: dict[int, dict[str, str]] = {}
    for key, text in header.items():
        matched = _KEY.fullmatch(key)
        if matched:
            fields.setdefault(int(matched[1]), {})[matched[2]] = text.strip()
    if len(fields) > MOST_NAMES:
        raise LabelError(f"the file's header describes {len(fields)} segments; valid: at most {MOST_NAMES}")
    segments = tuple(_parse_segment(number, fields[number]) for number in sorted(fields))
    _check_distinct(segments)
    return segments


def names_of(segments: Sequence[Segment], label_info: Sequence[NamedValue]) -> dict[int, str]:
    """Names of the values of a single-layer mask: those of the header, and those that only ``label_info`` has.

    Raises:
        LabelError: see :func:`check_label_info`.
    """
    names = {segment.value: segment.name for segment in segments}
    if check_label_info(segments, label_info):
        return names
    return {entry.value: entry.name for entry in label_info if entry.value} | names


def check_label_info(segments: Sequence[Segment], label_info: Sequence[NamedValue]) -> bool:
    """Check that ``label_info`` agrees with the names and values of the header, in one of two forms.

    3D Slicer's MONAI Label module sends the position in its list of segments as ``idx``, whatever the values are; other
    clients send the values.

    Returns:
        Whether ``idx`` counts positions in the list of segments; otherwise it is the value.

    Raises:
        LabelError: if it agrees with the header in neither form.
    """
    if all(_is_at_position(entry, segments) for entry in label_info):
        return True
    wrong = [entry for entry in label_info if _contradicts(entry, segments)]
    if not wrong:
        return False
    described = ", ".join(f"{segment.value}: {segment.name!r}" for segment in segments[:20])
    raise LabelError(
        f"label_info gives {wrong[0].name!r} the idx {wrong[0].value}, and the header of the file contradicts it: "
        f"it describes {described}; valid: label_info with the same names for the same values, or none"
    )


def flatten(layers: npt.NDArray[np.generic], segments: Sequence[Segment]) -> npt.NDArray[np.uint16]:
    """Merge all layers into one mask, in which each voxel has the index of its segment, counted from 1.

    Args:
        layers: shape (layers, X, Y, Z).
        segments: result of :func:`parse_segments`.

    Raises:
        LabelError: if a layer has a value without a segment, or if two labels share a voxel, which a label map cannot
            represent.
    """
    mask = np.zeros(layers.shape[1:], dtype=np.uint16)
    explained = [{s.value for s in segments if s.layer == layer} | {0} for layer in range(len(layers))]
    for layer, values in enumerate(explained):
        present = np.unique(layers[layer])
        strange = [value for value in present.tolist() if value not in values]
        if strange:
            raise LabelError(
                f"layer {layer} of the file has the value {strange[0]:g}, which no segment in its header has"
            )
    for number, segment in enumerate(segments, start=1):
        if is_no_label(segment.name) or segment.layer >= len(layers):
            continue
        drawn = layers[segment.layer] == segment.value
        shared = drawn & (mask != 0)
        if shared.any():
            other = segments[int(mask[shared][0]) - 1]
            if canonical_name(other.name) != canonical_name(segment.name):
                raise LabelError(
                    f"the segments {other.name!r} and {segment.name!r} overlap in {np.count_nonzero(shared)} voxels; "
                    "valid: one label a voxel (do not allow overlap in Slicer's Segment Editor)"
                )
        mask[drawn] = number
    return mask


def _parse_segment(number: int, fields: Mapping[str, str]) -> Segment:
    name = fields.get("Name") or fields.get("ID") or ""
    if not canonical_name(name) or len(name) > LONGEST_NAME:
        raise LabelError(
            f"segment {number} in the header of the file has the name {name!r:.100}; valid: a label's name"
        )
    if "LabelValue" not in fields and "Layer" not in fields:  # before Slicer 4.11
        return Segment(name, 1, number)
    value, layer = fields.get("LabelValue", "1"), fields.get("Layer", "0")
    if not (value.isdecimal() and layer.isdecimal() and 0 < int(value) <= LARGEST_VALUE and len(layer) < 6):
        raise LabelError(
            f"segment {name!r} in the header of the file has the value {value!r:.20} in layer {layer!r:.20}; "
            f"valid: a whole number from 1 to {LARGEST_VALUE}, and a layer from 0"
        )
    return Segment(name, int(value), int(layer))


def _check_distinct(segments: Sequence[Segment]) -> None:
    by_place: dict[tuple[int, int], str] = {}
    for segment in segments:
        before = by_place.setdefault((segment.layer, segment.value), segment.name)
        if canonical_name(before) != canonical_name(segment.name):
            raise LabelError(
                f"the header of the file calls the value {segment.value} both {before!r} and {segment.name!r}"
            )


def _is_at_position(entry: NamedValue, segments: Sequence[Segment]) -> bool:
    return 0 < entry.value <= len(segments) and _same(entry.name, segments[entry.value - 1].name)


def _contradicts(entry: NamedValue, segments: Sequence[Segment]) -> bool:
    of_value = [segment.name for segment in segments if segment.value == entry.value]
    of_name = [segment.value for segment in segments if _same(entry.name, segment.name)]
    if of_value:
        return not any(_same(entry.name, name) for name in of_value)
    return bool(of_name)


def _same(one: str, other: str) -> bool:
    return canonical_name(one) == canonical_name(other)
