"""Line charts as inline SVG, for pages, whose style sheet colours them, and for stand-alone reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

HEIGHT = 180
"""Height in pixels; the width is that of the page. Horizontal positions are in percent, so that text keeps its size."""
MOST_POINTS = 400
REJECTED = "rejected"
TICKS = 4
REPORT_WIDTH, REPORT_HEIGHT, BORDER = 640, 220, 40
COLORS = ("#c4572b", "#2b6cc4", "#3a8f3a", "#8b3ac4", "#c4a32b", "#2bb5c4", "#777777")


@dataclass(frozen=True)
class Point:
    """A point of a line: position, mark (``champion``, ``rejected``, ``plain``, or none), and description.

    With ``begins``, no line connects it with the previous point.
    """

    x: float
    y: float
    mark: str = ""
    text: str = ""
    begins: bool = False


def line_chart(points: Sequence[Point], title: str, x_title: str, y_title: str) -> str:
    """A chart of one line, which skips rejected points; empty text if there is no point to draw.

    Args:
        points: sorted by x; points that are not finite are left out.
        title: description of the chart for screen readers.
        x_title: title of the horizontal axis, with its unit.
        y_title: title of the vertical axis.
    """
    drawn = thin_out([point for point in points if math.isfinite(point.x) and math.isfinite(point.y)])
    if not drawn:
        return ""
    x_range = _range([point.x for point in drawn])
    y_range = _range([point.y for point in drawn], margin=0.08)
    places = [(_place(point.x, x_range, 0, 100), _place(point.y, y_range, HEIGHT, 0)) for point in drawn]
    parts = [f'<svg class="chart" height="{HEIGHT}" role="img" aria-label={quoteattr(title)}>', *_grid(y_range)]
    for stretch in _stretches(drawn, places):
        line = " ".join(f"{x:.2f},{y:.1f}" for x, y in stretch)
        parts.append(f'<svg viewBox="0 0 100 {HEIGHT}" preserveAspectRatio="none"><polyline points="{line}"/></svg>')
    parts += [_mark(point, *place) for point, place in zip(drawn, places, strict=True) if point.mark]
    texts = (f"{y_title}: {_number(drawn[-1].y)}", f"{x_title}: {drawn[0].x:g} ... {drawn[-1].x:g}")
    axes = "".join(f"<span>{escape(text)}</span>" for text in texts)
    return "".join([*parts, f'</svg><p class="small quiet axes">{axes}</p>'])


def draw_curves(name: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Curves of (step, value) as one chart of a report, with axis limits and a legend."""
    points = [p for curve in curves.values() for p in curve if math.isfinite(p[1])]
    if not points:
        return ""
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*points, strict=True))
    x_range, y_range = (x0, x0 + max(x1 - x0, 1)), (y0, y0 + max(y1 - y0, 1e-6))

    def place(x: float, y: float) -> str:
        across = _place(x, x_range, BORDER, REPORT_WIDTH - BORDER)
        return f"{across:.1f},{_place(y, y_range, REPORT_HEIGHT - BORDER, BORDER):.1f}"

    drawn = [
        f'<text x="{BORDER}" y="20">{escape(name)}</text>',
        f'<rect x="{BORDER}" y="{BORDER}" width="{REPORT_WIDTH - 2 * BORDER}" '
        f'height="{REPORT_HEIGHT - 2 * BORDER}" fill="none" stroke="#bbb"/>',
        f'<text x="2" y="{BORDER + 4}">{y1:.3f}</text><text x="2" y="{REPORT_HEIGHT - BORDER}">{y0:.3f}</text>',
        f'<text x="{BORDER}" y="{REPORT_HEIGHT - 22}">{x0:g}</text>',
        f'<text x="{REPORT_WIDTH - BORDER}" y="{REPORT_HEIGHT - 22}" text-anchor="end">step {x1:g}</text>',
    ]
    for number, (label, curve) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        line = " ".join(place(x, y) for x, y in curve if math.isfinite(y))
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        if len(curves) > 1:
            x = BORDER + 110 * number
            drawn.append(f'<text x="{x}" y="{REPORT_HEIGHT - 6}" fill="{color}">{escape(label)}</text>')
    frame = f'viewBox="0 0 {REPORT_WIDTH} {REPORT_HEIGHT}" width="{REPORT_WIDTH}" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>{"".join(drawn)}</svg>'


def _stretches(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The positions that each line connects: all but rejected points, split before points that begin a line."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for point, place in zip(points, places, strict=True):
        if point.mark == REJECTED:
            continue
        if point.begins:
            stretches.append([])
        stretches[-1].append(place)
    return [stretch for stretch in stretches if len(stretch) > 1]


def thin_out(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points, each of which is the mean of its neighbours; marked points are all kept."""
    if len(points) <= most or any(point.mark for point in points):
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [Point(_mean([p.x for p in group]), _mean([p.y for p in group])) for group in groups]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _range(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * margin or (abs(high) * 0.05 or 0.5 if high == low else 0.0)
    return low - room, high + room


def _place(value: float, limits: tuple[float, float], start: float, end: float) -> float:
    return start + (value - limits[0]) / (limits[1] - limits[0]) * (end - start)


def _grid(limits: tuple[float, float]) -> list[str]:
    lines = []
    for step in range(TICKS + 1):
        value = limits[0] + (limits[1] - limits[0]) * step / TICKS
        y = _place(value, limits, HEIGHT, 0)
        lines.append(f'<line x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    return lines


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def _mark(point: Point, x: float, y: float) -> str:
    """A circle, a filled circle or a cross, so that marks differ by shape and not by colour alone."""
    title = f"<title>{escape(point.text)}</title>"
    if point.mark == REJECTED:
        shape = '<path d="M-5 -5l10 10m0 -10l-10 10"/>'
    else:
        shape = f'<circle r="{6 if point.mark == "champion" else 4}"/>'
    return f'<svg class="mark {point.mark}" x="{x:.2f}%" y="{y:.1f}">{title}{shape}</svg>'
