from __future__ import annotations

import torch
from prometheus_client import CollectorRegistry, generate_latest

from lib.infers.devices.lane import Lane
from lib.infers.devices.lanes import Lanes
from lib.server.http.devices import DeviceFigures, device_views

CPU = torch.device("cpu")


def _lanes() -> Lanes:
    return Lanes([Lane("cpu", CPU), Lane("cpu#2", CPU)], lambda device: None, retry_seconds=60)


def _figures(lanes: Lanes) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(DeviceFigures(lanes))
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def _break(lanes: Lanes) -> None:
    """The first lane fails, and its work is done by the other."""

    def compute(lane: Lane) -> str:
        if lane.name == "cpu":
            raise RuntimeError("CUDA error: unspecified launch failure")
        return lane.name

    assert lanes.run(lanes.work(None), compute) == "cpu#2"


def test_device_that_failed_is_seen_with_its_reason_and_the_others_figures_go_on() -> None:
    lanes = _lanes()
    _break(lanes)
    first, second = device_views(lanes)
    assert (first.problem, first.failures, first.done) == ("CUDA error: unspecified launch failure", 1, 0)
    assert 50 < first.retry_seconds <= 60
    assert (second.problem, second.failures, second.done) == ("", 0, 1)
    assert second.total_bytes >= second.free_bytes > 0
    figures = _figures(lanes)
    assert figures['unetr_device_works{device="cpu"}'] == 0
    assert figures['unetr_device_works{device="cpu#2"}'] == 1
    assert figures['unetr_device_failures_total{device="cpu"}'] == 1
    assert figures['unetr_device_inferences_total{device="cpu#2"}'] == 1
    assert figures['unetr_device_memory_bytes{device="cpu#2"}'] == second.total_bytes


def test_busy_computing_ahead_and_waiting_are_told_apart() -> None:
    lanes = _lanes()
    weights = ("abdomen", "v1")
    asked, ahead, waiting = (
        lanes.work(None, what="a", weights=weights),
        lanes.work(None, ahead=True),
        lanes.work(None, "a"),
    )
    for work in (asked, ahead, waiting):
        lanes.enter(work)
    first, second = device_views(lanes)
    assert (first.busy, first.ahead, first.waiting, first.models) == (True, False, 1, ("abdomen",))
    assert (second.busy, second.ahead, second.waiting, second.models) == (False, True, 0, ())
    figures = _figures(lanes)
    assert figures['unetr_device_busy{device="cpu"}'] == 1 and figures['unetr_device_waiting{device="cpu"}'] == 1
    assert figures['unetr_device_computes_ahead{device="cpu#2"}'] == 1
    for work in (asked, ahead, waiting):
        lanes.leave(work)
    assert not any(view.busy or view.ahead or view.waiting for view in device_views(lanes))
