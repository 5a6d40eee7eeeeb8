"""The summary of a run, as a table for users and as data for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from lib.cluster.worker import Outcome


def summary(outcome: Outcome, model: str, version: str) -> dict[str, Any]:
    """The result of the cases, as plain data.

    Args:
        outcome: result of the run.
        model: name of the preset.
        version: version of the weights at the start of the run.
    """
    cases = outcome.done | outcome.skipped
    return {
        "model": model,
        "version": version,
        "versions": dict(Counter(case.version for case in cases.values())),
        "finished_now": len(outcome.done),
        "finished_before": len(outcome.skipped),
        "failed": outcome.failed,
        "seconds": round(sum(case.seconds for case in outcome.done.values()), 3),
        "cases": [asdict(cases[case]) for case in sorted(cases)],
    }


def as_table(outcome: Outcome) -> str:
    """A line for each case."""
    rows = [f"{'case':<32} {'seconds':>8} {'est. Dice':>9}  volumes (ml)"]
    for case, result in sorted((outcome.done | outcome.skipped).items()):
        dice = "-" if result.estimated_dice is None else f"{result.estimated_dice:.3f}"
        volumes = ", ".join(f"{label} {volume:g}" for label, volume in result.volumes_ml.items() if volume)
        note = " (finished before)" if case in outcome.skipped else ""
        rows.append(f"{case:<32} {result.seconds:>8.2f} {dice:>9}  {volumes or 'nothing found'}{note}")
    rows += [f"{_printable(case):<32} FAILED: {reason}" for case, reason in sorted(outcome.failed.items())]
    counts = f"{len(outcome.done)} finished, {len(outcome.skipped)} finished before, {len(outcome.failed)} failed"
    return "\n".join([*rows, counts])


def _printable(name: str) -> str:
    """A name on one line, whatever characters it contains."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
