"""How long short requests take while clients run inferences back to back: our server against MONAI Label's own.

    python benchmarks/server_load.py [--clients 16] [--seconds 60] [--out FILE]

Both servers run the same app, weights and cases, one after the other in the same run. ``--clients`` clients segment
without a pause; beside them one client each asks for ``/info/`` and the training's status and submits labels, ten times
a second. Prints a table and writes JSON: percentiles in milliseconds, errors, inferences a second, and memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import requests

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "sample-data", "tests/integration")]

from server import STOCK_APP, Server  # noqa: E402
from synthetic_hippocampus import SyntheticCase, draw_cases  # noqa: E402

MODEL = "hippocampus_mr"
SECONDS_BETWEEN_PROBES = 0.1
CASES = 6


@dataclass
class Timings:
    """One kind of request's times, and how many failed."""

    milliseconds: list[float] = field(default_factory=list)
    errors: int = 0

    def percentile(self, share: float) -> float:
        """A percentile in milliseconds; NaN if nothing was measured."""
        return float(np.percentile(self.milliseconds, share)) if self.milliseconds else float("nan")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    server: str
    request: str
    count: int
    errors: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


def main() -> int:
    """Measure both servers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", choices=("ours", "stock"))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "server_load.json")
    options = parser.parse_args()
    servers = {"stock": STOCK_APP, "ours": "lib.server.app:app"}
    rows: list[Row] = []
    memory: dict[str, list[float]] = {}
    for name, uvicorn_app in servers.items():
        if options.only in (None, name):
            measured, memory[name] = measure(name, uvicorn_app, options.clients, options.seconds)
            rows += measured
    show(rows, memory, options.seconds)
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count()},
        "clients": options.clients,
        "seconds": options.seconds,
        "rows": [asdict(row) for row in rows],
        "memory_mib": memory,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(name: str, uvicorn_app: str, clients: int, seconds: float) -> tuple[list[Row], list[float]]:
    """Start a server, load it, stop it; returns its lines and its memory in MiB, at the start and once a second."""
    cases = list(draw_cases(CASES, seed=3))
    with tempfile.TemporaryDirectory() as folder:
        server = prepare(Server(Path(folder), {"models": MODEL, "result_cache_mib": "0"}, uvicorn_app), cases)
        server.start()
        try:
            return load(name, server, cases, clients, seconds)
        finally:
            server.stop()


def prepare(server: Server, cases: list[SyntheticCase]) -> Server:
    """Cases as studies, and the shipped weights."""
    for number, case in enumerate(cases):
        nib.save(nib.Nifti1Image(case.image, case.affine_ras), server.studies / f"case_{number}.nii.gz")
        nib.save(nib.Nifti1Image(case.label, case.affine_ras), server.folder / f"label_{number}.nii.gz")
    shutil.copytree(REPOSITORY / "model" / MODEL, server.models / MODEL)
    return server


def load(
    name: str, server: Server, cases: list[SyntheticCase], clients: int, seconds: float
) -> tuple[list[Row], list[float]]:
    """Run all clients for a while."""
    labels = [(server.folder / f"label_{number}.nii.gz").read_bytes() for number in range(len(cases))]
    info = json.dumps({"label_info": [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]})
    stop = time.monotonic() + seconds

    def segment(http: requests.Session, turn: int) -> requests.Response:
        form = {"params": (None, '{"result_extension": ".nrrd", "result_dtype": "uint8"}')}
        return http.post(f"{server.url}/infer/{MODEL}?image=case_{turn % CASES}", files=form, timeout=600)

    def save(http: requests.Session, turn: int) -> requests.Response:
        files = {"params": (None, info), "label": ("label.nii.gz", labels[turn % CASES])}
        return http.put(f"{server.url}/datastore/label?image=case_{turn % CASES}", files=files, timeout=600)

    kinds: dict[str, tuple[Callable[[requests.Session, int], requests.Response], int, float]] = {
        "infer": (segment, clients, 0.0),
        "info": (lambda http, _: http.get(f"{server.url}/info/", timeout=600), 1, SECONDS_BETWEEN_PROBES),
        "train status": (lambda http, _: http.get(f"{server.url}/train/", timeout=600), 1, SECONDS_BETWEEN_PROBES),
        "save label": (save, 1, SECONDS_BETWEEN_PROBES),
    }
    segment(requests.Session(), 0)  # the first loads the weights
    timings = {kind: Timings() for kind in kinds}
    threads = [
        threading.Thread(target=work, args=(call, pause, stop, timings[kind]))
        for kind, (call, count, pause) in kinds.items()
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    memory = watch_memory(server, stop)
    for thread in threads:
        thread.join()
    return [row_of(name, kind, timing) for kind, timing in timings.items()], memory


def work(
    call: Callable[[requests.Session, int], requests.Response], pause: float, stop: float, timings: Timings
) -> None:
    """One client, until the time is up. 404 is the right answer to the status of a training that there is not."""
    http, turn = requests.Session(), 0
    while time.monotonic() < stop:
        start = time.perf_counter()
        try:
            failed = call(http, turn).status_code not in (200, 404)
        except requests.RequestException:
            failed = True
        timings.milliseconds.append((time.perf_counter() - start) * 1000)
        timings.errors += failed
        turn += 1
        time.sleep(pause)


def watch_memory(server: Server, stop: float) -> list[float]:
    """The server's resident memory in MiB, once a second."""
    assert server.process is not None
    process, seen = psutil.Process(server.process.pid), []
    while time.monotonic() < stop:
        seen.append(round(process.memory_info().rss / 2**20, 1))
        time.sleep(1)
    return seen


def row_of(server: str, request: str, timings: Timings) -> Row:
    """Summarize."""
    p50, p95, p99, most = (round(timings.percentile(share), 1) for share in (50, 95, 99, 100))
    return Row(server, request, len(timings.milliseconds), timings.errors, p50, p95, p99, most)


def show(rows: list[Row], memory: dict[str, list[float]], seconds: float) -> None:
    """Print the table and the ratios."""
    columns = "".join(f" {name:>9}" for name in ("p50 ms", "p95 ms", "p99 ms", "max ms"))
    print(f"{'server':8} {'request':14} {'count':>6} {'errors':>6}{columns}")
    for row in rows:
        print(
            f"{row.server:8} {row.request:14} {row.count:6} {row.errors:6} {row.p50_ms:9.1f} {row.p95_ms:9.1f} "
            f"{row.p99_ms:9.1f} {row.max_ms:9.1f}"
        )
    by_name = {(row.server, row.request): row for row in rows}
    for request in ("infer", "info", "train status", "save label"):
        ours, stock = by_name.get(("ours", request)), by_name.get(("stock", request))
        if ours and stock:
            print(f"{request}: p99 of stock / ours = {stock.p99_ms / ours.p99_ms:.1f}")
    for name, seen in memory.items():
        infer = by_name[name, "infer"].count / seconds
        print(f"{name}: {infer:.2f} inferences a second; memory {seen[0]:.0f} MiB at first, {seen[-1]:.0f} at last")


if __name__ == "__main__":
    sys.exit(main())
