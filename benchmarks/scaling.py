"""Time and memory of a request against the volume and the number of classes.

    python benchmarks/scaling.py [--shapes 64x64x64 128x128x128 ...] [--classes 2 14 105] [--whole]

Each request runs in a process of its own, with a preset whose voxels are the image's (nothing is made smaller) and a
very small UNETR (feature 2, hidden 48; window 96) with random weights: what is measured is what lies around the
network. ``--network point`` takes a single 1x1x1 convolution in its place, where only memory is asked for and there is
no time. The image is noise in a body of half the field of view's width on each side. ``--whole`` adds MONAI's sliding
window over the whole volume with the same network, and says in how many voxels the labels differ. Prints a table with
the peak above the loaded image and what the plan had promised, and straight lines through time and memory against the
voxels and the classes, with their R^2. Where there is a GPU, windows are computed on it, and their peak there is told.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from measuring import REPOSITORY, describe_machine, peak_mib, run_worker, show, tell, write_json
from monai.inferers import sliding_window_inference
from torch import nn

sys.path[:0] = [str(REPOSITORY)]

from lib.configs.preset import Preset, parse_preset  # noqa: E402
from lib.infers.memory import PeakMemory  # noqa: E402
from lib.infers.segmenter import Segmenter  # noqa: E402
from lib.networks.inference import InferenceNetwork  # noqa: E402
from lib.networks.precision import resolve_device  # noqa: E402
from lib.networks.unetr import build_unetr  # noqa: E402
from lib.transforms.preprocess import preprocess_volume  # noqa: E402
from lib.transforms.volume import Volume  # noqa: E402

SHAPES = ("64x64x64", "128x128x128", "256x256x128", "512x512x200", "512x512x600", "512x512x1500", "1024x1024x400")
AIR_HU = -1000.0
GIB = 2**30


def main() -> int:
    """Measure, print, write."""
    options = parse()
    if options.worker:
        work(options)
        return 0
    print(describe_machine())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            (shape, classes, way) for shape in options.shapes for classes in options.classes for way in ways(options)
        ]
        for shape, classes, way in cases:
            arguments = [
                "--worker",
                way,
                "--network",
                options.network,
                "--shapes",
                shape,
                "--classes",
                str(classes),
                "--folder",
                folder,
            ]
            arguments += ["--skip-air"] if options.skip_air else []
            rows.append({"shape": shape, "classes": classes, "way": way, **run_worker("scaling.py", arguments)})
            print(rows[-1], flush=True)
    report(rows)
    write_json(options.out, {"network": options.network, "rows": rows})
    return 0


def ways(options: argparse.Namespace) -> list[str]:
    """Ours, and the whole-volume way where asked."""
    return ["whole", "ours"] if options.whole else ["ours"]


def report(rows: list[dict[str, Any]]) -> None:
    """The table, and the fits."""
    names = (
        "shape",
        "classes",
        "way",
        "seconds",
        "above_image_gib",
        "planned_gib",
        "gpu_gib",
        "process_gib",
        "differing",
        "plan",
    )
    show(names, [[row.get(name, "") for name in names] for row in rows])
    ours = [row for row in rows if row["way"] == "ours"]
    for classes in sorted({row["classes"] for row in ours}):
        own = [row for row in ours if row["classes"] == classes]
        fit(f"{classes} classes", "million voxels", [count_voxels(row["shape"]) / 1e6 for row in own], own)
    for shape in sorted({row["shape"] for row in ours}, key=count_voxels):
        own = [row for row in ours if row["shape"] == shape]
        fit(shape, "class", [row["classes"] for row in own], own)


def fit(what: str, unit: str, sizes: list[float], rows: list[dict[str, Any]]) -> None:
    """Print the straight line through time and memory, with the share of the variance that it explains."""
    if len(rows) < 3:
        return
    for measure, digits in (("seconds", 3), ("above_image_gib", 4)):
        values = np.array([row[measure] for row in rows])
        slope, start = np.polyfit(sizes, values, 1)
        unexplained = ((values - slope * np.array(sizes) - start) ** 2).sum() / ((values - values.mean()) ** 2).sum()
        print(f"{what}: {measure} = {start:.{digits}f} + {slope:.{digits}f} a {unit}, R^2 {1 - unexplained:.3f}")


def count_voxels(shape: str) -> int:
    """Of a shape such as 64x64x64."""
    return int(np.prod([int(edge) for edge in shape.split("x")]))


def work(options: argparse.Namespace) -> None:
    """The worker: an image in memory, then the request."""
    shape = tuple(int(edge) for edge in options.shapes[0].split("x"))
    preset, labels = make_preset(options.classes[0], options.skip_air), Path(options.folder) / "labels.npy"
    torch.manual_seed(0)
    device, host = resolve_device(None), torch.device("cpu")
    plain = build_unetr(preset) if options.network == "unetr" else nn.Conv3d(1, preset.out_channels, 1)
    network = InferenceNetwork(plain, device, torch.float32)
    volume = make_volume(shape)
    segmenter = Segmenter(network, preset, device, "fp32")
    segmenter.plan(volume)  # measures
    start = time.perf_counter()
    with PeakMemory(host) as peak, PeakMemory(device) if device != host else nullcontext() as gpu_peak:
        found = whole(network, volume, preset, device) if options.worker == "whole" else segmenter.segment(volume)
    result: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 2)}
    if options.worker == "whole":
        np.save(labels, found)
    else:
        result |= {"planned_gib": round(found.plan.host_bytes / GIB, 2), "plan": found.plan.explain()}
        if labels.is_file():
            result["differing"] = int((np.load(labels) != found.labels).sum())
            labels.unlink()
    swapped = psutil.swap_memory().used
    above, process = round(peak.bytes / GIB, 3), round(peak_mib() / 1024, 2)
    on_gpu = round(gpu_peak.bytes / GIB, 3) if gpu_peak else 0.0
    tell({**result, "above_image_gib": above, "gpu_gib": on_gpu, "process_gib": process, "swap_bytes": swapped})


def whole(network: torch.nn.Module, volume: Volume, preset: Preset, device: torch.device) -> np.ndarray:
    """MONAI's sliding window with the logits of all classes for the whole volume, on the host."""
    image = preprocess_volume(volume, preset).as_subclass(torch.Tensor)
    with torch.inference_mode():
        logits = sliding_window_inference(
            image[None],
            preset.roi_size,
            1,
            network,
            overlap=preset.inference.overlap,
            mode="gaussian",
            sw_device=device,
            device="cpu",
        )
    return logits[0].argmax(0).to(torch.uint8).numpy()


