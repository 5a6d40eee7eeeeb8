"""Segmenting a pool: what the worker and Ray cost beside the computing, and what two nodes and a lost one do.

    python benchmarks/cluster.py [overhead] [efficiency] [recovery] [memory] [table] [--out FILE]

All five if none is named; it needs Ray (run.py setup --cluster) and two cores, and takes five to eight minutes.

overhead    seconds from one case to the next where the computing is a sleep of 0.5 s, as of a GPU: a bare loop that
            reads, sleeps and writes; the worker; Ray with one node. A sleep, so that a busy machine disturbs little.
efficiency  hippocampus cases a second with the shipped weights, on one node of one core and on two, each for 30 s once
            every node's worker has done its first cases: needs two quiet cores.
recovery    from the kill of one of two nodes until the cases that it had run elsewhere, and until they are done.
memory      of the driver while 10,000 cases wait, and how many cases it hands out in a second when they take no time.
table       what 10,000 CTs take on 8 and 64 GPUs: computed from the four others (of this call, or else of the file that
            an earlier one wrote) and printed as computed, with the formula and all that goes into it.

Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
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
from lib.cluster.source import FolderSource, ReadCase, read_case  # noqa: E402
from lib.cluster.worker import Case, MakeWorker, SegmentingWorker, segment_cases  # noqa: E402
from lib.configs.catalogue import load_preset  # noqa: E402
from lib.models.weights import WeightsLocator  # noqa: E402
from tests.cluster.ray_nodes import TwoNodes  # noqa: E402

PARTS = ("overhead", "efficiency", "recovery", "memory", "table")
CASE_SECONDS = 0.5
CASES, HIPPOCAMPI, LOST_CASES, QUEUED = 24, 8, 40, 10_000
FIRST_CASES, WINDOW_SECONDS, PATIENCE_SECONDS = 3, 30.0, 120.0
SHAPE = (64, 64, 64)
CT_SECONDS = 2.75
"""A whole request of a CT of 512x512x200 on one H200, with reading and writing, as it was measured there once."""
CT_BYTES = 512 * 512 * 200 * 2
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
        return read_case(case.id, self._source.fetch(case.id, Path()), self._preset)

    def compute(self, ready: ReadCase | Case) -> Masked:
        """An empty mask."""
        case = ready.id if isinstance(ready, Case) else ready.case
        if self._notes is not None:
            (self._notes / f"{case}-{time.time()}-{os.getpid()}").touch()
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
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the nodes are ended
    measured = [part for part in wanted if part != "table"]
    if measured:
        measure(measured, found, options.out)
    if "table" in wanted:
        if missing := [part for part in PARTS[:-1] if part not in found]:
            parser.error(f"the table needs {', '.join(missing)} too")
        found["table"] = compute(found)
        write_json(options.out, found)
    return 0


def measure(parts: list[str], found: dict[str, Any], out: Path) -> None:
    """Measure parts on a cluster of two nodes, and keep each as soon as it is there."""
    nodes = TwoNodes(second=False)
    try:
        with tempfile.TemporaryDirectory(prefix="unetr-") as name:
            for part in parts:
                start, load = time.monotonic(), round(os.getloadavg()[0], 1)
                print(f"\n{part}; load of the machine before it: {load}", flush=True)
                found[part] = MEASURES[part](nodes, Path(name)) | {"load_before": load}
                print(f"measured in {time.monotonic() - start:.0f} s", flush=True)
                write_json(out, found)
    finally:
        nodes.stop()


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


@dataclass(frozen=True)
class MakeNamed:
    """Makes workers that answer with the process that computed."""

    make: MakeWorker

    def __call__(self, device: str) -> Named:
        return Named(self.make(device))


class Named:
    """A worker that answers with its process."""

    def __init__(self, worker: SegmentingWorker) -> None:
        self._worker = worker

    def read(self, case: Case) -> Any:
        """As the worker does."""
        return self._worker.read(case)

    def compute(self, ready: Any) -> int:
        """As the worker does; returns the process' id."""
        self._worker.compute(ready)
        return os.getpid()


