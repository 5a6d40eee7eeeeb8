"""Memory and time of a training step, and the memory of runs with few and with many cases.

    python benchmarks/training.py steps [--crops 1 2 4] [--steps 2] [--preset NAME] [--keep-freed] [--deterministic]
    python benchmarks/training.py cases [--cases 50 1000]
    python benchmarks/training.py fits [--budgets 8 12 16 24] [--measure 128 160]
    python benchmarks/training.py throughput [--preset hippocampus_mr] [--steps 40] [--rounds 2] [--data FOLDER]

``steps`` runs forward, loss, backward, AdamW and the average on random crops of the preset's window, on a CPU each
setting in a process of its own: activations kept, recomputed in the transformer, or one crop at a time; fp32, or bf16
under autocast. Prints seconds a step, the peak beyond what PyTorch and the weights take, and what the planner counts.
With ``--keep-freed`` a step finds the memory of the one before, as in a run on a CPU that has room; with
``--deterministic`` it asks for the kernels that a run asks for.

``cases`` trains a tiny network for one epoch on so many small synthetic cases, each number in a process of its own.

``fits`` asks the planner's count for the largest cubic window (one crop) and the most crops of the preset's window that
fit devices of so many GiB, less the reserve of a twentieth, and measures some windows to hold the count against. On a
GPU it also says what really trains, with AdamW, when PyTorch gets no more than that.

``throughput`` takes turns between MONAI Label's BasicTrainTask and this project's loop: same starting weights, cases
(synthetic ones, or ``--data`` with ``images`` and ``labels``), crops, loss, optimiser and schedule. Prints crops a
second and CPU seconds a crop from the first step to the last, the process's peak, and the mean loss of the first and
the last quarter.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import torch
from measuring import REPOSITORY, describe_machine, middle, peak_mib, run_worker, show, tell, write_json
from monai.utils import set_determinism

sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "sample-data")]

from synthetic_hippocampus import draw_cases  # noqa: E402
from torso_phantom import draw_torso, grid_affine, render  # noqa: E402

from lib.cases.labelled import Case, find_cases  # noqa: E402
from lib.configs.catalogue import load_preset  # noqa: E402
from lib.configs.preset import Preset  # noqa: E402
from lib.infers.memory import (  # noqa: E402
    GIB,
    RESERVE_SHARE,
    PeakMemory,
    is_out_of_memory,
    keep_freed_memory,
    release_memory,
)
from lib.networks.checkpoint import Checkpoint, read_checkpoint, write_checkpoint  # noqa: E402
from lib.networks.placement import Placement  # noqa: E402
from lib.networks.precision import autocast, place_for_training, resolve_device  # noqa: E402
from lib.networks.unetr import build_unetr  # noqa: E402
from lib.trainers.loop import run_training  # noqa: E402
from lib.trainers.memory import count_kept_bytes, forward_in_parts, measure_step  # noqa: E402
from lib.trainers.optimization import build_average, build_loss, build_optimizer  # noqa: E402
from lib.trainers.plan import COPIES_OF_WEIGHTS, count_step_bytes  # noqa: E402
from lib.trainers.run.job import TrainingJob  # noqa: E402

WAYS = ("kept", "recomputed", "one at a time")
WINDOWS = range(64, 336, 16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    """Measure, print, write."""
    options = parse()
    measure, work = COMMANDS[options.what]
    if options.worker:
        torch.set_num_threads(options.threads)
        tell(work(options))
        return 0
    print(describe_machine())
    rows = measure(options)
    names = list(dict.fromkeys(name for row in rows for name in row))
    show(names, [[row.get(name, "") for name in names] for row in rows])
    write_json(options.out, {"what": options.what, "rows": rows})
    return 0


def measure_steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every setting, in turns."""
    rows = []
    for crops in options.crops:
        for way in WAYS if crops > 1 else WAYS[:2]:
            for dtype in DTYPES:
                setting = ["--crops", str(crops), "--way", way, "--dtype", dtype, "--steps", str(options.steps)]
                arguments = ["steps", "--worker", "--preset", options.preset, *setting]
                arguments += ["--keep-freed"] * options.keep_freed + ["--deterministic"] * options.deterministic
                if torch.cuda.is_available():  # whose allocator counts each setting for itself
                    found = work_step(parse(arguments))
                else:
                    found = run_worker("training.py", arguments)
                rows.append({"crops": crops, "activations": way, "precision": dtype, **found})
                print(rows[-1], flush=True)
    return rows


