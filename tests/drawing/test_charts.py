"""Line charts."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from lib.drawing.charts import HEIGHT, Point, line_chart, thin_out


def chart_in(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{html}</div>").find("svg")


def line_of(html: str) -> list[tuple[float, float]]:
    points = chart_in(html).find("svg/polyline").get("points")
    return [tuple(float(part) for part in pair.split(",")) for pair in points.split()]


def test_line_spans_the_chart_and_higher_values_lie_higher() -> None:
    places = line_of(line_chart([Point(1, 0.0), Point(2, 1.0), Point(3, 0.5)], "t", "x", "y"))
    assert (places[0][0], places[-1][0]) == (0, 100)
    assert 0 < places[1][1] < places[2][1] < places[0][1] < HEIGHT
    assert places[2][1] == pytest.approx((places[0][1] + places[1][1]) / 2, abs=0.1)


def test_points_that_are_not_finite_are_left_out() -> None:
    assert len(line_of(line_chart([Point(1, 1), Point(2, math.nan), Point(3, 2), Point(4, math.inf)], "", "", ""))) == 2
    assert line_chart([Point(1, math.nan)], "", "", "") == ""
    assert line_chart([], "", "", "") == ""


@pytest.mark.parametrize("value", [0.0, 0.87, -3.0])
def test_one_point_is_drawn_inside_the_chart(value: float) -> None:
    mark = chart_in(line_chart([Point(1, value, "champion")], "", "", "")).find("svg")
    assert 0 <= float(mark.get("x").rstrip("%")) <= 100 and 0 <= float(mark.get("y")) <= HEIGHT


def test_text_of_others_is_no_markup() -> None:
    svg = line_chart([Point(1, 1, "plain", '<script>"x"')], '"><script>', "<x>", "&y")
    assert "<script" not in svg
    assert chart_in(svg).get("aria-label") == '"><script>'


def test_rejected_points_are_crosses() -> None:
    html = line_chart([Point(1, 1, "plain"), Point(2, 2, "rejected"), Point(3, 3, "champion")], "", "", "")
    svg = chart_in(html)
    assert [mark.get("class") for mark in svg.findall("svg")][1:] == ["mark plain", "mark rejected", "mark champion"]
    assert [x for x, _ in line_of(html)] == [0, 100], "the line passes rejected ones by"
    assert svg.find("svg[@class='mark rejected']/path") is not None


def test_line_is_cut_where_another_begins() -> None:
    points = [Point(1, 1, "plain"), Point(2, 2, "plain"), Point(3, 1, "plain", begins=True), Point(4, 2, "champion")]
    lines = [line.get("points").split() for line in chart_in(line_chart(points, "", "", "")).findall("svg/polyline")]
    assert [[float(pair.split(",")[0]) for pair in line] for line in lines] == [[0, 33.33], [66.67, 100]]
    alone = [Point(1, 1, "plain"), Point(2, 2, "champion", begins=True)]
    assert chart_in(line_chart(alone, "", "", "")).find("svg/polyline") is None


def test_many_points_are_thinned_to_means_of_neighbours() -> None:
    points = [Point(float(step), float(step % 2)) for step in range(10_000)]
    thin = thin_out(points, most=100)
    assert len(thin) == 100
    assert {point.y for point in thin} == {0.5}
    assert thin[0].x == pytest.approx(49.5)