def efficiency(nodes: TwoNodes, folder: Path) -> dict[str, Any]:
    """Cases a second of two nodes against one."""
    studies = folder / "hippocampi"
    studies.mkdir()
    for number, case in enumerate(draw_cases(HIPPOCAMPI, seed=1)):
        nib.save(nib.Nifti1Image(case.image, case.affine_ras), studies / f"case{number:02d}.nii.gz")
    preset = load_preset("hippocampus_mr")
    model = ModelFile.find(preset, WeightsLocator(REPOSITORY / "model" / preset.name), compiles=False).packed()
    source = FolderSource(studies)
    recipe = Recipe(model.sha256, MakeNamed(MakeWorker(source, model)))
    rates = {1: _rate(nodes, source, recipe, 1)}
    nodes.start_second()
    rates[2] = _rate(nodes, source, recipe, 2)
    show(("nodes", "cases/s"), [(count, f"{rate:.2f}") for count, rate in rates.items()])
    print(f"two nodes do {rates[2] / rates[1]:.2f} times what one does")
    return {"cases_a_second": rates, "ratio": rates[2] / rates[1]}


def _rate(nodes: TwoNodes, source: FolderSource, recipe: Recipe[Case, int], count: int) -> float:
    """Cases a second while all nodes compute: each brings its weights, and measures costs, in its first cases."""
    done: Counter[int] = Counter()
    ends: list[float] = []
    start = time.perf_counter()
    run = RayEngine(nodes.address, 1).run(map(Case, itertools.cycle(source.cases())), lambda: recipe)
    for one in run:
        assert one.answer is not None, one.problem
        now = time.perf_counter()
        done[one.answer] += 1
        if len([process for process, number in done.items() if number >= FIRST_CASES]) >= count:
            ends.append(now)
        elif now - start > PATIENCE_SECONDS:
            raise RuntimeError(f"{len(done)} of {count} workers have done {FIRST_CASES} cases in {now - start:.0f} s")
        if ends and now - ends[0] > WINDOW_SECONDS:
            break
    run.close()  # type: ignore[attr-defined]  # it is a generator
    print(f"{count} nodes: {len(ends) - 1} cases in {ends[-1] - ends[0]:.1f} s, by {len(done)} processes", flush=True)
    return (len(ends) - 1) / (ends[-1] - ends[0])


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
        both = len({note.name.rpartition("-")[2] for note in notes.iterdir()}) == 2
        if not killed and len(done) >= 4 and both:
            nodes.kill_second()
            killed = time.time()
    assert len(done) == LOST_CASES, "a case was lost"
    if not killed:
        raise RuntimeError("the second node had not begun when all cases were done: the machine is too busy")
    begun: dict[str, list[float]] = {}
    for note in notes.iterdir():
        case, when, _ = note.name.split("-")
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
    """What 10,000 CTs take by the figures of the other parts. Nothing here was measured on so many GPUs."""
    overhead_s = max(0.0, found["overhead"]["seconds_a_case"]["Ray"] - CASE_SECONDS)
    share = min(1.0, found["efficiency"]["ratio"] / 2)
    rate = found["memory"]["most_per_second"]
    again = found["recovery"]["seconds_until_they_are_done"]
    lost = "no case was lost with the node here" if again is None else f"{again:.0f} s here"
    print(f"""
COMPUTED, not measured: {QUEUED} CTs of 512x512x200

    hours = {QUEUED} * max((g + o) / (n * e), 1 / r) / 3600

n  GPUs
g  = {CT_SECONDS} s, a whole request (reading, computing, writing) as measured once on one H200
o  = {overhead_s:.4f} s beside the computing, a case (overhead, Ray)
e  = {share:.2f}, what each of two nodes did of what one did alone (efficiency), taken as the same for n GPUs; and 1,
   if nothing were lost
r  = {rate:.0f} cases a second that one driver hands out at most (memory)
as if the folder or server of the images kept up; a node that is lost costs its cases' time again, {lost}
(recovery)
""")
    rows, computed = [], []
    for gpus in GPUS:
        for each in sorted({share, 1.0}):
            seconds = max((CT_SECONDS + overhead_s) / (gpus * each), 1 / rate)
            limit = "the driver" if seconds == 1 / rate else "the GPUs"
            hours, read = QUEUED * seconds / 3600, CT_BYTES / seconds / 1e9
            rows.append((gpus, f"{each:.2f}", f"{hours:.2f}", limit, f"{read:.1f}"))
            computed.append({"gpus": gpus, "efficiency": each, "hours": hours, "limited_by": limit, "read_gb_s": read})
    show(("GPUs", "e", "hours", "limited by", "images unpacked, GB/s"), rows)
    inputs = {"ct_seconds_measured_on_one_h200": CT_SECONDS, "overhead_s": overhead_s, "efficiency": share}
    return {"computed_not_measured": computed, "from": inputs | {"most_per_second": rate}}


MEASURES = {"overhead": overhead, "efficiency": efficiency, "recovery": recovery, "memory": memory}

if __name__ == "__main__":
    raise SystemExit(main())
