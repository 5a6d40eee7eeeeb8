"""Whole requests, file in and mask out: this project against MONAI Label's BasicInferTask and MONAI's plain way.

    python benchmarks/inference.py --preset hippocampus_mr --image FILE [FILE ...] [--labels FOLDER] [--weights FILE]
    python benchmarks/inference.py --preset abdomen_ct --torso 512 512 200 --rounds 3

The ways take turns, each request in a process of its own, with the weights loaded before the clock starts. Prints
seconds, peak memory of the process on the host and of PyTorch on the GPU, the median and spread of the ratio within a
turn, and the Dice against the plain fp32 answer (and against ``--labels``). ``--warm`` requests go before the timed one
in each process. ``--overlap`` gives a table of overlaps instead, ours only. Where there is a GPU, all compute on it;
only the plain way without TF32.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from measuring import REPOSITORY, describe_machine, middle, peak_mib, run_worker, show, tell, write_json
from monai.networks.nets import UNETR

sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "sample-data")]

from torso_phantom import FIELD_OF_VIEW_MM, TorsoCase, draw_torso, grid_affine, render  # noqa: E402

from lib.cases.metrics import dice_per_label, mean_known  # noqa: E402
from lib.configs.catalogue import load_preset  # noqa: E402
from lib.configs.preset import Preset  # noqa: E402
from lib.networks.checkpoint import Checkpoint, load_weights, read_checkpoint, write_checkpoint  # noqa: E402
from lib.networks.precision import resolve_device  # noqa: E402
from lib.networks.unetr import build_unetr  # noqa: E402
from lib.transforms.preprocess import IMAGE, LABEL, as_meta_tensor, build_preprocessing  # noqa: E402

WAYS = ("stock", "plain", "ours")
FITTED_VOXELS = 200_000


def main() -> int:
    """Measure, print, write."""
    options = parse()
    if options.worker:
        work(options)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        images = options.image or [draw_torso_file(Path(folder), options.torso)]
        weights = options.weights or find_weights(options.preset, Path(folder))
        if options.overlap:
            result = compare_overlaps(options, weights, images, Path(folder))
        else:
            result = compare_ways(options, weights, images, Path(folder))
    write_json(options.out, {"preset": options.preset, **result})
    return 0


def compare_ways(options: argparse.Namespace, weights: Path, images: list[Path], folder: Path) -> dict[str, Any]:
    """All ways on all images, in turns."""
    runs: list[dict[str, Any]] = []
    print(describe_machine())
    for turn in range(options.rounds):
        for image in images:
            for way in options.ways:
                mask = folder / f"{way}.nii.gz"
                found = ask(options, way, weights, image, mask, folder)
                runs.append({"turn": turn, "image": image.name, "way": way, **found, **score(mask, image, options)})
            reference = folder / "plain.nii.gz"
            for run in runs[-len(options.ways) :] if reference.is_file() else []:
                mask = read_mask(folder / f"{run['way']}.nii.gz")
                run["agreement"] = mean_dice(mask, read_mask(reference), load_preset(options.preset))
            print({run["way"]: (run["seconds"], run["peak_mib"]) for run in runs[-len(options.ways) :]}, flush=True)
    report(runs, options.ways)
    return {"weights": weights.name, "runs": runs}


def report(runs: list[dict[str, Any]], ways: list[str]) -> None:
    """The table of the ways, and the ratios within each turn."""
    by_way = {way: [run for run in runs if run["way"] == way] for way in ways}
    rows = []
    for way, own in by_way.items():
        ratios = [run["seconds"] / ours["seconds"] for run, ours in zip(own, by_way.get("ours", []), strict=False)]
        agreement = [run["agreement"] for run in own if run.get("agreement") is not None]
        dice = [run["dice"] for run in own if run["dice"] is not None]
        rows.append(
            (
                way,
                middle([run["seconds"] for run in own]),
                middle([run["peak_mib"] / 1024 for run in own]),
                middle([run["gpu_peak_mib"] / 1024 for run in own]),
                middle(ratios) if ratios else "",
                f"{statistics.mean(agreement):.4f}" if agreement else "",
                f"{statistics.mean(dice):.4f}" if dice else "",
            )
        )
    measures = ("peak GiB", "GPU peak GiB", "times as long as ours", "Dice to fp32", "Dice to the labels")
    show(("way", "seconds", *measures), rows)


def compare_overlaps(options: argparse.Namespace, weights: Path, images: list[Path], folder: Path) -> dict[str, Any]:
    """Ours at several overlaps: time of the network, and Dice."""
    runs = []

    def reference(image: Path) -> Path:
        """The mask of the largest overlap."""
        return folder / f"{max(options.overlap)}-{image.name}"

    for overlap in sorted(options.overlap, reverse=True):
        for image in images:
            mask = folder / f"{overlap}-{image.name}"
            found = ask(options, "ours", weights, image, mask, folder, str(overlap))
            agreement = {
                "agreement": mean_dice(read_mask(mask), read_mask(reference(image)), load_preset(options.preset))
            }
            runs.append({"overlap": overlap, "image": image.name, **found, **score(mask, image, options), **agreement})
    rows = []
    for overlap in options.overlap:
        own = [run for run in runs if run["overlap"] == overlap]
        network = [run["stages_ms"]["network"] / 1000 for run in own]
        windows = statistics.mean(run["windows"] for run in own)
        dice = [run["dice"] for run in own if run["dice"] is not None]
        agreement = f"{mean_known(run['agreement'] for run in own):.4f}"
        rows.append((overlap, f"{windows:.1f}", middle(network), agreement, f"{np.mean(dice):.4f}" if dice else ""))
    show(("overlap", "windows", "network s", "Dice to the largest overlap", "Dice to the labels"), rows)
    return {"overlaps": runs}


def ask(
    options: argparse.Namespace, way: str, weights: Path, image: Path, mask: Path, folder: Path, overlap: str = ""
) -> dict[str, Any]:
    """One request in a process of its own."""
    files = ["--weights", str(weights), "--image", str(image), "--out", str(mask)]
    extra = ["--overlap", overlap] * bool(overlap) + ["--pytorch"] * options.pytorch
    extra += ["--everywhere"] * options.everywhere
    return run_worker(
        "inference.py",
        [
            "--worker",
            way,
            "--warm",
            str(options.warm),
            "--preset",
            options.preset,
            "--costs",
            str(folder / "costs.json"),
            *files,
            *extra,
        ],
    )


def work(options: argparse.Namespace) -> None:
    """The worker: load, then the clock."""
    preset, image = load_preset(options.preset), options.image[0]
    changes = {"overlap": options.overlap[0]} if options.overlap else {}
    changes |= {"skip_air": False} if options.everywhere else {}
    preset = preset.model_copy(update={"inference": preset.inference.model_copy(update=changes)})
    extra: dict[str, Any] = {}
    if options.worker == "ours":
        seconds, extra = ours(preset, options, image)
    elif options.worker == "stock":
        seconds = stock(preset, options, image)
    else:
        seconds = plain(preset, options, image)
    tell({"seconds": round(seconds, 3), "peak_mib": peak_mib(), "gpu_peak_mib": peak_mib("gpu"), **extra})


def ours(preset: Preset, options: argparse.Namespace, image: Path) -> tuple[float, dict[str, Any]]:
    """The task that the server runs, compiled as it is there soon after the start; costs are measured once for all."""
    from lib.infers.costs import CostBook
    from lib.infers.plan import Planner
    from lib.infers.task import UnetrInferTask
    from lib.models.weights import WeightsLocator

    locator = WeightsLocator(options.out.parent / "none", str(options.weights))
    task = UnetrInferTask(preset, locator, planner=Planner(book=CostBook(options.costs)), compiles=not options.pytorch)
    task.load()
    task.settle()
    for _ in range(options.warm + 1):
        start = time.perf_counter()
        mask, answer = task({"image": str(image), "result_extension": ".nii.gz"})
        seconds = time.perf_counter() - start
        shutil.move(str(mask), options.out)
    return seconds, {
        "stages_ms": answer["latencies_ms"],
        "windows": answer["plan"]["windows"],
        "engine": answer["plan"]["engine"],
    }


def stock(preset: Preset, options: argparse.Namespace, image: Path) -> float:
    """MONAI Label's own."""
    from stock import StockInferTask

    task = StockInferTask(preset, options.weights)
    for _ in range(options.warm + 1):
        start = time.perf_counter()
        mask, _ = task({"image": str(image), "device": str(resolve_device(None)), "model": "stock"})
        seconds = time.perf_counter() - start
        shutil.move(str(mask), options.out)
    return seconds


