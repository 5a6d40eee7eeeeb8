"""State of each device, for the page and for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lib.infers.devices.lane import Lane
from lib.infers.devices.lanes import Lanes


@dataclass(frozen=True)
class DeviceView:
    """The current state of a lane.

    Attributes:
        name: name of the lane.
        hardware: description of the device.
        busy: whether it computes for a waiting client.
        ahead: whether it computes in the background.
        waiting: number of requests reserved for it.
        done: number of finished inferences.
        failures: number of failures.
        problem: why it is out of use; empty while it works.
        retry_seconds: seconds until it is tested again.
        models: loaded models.
        free_bytes, total_bytes: its memory; for a CPU, that of the machine; 0 if a GPU does not report it.
    """

    name: str
    hardware: str
    busy: bool
    ahead: bool
    waiting: int
    done: int
    failures: int
    problem: str
    retry_seconds: float
    models: tuple[str, ...]
    free_bytes: int
    total_bytes: int


def device_views(lanes: Lanes) -> list[DeviceView]:
    """All lanes, those of the pool first."""
    return [_view(lanes, lane) for lane in sorted(lanes, key=lambda lane: not lane.pooled)]


def _view(lanes: Lanes, lane: Lane) -> DeviceView:
    state = lanes.state(lane)
    work, failure = state.work, state.failure
    free, total = (0, 0) if failure is not None else memory_of(lane.device)
    return DeviceView(
        name=lane.name,
        hardware="CPU" if lane.device.type == "cpu" else _gpu_name(lane.device),
        busy=work is not None and not work.ahead,
        ahead=work is not None and work.ahead,
        waiting=state.waiting,
        done=state.done,
        failures=state.failures,
        problem="" if failure is None else failure.reason,
        retry_seconds=lanes.seconds_until_retry(lane),
        models=tuple(sorted(state.weights)),
        free_bytes=free,
        total_bytes=total,
    )


def memory_of(device: torch.device) -> tuple[int, int]:
    """Free and total memory of a device in bytes; for a CPU, that of the machine; zeros if a GPU does not report it."""
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        return memory.available, memory.total
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # it is broken, which no computation has shown yet
        return 0, 0
    return free, total


def _gpu_name(device: torch.device) -> str:
    try:
        return torch.cuda.get_device_name(device)
    except RuntimeError:
        return str(device)


class DeviceFigures(Collector):
    """Prometheus metrics of each GPU and CPU, read at each scrape, with the lane's name as the label ``device``."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes

    def collect(self) -> Iterable[Metric]:
        """One metric family for each figure."""
        views = device_views(self._lanes)
        gauges = {
            "unetr_device_busy": ("Whether somebody waits for what it computes", lambda view: view.busy),
            "unetr_device_computes_ahead": ("Whether it computes ahead", lambda view: view.ahead),
            "unetr_device_waiting": ("Inferences that wait for it", lambda view: view.waiting),
            "unetr_device_works": ("Whether it works; 0 while it is out", lambda view: not view.problem),
            "unetr_device_memory_free_bytes": ("Its free memory", lambda view: view.free_bytes),
            "unetr_device_memory_bytes": ("Its memory", lambda view: view.total_bytes),
        }
        for name, (description, value) in gauges.items():
            gauge = GaugeMetricFamily(name, description, labels=["device"])
            for view in views:
                gauge.add_metric([view.name], float(value(view)))
            yield gauge
        counts = {
            "unetr_device_inferences": ("Inferences that it has finished", lambda view: view.done),
            "unetr_device_failures": ("How often it fell out", lambda view: view.failures),
        }
        for name, (description, value) in counts.items():
            counter = CounterMetricFamily(name, description, labels=["device"])
            for view in views:
                counter.add_metric([view.name], float(value(view)))
            yield counter

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registration does not query devices."""
        return ()
