"""Parses what viewers send into prompts: deepedit and deepgrow of 3D Slicer and OHIF, and 3D Slicer's scribbles."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lib.configs.preset import Preset, canonical_name
from lib.errors import ParameterError
from lib.infers.request import InferRequest
from lib.interaction.prompts import Box, Prompts, Voxel, make_prompts, parse_box, parse_points
from lib.interaction.starting_mask import names_of

BACKGROUND = "background"
FOREGROUND = "foreground"
FOREGROUND_SCRIBBLES, BACKGROUND_SCRIBBLES = "foreground_scribbles", "background_scribbles"
NOBODY = frozenset({"", "null", "undefined", "none"})
"""The key that OHIF sends points under while no label is chosen."""
NOT_LABELS = frozenset(
    {"label", "roi", "image", "device", "session_id", "client_id", "label_info", "reset_state", "selected_label_name"}
)


@dataclass(frozen=True, kw_only=True)
class ClickRequest(InferRequest):
    """A request for a correction by clicks.

    Attributes:
        prompts: the clicks.
        all_labels: whether the response holds all labels, or only those that were prompted.
        label_info: names of the values in ``label_file``, as viewers send them; None where they are the preset's.
    """

    prompts: Prompts
    all_labels: bool
    label_info: Any = None


@dataclass(frozen=True, kw_only=True)
class ScribbleRequest(InferRequest):
    """A request for a correction by scribbles.

    Attributes:
        name: name of the structure.
        values: values in ``label_file`` of the structure, of the foreground scribbles and of the background scribbles;
            0 for one that is absent.
        box: region of interest, outside of which nothing changes; it may extend beyond the image. None for no box.
    """

    name: str
    values: tuple[int, int, int]
    box: Box | None = None


def parse_structure(request: Mapping[str, Any]) -> tuple[str, tuple[int, int, int]]:
    """The structure's name, and the values of structure, foreground and background scribbles; 0 for absent ones.

    Raises:
        ParameterError: if ``label_info`` does not name the structure, or gives it the value of the background.
    """
    by_name = {name: value for value, name in names_of(request.get("label_info")).items()}
    name = request.get("selected_label_name")
    if not isinstance(name, str) or not by_name.get(name) or name.endswith("_scribbles"):
        choices = ", ".join(n for n in by_name if not n.endswith("_scribbles"))
        raise ParameterError("selected_label_name", name, f"one of label_info's names: {choices}")
    return name, (by_name[name], by_name.get(FOREGROUND_SCRIBBLES, 0), by_name.get(BACKGROUND_SCRIBBLES, 0))


def parse_clicks(params: Mapping[str, Any], preset: Preset, other_labels: Collection[str] = ()) -> Prompts:
    """Parse the clicks of a request.

    A request with ``foreground`` is of the kind ``deepgrow``: its points belong to the one label that ``label`` names.
    Any other request is of the kind ``deepedit``: it has a list of points under the name of each label, and one under
    ``background``.

    Args:
        params: parameters of the request.
        preset: the task.
        other_labels: label names of other presets, which viewers send too and which are ignored.

    Raises:
        ParameterError: naming the unknown label or the malformed point.
    """
    box = parse_box(params.get("roi"))
    negative = parse_points(params.get(BACKGROUND), BACKGROUND)
    if FOREGROUND in params and preset.find_label(FOREGROUND) is None:
        label = _label_of(params.get("label"), preset)
        foreground = parse_points(params[FOREGROUND], FOREGROUND)
        return make_prompts({label: foreground}, negative, label, box)
    positive: dict[int, list[Voxel]] = {}
    ignored = NOT_LABELS | {canonical_name(name) for name in other_labels}
    for key, value in params.items():
        label_ = preset.find_label(key)
        if label_ is not None and (isinstance(value, list) or value is None):
            positive.setdefault(label_.index, []).extend(parse_points(value, key))
        elif key == BACKGROUND or key.lower() in NOBODY or key in NOT_LABELS:
            continue
        elif _holds_points(value) and canonical_name(key) not in ignored:
            raise ParameterError(
                key, f"{len(value)} points", f"points of {', '.join(preset.label_indices)}, background"
            )
        elif label_ is not None:
            raise ParameterError(key, value, "a list of points [i, j, k]")
    return make_prompts(positive, negative, None, box)


def _label_of(name: Any, preset: Preset) -> int:
    label = preset.find_label(name) if isinstance(name, str) else None
    if label is None:
        raise ParameterError("label", name, ", ".join(preset.label_indices))
    return label.index


def _holds_points(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)
