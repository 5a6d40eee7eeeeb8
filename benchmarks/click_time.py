"""How long a click takes on a phantom CT of 512x512x200, or on another image, once its automatic mask is there.

    python benchmarks/click_time.py --preset abdomen_ct
    python benchmarks/click_time.py --preset hippocampus_mr --image <file>

Clicks are made one after the other on the borders of structures, in one process, as a server's task answers them: the
mask is read from the cache, corrected, kept, and written as 3D Slicer asks for it (``.nrrd``). Prints milliseconds of
each click, of the CPU too, since others may keep it busy, their parts, and the memory that they took at most.
``--profile`` says which functions took the time.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from measuring import REPOSITORY, describe_machine, peak_mib, write_json

sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "sample-data"))
from torso_phantom import FIELD_OF_VIEW_MM, draw_torso, grid_affine, render

from lib.configs.catalogue import load_preset
from lib.infers.cache import ResultCache
from lib.infers.network_images import NetworkImages
from lib.infers.task import UnetrInferTask
from lib.interaction.editor import SharedEditor
from lib.interaction.served import ServedEditor
from lib.interaction.task import make_interactive_tasks
from lib.models.weights import WeightsLocator
from lib.transforms.volume import read_volume


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preset", default="abdomen_ct")
    parser.add_argument("--image", type=Path, help="a phantom's CT if not given")
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 200], help="of the phantom")
    parser.add_argument("--clicks", type=int, default=6)
    parser.add_argument("--editor", type=Path, help="clicks grow without weights if not given")
    parser.add_argument("--extension", default=".nrrd")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("click_time.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image = options.image or draw(Path(folder), options.shape)
        found = measure(options, image)
    write_json(options.out, found)
    return 0


def draw(folder: Path, shape: list[int]) -> Path:
    """A phantom's CT of that shape."""
    size = (shape[0], shape[1], shape[2])
    spacing_mm = tuple(extent / n for extent, n in zip(FIELD_OF_VIEW_MM, size, strict=True))
    case = render(draw_torso(0), size, grid_affine(size, spacing_mm, "LPS"))
    nib.save(nib.Nifti1Image(case.image_hu, case.affine_ras), folder / "torso.nii.gz")
    return folder / "torso.nii.gz"


def measure(options: argparse.Namespace, image: Path) -> dict[str, object]:
    """Segment, click, and print."""
    print(describe_machine())
    preset, images, cache = load_preset(options.preset), NetworkImages(256), ResultCache(256)
    locator = WeightsLocator(REPOSITORY / "model" / options.preset)
    automatic = UnetrInferTask(preset, locator, "cpu", cache=cache, images=images)
    shared = SharedEditor(options.editor) if options.editor else None
    editors = {options.preset: ServedEditor(options.preset, REPOSITORY / "none", shared)}
    tasks = make_interactive_tasks({options.preset: automatic}, images, cache, "cpu", editors)
    clicks = tasks[f"{options.preset}_edit"]
    request = {"image": str(image), "result_extension": options.extension, "result_compress": False}
    file, answer = automatic(request)
    labels = read_volume(Path(str(file))).voxels.astype(np.uint8)
    print(f"automatic mask in {answer['latencies_ms']['total']:.0f} ms, {peak_mib():.0f} MiB at most")
    random = np.random.default_rng(0)
    points: dict[str, list[list[int]]] = {}
    rows, profile = [], cProfile.Profile()
    for number in range(options.clicks):
        name = list(preset.label_indices)[number % len(preset.labels)]
        inside = np.argwhere(labels == preset.label_indices[name])
        if not len(inside):
            continue
        at = inside[int(random.integers(len(inside)))]
        side = name if number % 2 else "background"
        points.setdefault(side, []).append([int(v) for v in at])
        began, worked = time.perf_counter(), time.process_time()
        if options.profile:
            profile.enable()
        made, answer = clicks({**request, **points})
        profile.disable()
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
        Path(str(made)).unlink()
        rows.append({"seconds": seconds, "cpu_seconds": cpu_seconds, "latencies_ms": answer["latencies_ms"]})
        spent = f"{1000 * seconds:.0f} ms, {1000 * cpu_seconds:.0f} ms of CPU"
        print(f"click {number + 1}: {spent} {answer['latencies_ms']}")
    Path(str(file)).unlink()
    wall_ms, cpu_ms = (1000 * np.median([row[key] for row in rows]) for key in ("seconds", "cpu_seconds"))
    print(f"median {wall_ms:.0f} ms, {cpu_ms:.0f} ms of CPU, {peak_mib():.0f} MiB at most")
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(22)
    return {"preset": options.preset, "clicks": rows, "peak_mib": peak_mib()}


if __name__ == "__main__":
    raise SystemExit(main())
