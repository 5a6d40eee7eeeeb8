"""NIfTI cases in a DICOMweb viewer: what a list of many costs, and the memory of opening a large one.

    python benchmarks/presented.py [--cases 10000] [--out FILE]

A real server over ``--cases`` small files is asked what OHIF's study list asks for, and for metadata and a frame of
three of them; then a process opens one file of
512x512x300 voxels and says how much memory that took at most, beside the voxels themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "tests/integration")]

LARGE = (512, 512, 300)
QUERIES = {
    "studies, first page": "studies?limit=101&offset=0&fuzzymatching=true&includefield=00081030,00080060",
    "studies, last page": "studies?limit=101&offset=9900&fuzzymatching=true&includefield=00081030,00080060",
    "studies of one patient": "studies?PatientID=case_00042&includefield=all",
    "series of all": "series?limit=101",
}


def main() -> int:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--open", type=Path, help="only open this file, and print the figures")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "presented.json")
    options = parser.parse_args()
    if options.open:
        print(json.dumps(open_one(options.open)))
        return 0
    result = {"cases": options.cases, "list_ms": measure_list(options.cases), "open": measure_memory()}
    print(json.dumps(result, indent=2))
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure_list(count: int) -> dict[str, list[float]]:
    """Milliseconds of each query: the first time, and the second."""
    from server import Server

    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {"models": "hippocampus_mr"})
        first = server.studies / "case_00000.nii.gz"
        nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4)), first)
        for number in range(1, count):
            (server.studies / f"case_{number:05d}.nii.gz").write_bytes(first.read_bytes())
        server.start()
        try:
            measured = {name: [ask(server, path), ask(server, path)] for name, path in QUERIES.items()}
            for name, case in (("first", 1), ("middle", count // 2), ("last", count - 1)):
                place = place_of(server, f"case_{case:05d}")
                measured[f"metadata of the {name} case"] = [ask(server, f"{place}/metadata") for _ in range(2)]
                (sop, *_) = server.get(f"/dicom-web/{place}/metadata").json()
                frame = f"{place}/instances/{sop['00080018']['Value'][0]}/frames/1"
                measured[f"a frame of the {name} case"] = [ask(server, frame) for _ in range(2)]
            return measured
        finally:
            server.stop()


def place_of(server: object, case: str) -> str:
    """The address of the series of a case."""
    (found,) = server.get("/dicom-web/series", params={"PatientID": case}).json()  # type: ignore[attr-defined]
    return "/".join(["studies", found["0020000D"]["Value"][0], "series", found["0020000E"]["Value"][0]])


def ask(server: object, path: str) -> float:
    """Milliseconds until the answer is there."""
    began = time.perf_counter()
    answer = server.get(f"/dicom-web/{path}")  # type: ignore[attr-defined]
    assert answer.status_code == 200, answer.text
    return round(1000 * (time.perf_counter() - began), 1)


def measure_memory() -> dict[str, float]:
    """The figures of :func:`open_one`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "large.nii.gz"
        rng = np.random.default_rng(0)
        voxels = rng.integers(-1024, 1500, LARGE, dtype=np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([0.8, 0.8, 1.5, 1])), file)
        command = [sys.executable, __file__, "--open", str(file)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        figures: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
        return figures


def open_one(file: Path) -> dict[str, float]:
    """Seconds and MiB of opening a file, and of the first frame."""
    from lib.configs.catalogue import load_preset
    from lib.server.presented.cases import PresentedCases

    class One:
        """A studies folder of one file."""

        def stamp(self, image_id: str) -> str:
            return "1"

        def is_series(self, image_id: str) -> bool:
            return False

    cases = PresentedCases(One(), lambda _: file, {"abdomen_ct": load_preset("abdomen_ct")}, 0)  # type: ignore[arg-type]
    before, began = peak_mib(), time.perf_counter()
    opened = cases.open("large")
    seconds = time.perf_counter() - began
    return {
        "voxels": float(np.prod(opened.grid.shape)),
        "kept_mib": round(opened.stored.nbytes / 2**20, 1),
        "peak_mib_above_start": round(peak_mib() - before, 1),
        "seconds": round(seconds, 1),
    }


def peak_mib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    raise SystemExit(main())
