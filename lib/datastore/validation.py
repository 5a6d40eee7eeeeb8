"""Validates a submitted mask: reads it, compares its grid with the image's, and maps its values to the preset's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from lib.configs.preset import Preset
from lib.datastore.label_files.label_file import is_kept_as, read_label
from lib.datastore.label_files.segment_header import Segment, check_label_info, names_of
from lib.datastore.label_names import (
    LARGEST_VALUE,
    Completeness,
    Mapped,
    NamedValue,
    choose_reading,
    map_values,
    parse_entries,
)
from lib.errors import LabelError
from lib.imagefiles.compression import pack_gzip
from lib.imagefiles.geometry import set_affine
from lib.transforms.volume import Grid, Volume, apart_mm, reading_warning

MaskArray = npt.NDArray[np.uint8 | np.uint16]
MOST_VALUES = 1000
ROUNDING = 1e-6
"""Largest relative distance of a value from a whole number."""
FROM_HEADER = "the names were taken from the segments in the header of the file"


@dataclass(frozen=True)
class CheckedLabel:
    """A label that matches its image and the preset.

    Attributes:
        voxels: label values of the preset on the image's grid, shape (X, Y, Z).
        file: a compressed 3D NIfTI file of the smallest integer type on the image's grid: the submitted file if it has
            this form and the same content, otherwise a new one.
        mapped: mapping of the values.
        notes: changes, as sentences.
    """

    voxels: MaskArray
    file: Path
    mapped: Mapped
    notes: tuple[str, ...]


def check_label(file: Path, image: Grid, preset: Preset, info: Mapping[str, Any], folder: Path) -> CheckedLabel:
    """Validate a label, and convert it to the preset's values on its image's grid.

    Args:
        file: the submitted mask.
        image: grid of its image.
        preset: the preset of its label names.
        info: information sent with it: ``label_info``, ``complete``, ``missing_labels``. The names in the header of a
            ``.seg.nrrd`` take precedence over ``label_info``, which must not contradict them.
        folder: folder for a new file, if one is needed.

    Raises:
        LabelError: if it cannot be read, has another grid, is not integer-valued, or has unexplained values; the
            message states which.
    """
    entries, stated = parse_entries(info.get("label_info")), Completeness.parse(info)
    label = read_label(file, image)
    volume, reoriented = to_grid(label.volume, image)
    voxels = _whole_numbers(volume.voxels)
    present = _values_in(voxels)
    names, read_as = _names(present, label.segments, label.layered, entries, preset)
    mapped = map_values(present, names if label.segments or info.get("label_info") else None, preset, stated)
    changed = any(value != index for value, index in mapped.values.items())
    kept = _apply(voxels, mapped.values) if changed else smallest(voxels)
    notes = tuple(note for note in (reading_warning(image), reoriented, read_as) if note) + mapped.notes
    if changed or reoriented or not _lies_alike(label.volume, image) or not is_kept_as(file, label.header, kept.dtype):
        file = write_label(kept, image.affine_ras, folder / "kept.nii.gz")
    return CheckedLabel(kept, file, mapped, notes)


def as_kept(file: Path, folder: Path) -> Path:
    """A mask that this server computed, in the form in which labels are stored: NIfTI of the smallest integer type.

    Raises:
        LabelError: if it cannot be read, or has values that are not whole numbers.
    """
    label = read_label(file)
    voxels = smallest(_whole_numbers(label.volume.voxels))
    if is_kept_as(file, label.header, voxels.dtype):
        return file
    return write_label(voxels, label.volume.affine_ras, folder / "kept.nii.gz")


def smallest(voxels: npt.NDArray[np.uint16]) -> MaskArray:
    """The same values in the smallest type that can represent them."""
    return voxels.astype(np.uint8) if int(voxels.max(initial=0)) <= np.iinfo(np.uint8).max else voxels


def to_grid(label: Volume, image: Grid) -> tuple[Volume, str]:
    """Reorder the axes of a mask to its image's grid, if only their order or direction differs, without resampling.

    If ITK and nibabel read one of the two files differently, the mask may lie on either grid: ITK's grid is tried
    first, and a grid that needs no reordering is preferred.

    Returns:
        The mask, and a sentence on the change; empty if there was none.

    Raises:
        LabelError: if it has another grid.
    """
    for at, place in product(label.grid.readings, image.readings):
        if lies_on(at, place):
            return Volume(label.voxels, image.affine_ras), _read_as(at, place, label, image)
    apart = []
    for at, place in product(label.grid.readings, image.readings):
        turned = _turn(Volume(label.voxels, at.affine_ras), place)
        if turned is not None and lies_on(turned.grid, place):
            before, after = (_axcodes(affine) for affine in (at.affine_ras, place.affine_ras))
            note = f"the mask came in the orientation {before} and was turned to its image's, {after}"
            return Volume(turned.voxels, image.affine_ras), note
        apart += [apart_mm(one, place) for one in (at, turned and turned.grid) if one and one.shape == image.shape]
    if not apart:
        raise LabelError(f"the label has shape {label.voxels.shape}; valid: its image's {image.shape}")
    raise LabelError(f"the label lies up to {min(apart):.3g} mm away from its image: their affines differ")


def lies_on(label: Grid, image: Grid) -> bool:
    """Whether a mask has the shape and position of its image."""
    return label.shape == image.shape and apart_mm(label, image) <= image.tolerance_mm


def write_label(voxels: MaskArray, affine_ras: npt.NDArray[np.float64], path: Path) -> Path:
    """Write a mask as ``.nii.gz``."""
    image = nib.Nifti1Image(voxels, affine_ras)
    set_affine(image, affine_ras)
    path.write_bytes(pack_gzip(image.to_bytes()))
    return path


def _read_as(at: Grid, place: Grid, label: Volume, image: Grid) -> str:
    """A sentence if a mask matches its image only as nibabel reads one of them; empty if it matches for ITK."""
    whose = [
        name
        for name, one, itk in (("the mask", at, label.affine_ras), ("its image", place, image.affine_ras))
        if one.affine_ras is not itk
    ]
    if not whose:
        return ""
    return (
        f"the mask lies on its image as nibabel reads {' and '.join(whose)}, which ITK (3D Slicer) reads differently; "
        "it is kept on the image's grid as ITK reads that"
    )


def _lies_alike(label: Volume, image: Grid) -> bool:
    """Whether the mask matches its image for nibabel too."""
    return lies_on(label.grid.readings[-1], image.readings[-1])


def _names(
    present: set[int], segments: Sequence[Segment], layered: bool, entries: Sequence[NamedValue], preset: Preset
) -> tuple[dict[int, str], str]:
    """Names of a mask's values, and a sentence if they are not simply those of ``label_info``."""
    entries = [NamedValue(_preset_name(entry.name, preset), entry.value) for entry in entries]
    if not segments:
        return choose_reading(present, entries)
    segments = [replace(segment, name=_preset_name(segment.name, preset)) for segment in segments]
    if layered:
        check_label_info(segments, entries)
        return {number: segment.name for number, segment in enumerate(segments, start=1)}, FROM_HEADER
    return names_of(segments, entries), FROM_HEADER