def plain(preset: Preset, options: argparse.Namespace, image: Path) -> float:
    """MONAI's sliding windows in fp32, which is not to be TF32."""
    from stock import plain_monai

    torch.backends.cudnn.allow_tf32 = False
    network = build_unetr(preset).eval()
    load_weights(network, read_checkpoint(options.weights).model)
    network.to(resolve_device(None))
    for _ in range(options.warm + 1):
        start = time.perf_counter()
        plain_monai(preset, network, image, options.out)
        seconds = time.perf_counter() - start
    return seconds


def score(mask: Path, image: Path, options: argparse.Namespace) -> dict[str, float | None]:
    """Dice against the labels, where there are any."""
    if options.labels is None:
        return {"dice": None}
    return {"dice": mean_dice(read_mask(mask), read_mask(options.labels / image.name), load_preset(options.preset))}


def mean_dice(mask: np.ndarray, reference: np.ndarray, preset: Preset) -> float:
    """Mean over the labels that the reference has."""
    return mean_known(dice_per_label(mask, reference, preset.label_indices).values())


def read_mask(file: Path) -> np.ndarray:
    """Labels of a NIfTI file."""
    return np.asarray(nib.load(file).dataobj).astype(np.uint8)


def draw_torso_file(folder: Path, shape: list[int]) -> Path:
    """A phantom's CT of that shape."""
    case = render_torso((shape[0], shape[1], shape[2]))
    nib.save(nib.Nifti1Image(case.image_hu, case.affine_ras), folder / "torso.nii.gz")
    return folder / "torso.nii.gz"


