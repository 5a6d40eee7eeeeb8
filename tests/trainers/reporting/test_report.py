"""The report: one page that needs nothing else, with curves, scores, the comparison and the worst cases."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lib.cases.labelled import Case
from lib.drawing.charts import draw_curves
from lib.drawing.contours import outline_path
from lib.infers.segmenter import Segmenter
from lib.trainers.judging.evaluate import CaseScore, Evaluation, evaluate
from lib.trainers.judging.gate import Champion, Rules, judge
from lib.trainers.judging.masks import CaseMasks
from lib.trainers.reporting.picture import draw_slice
from lib.trainers.reporting.report import as_json, render_html, report_data, thin, worst_cases
from lib.trainers.run.job import TrainingResult, Validation
from tests.tiny import tiny_preset

MakeCases = Callable[..., tuple[Case, ...]]
RESULT = TrainingResult(
    {}, 2, {"x": 0.8}, tuple(1 / step for step in range(1, 11)), 65.0,
    (Validation(5, {"x": 0.6}), Validation(10, {"x": 0.8})),
)  # fmt: skip


def scores(dice: float) -> Evaluation:
    return Evaluation((CaseScore("a<b>", {"x": dice}, {"x": math.nan}, {"x": 0.9}),))


@pytest.fixture
def data() -> dict[str, object]:
    verdict = judge(scores(0.7), Champion(scores(0.8)), Rules())
    details = {
        "model": "tiny", "version": "v0002", "status": "rejected", "reason": verdict.reason, "parent": "v0001",
        "comparison": verdict.comparison, "started_from": "v0001", "left_out": {"bad": "label of 'bad' is <empty>"},
        "split": {"train": ["t"], "validation": ["a<b>"], "test": []},
        "trained_on": [{"image": "t", "times": 2, "label_sha256": "f" * 64}],
    }  # fmt: skip
    return report_data(details, scores(0.7), scores(0.8), None, RESULT)


class _Tags(HTMLParser):
    """Open tags, and every address on the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [str(value) for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else(data: dict[str, object]) -> None:
    page = render_html(data, [("a<b>", 0.7, "<svg></svg>")])
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.addresses == []
    assert "<script" not in page
    assert "a&lt;b&gt;" in page and "a<b>" not in page
    assert "label of &#x27;bad&#x27; is &lt;empty&gt;" in page
    assert "rejected: the Dice of x falls from 0.8000 to 0.7000" in page
    assert page.count("<polyline") == 2, "loss and Dice"
    assert "10 steps in 1m05s, best epoch 2; trained on 1 cases, judged on 1, tested on 0; started from v0001" in page


def test_json_says_the_same_without_nan(data: dict[str, object]) -> None:
    read = json.loads(as_json(data), parse_constant=pytest.fail)
    assert read["curves"]["dice"] == {"x": [[5, 0.6], [10, 0.8]]}
    assert read["curves"]["loss"][0] == [1, 1.0]
    assert read["cases"]["new"] == [{"case": "a<b>", "dice": {"x": 0.7}, "nsd": {"x": 0.9}, "hd95_mm": {"x": None}}]
    assert read["comparison"]["mean_dice"]["difference"] == pytest.approx(-0.1)


def test_curve_is_drawn_between_its_limits() -> None:
    drawn = draw_curves("loss", {"loss": [(1, 2.0), (11, 1.0), (6, math.nan)]})
    (points,) = re.findall(r'points="([^"]+)"', drawn)
    assert points == "40.0,40.0 600.0,180.0"
    assert "2.000" in drawn and "1.000" in drawn
    assert draw_curves("nothing", {"x": [(1, math.nan)]}) == ""


def test_long_curve_is_thinned_to_means() -> None:
    curve = [(step, float(step % 2)) for step in range(1, 2001)]
    thinned = thin(curve)
    assert len(thinned) == 400
    assert {value for _, value in thinned} <= {0.4, 0.6}
    assert thinned[-1][0] == 2000
    assert thin([]) == []


def test_contour_goes_along_the_edges_of_pixels() -> None:
    mask = np.zeros((3, 4), dtype=bool)
    mask[1, 1:3] = True
    edges = outline_path(mask)
    assert edges.count("h1") == 4 and edges.count("v1") == 2
    assert {"M1 1h1", "M2 1h1", "M1 2h1", "M2 2h1", "M1 1v1", "M3 1v1"} == set(re.findall(r"M\d+ \d+[hv]1", edges))
    assert outline_path(np.zeros((2, 2), dtype=bool)) == ""


def test_picture_is_the_slice_that_differs_most() -> None:
    image = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    reference, predicted = (np.zeros(image.shape, dtype=np.uint8) for _ in range(2))
    reference[1:3, 1:4, 2:5] = 1
    predicted[1:3, 1:4, 2:4] = 1  # it misses slice 4
    drawn = draw_slice(image, reference, predicted, {1: (255, 0, 16)})
    png = base64.b64decode(re.findall(r"base64,([^\"]+)", drawn)[0])
    shown = np.asarray(Image.open(io.BytesIO(png)))
    assert shown.shape == (5, 4), "rows are y from the top, columns x"
    assert shown[-1, 0] < shown[0, -1]
    assert '<path d="" stroke="#ff0010"' in drawn, "nothing was predicted here"
    assert drawn.count("h1") == 4 and drawn.count("v1") == 6


class Nothing(nn.Module):
    """Predicts background."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.ones_like(windows[:, 0]), *[torch.zeros_like(windows[:, 0])] * 2], dim=1)


def test_worst_cases_are_the_three_of_lowest_dice(make_cases: MakeCases) -> None:
    masks, cases = CaseMasks(Segmenter(Nothing(), tiny_preset(), torch.device("cpu"), "fp32")), make_cases(5)
    scored = evaluate(masks, cases).cases
    better = [CaseScore(c.case_id, {"core": 0.1 * n}, c.hd95_mm, c.nsd) for n, c in enumerate(scored)]
    drawn = worst_cases(masks, cases, Evaluation(tuple(better[::-1])))
    assert [(name, round(dice, 3)) for name, dice, _ in drawn] == [
        ("case_001", 0),
        ("case_002", 0.1),
        ("case_003", 0.2),
    ]
    assert all(picture.startswith("<svg") for _, _, picture in drawn)