def measure_cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each number of cases."""
    return [{"cases": n, **run_worker("training.py", ["cases", "--worker", "--cases", str(n)])} for n in options.cases]


def measure_throughput(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both, in turns, on the same cases and from the same weights."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = options.data or draw_cases_of(options.preset, folder / "data")
        preset = load_preset(options.preset)
        torch.manual_seed(0)
        write_checkpoint(folder / "start.pt", Checkpoint(dict(build_unetr(preset).state_dict()), preset))
        for turn in range(options.rounds):
            for way in ("stock", "ours"):
                given = ["--preset", options.preset, "--steps", str(options.steps), "--way", way, "--data", str(data)]
                given += ["--threads", str(options.threads), "--folder", name]
                found = run_worker("training.py", ["throughput", "--worker", *given])
                rows.append({"turn": turn, "way": way, **found})
                print(rows[-1], flush=True)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    wall = [ours["crops_a_second"] / stock["crops_a_second"] for stock, ours in pairs]
    work = [stock["cpu_seconds_a_crop"] / ours["cpu_seconds_a_crop"] for stock, ours in pairs]
    print(f"times as many crops as BasicTrainTask: {middle(wall)} a second, {middle(work)} a CPU second")
    return rows


def search_fits(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The largest that the planner's count lets through; then what some windows really take."""
    for edge in options.measure:
        for way in WAYS[:2]:
            given = ["--preset", options.preset, "--measure", str(edge), "--way", way, "--dtype", "bf16"]
            print(run_worker("training.py", ["fits", "--worker", *given]), flush=True)
    preset, rows = load_preset(options.preset), []
    for way in WAYS[:2]:
        for dtype in DTYPES:
            windows = {edge: takes(with_roi(preset, edge), 1, way != "kept", dtype) for edge in WINDOWS}
            batches = {crops: takes(preset, crops, way != "kept", dtype) for crops in range(1, 65)}
            for budget in options.budgets:
                free = int(budget * GIB * (1 - RESERVE_SHARE))
                edges = [edge for edge, size in windows.items() if size <= free]
                crops = [number for number, size in batches.items() if size <= free]
                found = {"largest_window": max(edges, default=0), "most_crops": max(crops, default=0)}
                if torch.cuda.is_available() and dtype == "bf16":  # as a GPU trains
                    found |= try_on_gpu(preset, way, dtype, budget, found)
                rows.append({"precision": dtype, "activations": way, "budget_gib": budget, **found})
                print(rows[-1], flush=True)
    return rows


