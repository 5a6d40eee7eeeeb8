"""What saving one label costs with more and more cases: this project's store against MONAI Label's own.

    python benchmarks/label_store.py [--cases 20,1000,50000] [--saves 40] [--out FILE]

For each number of cases a folder of that many images and final labels is opened by each store, and labels of random
cases are saved again. Prints a table and writes JSON: milliseconds of a save (median, 95th percentile, most), seconds
until the folder is open for the first time and again. This project's store waits for the disk in each save (fsync, so
that a power cut loses nothing); MONAI Label's own does not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
from monailabel.datastore.local import LocalDatastore

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from lib.datastore.records import Submission  # noqa: E402
from lib.datastore.store import VersionedDatastore  # noqa: E402

CASES = (20, 200, 2_000, 10_000, 50_000)
SHAPE = (35, 50, 35)
Save = Callable[[str, Path], None]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    store: str
    cases: int
    saves: int
    first_open_seconds: float
    open_seconds: float
    median_ms: float
    p95_ms: float
    max_ms: float


def main() -> int:
    """Measure both stores at each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=lambda text: tuple(map(int, text.split(","))), default=CASES)
    parser.add_argument("--saves", type=int, default=40)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "label_store.json")
    options = parser.parse_args()
    print(f"{'store':6} {'cases':>6} {'first s':>8} {'open s':>8} {'median ms':>10} {'p95 ms':>8} {'max ms':>8}")
    rows = []
    for cases in options.cases:
        for store in ("stock", "ours"):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(store, Path(folder), cases, options.saves))
            row = rows[-1]
            times = f"{row.median_ms:10.1f} {row.p95_ms:8.1f} {row.max_ms:8.1f}"
            print(
                f"{row.store:6} {row.cases:6} {row.first_open_seconds:8.2f} {row.open_seconds:8.2f} {times}", flush=True
            )
    show_ratios(rows)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count()}
    options.out.write_text(json.dumps({"machine": machine, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    return 0


def measure(store: str, folder: Path, cases: int, saves: int) -> Row:
    """Fill a folder, open it, and save labels of random cases."""
    ids = fill(folder, cases)
    opened = []
    for _ in range(2):
        start = time.perf_counter()
        save, close = open_ours(folder) if store == "ours" else open_stock(folder)
        opened.append(round(time.perf_counter() - start, 2))
        if len(opened) == 1:
            close()
    label, chosen, times = folder / "history.nii.gz", random.Random(1), []
    label.write_bytes(mask(2))
    for _ in range(saves):
        name = chosen.choice(ids)
        start = time.perf_counter()
        save(name, label)
        times.append((time.perf_counter() - start) * 1000)
    close()
    median, p95, most = (round(float(np.percentile(times, share)), 2) for share in (50, 95, 100))
    return Row(store, cases, saves, *opened, median, p95, most)


def fill(folder: Path, cases: int) -> list[str]:
    """Small images with final labels, as a folder that was labelled with other tools."""
    (folder / "labels" / "final").mkdir(parents=True)
    content, ids = mask(1), [f"case_{number:05d}" for number in range(cases)]
    for name in ids:
        (folder / f"{name}.nii.gz").write_bytes(b"an image")
        (folder / "labels" / "final" / f"{name}.nii.gz").write_bytes(content)
    return ids


def mask(seed: int) -> bytes:
    """A hippocampus-sized mask as ``.nii.gz``."""
    voxels = np.zeros(SHAPE, np.uint8)
    start = 8 + seed
    voxels[start : start + 12, 15:35, 10:25] = np.random.default_rng(seed).integers(1, 3, (12, 20, 15))
    return gzip.compress(nib.Nifti1Image(voxels, np.eye(4)).to_bytes(), 1)


def open_ours(folder: Path) -> tuple[Save, Callable[[], None]]:
    """This project's store."""
    store = VersionedDatastore(str(folder), extensions=["*.nii.gz"])
    return lambda name, file: ignore(store.save_version(file, Submission(image_id=name))), store.close


def open_stock(folder: Path) -> tuple[Save, Callable[[], None]]:
    """MONAI Label's own."""
    store = LocalDatastore(str(folder), extensions=["*.nii.gz"])
    return lambda name, file: ignore(store.save_label(name, str(file), "final", {"client_id": "slicer"})), lambda: None


def ignore(_: object) -> None:
    """Nothing: a save's result is not of interest here."""


def show_ratios(rows: list[Row]) -> None:
    """How a save's cost grows, and how the stores compare."""
    by_place = {(row.store, row.cases): row for row in rows}
    few, many = min(row.cases for row in rows), max(row.cases for row in rows)
    for store in ("stock", "ours"):
        growth = by_place[store, many].median_ms / by_place[store, few].median_ms
        print(f"{store}: a save with {many} cases takes {growth:.1f} times as long as with {few}")
    ratio = by_place["stock", many].median_ms / by_place["ours", many].median_ms
    print(f"with {many} cases: stock / ours = {ratio:.1f}")


if __name__ == "__main__":
    sys.exit(main())
