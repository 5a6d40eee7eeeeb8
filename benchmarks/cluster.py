"""Segmenting a pool: what the worker and Ray cost beside the computing, and what two nodes and a lost one do.

    python benchmarks/cluster.py [overhead] [efficiency] [recovery] [memory] [--out FILE]

All four if none is named; it needs Ray (run.py setup --cluster), two cores, and less than five minutes.

overhead    seconds from one case to the next where the computing is a sleep of 0.5 s, as of a GPU: a bare loop that
            reads, sleeps and writes; the worker; Ray with one node. A sleep, so that a busy machine disturbs little.
efficiency  hippocampus cases with the shipped weights, on one node of one core and on two: needs two quiet cores.
recovery    from the kill of one of two nodes until the cases that it had run elsewhere, and until they are done.
memory      of the driver while 10,000 cases wait, and how many cases it hands out in a second when they take no time.

The time of 10,000 CTs on 8 and 64 GPUs is computed from these, and printed as computed. Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
from measuring import REPOSITORY, show, write_json

sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "sample-data")]

from synthetic_hippocampus import draw_cases  # noqa: E402

from lib.cluster.engine import Engine, LocalEngine, Recipe  # noqa: E402
from lib.cluster.model import ModelFile  # noqa: E402
from lib.cluster.ray_engine import RayEngine  # noqa: E402
from lib.cluster.results import CaseResult, Masked, ResultFolder  # noqa: E402
from lib.cluster.source import FolderSource, ReadCase, checksum_of, read_case  # noqa: E402
from lib.cluster.worker import Case, MakeWorker, segment_cases  # noqa: E402
from lib.configs.catalogue import load_preset  # noqa: E402
from lib.models.weights import WeightsLocator  # noqa: E402
from tests.cluster.ray_nodes import TwoNodes  # noqa: E402

PARTS = ("overhead", "efficiency", "recovery", "memory")
CASE_SECONDS = 0.5
CASES, HIPPOCAMPI, LOST_CASES, QUEUED = 24, 48, 16, 10_000
SHAPE = (64, 64, 64)
# A whole CT request of 512x512x200 on an H200 as it was measured, and a goal.
CT_SECONDS = (2.75, 1.0)
GPUS = (8, 64)


class Sleeper:
    """Reads a case, and sleeps where a GPU would compute; notes in the folder ``notes`` when it began."""

    def __init__(self, source: FolderSource | None, seconds: float, notes: Path | None = None) -> None:
        self._source, self._seconds, self._notes = source, seconds, notes
        self._preset = load_preset("hippocampus_mr")

    def read(self, case: Case) -> ReadCase | Case:
        """The image, where there are images."""
        if self._source is None:
            return case
        path = self._source.fetch(case.id, Path()).path
        return read_case(case.id, path, checksum_of(path), self._preset)

    def compute(self, ready: ReadCase | Case) -> Masked:
        """An empty mask."""
        case = ready.id if isinstance(ready, Case) else ready.case
        if self._notes is not None:
            (self._notes / f"{case}-{time.time()}").touch()
        time.sleep(self._seconds)
        return Masked(CaseResult(case, "", "sleep", "none", "", f"{case}.nii.gz", self._seconds, {}), b"mask")


@dataclass(frozen=True)
class MakeSleeper:
    """Makes them in other processes."""

    source: FolderSource | None
    seconds: float
    notes: Path | None = None

    def __call__(self, device: str) -> Sleeper:
        return Sleeper(self.source, self.seconds, self.notes)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is given")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "cluster.json")
    options = parser.parse_args()
    wanted = options.parts or PARTS
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; valid: {', '.join(PARTS)}")
    found: dict[str, Any] = {}
    nodes = TwoNodes(second=False)
    try:
        with tempfile.TemporaryDirectory(prefix="unetr-") as name:
            folder = Path(name)
            for part in wanted:
                print(f"\n{part}", flush=True)
                found[part] = MEASURES[part](nodes, folder)
    finally:
        nodes.stop()
    if {"overhead", "memory"} <= found.keys():
        found["computed"] = compute(found)
    write_json(options.out, found)
    return 0


def overhead(nodes: TwoNodes, folder: Path) -> dict[str, Any]:
    """Seconds a case of each way beyond the sleep."""
    studies = folder / "overhead"
    studies.mkdir()
    voxels = np.random.default_rng(0).normal(0, 100, SHAPE).astype(np.int16)
    for number in range(CASES):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), studies / f"case{number:02d}.nii.gz")
    source = FolderSource(studies)
    ways: dict[str, Callable[[], float]] = {
        "bare loop": lambda: _bare(source, ResultFolder(folder / "bare")),
        "worker": lambda: _paced(source, ResultFolder(folder / "worker"), LocalEngine(["cpu"])),
        "Ray": lambda: _paced(source, ResultFolder(folder / "ray"), RayEngine(nodes.address, 1)),
    }
    seconds = {way: measure() for way, measure in ways.items()}
    bare = seconds["bare loop"]
    rows = [
        (way, f"{value:.4f}", f"{1000 * (value - CASE_SECONDS):.1f}", f"{100 * (value / bare - 1):+.1f} %")
        for way, value in seconds.items()
    ]
    show(("way", "s a case", "of them not computing, ms", "against the bare loop"), rows)
    return {"seconds_a_case": seconds, "against_bare": {way: value / bare - 1 for way, value in seconds.items()}}


def _bare(source: FolderSource, results: ResultFolder) -> float:
    worker, ends = Sleeper(source, CASE_SECONDS), []
    for case in source.cases():
        results.keep(worker.compute(worker.read(Case(case))))
        ends.append(time.perf_counter())
    return _a_case(ends)


def _paced(source: FolderSource, results: ResultFolder, engine: Engine) -> float:
    """From the first case's end to the last one's: without the start of workers, which is once for a run."""
    ends: list[float] = []
    recipe = Recipe("sleep", MakeSleeper(source, CASE_SECONDS))
    segment_cases(
        source.cases(),
        results,
        engine,
        lambda: recipe,
        ("sleep", ""),
        on_case=lambda case: ends.append(time.perf_counter()),
    )
    return _a_case(ends)


def _a_case(ends: list[float]) -> float:
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def efficiency(nodes: TwoNodes, folder: Path) -> dict[str, Any]:
    """Cases a second of two nodes against one."""
    studies = folder / "hippocampi"
    studies.mkdir()
    for number, case in enumerate(draw_cases(HIPPOCAMPI, seed=1)):
        nib.save(nib.Nifti1Image(case.image, case.affine_ras), studies / f"case{number:02d}.nii.gz")
    preset = load_preset("hippocampus_mr")
    model = ModelFile.find(preset, WeightsLocator(REPOSITORY / "model" / preset.name), compiles=False).packed()
    source = FolderSource(studies)
    recipe = Recipe(model.sha256, MakeWorker(source, model))
    rates = {}
    for count in (1, 2):
        if count == 2:
            nodes.start_second()
        ends: list[float] = []
        # the first ones bring the weights, and the first window's measuring of costs, to each worker
        cases = source.cases()
        for _ in RayEngine(nodes.address, 1).run(map(Case, cases), lambda: recipe):
            ends.append(time.perf_counter())
        warm = ends[len(ends) // 3 :]
        rates[count] = (len(warm) - 1) / (warm[-1] - warm[0])
    show(("nodes", "cases/s"), [(count, f"{rate:.2f}") for count, rate in rates.items()])
    print(f"two nodes do {rates[2] / rates[1]:.2f} times what one does")
    return {"cases_a_second": rates, "ratio": rates[2] / rates[1]}


def recovery(nodes: TwoNodes, folder: Path) -> dict[str, Any]:
    """Seconds from a node's kill until its cases run elsewhere."""
    notes = folder / "notes"
    notes.mkdir()
    nodes.start_second()
    recipe = Recipe("sleep", MakeSleeper(None, 2 * CASE_SECONDS, notes))
    done: dict[str, float] = {}
    killed = 0.0
    for one in RayEngine(nodes.address, 1).run((Case(f"case{n:02d}") for n in range(LOST_CASES)), lambda: recipe):
        done[one.item.id] = time.time()
        assert one.answer is not None, one.problem
        if len(done) == 4:
            nodes.kill_second()
            killed = time.time()
    assert len(done) == LOST_CASES, "a case was lost"
    begun: dict[str, list[float]] = {}
    for note in notes.iterdir():
        case, _, when = note.name.partition("-")
        begun.setdefault(case, []).append(float(when))
    again = {case: max(times) for case, times in begun.items() if len(times) > 1}
    result = {
        "cases_run_again": len(again),
        "seconds_until_they_run": max((when - killed for when in again.values()), default=None),
        "seconds_until_they_are_done": max((done[case] - killed for case in again), default=None),
    }
    show(tuple(result), [tuple(f"{value:.1f}" if isinstance(value, float) else value for value in result.values())])
    return result


