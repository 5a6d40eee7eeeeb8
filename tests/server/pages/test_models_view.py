"""The chart of the versions: what was scored on other cases is not joined."""

from __future__ import annotations

from xml.etree import ElementTree

from lib.server.pages.language import read_language
from lib.server.pages.models_view import ModelView, VersionView


def version(number: int, dice: float, cases: str, state: str = "published", before: float | None = None) -> VersionView:
    return VersionView(
        "tiny", f"v{number:04d}", number, state, dice, {}, "", judged_on=frozenset(cases.split()), before=before
    )


def test_dice_of_another_validation_set_does_not_continue_the_line() -> None:
    """The third version is better than the second on the same cases, although its figure is lower."""
    versions = (
        version(5, 0.80, "a b c", "live"),
        version(4, 0.78, "a b c", before=0.76),
        version(3, 0.99, "x", "rejected"),
        version(2, 0.90, "a b"),
        version(1, 0.88, "a b"),
    )
    html = ModelView("tiny", versions).chart(read_language("en"))
    chart = ElementTree.fromstring(f"<div>{html}</div>").find("svg")
    assert chart is not None
    lines = [line.get("points", "").split() for line in chart.findall("svg/polyline")]
    assert [len(line) for line in lines] == [2, 2]
    assert "v0004: 0.780 (0.760 before it, on the same cases)" in html
    assert len(chart.findall("svg[@class='mark plain']")) == 3
