"""Maps the values of a submitted mask by the names that were sent with it, and never by their order.

3D Slicer numbers a user's segments in the order of its list, and sends the names in ``label_info``: ``[{"name":
"spleen", "idx": 1}, ...]``, including segments without voxels. Its module excludes the segments ``background``,
``foreground_scribbles`` and ``background_scribbles`` from the mask, whose values count the remaining segments from 1,
but includes them in ``idx``: :func:`choose_reading` decides from the values which numbering applies.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from lib.configs.catalogue import shipped_preset_names
from lib.configs.preset import Preset, canonical_name
from lib.errors import LabelError

BACKGROUND = "background"
SCRIBBLES = ("foreground_scribbles", "background_scribbles")
NO_LABELS = (BACKGROUND, *SCRIBBLES)
"""Segments that tools create for their own use; 3D Slicer's module does not export them."""
OTHER_TASK = "is for another task of this server"
LARGEST_VALUE = 65535
MOST_NAMES = 1000
LONGEST_NAME = 200


@dataclass(frozen=True)
class NamedValue:
    """An entry of ``label_info``: a name, and its value or position in the client's list."""

    name: str
    value: int


@dataclass(frozen=True)
class Mapped:
    """The mapping of a mask's values to the preset's.

    Attributes:
        values: value in the submitted mask to value in the stored mask; background stays 0.
        label_map: name to value in the stored mask: annotated labels of the preset, and unknown ones.
        missing: labels of the preset that the mask does not annotate.
        notes: changes, as sentences.
    """

    values: Mapping[int, int]
    label_map: Mapping[str, int]
    missing: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completeness:
    """Which labels a mask annotates, as far as the client states it.

    Attributes:
        complete: whether labels without voxels are absent in the image; otherwise they may just not have been drawn.
        missing: labels that are present in the image but were not drawn, or only in part.
    """

    complete: bool = False
    missing: tuple[str, ...] = ()

    @classmethod
    def parse(cls, info: Mapping[str, Any]) -> Completeness:
        """Parse ``complete`` (true or false) and ``missing_labels`` (names) of a submission.

        Raises:
            LabelError: for other values.
        """
        complete, missing = info.get("complete", False), info.get("missing_labels", [])
        if not isinstance(complete, bool):
            raise LabelError(f"complete is {complete!r:.100}; valid: true, false")
        if not isinstance(missing, list) or not all(isinstance(name, str) for name in missing):
            raise LabelError(f"missing_labels is {missing!r:.100}; valid: a list of names")
        return cls(complete, tuple(missing))


def parse_label_info(info: Any) -> dict[int, str] | None:
    """Value to name from ``label_info``; None if a client sends none.

    Raises:
        LabelError: see :func:`parse_entries`.
    """
    return {entry.value: entry.name for entry in parse_entries(info) if entry.value != 0} if info else None


def parse_entries(info: Any) -> tuple[NamedValue, ...]:
    """The entries of ``label_info`` in the client's order; empty if it sends none.

    Raises:
        LabelError: if it is not a list of ``{"name": text, "idx": whole number}``, or if a value has two names.
    """
    if info is None or info == []:
        return ()
    if not isinstance(info, list) or len(info) > MOST_NAMES:
        raise LabelError(f'label_info is not a list of up to {MOST_NAMES} of {{"name": text, "idx": whole number}}')
    names: dict[int, str] = {}
    entries = tuple(_parse_entry(entry) for entry in info)
    for entry in entries:
        before = names.setdefault(entry.value, entry.name)
        if canonical_name(before) != canonical_name(entry.name):
            raise LabelError(f"label_info calls the value {entry.value} both {before!r} and {entry.name!r}")
    return entries


def is_no_label(name: str) -> bool:
    """Whether a segment is one that tools create for their own use, such as ``background``."""
    return canonical_name(name) in NO_LABELS