def _preset_name(name: str, preset: Preset) -> str:
    """The preset's own name of a label, so that aliases do not count as contradictions."""
    label = preset.find_label(name)
    return label.name if label is not None else name


def _turn(label: Volume, image: Grid) -> Volume | None:
    """The mask with its axes in the image's order and direction; None if they are not parallel to the image's."""
    steps = np.linalg.inv(image.affine_ras[:3, :3]) @ label.affine_ras[:3, :3]
    axis = np.abs(steps).argmax(axis=0)
    if sorted(axis) != [0, 1, 2]:
        return None
    orientation = np.stack([axis, np.sign(steps[axis, range(3)])], axis=1)
    voxels = nib.orientations.apply_orientation(label.voxels, orientation)
    return Volume(voxels, label.affine_ras @ nib.orientations.inv_ornt_aff(orientation, label.voxels.shape))


def _whole_numbers(voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The voxels as whole numbers.

    Raises:
        LabelError: naming a value that is not a whole number.
    """
    low, high = float(voxels.min()), float(voxels.max())
    if not np.isfinite([low, high]).all():
        raise LabelError("the label has values that are not finite numbers")
    if low < -ROUNDING or high > LARGEST_VALUE:
        raise LabelError(f"the label has the value {low if low < 0 else high:g}; valid: 0 to {LARGEST_VALUE}")
    whole = np.rint(voxels).astype(np.uint16)
    other = voxels[whole != voxels]
    # other tools write 0.9999999 instead of 1
    broken = other[np.abs(np.rint(other) - other) > ROUNDING * np.maximum(other, 1)]
    if broken.size:
        raise LabelError(f"the label has values that are no whole numbers, such as {broken[0]!s}")
    return whole


def _values_in(voxels: npt.NDArray[np.uint16]) -> set[int]:
    """The distinct values except 0.

    Raises:
        LabelError: if there are more than any preset has labels.
    """
    counts = np.zeros(LARGEST_VALUE + 1, dtype=bool)
    counts[voxels.ravel()] = True
    values = np.flatnonzero(counts[1:]) + 1
    if len(values) > MOST_VALUES:
        raise LabelError(f"the label has {len(values)} different values; valid: at most {MOST_VALUES}")
    return {int(value) for value in values}


def _apply(voxels: npt.NDArray[np.uint16], values: Mapping[int, int]) -> MaskArray:
    highest = max((0, *values.values()))
    table: MaskArray = np.zeros(LARGEST_VALUE + 1, dtype=np.uint8 if highest <= 255 else np.uint16)
    for value, index in values.items():
        table[value] = index
    return table[voxels]


def _axcodes(affine_ras: npt.NDArray[np.float64]) -> str:
    return "".join(nib.aff2axcodes(affine_ras))
