"""Where masks differ from MONAI's plain fp32 answer: number format, windows over the body, or windows elsewhere.

    python benchmarks/agreement.py --preset abdomen_ct_base --weights FILE [--data FOLDER] [--cases 3]

Labels are compared on the network's grid, so that nothing but the network and its windows is. Besides ours, MONAI's own
sliding window is compared with itself: in bf16, and on the image with some voxels of air (or of its edge, as the preset
pads) before each axis, which places the same windows elsewhere: what weights say of the same tissue at another
place. Cases are of ``--data`` (``images`` and ``labels``), or phantoms that no other benchmark draws.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference import mean_dice, preprocess_torso, render_torso
from measuring import REPOSITORY, describe_machine, show, write_json
from stock import label_windows

sys.path[:0] = [str(REPOSITORY)]

from lib.cases.labelled import find_cases  # noqa: E402
from lib.configs.catalogue import load_preset  # noqa: E402
from lib.configs.preset import Preset  # noqa: E402
from lib.infers.predictor import Stitching, predict  # noqa: E402
from lib.networks.checkpoint import load_weights, read_checkpoint  # noqa: E402
from lib.networks.inference import InferenceNetwork  # noqa: E402
from lib.networks.placement import Placement  # noqa: E402
from lib.networks.precision import autocast, resolve_device  # noqa: E402
from lib.networks.unetr import build_unetr  # noqa: E402
from lib.trainers.datasets import build_dataset  # noqa: E402
from lib.transforms.preprocess import IMAGE, LABEL  # noqa: E402

FIRST_SEED = 1000
SHAPE = (273, 273, 200)
MOVED_VOXELS = 24
Way = Callable[[torch.Tensor], tuple[np.ndarray, int | str]]


def main() -> int:
    """Measure, print, write."""
    options = parse()
    preset, device = load_preset(options.preset), resolve_device(None)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    print(describe_machine())
    runs = []
    ways = build_ways(preset, options.weights, device)
    for number, (image, label) in enumerate(read_cases(preset, options)):
        reference: np.ndarray | None = None
        for name, way in ways.items():
            start = time.perf_counter()
            mask, windows = way(image)
            seconds = time.perf_counter() - start
            reference = mask if reference is None else reference
            found = {"agreement": mean_dice(mask, reference, preset), "dice": mean_dice(mask, label, preset)}
            same = float((mask == reference).mean())
            runs.append({"case": number, "way": name, "windows": windows, "seconds": seconds, "same": same, **found})
            print(runs[-1], flush=True)
    report(runs)
    write_json(options.out, {"preset": options.preset, "weights": options.weights.name, "runs": runs})
    return 0


def build_ways(preset: Preset, weights: Path, device: torch.device) -> dict[str, Way]:
    """Each way's name, and how it labels an image of shape (1, X, Y, Z) on the network's grid; the reference first."""
    network = build_unetr(preset).eval()
    load_weights(network, read_checkpoint(weights).model)
    fp32, bf16 = torch.float32, torch.bfloat16
    served = {dtype: InferenceNetwork(deepcopy(network), device, dtype) for dtype in (fp32, bf16)}
    network.to(device)

    def plain(dtype: torch.dtype, moved: int = 0) -> Way:
        def label(image: torch.Tensor) -> tuple[np.ndarray, str]:
            mode = "constant" if preset.padding == "constant" else "replicate"
            padded = torch.nn.functional.pad(image[None], (moved, 0) * 3, mode=mode)
            with autocast(device, dtype):
                labels = label_windows(preset, network, padded[0])
            return labels[0].numpy()[moved:, moved:, moved:], ""

        return label

    def ours(dtype: torch.dtype, skip_air: bool, overlap: float | None = None) -> Way:
        inference = preset.inference.model_copy(update={"skip_air": skip_air})
        placed = preset.model_copy(update={"inference": inference})

        def label(image: torch.Tensor) -> tuple[np.ndarray, int]:
            found = predict(served[dtype], image, Placement(placed, device, dtype), Stitching(), overlap)
            return found.labels, found.windows

        return label

    return {
        "plain, fp32": plain(fp32),
        "plain, bf16": plain(bf16),
        f"plain, fp32, windows {MOVED_VOXELS} voxels elsewhere": plain(fp32, MOVED_VOXELS),
        "ours, fp32, the same windows": ours(fp32, skip_air=False),
        "ours, bf16, the same windows": ours(bf16, skip_air=False),
        "ours, fp32, over the body": ours(fp32, skip_air=True),
        "ours, bf16, over the body": ours(bf16, skip_air=True),
        "ours, bf16, over the body, overlap 0.5": ours(bf16, skip_air=True, overlap=0.5),
    }


def read_cases(preset: Preset, options: argparse.Namespace) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Images and labels on the network's grid."""
    if options.data:
        cases = find_cases(options.data / "images", options.data / "labels")[: options.cases]
        dataset = build_dataset(cases, preset, "Dataset", options.data)
        items: Iterator[Any] = (dataset[number] for number in range(len(cases)))
    else:
        torsos = (render_torso(SHAPE, FIRST_SEED + number) for number in range(options.cases))
        items = (preprocess_torso(torso, preset) for torso in torsos)
    for item in items:
        yield item[IMAGE].as_subclass(torch.Tensor).float(), item[LABEL][0].numpy().astype(np.uint8)


def report(runs: list[dict[str, Any]]) -> None:
    """One row a way, means over the cases."""
    rows = []
    for way in dict.fromkeys(run["way"] for run in runs):
        own = [run for run in runs if run["way"] == way]
        mean = {key: statistics.mean(run[key] for run in own) for key in ("agreement", "same", "dice", "seconds")}
        lowest = min(run["agreement"] for run in own)
        agreement = f"{mean['agreement']:.4f} ({lowest:.4f})"
        cells = (f"{mean['same']:.4%}", f"{mean['dice']:.4f}", f"{mean['seconds']:.2f}")
        rows.append((way, own[0]["windows"], agreement, *cells))
    show(("way", "windows", "Dice to plain fp32 (lowest)", "same voxels", "Dice to the labels", "seconds"), rows)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="abdomen_ct_base")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder with images and labels")
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "agreement.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
