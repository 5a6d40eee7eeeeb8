"""Responses to clicks and scribbles: a mask of the labels that were prompted, and its description."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.configs.preset import Preset
from lib.interaction.merge import Part
from lib.transforms.postprocess import measure_labels
from lib.transforms.volume import Affine, Grid, reading_warning

LabelArray = npt.NDArray[np.uint8]


def only_labels(labels: LabelArray, values: Collection[int], boxes: Sequence[Part | None]) -> LabelArray:
    """The mask reduced to some of its labels; only the boxes of these labels are read.

    Args:
        labels: shape (X, Y, Z).
        values: label values to keep.
        boxes: for each value from 1 on, a box that holds all of its voxels; None where the label has none.
    """
    shown = np.zeros(labels.shape, dtype=np.uint8, order="F" if labels.flags.fnc else "C")
    for value in values:
        if (box := boxes[value - 1]) is not None:
            np.copyto(shown[box], np.uint8(value), where=labels[box] == value)
    return shown


def warnings_of(grid: Grid) -> list[str]:
    """A warning if ITK and nibabel place the image differently in space."""
    return [warning] if (warning := reading_warning(grid)) else []


def describe_answer(
    preset: Preset,
    shown: LabelArray,
    affine_ras: Affine,
    details: Mapping[str, Any],
    named: Mapping[str, int],
    boxes: Sequence[Part | None] | None = None,
    measured: Preset | None = None,
) -> dict[str, Any]:
    """The JSON of a response, of the same form as that of an automatic mask except for start, prompts and times.

    Args:
        preset: the task, which gives the colours.
        shown: the mask that is returned.
        affine_ras: of the mask's grid, 4x4, voxel indices to millimetres in RAS.
        details: the entries ``start``, ``prompts``, ``warnings`` and ``edit_ms``.
        named: names and values of the labels in the mask.
        boxes: bounding boxes of the named labels, as for :func:`~lib.transforms.postprocess.measure_labels`.
        measured: preset that names the mask's values, where it is not ``preset``.
    """
    among = (measured or preset).labels
    if boxes is not None:
        boxes = [boxes[label.index - 1] if label.name in named else None for label in among]
    measures = measure_labels(shown, affine_ras, measured or preset, boxes)
    return {
        "warnings": list(details["warnings"]),
        "label_names": dict(named),
        "label_colors": {label.name: list(label.color) for label in preset.labels if label.name in named},
        "label_statistics": measures,
        "centroids": {n: [str(round(c)) for c in m["centroid_voxels"]] for n, m in measures.items()},  # type: ignore[attr-defined]
        "interaction": {"start": details["start"], "prompts": details["prompts"]},
        "quality": None,
    }


def describe_time(edit_ms: float, total_ms: float, hit: bool) -> dict[str, Any]:
    """The times that a response took, under this server's keys and under those that MONAI Label's clients read."""
    return {
        "latencies_ms": {"edit": edit_ms, "total": total_ms},
        "latencies": {"infer": round(edit_ms / 1000, 3), "total": round(total_ms / 1000, 3)},
        "cache": {"hit": hit} | ({"computed_in_ms": edit_ms} if hit else {}),
    }
