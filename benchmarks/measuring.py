"""What the benchmarks share: the machine in words, a worker in its own process, a model folder, medians and a table."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
RESULT = "RESULT "


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, load, GPU, and the versions that matter."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    known = torch.cpu.get_capabilities()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "cpu": known.get("cpu_name") or platform.processor() or platform.machine(),
        "bf16": [name for name in ("amx_bf16", "avx512_bf16") if known.get(name)],
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def peak_mib(where: str = "host") -> float:
    """The most memory that this process has held on the host, or that PyTorch has taken for it on the ``gpu``."""
    if where == "gpu":
        return round(torch.cuda.max_memory_reserved() / 2**20, 1) if torch.cuda.is_available() else 0.0
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def tell(result: Mapping[str, Any]) -> None:
    """What a worker reports to the process that started it."""
    print(RESULT + json.dumps(result), flush=True)


def run_worker(script: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a benchmark's ``--worker`` in a process of its own, and return what it tells.

    Raises:
        RuntimeError: with the end of its output, when it fails.
    """
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script), *arguments]
    given = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "sample-data"), *([given] if given else [])])
    # the waiting of run.py's server, for every way alike
    defaults = {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}
    ended = subprocess.run(
        command,
        env={**defaults, **os.environ, **(environment or {}), "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith(RESULT)]
    if ended.returncode or not lines:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{(ended.stdout + ended.stderr)[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
    return found


def middle(values: Sequence[float]) -> str:
    """Median, with the smallest and the largest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def show(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def write_json(file: Path, result: Mapping[str, Any]) -> None:
    """Keep a benchmark's result with the machine that it was taken on."""
    file.write_text(json.dumps({"machine": describe_machine(), **result}, indent=1) + "\n", encoding="utf-8")


def copy_model(preset: str, folder: Path, weights: Path | None = None) -> None:
    """Copy what the project ships of a preset into a server's ``model_dir``, so that nothing is written beside it.

    Args:
        preset: its name.
        folder: the ``model_dir``.
        weights: served instead of the shipped ones, with their JSON side-car.
    """
    shutil.copytree(REPOSITORY / "model" / preset, folder / preset)
    if weights is not None:
        for suffix in (".pt", ".json"):
            shutil.copy(weights.with_suffix(suffix), folder / preset / f"shipped{suffix}")
