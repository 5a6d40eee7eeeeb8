"""The server on the page: its devices, memory, disk, and the duration of segmentations."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.server.http.devices import DeviceView, device_views
from lib.server.http.metrics import Metrics
from lib.server.work.queue import InferenceQueue

GIB = 2**30


@dataclass(frozen=True)
class SystemView:
    """The figures of the server; ``stages`` are mean milliseconds over all segmentations."""

    devices: Sequence[DeviceView]
    disk_free_gib: float | None
    inferences: int
    mean_seconds: float | None
    stages: Mapping[str, float]
    waiting: int
    cache_hits: int


def system_view(studies: str, metrics: Metrics, inferences: InferenceQueue) -> SystemView:
    """The current figures.

    Args:
        studies: a folder, or the address of a DICOMweb server.
        metrics: counts and durations of inferences.
        inferences: the queue of inference requests, with the devices.
    """
    folder = None if studies.startswith(("http://", "https://")) else Path(studies)
    count, means = metrics.inference_means()
    return SystemView(
        devices=device_views(inferences.lanes),
        disk_free_gib=None if folder is None else shutil.disk_usage(folder).free / GIB,
        inferences=count,
        mean_seconds=means["total"] / 1000 if "total" in means else None,
        stages={stage: value for stage, value in means.items() if stage != "total"},
        waiting=inferences.waiting,
        cache_hits=metrics.cache_hits(),
    )