def make_preset(classes: int, skip_air: bool) -> Preset:
    """A CT task on the image's own voxels; where both ways are to do the same, windows are looked at in air too."""
    return parse_preset(
        {
            "name": "scaling",
            "modality": "CT",
            "labels": [{"index": number, "name": f"label {number}"} for number in range(1, classes)],
            "spacing_mm": [1.0, 1.0, 1.0],
            "roi_size": [96, 96, 96],
            "intensity": {"kind": "window", "lower": -175, "upper": 250},
            "network": {"feature_size": 2, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4},
            "inference": {"skip_air": skip_air},
        },
        source="scaling",
    )


def make_volume(shape: tuple[int, ...]) -> Volume:
    """Noise of soft tissue in air, in the array order of NIfTI, drawn plane by plane."""
    voxels = np.full(shape, AIR_HU, dtype=np.float32, order="F")
    random = np.random.default_rng(0)
    x, y = (slice(size // 4, size - size // 4) for size in shape[:2])
    for plane in range(shape[2]):
        part = voxels[x, y, plane]
        part[:] = random.normal(40, 80, part.shape)
    return Volume(voxels, np.eye(4))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--classes", type=int, nargs="+", default=[14])
    parser.add_argument("--network", choices=("unetr", "point"), default="unetr")
    parser.add_argument("--skip-air", action="store_true", help="windows over the body only, as a request has them")
    parser.add_argument("--whole", action="store_true", help="MONAI's whole-volume way too")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "scaling.json")
    parser.add_argument("--worker", choices=("ours", "whole"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