def choose_reading(present: Set[int], entries: Sequence[NamedValue]) -> tuple[dict[int, str], str]:
    """Choose the meaning of ``idx`` in ``label_info`` by the values that are present in the mask.

    In the first reading, ``idx`` is the value. In the second, it is the position in 3D Slicer's list, from which up to
    three segments were excluded, and the values count the named segments from 1.

    Args:
        present: the values in the mask, without 0.
        entries: result of :func:`parse_entries`, in the client's order.

    Returns:
        Value to name, and a sentence if the second reading applies.

    Raises:
        LabelError: if both readings explain all values that are present, but with different names.
    """
    by_value = {entry.value: entry.name for entry in entries if entry.value != 0}
    by_order = dict(enumerate((entry.name for entry in entries), start=1))
    if not _may_count_positions(entries) or not present <= by_order.keys():
        return by_value, ""
    if not present <= by_value.keys():
        return by_order, "the idx of label_info are positions in 3D Slicer's list; the values were taken in their order"
    differing = sorted(v for v in present if canonical_name(by_value[v]) != canonical_name(by_order[v]))
    if differing:
        value = differing[0]
        raise LabelError(
            f"the value {value} of the mask is {by_value[value]!r} if the idx of label_info are values, and "
            f"{by_order[value]!r} if they are positions in 3D Slicer's list, where {', '.join(NO_LABELS)} are counted "
            "and not sent; in Slicer, drag these segments to the end of the list and submit again; elsewhere, add "
            '{"name": "background", "idx": 0} to label_info to say that idx are values'
        )
    return by_value, ""


def map_values(
    present: Set[int],
    names: Mapping[int, str] | None,
    preset: Preset,
    completeness: Completeness | None = None,
) -> Mapped:
    """Map a mask's values to the preset's.

    A label of the preset without voxels in the mask is missing, since an organ that was not drawn may be present. With
    ``complete`` it counts as absent instead.

    Args:
        present: the values in the mask, without 0.
        names: value to name, from :func:`parse_label_info`; None if the values are the preset's own.
        preset: the preset.
        completeness: the client's statement on completeness.

    Raises:
        LabelError: for values without a name, and for unknown names if the preset does not allow them.
    """
    stated = completeness or Completeness()
    by_value = _own_names(preset) if names is None else names
    unexplained = sorted(present - by_value.keys())
    if unexplained:
        raise LabelError(_unexplained(unexplained, names, preset))
    known, unknown = _sort_by_preset({value: by_value[value] for value in sorted(present)}, preset)
    if unknown and not preset.ignore_unknown_labels:
        raise LabelError(
            f"{_listing(unknown.values())} are no labels of {preset.name!r}; known: {', '.join(preset.label_indices)}"
        )
    extra = _number_unknown(unknown, preset)
    values = known | {value: extra[canonical_name(name)] for value, name in unknown.items()}
    drawn = {name for name, index in preset.label_indices.items() if index in set(known.values())}
    missing = _missing(drawn, preset, stated)
    label_map = {n: index for n, index in preset.label_indices.items() if n in drawn or n not in missing}
    label_map |= {name: extra[canonical_name(name)] for name in unknown.values()}
    left_out = [by_value[value] for value in sorted(present) if values[value] == 0]
    return Mapped(values, label_map, missing, _notes(values, unknown, left_out, preset))


def _may_count_positions(entries: Sequence[NamedValue]) -> bool:
    """Whether 3D Slicer's module can have sent these entries, with excluded segments before the last one."""
    values = [entry.value for entry in entries]
    ascending = all(one < next_one for one, next_one in itertools.pairwise(values))
    return bool(values) and ascending and values[0] > 0 and 0 < values[-1] - len(values) <= len(NO_LABELS)


def _parse_entry(entry: Any) -> NamedValue:
    name, value = (entry.get("name"), entry.get("idx")) if isinstance(entry, dict) else (None, None)
    if not isinstance(name, str) or not canonical_name(name) or len(name) > LONGEST_NAME:
        raise LabelError(f'label_info has the entry {entry!r:.100}; valid: {{"name": text, "idx": whole number}}')
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_VALUE:
        raise LabelError(
            f"label_info gives {name!r} the idx {value!r:.50}; valid: a whole number up to {LARGEST_VALUE}"
        )
    return NamedValue(name, value)


