"""The devices on which trainings and scorings compute, in processes outside of the lanes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lib.infers.devices.lanes import Lanes
from lib.server.work.jobs import Job
from lib.server.work.pause import Pause


def pooled_devices(lanes: Lanes) -> list[str]:
    """The distinct devices of a server, in order."""
    return list(dict.fromkeys(str(lane.device) for lane in lanes if lane.pooled))


def idle_place(lanes: Lanes) -> dict[str, Any]:
    """The fields of a request that select the least busy device, if there are several; otherwise none.

    On a server with GPUs, it is a GPU.
    """
    devices = pooled_devices(lanes)
    if len(devices) == 1:
        return {}
    kind = "cuda" if any(device.startswith("cuda") for device in devices) else "cpu"
    return {"device": str(lanes.quietest(kind))}


def devices_of(request: Mapping[str, Any], kind: str, devices: list[str]) -> frozenset[str]:
    """The devices that a job of this request uses.

    Args:
        request: a request for a training or a scoring.
        kind: ``train`` or ``scoring``.
        devices: the server's devices.
    """
    gpus, name = [device for device in devices if device.startswith("cuda")], str(request.get("device") or "")
    if kind == "train" and gpus and name != "cpu":
        chosen = str(request.get("gpus") or "all")
        if chosen != "all":
            return frozenset(f"cuda:{index}" for index in chosen.split(","))
        if request.get("multi_gpu", True):
            return frozenset(gpus)
    index = re.search(r":(\d+)$", name)  # cuda:1, or a GPU's name as MONAI Label's clients send it
    return frozenset([f"cuda:{index[1]}" if index else "cpu" if name == "cpu" else devices[0]])


def occupied(jobs: Iterable[Job], devices: list[str]) -> frozenset[str]:
    """The devices that unfinished trainings and scorings use."""
    open_ones = [job for job in jobs if job.is_open and job.kind in ("train", "scoring")]
    return frozenset().union(*(devices_of(job.request, job.kind, devices) for job in open_ones))


def pause_file(pause: Pause, lanes: Lanes, request: Mapping[str, Any]) -> Path:
    """The file that a training of this request checks, to pause while its devices answer requests."""
    devices = pooled_devices(lanes)
    return pause.file if len(devices) == 1 else pause.file_for(devices_of(request, "train", devices))
