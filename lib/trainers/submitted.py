"""The studies' final labels as cases of a preset: which labels count, what their values mean, and what they omit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.cases.labelled import Case, case_id
from lib.configs.preset import Preset
from lib.datastore.label_names import OTHER_TASK, why_not_for
from lib.datastore.records import INFERENCE, LabelVersion


@dataclass(frozen=True)
class SubmittedLabels:
    """The final labels of the studies.

    Attributes:
        cases: usable cases, as far as can be told without reading them.
        left_out: case id to reason, for labels that do not match the preset.
        complete: ids of labels whose sender stated that labels without voxels are absent in the image.
    """

    cases: tuple[Case, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    complete: frozenset[str] = frozenset()


def submitted_labels(datastore: Any, preset: Preset, served: Collection[str]) -> SubmittedLabels:
    """The datastore's final labels, except those that were saved for another preset of this server.

    The file of the label version is used and not its current copy, so that a label submitted meanwhile does not change
    the run.

    Args:
        datastore: MONAI Label's datastore, with or without a label history.
        preset: the preset.
        served: names of all presets of this server.
    """
    history = getattr(datastore, "history", None)
    versions = {version.image_id: version for version in history.all_latest()} if history else {}
    cases, left_out, complete = [], {}, set()
    for item in datastore.datalist():
        image, name = Path(item["image"]), case_id(Path(item["image"]))
        version = versions.get(name)
        if version is None:
            cases.append(Case(name, image, Path(item["label"])))
            continue
        problem = why_not_for(preset, version.preset, version.label_map, served)
        if problem and problem != OTHER_TASK:
            left_out[name] = f"label of {name!r} {problem}"
        elif not problem and history and not history.is_kept(version):
            left_out[name] = f"label of {name!r} is not what was saved"
        elif not problem:
            cases.append(case_of_version(version, image, preset))
            if version.source == INFERENCE or version.info.get("complete") is True:
                complete.add(name)
    return SubmittedLabels(tuple(cases), left_out, frozenset(complete))


def case_of_version(version: LabelVersion, image: Path, preset: Preset) -> Case:
    """A label version as a case: its values by name, and the labels that it does not annotate.

    Labels that the preset does not have are not used in training. A version without names uses the preset's own
    numbers.
    """
    if not version.label_map and not version.missing_labels:
        return Case(version.image_id, image, version.file)
    indices = {name: label.index for name in version.label_map if (label := preset.find_label(name)) is not None}
    values = {value: indices[name] for name, value in version.label_map.items() if name in indices}
    stated_missing = {label.index for name in version.missing_labels if (label := preset.find_label(name)) is not None}
    missing = tuple(sorted(set(preset.label_indices.values()) - set(indices.values()) | stated_missing))
    return Case(version.image_id, image, version.file, values, missing)


def undrawn_as_missing(case: Case, label: npt.NDArray[np.uint8], preset: Preset) -> Case:
    """The case with labels without voxels marked as missing, since nobody stated that they are absent.

    Args:
        case: a case whose label is not declared complete.
        label: its label in the preset's values.
        preset: the preset.
    """
    drawn = set(np.unique(label).tolist())
    undrawn = {index for index in preset.label_indices.values() if index not in drawn}
    return replace(case, missing=tuple(sorted({*case.missing, *undrawn})))


def missing_labels(cases: Iterable[Case], preset: Preset) -> dict[str, list[str]]:
    """Names of the labels that each case does not annotate, by case id; only cases that have any."""
    names = {index: name for name, index in preset.label_indices.items()}
    return {case.case_id: [names[index] for index in case.missing] for case in cases if case.missing}


def labels_nowhere(cases: Iterable[Case], preset: Preset) -> frozenset[str]:
    """Names of the preset's labels that no case annotates."""
    everywhere = set.intersection(*[set(case.missing) for case in cases] or [set()])
    return frozenset(name for name, index in preset.label_indices.items() if index in everywhere)
