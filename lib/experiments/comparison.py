"""Results of an experiment: arms compared case by case, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.cases.metrics import mean_known
from lib.drawing.figures import drawn_figure, mark_counts
from lib.storage.json_files import write_json

FloatArray = npt.NDArray[np.float64]
DRAWS = 4000
MIN_SEEDS = 3
"""Smallest number of seeds for a conclusion; with fewer, the variation between seeds is unknown."""


@dataclass(frozen=True)
class Outcome:
    """The result of one run; ``dice`` is the mean over the labels for each judged case.

    NaN stands for what has no value: Dice of a label that no mask has, the distance to one that was never found.
    """

    arm: str
    labels: int
    seed: int
    steps: int
    cpu_seconds: float
    parameters: int
    dice: Mapping[str, float]
    dice_by_label: Mapping[str, float]
    hd95_mm: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """An arm with a number of labelled cases, compared with the baseline.

    Attributes:
        dice: mean over cases and seeds.
        deviation: standard deviation of the seeds' means; NaN for one seed.
        hd95_mm: mean over labels, cases and seeds.
        difference: mean difference of the Dice from the baseline's, paired by case and seed; None for the baseline
            itself, or if no seed has both.
        low, high: 95 % confidence interval of the difference.
        verdict: conclusion in words.
    """

    arm: str
    labels: int
    seeds: int
    steps: int
    cpu_minutes: float
    dice: float
    deviation: float
    hd95_mm: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str = ""


def outcome_of(data: Mapping[str, Any]) -> Outcome:
    """The outcome of stored data, in which null stands for NaN."""
    with_nan: dict[str, Any] = {
        k: _with_nan(value) if isinstance(value, Mapping) else value for k, value in data.items()
    }
    return Outcome(**with_nan)


def _with_nan(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}


def compare(outcomes: Sequence[Outcome], baseline: str, subject_of: Callable[[str], str]) -> list[Row]:
    """A row for each arm and number of labels, in their original order."""
    by_key: dict[tuple[int, str], dict[int, Outcome]] = {}
    for outcome in outcomes:
        by_key.setdefault((outcome.labels, outcome.arm), {})[outcome.seed] = outcome
    return [
        _row(runs, by_key.get((labels, baseline), {}) if arm != baseline else {}, subject_of)
        for (labels, arm), runs in sorted(by_key.items(), key=lambda item: item[0][0])
    ]


def interval(differences: FloatArray, subjects: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean difference by the bootstrap over seeds and subjects (Efron 1979).

    Args:
        differences: shape (seeds, cases).
        subjects: subject of each case; cases of one subject are drawn together.
        seed: seed of the bootstrap.
    """
    random = np.random.default_rng(seed)
    names, member = np.unique(np.asarray(subjects), return_inverse=True)
    runs = random.multinomial(len(differences), [1 / len(differences)] * len(differences), DRAWS)
    heads = random.multinomial(len(names), [1 / len(names)] * len(names), DRAWS)[:, member]
    means = np.einsum("ds,sc,dc->d", runs, differences, heads) / (len(differences) * heads.sum(axis=1))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def write_report(
    stem: Path, question: str, baseline: str, outcomes: Sequence[Outcome], subject_of: Callable[[str], str]
) -> str:
    """Write ``stem`` with .json, .table.md and .png; returns the table."""
    rows = compare(outcomes, baseline, subject_of)
    text = table(rows, baseline)
    stem.parent.mkdir(parents=True, exist_ok=True)
    content = {"question": question, "rows": [asdict(row) for row in rows], "runs": [asdict(run) for run in outcomes]}
    write_json(stem.with_suffix(".json"), content)
    stem.with_suffix(".table.md").write_text(text, encoding="utf-8")
    draw(rows, stem.with_suffix(".png"))
    return text


def table(rows: Sequence[Row], baseline: str) -> str:
    """The rows as a Markdown table."""
    head = ["labels", "arm", "seeds", "steps", "CPU min", "Dice", "HD95 mm", f"against {baseline} [95 %]", "verdict"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        spread = "" if math.isnan(row.deviation) else f" ± {row.deviation:.3f}"
        distance = "" if row.difference is None else f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
        figures = [str(row.labels), row.arm, str(row.seeds), str(row.steps), f"{row.cpu_minutes:.1f}"]
        lines.append([*figures, f"{row.dice:.3f}{spread}", f"{row.hd95_mm:.2f}", distance, row.verdict])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot mean Dice against the number of labels; for a single number, plot differences from the baseline."""
    counts = sorted({row.labels for row in rows})
    if len(counts) < 2:
        _draw_distances([row for row in rows if row.difference is not None], path)
        return
    with drawn_figure(path, "labelled cases", "mean Dice on judged subjects") as axes:
        for arm in dict.fromkeys(row.arm for row in rows):
            own = [row for row in rows if row.arm == arm]
            spread = [0.0 if math.isnan(row.deviation) else row.deviation for row in own]
            axes.errorbar([r.labels for r in own], [r.dice for r in own], yerr=spread, marker="o", capsize=3, label=arm)
        mark_counts(axes, counts)


def _draw_distances(rows: Sequence[Row], path: Path) -> None:
    places = range(len(rows))
    values = [row.difference or 0.0 for row in rows]
    below = [value - (row.low or 0.0) for value, row in zip(values, rows, strict=True)]
    above = [(row.high or 0.0) - value for value, row in zip(values, rows, strict=True)]
    with drawn_figure(path, "Dice less the baseline's, same cases, 95 % interval") as axes:
        axes.errorbar(values, places, xerr=[below, above], fmt="o", capsize=3)
        axes.set_yticks(places, [row.arm for row in rows])
        axes.axvline(0, color="grey", linewidth=1)


def _row(runs: Mapping[int, Outcome], baseline: Mapping[int, Outcome], subject_of: Callable[[str], str]) -> Row:
    means = [mean_known(run.dice.values()) for run in runs.values()]
    any_run = next(iter(runs.values()))
    row = {
        "arm": any_run.arm,
        "labels": any_run.labels,
        "seeds": len(runs),
        "steps": any_run.steps,
        "cpu_minutes": float(np.mean([run.cpu_seconds for run in runs.values()])) / 60,
        "dice": float(np.mean(means)),
        "deviation": float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
        "hd95_mm": float(np.mean([mean_known(run.hd95_mm.values()) for run in runs.values()])),
    }
    both = sorted(set(runs) & set(baseline))
    if not both:
        return Row(**row)  # type: ignore[arg-type]
    paired = [run for seed in both for run in (runs[seed], baseline[seed])]
    cases = sorted(set.intersection(*({c for c, dice in run.dice.items() if not math.isnan(dice)} for run in paired)))
    if not cases:
        return Row(**row)  # type: ignore[arg-type]
    apart = np.array([[runs[s].dice[case] - baseline[s].dice[case] for case in cases] for s in both])
    low, high = interval(apart, [subject_of(case) for case in cases])
    return Row(**row, difference=float(apart.mean()), low=low, high=high, verdict=_verdict(len(both), low, high))  # type: ignore[arg-type]


def _verdict(seeds: int, low: float, high: float) -> str:
    if seeds < MIN_SEEDS:
        return f"nothing claimed of {seeds} seed{'s' * (seeds > 1)}"
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"