def memory(nodes: TwoNodes, folder: Path) -> dict[str, Any]:
    """MiB of the driver as the queue gets shorter, and cases a second."""
    nodes.start_second()
    recipe, process = Recipe("sleep", MakeSleeper(None, 0.0)), psutil.Process()
    rows, taken, results = [], [0], []

    def cases() -> Iterator[Case]:
        for number in range(QUEUED):
            taken[0] += 1
            yield Case(f"case{number:05d}")

    start = time.perf_counter()
    for count, one in enumerate(RayEngine(nodes.address, 1).run(cases(), lambda: recipe), 1):
        assert one.answer is not None, one.problem
        results.append(one.answer.result)  # as a run keeps them for its table
        if count in (100, 1000, QUEUED // 2, QUEUED):
            rows.append((count, QUEUED - taken[0], round(process.memory_info().rss / 2**20, 1)))
    rate = QUEUED / (time.perf_counter() - start)
    show(("done", "not yet taken from the queue", "driver, MiB"), rows)
    print(f"{rate:.0f} cases a second at most")
    return {
        "rss_mib": [{"done": done, "queued": left, "mib": mib} for done, left, mib in rows],
        "most_per_second": rate,
    }


def compute(found: dict[str, Any]) -> dict[str, Any]:
    """What 10,000 CTs take by the figures above. Not measured on so many GPUs."""
    cost = found["overhead"]["seconds_a_case"]["Ray"] - CASE_SECONDS
    rate = found["memory"]["most_per_second"]
    rows, computed = [], []
    for seconds in CT_SECONDS:
        for gpus in GPUS:
            hours = QUEUED * max((seconds + cost) / gpus, 1 / rate) / 3600
            limit = "the driver" if 1 / rate > (seconds + cost) / gpus else "the GPUs"
            rows.append((seconds, gpus, f"{hours:.2f}", limit))
            computed.append({"seconds_a_ct": seconds, "gpus": gpus, "hours": hours, "limited_by": limit})
    print("\n10,000 CTs, COMPUTED from the overhead of Ray and the driver's rate, as if reading kept up")
    show(("s a CT on one GPU", "GPUs", "hours", "limited by"), rows)
    return {"computed_not_measured": computed}


MEASURES = {"overhead": overhead, "efficiency": efficiency, "recovery": recovery, "memory": memory}

if __name__ == "__main__":
    raise SystemExit(main())
