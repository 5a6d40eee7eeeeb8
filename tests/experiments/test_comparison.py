"""Comparisons: paired by case, with an interval that knows of subjects and seeds, and nothing claimed of one seed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lib.experiments.comparison import Outcome, compare, interval, outcome_of, write_report
from lib.storage.json_files import read_json, write_json


def _outcome(arm: str, seed: int, dice: list[float], labels: int = 8) -> Outcome:
    cases = {f"case_{i}": value for i, value in enumerate(dice)}
    return Outcome(arm, labels, seed, 10, 60.0, 1000, cases, {"core": float(np.mean(dice))}, {"core": 1.5})


def _runs(gain: float, seeds: int, noise: float = 0.01) -> list[Outcome]:
    """Two arms over 20 cases of very different difficulty, one better by ``gain`` on all of them."""
    random = np.random.default_rng(0)
    hard = random.uniform(0.3, 0.9, 20)
    runs = []
    for seed in range(seeds):
        for arm, bonus in (("cnn", 0.0), ("unetr", gain)):
            runs.append(_outcome(arm, seed, list(hard + bonus + random.normal(0, noise, 20))))
    return runs


def _row(runs: list[Outcome], subject_of=lambda case: case):
    return next(row for row in compare(runs, "cnn", subject_of) if row.arm == "unetr")


def test_difference_is_paired_so_that_hard_cases_do_not_hide_it() -> None:
    row = _row(_runs(0.02, seeds=3))
    assert row.difference == pytest.approx(0.02, abs=0.005)
    assert row.low is not None and row.high is not None
    assert 0 < row.low < row.difference < row.high < 0.04
    assert (row.verdict, row.seeds, row.steps, row.cpu_minutes) == ("better", 3, 10, 1.0)


@pytest.mark.parametrize(("gain", "verdict"), [(-0.02, "worse"), (0.0, "no difference shown")])
def test_verdict_follows_the_interval(gain: float, verdict: str) -> None:
    assert _row(_runs(gain, seeds=3)).verdict == verdict


@pytest.mark.parametrize("seeds", [1, 2])
def test_of_fewer_than_three_seeds_nothing_is_claimed(seeds: int) -> None:
    row = _row(_runs(0.2, seeds))
    assert row.verdict == f"nothing claimed of {seeds} seed{'s' * (seeds > 1)}"
    assert math.isnan(row.deviation) == (seeds == 1)


def test_baseline_is_compared_with_nothing() -> None:
    rows = compare(_runs(0.1, 3), "cnn", lambda case: case)
    baseline = next(row for row in rows if row.arm == "cnn")
    assert (baseline.difference, baseline.low, baseline.verdict) == (None, None, "")


def test_only_seeds_that_both_have_are_paired() -> None:
    runs = _runs(0.02, seeds=3)
    runs = [run for run in runs if not (run.arm == "cnn" and run.seed == 2)]
    assert _row(runs).verdict == "nothing claimed of 2 seeds"


def test_case_without_a_value_is_left_out_on_both_sides() -> None:
    """As a CT in which neither a mask nor the label has any of the structures."""
    runs = [_outcome("cnn", 0, [0.5, math.nan, 0.7, 0.2]), _outcome("unetr", 0, [0.6, 0.9, 0.8, math.nan])]
    row = _row(runs)
    assert row.difference == pytest.approx(0.1)
    assert row.dice == pytest.approx((0.6 + 0.9 + 0.8) / 3)
    nothing = [_outcome("cnn", 0, [0.5, math.nan]), _outcome("unetr", 0, [math.nan, 0.9])]
    assert (_row(nothing).difference, _row(nothing).verdict) == (None, "")


def test_stored_outcome_without_some_values_is_read_and_reported(tmp_path: Path) -> None:
    """A gallbladder that was taken out has no Dice, and one that was not found no distance."""
    for arm in ("cnn", "unetr"):
        run = Outcome(arm, 8, 0, 10, 60.0, 1000, {"a": 0.5, "b": math.nan}, {"core": math.nan}, {"core": math.nan})
        write_json(tmp_path / f"{arm}.json", run.__dict__)
    runs = [outcome_of(read_json(tmp_path / f"{arm}.json")) for arm in ("cnn", "unetr")]
    assert math.isnan(runs[0].dice["b"]) and math.isnan(runs[0].hd95_mm["core"]) and runs[0].dice["a"] == 0.5
    text = write_report(tmp_path / "x", "Which?", "cnn", runs, lambda case: case)
    assert "| 8 | unetr | 1 | 10 | 1.0 | 0.500 | nan | +0.0000 [+0.0000, +0.0000] | nothing claimed of 1 seed |" in text


def test_interval_of_a_constant_difference_has_no_width() -> None:
    assert interval(np.full((3, 4), 0.05), list("abcd")) == (pytest.approx(0.05), pytest.approx(0.05))


def test_interval_is_wider_where_cases_are_of_the_same_subject() -> None:
    """Twins say the same twice: ten subjects of two cases are ten observations and not twenty."""
    random = np.random.default_rng(1)
    twins = np.repeat(random.normal(0, 0.02, 10), 2)[None]
    low, high = interval(twins, [str(i // 2) for i in range(20)])
    naive_low, naive_high = interval(twins, [str(i) for i in range(20)])
    assert 1.2 < (high - low) / (naive_high - naive_low) < 1.7
    # the normal approximation of ten observations
    assert high - low == pytest.approx(2 * 1.96 * twins[0, ::2].std() / math.sqrt(10), rel=0.15)


def test_interval_is_wider_where_seeds_disagree() -> None:
    apart = np.array([[-0.05] * 10, [0.0] * 10, [0.05] * 10])
    low, high = interval(apart, [str(i) for i in range(10)])
    assert low < -0.03 and high > 0.03


def test_report_has_table_plot_and_every_run(tmp_path: Path) -> None:
    runs = [*_runs(0.02, 3), _outcome("cnn", 0, [0.9] * 20, labels=16)]
    text = write_report(tmp_path / "docs" / "x", "Which?", "cnn", runs, lambda case: case)
    assert (tmp_path / "docs" / "x.table.md").read_text(encoding="utf-8") == text
    lines = text.splitlines()
    assert lines[0].startswith("| labels | arm | seeds |") and "against cnn [95 %]" in lines[0]
    assert [line.split(" | ")[0:2] for line in lines[2:]] == [["| 8", "cnn"], ["| 8", "unetr"], ["| 16", "cnn"]]
    assert "+0.0" in lines[3] and lines[3].endswith("| better |")
    kept = json.loads((tmp_path / "docs" / "x.json").read_text(encoding="utf-8"))
    assert len(kept["runs"]) == 7 and kept["question"] == "Which?"
    assert (tmp_path / "docs" / "x.png").read_bytes().startswith(b"\x89PNG")
    write_report(tmp_path / "one", "Which?", "cnn", _runs(0.02, 3), lambda case: case)
    assert (tmp_path / "one.png").stat().st_size > 5000
