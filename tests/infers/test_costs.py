"""Costs are measured once, kept, and measured again where they are lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lib.infers import costs
from lib.infers.costs import CostBook, Limits, WindowCost, cost_key, measure_windows
from lib.networks.placement import Placement
from lib.networks.unetr import build_unetr
from tests.tiny import tiny_preset

CPU = torch.device("cpu")


def test_costs_and_limits_survive_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "model" / "costs.json"
    book = CostBook(file)
    assert book.cost("cpu", 2) is None
    book.keep("cpu", 2, WindowCost(1000, 0.5))
    book.limit("cpu", Limits(window_batch=1, on_host=True, bands=4))
    again = CostBook(file)
    assert again.cost("cpu", 2) == WindowCost(1000, 0.5)
    assert (again.limits("cpu").window_batch, again.limits("cpu").bands) == (1, 4)
    assert again.limits("another") == Limits()


def test_limits_end_after_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    book = CostBook()
    book.limit("cpu", Limits(bands=4))
    now = costs.time.time()
    monkeypatch.setattr(costs.time, "time", lambda: now + 25 * 3600)
    assert book.limits("cpu") == Limits()
    now -= 10 * 86_400
    assert book.limits("cpu") == Limits(), "the clock was turned back"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"cpu": 3}',
        "\x00",
        "[" * 100_000,
        '{"cpu": {"1": 5}}',
        '{"cpu": {"1": {"bytes": "many", "seconds": 1}}}',
        '{"cpu": {"1": {"bytes": 5}, "limits": {"until": "soon"}}}',
        '{"cpu": {"1": null, "limits": []}}',
    ],
)
def test_damaged_book_is_an_empty_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(text)
    book = CostBook(tmp_path / "costs.json")
    assert book.cost("cpu", 1) is None and book.limits("cpu") == Limits()
    book.keep("cpu", 1, WindowCost(5, 1.0))
    assert CostBook(tmp_path / "costs.json").cost("cpu", 1) == WindowCost(5, 1.0)


def test_book_that_cannot_be_written_is_kept_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    book = CostBook(tmp_path / "file" / "costs.json")
    book.keep("cpu", 1, WindowCost(5, 1.0))
    assert book.cost("cpu", 1) == WindowCost(5, 1.0)
    assert "are not kept" in caplog.text
    assert os.listdir(tmp_path) == ["file"]


def test_key_changes_with_what_a_cost_depends_on() -> None:
    keys = {
        cost_key(Placement(preset, CPU, dtype))
        for preset in (tiny_preset(), tiny_preset(roi_size=[32, 16, 16]))
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(keys) == 4
    assert cost_key(Placement(tiny_preset(name="other"), CPU, torch.float32)) in keys


def test_windows_are_measured() -> None:
    preset = tiny_preset(roi_size=[64, 64, 64], network={"feature_size": 16, "hidden_size": 48, "num_heads": 4})
    network = build_unetr(preset).eval()
    cost = measure_windows(network, Placement(preset, CPU, torch.float32), 1)
    maps = 16 * 64**3 * 4  # the finest feature map
    assert 2 * maps < cost.bytes < 40 * maps
    assert 0 < cost.seconds < 60
