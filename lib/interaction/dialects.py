"""What viewers send, read as prompts: deepedit and deepgrow of 3D Slicer and OHIF."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lib.configs.preset import Preset, canonical_name
from lib.errors import ParameterError
from lib.interaction.prompts import Prompts, Voxel, make_prompts, parse_box, parse_points

BACKGROUND = "background"
FOREGROUND = "foreground"
NOBODY = frozenset({"", "null", "undefined", "none"})
"""The key that OHIF sends points under while no label is chosen."""
NOT_LABELS = frozenset(
    {"label", "roi", "image", "device", "session_id", "client_id", "label_info", "reset_state", "selected_label_name"}
)


def parse_clicks(params: Mapping[str, Any], preset: Preset, elsewhere: Collection[str] = ()) -> Prompts:
    """Read the clicks of a request.

    With ``foreground`` it is of the kind ``deepgrow``: points of the one label that ``label`` names. Otherwise it is of
    the kind ``deepedit``: a list of points for each label, under its name, and for ``background``.

    Args:
        params: of the request.
        preset: the task.
        elsewhere: names of other tasks' labels, which viewers send along, and which say nothing here.

    Raises:
        ParameterError: naming what is wrong: a label that there is not, or a point that is none.
    """
    box = parse_box(params.get("roi"))
    negative = parse_points(params.get(BACKGROUND), BACKGROUND)
    if FOREGROUND in params and preset.find_label(FOREGROUND) is None:
        label = _label_of(params.get("label"), preset)
        foreground = parse_points(params[FOREGROUND], FOREGROUND)
        return make_prompts({label: foreground}, negative, label, box)
    positive: dict[int, list[Voxel]] = {}
    ignored = NOT_LABELS | {canonical_name(name) for name in elsewhere}
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