def _own_names(preset: Preset) -> dict[int, str]:
    return {index: name for name, index in preset.label_indices.items()}


def why_not_for(preset: Preset, task: str, names: Collection[str], served: Collection[str]) -> str:
    """Why a stored label cannot be used for a preset; empty if it can.

    A label belongs to the preset for which it was saved. Other servers use other task names (``segmentation``,
    ``deepedit``); then the label names decide, and without names the values.

    Args:
        preset: the preset.
        task: name of the task for which the label was saved; empty if unknown.
        names: names of its labels.
        served: names of all presets of this server.

    Returns:
        ``OTHER_TASK`` for a label of another preset of this server; otherwise the end of a sentence about the label.
    """
    own = [name for name in names if not is_no_label(name)]
    if task == preset.name or (not task and own):
        return ""
    if task in served:
        return OTHER_TASK
    saved = f"was saved for the task {task!r}" if task else "came without a task"
    if own:
        fits = any(preset.find_label(name) for name in own)
        return "" if fits else f"{saved} and has {_listing(own)}; valid: {', '.join(preset.label_indices)}"
    if task in shipped_preset_names():
        return f"{saved}, and nothing names its values"
    if len(served) > 1:
        return f"{saved}, nothing names its values, and this server has several tasks: {', '.join(served)}"
    return ""


def _sort_by_preset(names: Mapping[int, str], preset: Preset) -> tuple[dict[int, int], dict[int, str]]:
    """Values of the preset's labels with the preset's values, and values with unknown names."""
    known, unknown = {}, {}
    for value, name in names.items():
        label = preset.find_label(name)
        if label is not None:
            known[value] = label.index
        elif is_no_label(name):
            known[value] = 0
        else:
            unknown[value] = name
    return known, unknown


def _number_unknown(unknown: Mapping[int, str], preset: Preset) -> dict[str, int]:
    """Values above the preset's for unknown names, equal for equal names."""
    distinct = sorted({canonical_name(name) for name in unknown.values()})
    return {name: len(preset.labels) + position for position, name in enumerate(distinct, start=1)}


def _missing(drawn: Set[str], preset: Preset, stated: Completeness) -> tuple[str, ...]:
    named = set()
    for name in stated.missing:
        label = preset.find_label(name)
        if label is None:
            raise LabelError(f"missing_labels names {name[:100]!r}; known: {', '.join(preset.label_indices)}")
        named.add(label.name)
    not_drawn = set() if stated.complete else preset.label_indices.keys() - drawn
    return tuple(name for name in preset.label_indices if name in named | not_drawn)


def _notes(
    values: Mapping[int, int], unknown: Mapping[int, str], left_out: Sequence[str], preset: Preset
) -> tuple[str, ...]:
    notes = []
    if any(value != index for value, index in values.items()):
        notes.append(f"the values were mapped to those of {preset.name!r} by name")
    if unknown:
        notes.append(f"{_listing(unknown.values())} are kept, and left out of training")
    scribbles = [name for name in left_out if canonical_name(name) != BACKGROUND]
    if scribbles:
        notes.append(f"{_listing(scribbles)} are no labels, and their voxels were kept as background")
    return tuple(notes)


def _unexplained(values: Sequence[int], names: Mapping[int, str] | None, preset: Preset) -> str:
    shown = ", ".join(map(str, values[:8])) + (f" and {len(values) - 8} more" if len(values) > 8 else "")
    if names is None:
        return f"the mask has the values {shown}, and no label_info to explain them; valid: {preset.label_indices}"
    return f"the mask has the values {shown}, which nothing names; named are {_shown_names(names)}"


def _shown_names(names: Mapping[int, str]) -> str:
    return ", ".join(f"{value}: {name}" for value, name in list(names.items())[:20])


def _listing(names: Any) -> str:
    distinct = list(dict.fromkeys(names))
    return ", ".join(repr(name) for name in distinct[:8]) + (f" and {len(distinct) - 8} more" if distinct[8:] else "")