def render_torso(shape: tuple[int, int, int], seed: int = 0) -> TorsoCase:
    """A phantom in its usual field of view."""
    spacing_mm = tuple(extent / size for extent, size in zip(FIELD_OF_VIEW_MM, shape, strict=True))
    return render(draw_torso(seed), shape, grid_affine(shape, spacing_mm, "LPS"))


def preprocess_torso(case: TorsoCase, preset: Preset) -> dict[str, torch.Tensor]:
    """Image and labels of a phantom as the network sees them."""
    voxels = {IMAGE: case.image_hu.astype(np.float32), LABEL: case.label}
    both = {key: as_meta_tensor(value, case.affine_ras) for key, value in voxels.items()}
    seen: dict[str, torch.Tensor] = build_preprocessing(preset, (IMAGE, LABEL))(both)
    return seen


def find_weights(name: str, folder: Path) -> Path:
    """The shipped weights; for a preset that has none, random ones that take as long, with a fitted last layer."""
    shipped = REPOSITORY / "model" / name / "shipped.pt"
    if shipped.is_file():
        return shipped
    preset = load_preset(name)
    torch.manual_seed(0)
    network = build_unetr(preset)
    if preset.modality == "CT":
        fit_last_layer(network, preset)
    write_checkpoint(folder / "random.pt", Checkpoint(dict(network.state_dict()), preset))
    return folder / "random.pt"


def fit_last_layer(network: UNETR, preset: Preset) -> None:
    """Fit the 1x1x1 convolution at the end to the phantom's labels, by logistic regression on the random features.

    With wholly random weights most voxels are near ties, and two masks say little about how alike two answers are.
    """
    seen = preprocess_torso(render_torso((256, 256, 200)), preset)
    features, labels = list[torch.Tensor](), list[torch.Tensor]()
    hook = network.out.register_forward_hook(lambda _m, given, _o: features.append(given[0][0].flatten(1).T))
    with torch.inference_mode():
        for share in (0.3, 0.5, 0.7):
            box = tuple(
                slice(first := round((size - edge) * part), first + edge)
                for size, edge, part in zip(seen[IMAGE].shape[1:], preset.roi_size, (share, 0.5, share), strict=True)
            )
            network.eval()(seen[IMAGE].as_subclass(torch.Tensor)[(None, slice(None), *box)])
            labels.append(seen[LABEL].as_subclass(torch.Tensor)[(0, *box)].flatten())
    hook.remove()
    chosen = torch.randperm(sum(map(len, labels)))[:FITTED_VOXELS]
    set_last_layer(network, torch.cat(features)[chosen].clone(), torch.cat(labels)[chosen].long())


def set_last_layer(network: UNETR, features: torch.Tensor, labels: torch.Tensor) -> None:
    """Multinomial logistic regression of standardised features, written back for the plain ones."""
    mean, deviation = features.mean(0), features.std(0)
    layer = torch.nn.Linear(features.shape[1], network.out.conv.conv.out_channels)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=60)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer((features - mean) / deviation), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        weight = layer.weight / deviation
        network.out.conv.conv.weight.copy_(weight[..., None, None, None])
        network.out.conv.conv.bias.copy_(layer.bias - weight @ mean)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="hippocampus_mr")
    parser.add_argument("--image", type=Path, nargs="+")
    parser.add_argument("--labels", type=Path, help="folder of label files of the same names")
    parser.add_argument(
        "--torso", type=int, nargs=3, default=[512, 512, 200], help="shape of a phantom, without --image"
    )
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=0, help="requests before the timed one, in each process")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--overlap", type=float, nargs="+")
    parser.add_argument("--pytorch", action="store_true", help="ours without OpenVINO")
    parser.add_argument("--everywhere", action="store_true", help="ours in the windows of the others, in air too")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "inference.json")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--costs", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
