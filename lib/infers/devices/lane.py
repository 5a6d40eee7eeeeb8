"""A lane, which is a device of this process or a share of one, and the lane that a thread computes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from lib.errors import ConfigError, ParameterError
from lib.networks.precision import resolve_device

ALL = "all"
MOST_LANES = 64

_current: ContextVar[Lane | None] = ContextVar("lane", default=None)


@dataclass(eq=False)
class Lane:
    """A device, or a share of one.

    Attributes:
        name: name of the device, with ``#2`` and so on for further lanes of one device.
        device: the device on which it computes.
        threads: CPU threads for it; 0 for as many as there are.
        pooled: whether work that names no device may run here.
        lock: held by the thread that computes.
        generation: changes when the device fails: models that were loaded before must not be used any more.
    """

    name: str
    device: torch.device
    threads: int = 0
    pooled: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    generation: int = 0

    def serves(self, device: torch.device | None) -> bool:
        """Whether work for this device may run here.

        Args:
            device: None for any device; without an index, any device of this kind.
        """
        if device is None:
            return self.pooled
        return device.type == self.device.type and (device.index is None or (self.device.index or 0) == device.index)


def parse_devices(text: str) -> list[Lane]:
    """Parse the lanes of ``--conf devices``: ``all``, or device names separated by commas; by default the best device.

    Raises:
        ConfigError: for an unknown device, or a GPU that is named twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == [ALL]:
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    if len(names) > MOST_LANES:
        raise ConfigError(f"--conf devices names {len(names)} devices; valid: at most {MOST_LANES}")
    try:
        devices = [resolve_device(name) for name in names or [""]]
    except ParameterError as error:
        raise ConfigError(f"--conf device or devices: {error}; devices: or 'all', or several") from error
    shares = sum(device.type == "cpu" for device in devices)
    threads = max(1, torch.get_num_threads() // shares) if shares > 1 else 0
    lanes: list[Lane] = []
    for device in devices:
        count = sum(lane.device == device for lane in lanes)
        if count and device.type != "cpu":
            raise ConfigError(f"--conf devices names {device} twice; valid: each GPU once")
        name = f"{device}#{count + 1}" if count else str(device)
        lanes.append(Lane(name, device, threads if device.type == "cpu" else 0))
    return lanes


def lane_in_use() -> Lane | None:
    """The lane that this thread computes on; None outside of a lane."""
    return _current.get()


def device_in_use(default: torch.device) -> torch.device:
    """The device of the lane that this thread computes on; outside of a lane, ``default``."""
    lane = _current.get()
    return default if lane is None else lane.device


@contextmanager
def computing_on(lane: Lane) -> Iterator[None]:
    """Make computations inside the block use the lane, in this thread and in copies of its context."""
    token = _current.set(lane)
    if lane.threads and torch.get_num_threads() != lane.threads:
        torch.set_num_threads(lane.threads)
    try:
        # CUDA records graphs and releases memory on the current device
        with torch.cuda.device(lane.device) if lane.device.type == "cuda" else nullcontext():
            yield
    finally:
        _current.reset(token)
