from __future__ import annotations

from lib.datastore.records import LabelVersion
from lib.server.pages.effort_view import EffortRow, effort_view
from lib.server.pages.language import codes, read_language


def version(number: int, model_version: str, **fields: object) -> LabelVersion:
    known = {"image_id": f"case_{number}", "preset": "tiny", "source": "rest", "prompts_used": 0}
    return LabelVersion(sequence=number, model_version=model_version, **(known | fields))  # type: ignore[arg-type]


LABELS = [
    version(1, "shipped", seconds_spent=300.0, prompts_used=9, voxels_changed=900),
    version(2, "shipped", seconds_spent=100.0, prompts_used=5, voxels_changed=500),
    version(3, "v0001", seconds_spent=40.0, prompts_used=2, voxels_changed=50),
    version(4, "v0001", seconds_spent=None, prompts_used=1, voxels_changed=None),
    version(5, "v0001", source="inference", prompts_used=None),
    version(6, "v0001", restored_from="00000003-abc", source="restore", seconds_spent=40.0),
]


def test_effort_is_told_by_the_version_that_labels_started_from() -> None:
    assert effort_view(LABELS).rows == (
        EffortRow("tiny", "shipped", 2, 200.0, 7.0, 700.0),
        EffortRow("tiny", "v0001", 2, 40.0, 1.5, 50.0),
    )


def test_effort_is_drawn_over_time() -> None:
    for language in map(read_language, sorted(codes())):
        drawn = effort_view(LABELS).charts(language)
        assert drawn.count('<svg class="chart"') == 3
        assert effort_view(LABELS[:1]).charts(language) == "", "one label is no line"
