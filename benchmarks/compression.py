"""Reading a compressed volume and writing a mask, with zlib and with ISA-L.

    python benchmarks/compression.py --image FILE [--rounds 3] [--out FILE]

The image is resampled to 512x512x200 int16 with noise, as a CT has it, and compressed at level 6; the mask is what lies
above a threshold, smoothed. The two ways take turns, each in a process of its own. Prints a table and writes JSON:
seconds from the file to voxels (unpacking, checksum, scaling), seconds of the mask's compression, and its size.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from measuring import REPOSITORY, middle, run_worker, show, tell, write_json
from scipy.ndimage import uniform_filter, zoom

sys.path[:0] = [str(REPOSITORY)]

SHAPE = (512, 512, 200)
NOISE_HU = 8.0
THRESHOLD_HU = 150
WAYS = ("zlib", "isal")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "compression.json")
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker[0], Path(options.worker[1]))
    if options.image is None:
        parser.error("--image is needed")
    with tempfile.TemporaryDirectory() as folder:
        make_files(options.image, Path(folder))
        runs = [
            {"way": way, **run_worker("compression.py", ["--worker", way, folder])}
            for _ in range(options.rounds)
            for way in WAYS
        ]
    rows = []
    for way in WAYS:
        mine = [run for run in runs if run["way"] == way]
        rows.append(
            (way, *(middle([run[key] for run in mine]) for key in ("read", "write")), f"{mine[0]['bytes'] / 1e6:.2f}")
        )
    show(("way", "reading, s", "compressing the mask, s", "mask, MB"), rows)
    write_json(options.out, {"runs": runs})
    return 0


def make_files(image: Path, folder: Path) -> None:
    """Write ``image.nii.gz`` and ``mask.nii``."""
    given = nib.load(image)
    small = np.asarray(given.dataobj, dtype=np.float32)
    large = zoom(small, [new / old for new, old in zip(SHAPE, small.shape, strict=True)], order=1)
    large += np.random.default_rng(0).normal(0, NOISE_HU, SHAPE).astype(np.float32)
    voxels = large.round().astype(np.int16)
    content = nib.Nifti1Image(voxels, given.affine).to_bytes()
    (folder / "image.nii.gz").write_bytes(gzip.compress(content, 6, mtime=0))
    mask = (uniform_filter((large > THRESHOLD_HU).astype(np.float32), 9) > 0.5).astype(np.uint8)
    (folder / "mask.nii").write_bytes(nib.Nifti1Image(mask, given.affine).to_bytes())


def work(way: str, folder: Path) -> int:
    """Read and write one time, after a time that warms the caches."""
    if way == "zlib":
        sys.modules["isal"] = None  # type: ignore[assignment]  # as where the package is missing
    from lib.imagefiles.compression import pack_gzip
    from lib.imagefiles.reading import read_voxels

    mask = (folder / "mask.nii").read_bytes()
    for _ in range(2):
        start = time.perf_counter()
        read_voxels(folder / "image.nii.gz")
        read = time.perf_counter() - start
        start = time.perf_counter()
        packed = pack_gzip(mask)
        write = time.perf_counter() - start
    tell({"read": read, "write": write, "bytes": len(packed)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
