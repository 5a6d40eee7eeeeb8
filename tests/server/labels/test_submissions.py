"""Which task a submitted label is for."""

from __future__ import annotations

from pathlib import Path

from lib.datastore.label_files.segment_header import Segment
from lib.server.labels.submissions import choose_preset, names_in
from tests.segment_files import write_segments
from tests.tiny import boxes, preset_data, tiny_preset

PRESET = tiny_preset()
VOXELS = boxes()[1]


def test_names_of_the_header_choose_the_task(tmp_path: Path) -> None:
    other = tiny_preset(name="other", labels=[{"index": 1, "name": "nucleus"}, *preset_data()["labels"][1:]])
    sent = write_segments(tmp_path / "sent.seg.nrrd", [VOXELS], [Segment("nucleus", 1), Segment("background", 2)])
    assert choose_preset({"tiny": PRESET, "other": other}, {}, None, names_in(sent)) is other


def test_model_that_takes_clicks_names_its_preset() -> None:
    """Also where two presets have the same labels, so that names alone would choose the first."""
    presets = {"tiny": PRESET, "other": tiny_preset(name="other")}
    models = {"tiny": "tiny", "other": "other", "other_edit": "other", "other_scribbles": "other"}
    for model in ("other", "other_edit", "other_scribbles"):
        assert choose_preset(presets, {"model": model}, None, ["core"], models).name == "other"
    assert choose_preset(presets, {"model": "unknown"}, None, ["core"], models).name == "tiny"
