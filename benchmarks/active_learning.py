"""How long a clinician waits: for the next case among thousands, and for its mask, computed ahead or not.

    python benchmarks/active_learning.py [--images 5000] [--asks 20] [--cases 10] [--out FILE]

First: a real server over ``--images`` unlabelled cases, nine tenths of them scored, is asked for the next case
``--asks`` times by each strategy. Then: a client takes the next case and its mask, ``--cases`` times, from a server
that computes ahead and from one that does not, looking at each case for ``--think`` seconds before it presses Run.
Prints tables and writes JSON, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "sample-data", "tests/integration")]

from server import Server  # noqa: E402
from synthetic_hippocampus import draw_cases  # noqa: E402

from lib.activelearning.case_scores import MEASURES, REGIONS, CaseScores, score_name  # noqa: E402
from lib.activelearning.pool_knowledge import version_key  # noqa: E402
from lib.activelearning.score_store import CaseScoreRecord, ScoreStore  # noqa: E402
from lib.activelearning.selection import STRATEGIES  # noqa: E402
from lib.models.weights import WeightsLocator  # noqa: E402

MODEL = "hippocampus_mr"
HIDDEN = 128


def main() -> int:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--labelled", type=int, default=200)
    parser.add_argument("--asks", type=int, default=20)
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--think", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "active_learning.json")
    options = parser.parse_args()
    asked = measure_asking(options.images, options.labelled, options.asks)
    masks = {name: measure_masks(mib, options.cases, options.think) for name, mib in (("ahead", 256), ("without", 0))}
    ratio = masks["without"]["p50"] / masks["ahead"]["p50"]
    print(f"time to mask: {masks['without']['p50']:.0f} ms computed when asked, {masks['ahead']['p50']:.0f} ms ahead")
    print(f"ratio of the medians {ratio:.1f}")
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count()},
        "images": options.images,
        "next_sample_ms": asked,
        "think_seconds": options.think,
        "time_to_mask_ms": masks,
        "ratio": round(ratio, 2),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure_asking(images: int, labelled: int, asks: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the answer to next-sample, by strategy."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {"models": MODEL, "result_cache_mib": "0"})
        fill(server, images, labelled)
        server.start()
        try:
            print(f"{images} cases without a label, {labelled} with one")
            print(f"{'strategy':24} {'p50 ms':>8} {'max ms':>8} {'CPU ms':>8}")
            return {name: ask(server, name, asks) for name in STRATEGIES}
        finally:
            server.stop()


def ask(server: Server, strategy: str, count: int) -> dict[str, float]:
    """Ask one strategy a few times; the first answer, which reads what is kept, is told apart.

    The server's CPU time for an answer hardly depends on what else the machine does.
    """
    address, client = f"/activelearning/{strategy}", {"client_id": "one"}
    first = timed(lambda: server.post(address, json=client).json())
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    before = process.cpu_times()
    seconds = [timed(lambda: server.post(address, json=client).json()) for _ in range(count)]
    after = process.cpu_times()
    used = (after.user + after.system - before.user - before.system) / count
    row = describe(seconds) | {"first": round(1000 * first, 1), "cpu": round(1000 * used, 1)}
    print(f"{strategy:24} {row['p50']:8.1f} {row['max']:8.1f} {row['cpu']:8.1f}")
    return row


def fill(server: Server, images: int, labelled: int) -> None:
    """One small image under many names, and what a model would have made of each."""
    case = next(iter(draw_cases(1, seed=3)))
    first = server.studies / "case_00000.nii.gz"
    nib.save(nib.Nifti1Image(case.image, case.affine_ras), first)
    for number in range(1, images + labelled):
        os.link(first, server.studies / f"case_{number:05d}.nii.gz")
    labels = server.studies / "labels" / "final"
    labels.mkdir(parents=True)
    label = labels / "case_00000.nii.gz"
    nib.save(nib.Nifti1Image(case.label, case.affine_ras), label)
    for number in range(1, labelled):
        os.link(label, labels / f"case_{number:05d}.nii.gz")
    shutil.copytree(REPOSITORY / "model" / MODEL, server.models / MODEL)
    store = ScoreStore(server.models / MODEL)
    version = version_key(WeightsLocator(server.models / MODEL).find())
    random = np.random.default_rng(0)
    names = [score_name(measure, region) for measure in MEASURES for region in REGIONS]
    for number in range(images + labelled):
        vector = random.normal(size=HIDDEN).astype(np.float32)
        scored = number % 10 != 0
        values = dict(zip(names, random.random(len(names)).tolist(), strict=True)) if scored else {}
        found = CaseScores(values, 3000.0 if scored else math.nan, vector / np.linalg.norm(vector))
        store.keep(version, f"case_{number:05d}", CaseScoreRecord(found, scored))
    store.close()


def measure_masks(cache_mib: int, count: int, think: float) -> dict[str, float]:
    """Milliseconds from pressing Run to the mask, for cases that next-sample handed out."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {"models": MODEL, "result_cache_mib": str(cache_mib)})
        for number, case in enumerate(draw_cases(count, seed=4)):
            nib.save(nib.Nifti1Image(case.image, case.affine_ras), server.studies / f"case_{number}.nii.gz")
        shutil.copytree(REPOSITORY / "model" / MODEL, server.models / MODEL)
        server.start()
        try:
            server.infer(MODEL, "case_0")  # loads the weights
            seconds = []
            for _ in range(count):
                image = server.post("/activelearning/first", json={"client_id": "one"}).json()["id"]
                time.sleep(think)
                seconds.append(timed(lambda image=image: server.infer(MODEL, image).raise_for_status()))
            return describe(seconds)
        finally:
            server.stop()


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def describe(seconds: list[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    p50, p95, most = (round(1000 * float(np.percentile(seconds, share)), 1) for share in (50, 95, 100))
    return {"p50": p50, "p95": p95, "max": most}


if __name__ == "__main__":
    sys.exit(main())
