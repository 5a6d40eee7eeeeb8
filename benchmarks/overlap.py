"""What it brings that the next case is read, and the one before finished, while a device computes.

    python benchmarks/overlap.py [--cases 6] [--rounds 2] [--out FILE]

Drawn CTs of 320x320x160 with noise as .nii.gz, the shipped abdomen_ct on one thread of the CPU by PyTorch; two cores,
one of them for the overlap. Seconds from the first case to the last, divided by the cases, of

worker, one by one    read, compute, restore and pack, for one case after the other
worker, overlapped    the same by LocalEngine, as run.py segment does
server, one by one    requests that all wait at once, each with its device for all that it does
server, overlapped    the same, with the device for the network alone, as POST /infer/ does

The ways take turns. Prints a table and writes JSON; the masks of all ways are compared, byte for byte.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

import nibabel as nib
import numpy as np
import torch
from measuring import REPOSITORY, show, write_json
from scipy.ndimage import gaussian_filter

sys.path[:0] = [str(REPOSITORY)]

from lib.cluster.engine import LocalEngine, Recipe, Rest  # noqa: E402
from lib.cluster.model import Model, ModelFile  # noqa: E402
from lib.cluster.source import FolderSource  # noqa: E402
from lib.cluster.worker import Case, SegmentingWorker  # noqa: E402
from lib.configs.catalogue import load_preset  # noqa: E402
from lib.infers.devices.lanes import Lanes  # noqa: E402
from lib.infers.task import UnetrInferTask  # noqa: E402
from lib.models.weights import WeightsLocator  # noqa: E402
from lib.server.work.queue import InferenceQueue  # noqa: E402
from lib.transforms.volume import read_volume  # noqa: E402

SHAPE = (320, 320, 160)
SPACING_MM = (1.2, 1.2, 2.0)
PRESET = "abdomen_ct"


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "overlap.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="unetr-") as name:
        studies = Path(name)
        for number in range(options.cases):
            draw(studies / f"case{number}.nii.gz", number)
        preset = load_preset(PRESET)
        locator = WeightsLocator(REPOSITORY / "model" / PRESET)
        model = ModelFile.find(preset, locator, compiles=False).load("cpu")
        source, task = FolderSource(studies), UnetrInferTask(preset, locator, "cpu")
        ways = {
            "worker, one by one": lambda: one_by_one(source, model),
            "worker, overlapped": lambda: overlapped(source, model),
            "server, one by one": lambda: asyncio.run(serve(studies, task, overlap=False)),
            "server, overlapped": lambda: asyncio.run(serve(studies, task, overlap=True)),
        }
        # costs are measured, and buffers made, by a first image
        first = studies / "case0.nii.gz"
        Path(task({"image": str(first)})[0]).unlink()
        model.segmenter.segment(read_volume(first))
        runs: dict[str, list[float]] = {way: [] for way in ways}
        masks: dict[str, set[str]] = {"worker": set(), "server": set()}
        for _ in range(options.rounds):
            for way, run in ways.items():
                start = time.perf_counter()
                checksum = run()
                runs[way].append((time.perf_counter() - start) / options.cases)
                masks[way.split(",")[0]].add(checksum)
    assert all(len(found) == 1 for found in masks.values()), "the ways make different masks"
    rows = []
    for who in ("worker", "server"):
        before, after = (median(runs[f"{who}, {how}"]) for how in ("one by one", "overlapped"))
        rows.append((who, f"{before:.2f}", f"{after:.2f}", f"{100 * (1 - after / before):.0f} %"))
    show(("", "one by one, s a case", "overlapped, s a case", "less"), rows)
    write_json(options.out, {"seconds_a_case": runs, "shape": SHAPE, "cases": options.cases})
    return 0


def draw(file: Path, seed: int) -> None:
    """Soft shapes in noise, as a CT compresses."""
    random = np.random.default_rng(seed)
    coarse = gaussian_filter(random.normal(0, 1, tuple(size // 8 for size in SHAPE)), 2)
    voxels = np.kron(coarse / coarse.std() * 60 + 40, np.ones((8, 8, 8))) + random.normal(0, 12, SHAPE)
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.diag([*SPACING_MM, 1.0])), file)


def one_by_one(source: FolderSource, model: Model) -> str:
    """The worker's steps for one case after the other; the checksum of all masks."""
    worker, masks = SegmentingWorker(source, model), {}
    for case in source.cases():
        rest = worker.compute(worker.read(Case(case)))
        assert isinstance(rest, Rest)
        masks[case] = rest.finish().mask  # type: ignore[union-attr]
    return _checksum(masks)


def overlapped(source: FolderSource, model: Model) -> str:
    """The same by the engine."""
    recipe = Recipe("one", lambda device: SegmentingWorker(source, model))
    run = LocalEngine(["cpu"]).run(map(Case, source.cases()), lambda: recipe)
    return _checksum({one.item.id: one.answer.mask for one in run})  # type: ignore[union-attr]


async def serve(studies: Path, task: UnetrInferTask, overlap: bool) -> str:
    """Requests for all images at once; the checksum of all masks."""
    queue = InferenceQueue(100, Lanes.of("cpu"))

    async def ask(image: Path) -> bytes:
        request = task.parse({"image": str(image), "result_extension": ".nii.gz"})
        if not overlap:
            async with queue.slot() as slot:
                file, _ = await slot.run(lambda: task.segment(request))
        else:
            async with AsyncExitStack() as stack:
                async with queue.slot(what=str(image), read=lambda: task.read_ahead(request)) as slot:
                    begun = await slot.run(lambda: task.begin(request, slot.ahead))
                    place = await stack.enter_async_context(slot.finishing())
                file, _ = await place.run(lambda: task.complete(begun))
        content = Path(file).read_bytes()
        Path(file).unlink()
        return content

    images = sorted(studies.glob("*.nii.gz"))
    return _checksum(dict(zip(map(str, images), await asyncio.gather(*map(ask, images)), strict=True)))


def _checksum(masks: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(mask for _, mask in sorted(masks.items()))).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
