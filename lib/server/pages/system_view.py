"""What the page says of the server: its device, memory, disk, and how long segmentations take."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lib.networks.precision import resolve_device
from lib.server.http.metrics import Metrics
from lib.server.work.queue import InferenceQueue

GIB = 2**30


@dataclass(frozen=True)
class SystemView:
    """The server's figures; ``stages`` are mean milliseconds over all segmentations."""

    device: str
    memory_free_gib: float
    memory_gib: float
    disk_free_gib: float | None
    inferences: int
    mean_seconds: float | None
    stages: Mapping[str, float]
    waiting: int
    cache_hits: int


def system_view(device_name: str, studies: str, metrics: Metrics, inferences: InferenceQueue) -> SystemView:
    """The figures as they are now.

    Args:
        device_name: the setting ``device``.
        studies: a folder, or the address of a DICOMweb server.
        metrics: counts and durations of inferences.
        inferences: the queue in which they wait.
    """
    device = resolve_device(device_name)
    free, total = _memory(device)
    folder = None if studies.startswith(("http://", "https://")) else Path(studies)
    count, means = metrics.inference_means()
    return SystemView(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        memory_free_gib=free / GIB,
        memory_gib=total / GIB,
        disk_free_gib=None if folder is None else shutil.disk_usage(folder).free / GIB,
        inferences=count,
        mean_seconds=means["total"] / 1000 if "total" in means else None,
        stages={stage: value for stage, value in means.items() if stage != "total"},
        waiting=inferences.waiting,
        cache_hits=metrics.cache_hits(),
    )


def _memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of the device's memory; of the machine's, where it computes on the CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    memory = psutil.virtual_memory()
    return memory.available, memory.total