def try_on_gpu(preset: Preset, way: str, dtype: str, budget: float, counted: dict[str, int]) -> dict[str, int]:
    """What really trains on a GPU of so many GiB, upwards from what was counted, or downwards where that fails."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(budget * (1 - RESERVE_SHARE) * GIB / total)
    setting = ["steps", "--way", way, "--dtype", dtype, "--steps", "1"]

    def trains(roi: Preset, crops: int) -> bool:
        release_memory(torch.device("cuda"))
        try:
            work_step(parse([*setting, "--crops", str(crops)]), roi)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    window = climb(max(16, counted["largest_window"]), 16, lambda edge: trains(with_roi(preset, edge), 1))
    crops = climb(max(1, counted["most_crops"]), 1, lambda number: trains(preset, number))
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {"window_that_trains": window, "crops_that_train": crops}


def climb(start: int, step: int, works: Callable[[int], bool]) -> int:
    """The largest number that works, in steps up from ``start``, or down; 0 where none does."""
    if not works(start):
        return next((number for number in range(start - step, 0, -step) if works(number)), 0)
    while works(start + step):
        start += step
    return start


def takes(preset: Preset, crops: int, recompute: bool, dtype: str) -> int:
    """Bytes that the planner counts."""
    return count_step_bytes(preset, crops, recompute, DTYPES[dtype])


def with_roi(preset: Preset, edge: int) -> Preset:
    """The preset with a cubic window."""
    return preset.model_copy(update={"roi_size": (edge, edge, edge)})


def draw_cases_of(preset: str, folder: Path) -> Path:
    """Synthetic cases of the preset's kind."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    drawn: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    if load_preset(preset).modality == "CT":
        shape, affine_ras = (180, 180, 120), grid_affine((180, 180, 120), (2.2, 2.2, 3.0), "LPS")
        torsos = [render(draw_torso(seed), shape, affine_ras) for seed in range(4)]
        drawn = [(torso.image_hu, torso.label, affine_ras) for torso in torsos]
    else:
        drawn = [(case.image, case.label, case.affine_ras) for case in draw_cases(16)]
    for number, (image, label, affine_ras) in enumerate(drawn):
        nib.save(nib.Nifti1Image(image, affine_ras), folder / "images" / f"case_{number:03d}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine_ras), folder / "labels" / f"case_{number:03d}.nii.gz")
    return folder


def work_step(options: argparse.Namespace, preset: Preset | None = None) -> dict[str, Any]:
    """One setting: a step to begin with, then timed ones."""
    preset, dtype, crops = preset or load_preset(options.preset), DTYPES[options.dtype], options.crops[0]
    device = resolve_device(None)
    if options.keep_freed:
        keep_freed_memory()
    torch.manual_seed(0)
    if options.deterministic:
        set_determinism(0)
    with device:
        network = build_unetr(preset, options.way != "kept").train()
    place_for_training(network, device)
    optimizer, loss_of = build_optimizer(network, preset.training), build_loss(preset.training)
    average = build_average(network, preset.training)
    image = torch.randn(crops, 1, *preset.roi_size, device=device)
    label = torch.randint(0, preset.out_channels, (crops, 1, *preset.roi_size), device=device).float()
    seconds = []
    with PeakMemory(device) as peak:
        for _ in range(options.steps + 1):
            start = time.perf_counter()
            with autocast(device, dtype):
                logits = forward_in_parts(network, image, 1 if options.way == "one at a time" else crops)
            loss = loss_of(logits.float(), label)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            average.update_parameters(network)
            loss.item()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
    del network, optimizer, average, image, label, logits, loss
    release_memory(device)
    kept, weights = count_kept_bytes(preset, options.way != "kept")
    return {
        "seconds": round(min(seconds[1:]), 4),
        "peak_gib": round(peak.bytes / GIB, 2),
        "weights_gib": round(weights / GIB, 2),
        "counted_gib_a_crop_fp32": round(kept / GIB, 2),
    }


def work_cases(options: argparse.Namespace) -> dict[str, Any]:
    """A run over so many cases, with the cache that a server uses."""
    from tests.tiny import boxes, tiny_preset, write_nifti

    with tempfile.TemporaryDirectory() as folder:
        cases = []
        for number in range(options.cases[0]):
            image, label = boxes((48, 48, 48), seed=number)
            paths = [Path(folder) / f"{kind}_{number}.nii.gz" for kind in ("image", "label")]
            cases.append(Case(f"case_{number}", write_nifti(paths[0], image), write_nifti(paths[1], label)))
        before = peak_mib()
        recipe = tiny_preset().training.model_copy(update={"max_epochs": 1})
        preset = tiny_preset().model_copy(update={"training": recipe})
        result = run_training(TrainingJob(preset, tuple(cases), (), Path(folder) / "run", torch.device("cpu")))
        return {"steps": len(result.losses), "peak_mib": peak_mib(), "before_mib": before}


def work_fit(options: argparse.Namespace) -> dict[str, Any]:
    """One crop of a window: the peak of forward and backward pass beside the weights, and what the planner counts."""
    preset, recompute = with_roi(load_preset(options.preset), options.measure[0]), options.way != "kept"
    device = resolve_device(None)
    _, weights = count_kept_bytes(preset, recompute)
    cost = measure_step(Placement(preset, device, DTYPES[options.dtype]), 1, recompute)
    counted = takes(preset, 1, recompute, options.dtype) - COPIES_OF_WEIGHTS * weights
    names = {"window": options.measure[0], "activations": options.way, "precision": options.dtype}
    gib = {"measured_gib": round(cost.bytes / GIB, 2), "counted_gib": round(counted / GIB, 2)}
    return {**names, **gib, "seconds": round(cost.seconds, 1)}


def work_throughput(options: argparse.Namespace) -> dict[str, Any]:
    """One way: so many steps without validation."""
    preset, folder = load_preset(options.preset), Path(options.folder)
    cases = find_cases(options.data / "images", options.data / "labels")
    recipe = preset.training
    batches = math.ceil(len(cases) / recipe.batch_size)
    recipe = recipe.model_copy(update={"max_epochs": math.ceil(options.steps / batches)})
    preset, steps = preset.model_copy(update={"training": recipe}), recipe.max_epochs * batches
    ends, losses = list[tuple[float, float]](), list[float]()
    if options.way == "stock":
        losses = train_stock(preset, cases, folder, steps, ends)
    else:
        start = read_checkpoint(folder / "start.pt").model
        device = resolve_device(None)
        plan = TrainingJob(preset, tuple(cases), (), folder / "run", device, start, cache_dir=folder / "cache")
        losses = list(run_training(plan, lambda _: ends.append(clocks())).losses)
    crops = min(recipe.batch_size, len(cases)) * recipe.crops_per_case
    quarter = max(1, len(losses) // 4)
    wall, cpu = (last - first for first, last in zip(ends[0], ends[-1], strict=True))
    return {
        "steps": len(losses),
        "crops_a_second": round(crops * (len(ends) - 1) / wall, 3),
        "cpu_seconds_a_crop": round(cpu / crops / (len(ends) - 1), 3),
        "peak_gib": round(peak_mib() / 1024, 2),
        "gpu_peak_gib": round(peak_mib("gpu") / 1024, 2),
        "loss_first": round(statistics.mean(losses[:quarter]), 4),
        "loss_last": round(statistics.mean(losses[-quarter:]), 4),
    }


def clocks() -> tuple[float, float]:
    """Seconds of the wall's clock, and of all threads of this process on a CPU: those hardly see other programs."""
    return time.perf_counter(), time.process_time()


def train_stock(
    preset: Preset, cases: list[Case], folder: Path, steps: int, ends: list[tuple[float, float]]
) -> list[float]:
    """MONAI Label's BasicTrainTask with its fastest cache; the losses of its steps."""
    from stock import StockTrainTask

    losses = list[float]()

    def on_step(loss: float) -> None:
        ends.append(clocks())
        losses.append(loss)

    set_determinism(preset.training.seed)
    start = folder / "stock.pt"
    shutil.rmtree(folder / "stock", ignore_errors=True)  # it would go on with the weights of the turn before
    torch.save({"model": dict(read_checkpoint(folder / "start.pt").model)}, start)
    task = StockTrainTask(preset, folder / "stock", start, steps, on_step)
    request = {
        "name": "run",
        "device": resolve_device(None).type,
        "max_epochs": preset.training.max_epochs,
        "train_batch_size": preset.training.batch_size,
        "val_split": 0.0,
        "multi_gpu": False,
        "dataset": "CacheDataset",
        "dataloader": "ThreadDataLoader",
        "tracking": "None",
    }
    items = [{"image": str(case.image), "label": str(case.label)} for case in cases]
    task(request, SimpleNamespace(datalist=lambda: items))
    return losses


COMMANDS = {
    "steps": (measure_steps, work_step),
    "cases": (measure_cases, work_cases),
    "throughput": (measure_throughput, work_throughput),
    "fits": (search_fits, work_fit),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(COMMANDS))
    parser.add_argument("--preset", default="abdomen_ct_base")
    parser.add_argument("--crops", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--budgets", type=float, nargs="+", default=[8, 12, 16, 24], help="GiB")
    parser.add_argument("--measure", type=int, nargs="*", default=[128, 160], help="edges of windows")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="for throughput; a server trains on half"
    )
    parser.add_argument("--data", type=Path, help="folder with images and labels, for throughput")
    parser.add_argument("--cases", type=int, nargs="+", default=[50, 1000])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "training.json")
    parser.add_argument("--keep-freed", action="store_true", help="for steps: freed memory is kept for the next one")
    parser.add_argument("--deterministic", action="store_true", help="for steps: deterministic kernels")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=(*WAYS, "stock", "ours"), default="kept", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
