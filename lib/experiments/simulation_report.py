"""The table and the figure of a simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lib.drawing.figures import drawn_figure, mark_counts
from lib.experiments.simulation import Curve


def table(curves: Sequence[Curve]) -> str:
    """Dice at each budget, area under the curve, and labels needed, as a Markdown table."""
    if not curves:
        return "no run is complete\n"
    budgets = curves[0].budgets
    head = ["strategy", *(f"{budget} labels" for budget in budgets), "area", "against random", "labels needed", "seeds"]
    rows = [head, ["---"] * len(head)]
    for curve in curves:
        dice = [_with_error(*pair) for pair in zip(curve.mean, curve.deviation, strict=True)]
        needed = "more" if curve.labels_needed is None else f"{curve.labels_needed:.0f}"
        gain = "" if curve.gain is None else _with_error(*curve.gain, sign="+")
        rows.append([curve.strategy, *dice, _with_error(*curve.area), gain, needed, str(curve.seeds)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Plot the mean Dice against labels, with a band of one standard deviation over the seeds."""
    with drawn_figure(path, "labelled cases", "mean Dice on held-out subjects") as axes:
        for curve in curves:
            (line,) = axes.plot(curve.budgets, curve.mean, marker="o", label=curve.strategy)
            if not any(math.isnan(value) for value in curve.deviation):
                low = [m - d for m, d in zip(curve.mean, curve.deviation, strict=True)]
                high = [m + d for m, d in zip(curve.mean, curve.deviation, strict=True)]
                axes.fill_between(curve.budgets, low, high, alpha=0.12, color=line.get_color())
        if curves:
            mark_counts(axes, curves[0].budgets)


def _with_error(value: float, deviation: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if math.isnan(deviation) else f"{value:{sign}.3f} ± {deviation:.3f}"
