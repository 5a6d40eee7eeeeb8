"""The report of a run: a self-contained HTML file, and the same data as JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib.cases.labelled import Case, read_case
from lib.cases.metrics import mean_known
from lib.drawing.charts import draw_curves
from lib.storage.json_files import without_nan
from lib.trainers.judging.evaluate import CaseScore, Evaluation
from lib.trainers.judging.masks import CaseMasks
from lib.trainers.reporting.picture import draw_slice
from lib.trainers.reporting.progress import format_seconds
from lib.trainers.run.job import TrainingResult

WORST = 3
POINTS = 400
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}figure{display:inline-block;margin:.5rem}svg{background:#fafafa}"
)


def report_data(
    details: Mapping[str, Any],
    scores: Evaluation,
    before: Evaluation | None,
    tested: Evaluation | None,
    result: TrainingResult,
) -> dict[str, Any]:
    """The data of the report: the description of the version, and every score and curve.

    Args:
        details: as in ``version.json``, with ``status``, ``reason``, ``comparison`` and training cases.
        scores: scores of the new weights on the validation cases.
        before: scores of the live weights on the same cases; None if there were none.
        tested: scores of the new weights on the test cases; None if there are none.
        result: result of the training.
    """  # fmt: skip
    curves = {
        "loss": thin([(step, loss) for step, loss in enumerate(result.losses, start=1)]),
        "dice": {name: [(v.step, v.dice[name]) for v in result.validations] for name in result.dice},
    }
    evaluations = {"new": scores, "served": before, "test": tested}
    cases = {name: [_row(case) for case in evaluation.cases] for name, evaluation in evaluations.items() if evaluation}
    run = {"seconds": round(result.seconds, 1), "steps": len(result.losses), "best_epoch": result.best_epoch}
    return dict(details) | {"training": run, "curves": curves, "cases": cases}


def worst_cases(masks: CaseMasks, cases: Sequence[Case], scores: Evaluation) -> list[tuple[str, float, str]]:
    """Id, mean Dice and picture of the cases with the lowest scores of the new weights."""
    by_id = {case.case_id: case for case in cases}
    known = [(mean_known(s.dice.values()), s.case_id) for s in scores.cases]
    drawn = []
    for dice, name in sorted(pair for pair in known if not math.isnan(pair[0]))[:WORST]:
        volume, reference = read_case(by_id[name], masks.preset)
        predicted = masks.of(by_id[name], volume).labels
        colors = {label.index: label.color for label in masks.preset.labels}
        drawn.append((name, dice, draw_slice(volume.voxels, reference, predicted, colors)))
    return drawn


def render_html(data: Mapping[str, Any], pictures: Sequence[tuple[str, float, str]]) -> str:
    """The report as one HTML page without scripts or external links."""
    title = f"{data['model']} {data['version']}: {data['status']}"
    sections = [
        f"<h1>{html.escape(title)}</h1><p><b>{html.escape(str(data['reason']))}</b></p>",
        f"<p>{html.escape(_in_short(data))}</p>",
        "<h2>Learning curves</h2>",
        draw_curves("loss", {"loss": data["curves"]["loss"]}),
        draw_curves("Dice on the validation cases", data["curves"]["dice"]) if data["curves"]["dice"] else "",
        "<h2>Served and new weights on the same cases</h2>",
        _comparison(data),
        "<h2>Worst cases</h2>" if pictures else "",
        *(_figure(name, dice, picture) for name, dice, picture in pictures),
        *_case_tables(data),
        "<h2>Data</h2>",
        _data(data),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def as_json(data: Mapping[str, Any]) -> str:
    """The report as JSON; unknown numbers are null."""
    return json.dumps(without_nan(data), indent=1) + "\n"


def thin(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A long curve reduced to the means of at most 400 segments."""
    size = math.ceil(len(curve) / POINTS)
    stretches = [curve[start : start + size] for start in range(0, len(curve), max(1, size))]
    return [(stretch[-1][0], mean_known(value for _, value in stretch)) for stretch in stretches]


def _row(case: CaseScore) -> dict[str, Any]:
    return {"case": case.case_id, "dice": case.dice, "nsd": case.nsd, "hd95_mm": case.hd95_mm}


def _in_short(data: Mapping[str, Any]) -> str:
    run, split = data["training"], data["split"]
    plan = f"; {data['memory_plan']['text']}" if data.get("memory_plan") else ""
    return (
        f"{run['steps']} steps in {format_seconds(run['seconds'])}, best epoch {run['best_epoch']}; trained on "
        f"{len(split['train'])} cases, judged on {len(split['validation'])}, tested on {len(split['test'])}; "
        f"started from {data['started_from'] or 'nothing'}; served before: {data['parent'] or 'nothing'}{plan}"
    )


def _comparison(data: Mapping[str, Any]) -> str:
    comparison = data.get("comparison")
    if not comparison:
        return "<p>There was nothing to compare with, or nothing to compare on.</p>"
    rows = [("mean Dice", comparison["mean_dice"])]
    rows += [(f"Dice, {label}", row) for label, row in comparison["dice"].items()]
    rows += [(f"surface distance (normalised), {label}", row) for label, row in comparison["nsd"].items()]
    cells = [[name, *(row[side] for side in ("champion", "challenger", "difference"))] for name, row in rows]
    return _table(("", "served", "new", "difference"), cells)


def _case_tables(data: Mapping[str, Any]) -> Iterable[str]:
    names = {"new": "New weights on the validation cases", "served": "Served weights on the validation cases",
             "test": "New weights on the test cases"}  # fmt: skip
    for key, rows in data["cases"].items():
        labels = list(rows[0]["dice"]) if rows else []
        head = ("case", *(f"{kind} {label}" for label in labels for kind in ("Dice", "surface", "HD95 mm")))
        cells = [
            [row["case"], *(row[k][label] for label in labels for k in ("dice", "nsd", "hd95_mm"))] for row in rows
        ]
        yield f"<h2>{names[key]}</h2>" + _table(head, cells)


def _data(data: Mapping[str, Any]) -> str:
    trained = [[row["image"], row["times"], row["label_sha256"][:12]] for row in data["trained_on"]]
    left_out = [[name, reason] for name, reason in (data.get("left_out") or {}).items()]
    table = _table(("trained on", "times an epoch", "label's SHA-256"), trained)
    return table + (f"<h3>Left out</h3>{_table(('case', 'why'), left_out)}" if left_out else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else "-"
    return html.escape(str(value))


def _figure(name: str, dice: float, picture: str) -> str:
    caption = f"{html.escape(name)}: mean Dice {dice:.3f}; in colour the new weights, dashed the label"
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
