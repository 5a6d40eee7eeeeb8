"""A simulation's table and picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

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
    """Draw the mean Dice against labels, with a band of one deviation over the seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        (line,) = axes.plot(curve.budgets, curve.mean, marker="o", label=curve.strategy)
        if not any(math.isnan(value) for value in curve.deviation):
            low = [m - d for m, d in zip(curve.mean, curve.deviation, strict=True)]
            high = [m + d for m, d in zip(curve.mean, curve.deviation, strict=True)]
            axes.fill_between(curve.budgets, low, high, alpha=0.12, color=line.get_color())
    axes.set_xscale("log", base=2)
    if curves:
        axes.set_xticks(curves[0].budgets, [str(budget) for budget in curves[0].budgets])
        axes.legend()
    axes.set_xlabel("labelled cases")
    axes.set_ylabel("mean Dice on held-out subjects")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})


def _with_error(value: float, deviation: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if math.isnan(deviation) else f"{value:{sign}.3f} ± {deviation:.3f}"
