"""What clicks and scribbles answer: a mask of the labels that were prompted, and its description."""

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
    """The mask with some labels alone; the rest of a large volume is not looked at.

    Args:
        labels: shape (X, Y, Z).
        values: that stay.
        boxes: of each value from 1 on, a part that holds all its voxels; None for none.
    """
    shown = np.zeros(labels.shape, dtype=np.uint8, order="F" if labels.flags.fnc else "C")
    for value in values:
        if (box := boxes[value - 1]) is not None:
            np.copyto(shown[box], np.uint8(value), where=labels[box] == value)
    return shown


def warnings_of(grid: Grid) -> list[str]:
    """A sentence where ITK and nibabel place the image differently."""
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
    """The answer's JSON, of the form of an automatic mask's, but for what it was made with and how long that took.

    Args:
        preset: gives colours.
        shown: the mask of the answer.
        affine_ras: of its grid.
        details: ``start``, ``prompts``, ``warnings`` and ``edit_ms``.
        named: names and values in the mask.
        boxes: as of :func:`~lib.transforms.postprocess.measure_labels`, for the named labels.
        measured: names the mask's values, where that is not ``preset``.
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
    """How long an answer took, under this server's names and under those that MONAI Label's clients read."""
    return {
        "latencies_ms": {"edit": edit_ms, "total": total_ms},
        "latencies": {"infer": round(edit_ms / 1000, 3), "total": round(total_ms / 1000, 3)},
        "cache": {"hit": hit} | ({"computed_in_ms": edit_ms} if hit else {}),
    }
