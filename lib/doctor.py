"""Checks this machine, with one line for each finding: ``python -m lib.doctor``.

``run.py doctor`` calls it inside the virtual environment. Each line begins with ``ok``, ``warn`` or ``FAIL``; lines
with ``warn`` or ``FAIL`` state what to do. It starts no server and changes nothing. ``--plan PRESET [--image FILE]``
shows how an image would be segmented instead, and ``--plan PRESET --train`` how a training step would be computed;
their measurements are stored for the server. ``--memory-budget 8GiB`` plans for less memory than is free. ``--studies
DIR [--models NAMES] [--preset FILE]`` lists the files in that folder that cannot be used as cases, and the labels that
are refused, with the reasons.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch

from lib.cluster.ray_connection import Authentication
from lib.configs.catalogue import load_preset, shipped_preset_names
from lib.configs.preset import Preset
from lib.configs.settings import REPOSITORY, Settings
from lib.datastore.images.folder import NOT_SCANNED, list_images
from lib.datastore.label_files.found_labels import find_problems
from lib.errors import ImageError, UnetrError
from lib.infers.compiling import compile_if_faster
from lib.infers.costs import COSTS_FILE, CostBook
from lib.infers.devices.failures import try_device
from lib.infers.devices.lane import ALL, parse_devices
from lib.infers.plan import Planner
from lib.infers.segmenter import Segmenter
from lib.models.weights import WeightsFile, WeightsLocator
from lib.networks.inference import InferenceNetwork
from lib.networks.precision import cpu_computes_bf16, resolve_device, resolve_precision
from lib.networks.unetr import build_unetr
from lib.storage.files import sha256_of
from lib.storage.json_files import read_json
from lib.trainers.plan import StepPlanner
from lib.transforms.channel_search import find_channel_sources
from lib.transforms.channels import read_channels
from lib.transforms.volume import Volume, read_volume

State = Literal["ok", "warn", "FAIL"]
GIB = 2**30
MIN_MEMORY_GIB = 4.0
MIN_DISK_GIB = 5.0
STUDIES_ENDINGS = (".nii.gz", ".nii", ".nrrd")
NEEDED_MODULES = ("monai.networks.nets", "monailabel.interfaces.app", "pydicom_seg", "highdicom", "itk", "nrrd")


@dataclass(frozen=True)
class Finding:
    """One line of the report: its state, what was observed, and what to do about it."""

    state: State
    text: str
    advice: str = ""

    def __post_init__(self) -> None:
        if self.state != "ok" and not self.advice:
            raise ValueError(f"{self.state} without advice: {self.text}")

    def __str__(self) -> str:
        return f"{self.state:<5} {self.text}" + (f"; {self.advice}" if self.advice else "")


def main(arguments: Sequence[str] | None = None, costs: Path | None = None) -> int:
    """Print each finding; returns 1 if one of them is a failure.

    Args:
        arguments: of the command line.
        costs: file of measured costs; by default that of the served models.
    """
    parser = argparse.ArgumentParser(prog="doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", metavar="PRESET")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--memory-budget", default="")
    parser.add_argument("--studies", type=Path)
    parser.add_argument("--models", default="all")
    parser.add_argument("--preset", default="")
    options = parser.parse_args(arguments)
    if options.studies is not None:
        findings: Iterable[Finding] = check_studies(options.studies, options.models, options.preset)
    elif options.plan is None:
        findings = examine()
    elif options.train:
        findings = [check_training_plan(options.plan, options.memory_budget, costs)]
    else:
        findings = [check_plan(options.plan, options.image, options.memory_budget, costs)]
    failed = False
    for finding in findings:
        print(finding, flush=True)
        failed = failed or finding.state == "FAIL"
    return int(failed)


def examine() -> Iterable[Finding]:
    """All findings, cheap checks first."""
    yield check_versions((REPOSITORY / "requirements.txt").read_text(encoding="utf-8"))
    yield from (check_module(name) for name in NEEDED_MODULES)
    yield check_torch()
    yield from check_devices()
    yield check_cpu()
    yield check_memory(psutil.virtual_memory().available / GIB)
    yield check_disk(shutil.disk_usage(REPOSITORY).free / GIB)
    yield check_cluster()
    for name in shipped_preset_names():
        yield check_weights(name, WeightsLocator(Settings().model_dir / name))


def check_studies(studies: Path, models: str, preset: str = "") -> Iterable[Finding]:
    """Check a folder of studies: which files cannot be used as cases, and which labels are refused.

    Args:
        studies: the folder.
        models: names of presets, as for ``--conf models``.
        preset: file of the user's own preset; empty for none.
    """
    if not studies.is_dir():
        yield Finding("FAIL", f"there is no folder {str(studies)!r}", "name the folder of the studies")
        return
    try:
        presets = Settings.from_conf({"models": models} | ({"preset": preset} if preset else {})).load_presets()
    except UnetrError as error:
        yield Finding("FAIL", str(error), "name presets that there are")
        return
    yield from check_images(studies, list(presets.values()))
    advice = "put a label there that fits its image, or remove it; its case is handed out meanwhile"
    left_out = 0
    with tempfile.TemporaryDirectory(prefix="unetr-") as folder:
        for problem in find_problems(studies, list(presets.values()), Path(folder)):
            left_out += 1
            yield Finding("warn", f"{problem.file} is left out: {problem.reason}", advice)
    if not left_out:
        yield Finding("ok", f"no label in {studies.name!r} is left out")


def check_images(folder: Path, presets: Sequence[Preset] = ()) -> Iterable[Finding]:
    """Findings on the files of a studies folder, each of which is read."""
    taken: set[Path] = set()
    for preset in presets:
        for sources in find_channel_sources(folder, preset, NOT_SCANNED) if preset.channels else ():
            taken.update(sources.files.values())
            try:
                read_channels(sources, preset)
            except ImageError as error:
                yield Finding("warn", f"{preset.name}: {error}", "it will be left out of Next Sample")
    listing = list_images(folder, STUDIES_ENDINGS, taken)
    yield Finding("ok", f"{len(listing.images)} images that are files in {folder}")
    for problem in listing.problems:
        yield Finding("warn", str(problem), "it is no case")
    for image_id, ending in sorted(listing.images.items()):
        try:
            volume = read_volume(folder / f"{image_id}{ending}")
            if not np.isfinite(volume.voxels).all() or volume.voxels.min() == volume.voxels.max():
                raise ImageError(f"image {image_id + ending!r} is constant, or has voxels that are not finite numbers")
        except ImageError as error:
            yield Finding("warn", str(error), "it will be left out of Next Sample")


def check_versions(requirements: str) -> Finding:
    """Whether the packages pinned in ``requirements`` are installed in these versions.

    Build variants of one version (``+cpu``, ``+cu126``) count as equal.
    """
    differing = []
    for name, wanted in pinned(requirements):
        try:
            installed = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            installed = "not installed"
        if installed != wanted:
            differing.append(f"{name} {installed} (tested: {wanted})")
    if differing:
        return Finding("warn", f"packages differ: {', '.join(differing)}", "run.py setup installs the tested ones")
    return Finding("ok", "installed packages are the tested ones")


def pinned(requirements: str) -> Iterable[tuple[str, str]]:
    """Package names and pinned versions of a requirements file, of the lines whose markers match this Python.

    >>> list(pinned('a==1.0\\nb==2.0; python_version < "3.0"\\n# c==3'))
    [('a', '1.0')]
    """
    marker = re.compile(r'python_version (<|>=) "(\d+)\.(\d+)"')
    for line in requirements.splitlines():
        pin = re.match(r"([A-Za-z0-9._-]+)==([^;\s]+)", line)
        condition = marker.search(line)
        if condition:
            older = sys.version_info[:2] < (int(condition[2]), int(condition[3]))
            if older is not (condition[1] == "<"):
                continue
        if pin:
            yield pin[1], pin[2]


def check_module(name: str) -> Finding:
    """Whether a package that the server requires can be imported."""
    try:
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - a broken package raises anything, and this is here to say so
        return Finding("FAIL", f"{name} cannot be imported ({error})", "delete .venv and start run.py again")
    return Finding("ok", f"{name} can be imported")


def check_torch(find_program: Callable[[str], str | None] = shutil.which) -> Finding:
    """PyTorch and the GPUs that it detects.

    Args:
        find_program: finds the path of a program; NVIDIA's ``nvidia-smi`` is installed with its driver.
    """
    version = f"PyTorch {torch.__version__}"
    if torch.cuda.is_available():
        gpus = [_describe_gpu(index) for index in range(torch.cuda.device_count())]
        return Finding("ok", f"{version} sees {len(gpus)} GPU(s): {', '.join(gpus)}")
    if find_program("nvidia-smi") and torch.version.cuda is None:
        advice = "README, 'GPU', says how to get a CUDA build"
        return Finding("warn", f"{version} is a build for the CPU, but there is an NVIDIA driver", advice)
    if find_program("nvidia-smi"):
        advice = f"update it for CUDA {torch.version.cuda}, or take an older CUDA build (README, 'GPU')"
        return Finding("warn", f"{version} does not get on with the NVIDIA driver", advice)
    return Finding("ok", f"{version} computes on the CPU (no NVIDIA GPU seen)")


def check_devices(devices: str = ALL, compute: Callable[[torch.device], None] = try_device) -> Iterable[Finding]:
    """Whether each device works; ``--conf devices all`` uses the working ones.

    Args:
        devices: see ``--conf devices``.
        compute: test computation on a device; raises if the device does not work.
    """
    for lane in parse_devices(devices):
        try:
            compute(lane.device)
        except (RuntimeError, MemoryError) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            advice = "the server goes on with the others; see nvidia-smi, or restart the machine"
            yield Finding("FAIL", f"device {lane.name} does not compute: {reason}", advice)
        else:
            yield Finding("ok", f"device {lane.name} computes")


def _describe_gpu(index: int) -> str:
    free, total = torch.cuda.mem_get_info(index)
    return f"{torch.cuda.get_device_name(index)} ({free / GIB:.1f} of {total / GIB:.1f} GiB free)"


def check_cpu() -> Finding:
    """Cores, threads, and hardware support for bf16."""
    bf16 = "bf16 in hardware" if cpu_computes_bf16() else "no bf16 in hardware, so fp32 is used"
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} PyTorch threads"
    return Finding("ok", f"CPU {platform.machine()}: {threads}, {bf16}")


def check_memory(free_gib: float) -> Finding:
    """Free memory compared with the needs of a large CT."""
    text = f"{free_gib:.1f} GiB of memory free"
    if free_gib < MIN_MEMORY_GIB:
        return Finding("warn", text, f"large CTs need {MIN_MEMORY_GIB:.0f} GiB and more: close other programs")
    return Finding("ok", text)


def check_disk(free_gib: float) -> Finding:
    """Free disk space compared with the needs of training caches and weights."""
    text = f"{free_gib:.1f} GiB of disk free in {REPOSITORY}"
    if free_gib < MIN_DISK_GIB:
        return Finding("warn", text, f"training keeps caches and weights there: free {MIN_DISK_GIB:.0f} GiB")
    return Finding("ok", text)


def check_cluster(
    is_installed: bool | None = None, environment: Mapping[str, str] = os.environ, home: Path | None = None
) -> Finding:
    """Ray, the optional engine for clusters, and a warning about access to its ports.

    Args:
        is_installed: detected if not given.
        environment: environment variables with Ray's settings.
        home: folder in which Ray looks for its token; by default this user's home.
    """
    if not (importlib.util.find_spec("ray") is not None if is_installed is None else is_installed):
        return Finding("ok", "Ray is not installed (run.py setup --cluster); segmenting on one machine needs none")
    ways_in = "whoever reaches Ray's ports can run any program on the cluster's machines"
    authentication = Authentication.find(environment, home)
    if not authentication.asked:
        advice = "keep them in a network of their own, and set RAY_AUTH_MODE=token (docs/how-to/many-scans.md, 'Ray')"
        return Finding("warn", f"Ray is installed without authentication: {ways_in}", advice)
    if not authentication.given:
        return Finding(
            "warn", f"RAY_AUTH_MODE is token, but there is none in {authentication.source}", "put the cluster's there"
        )
    text = f"Ray asks for a token, and has one in {authentication.source}; with it {ways_in}"
    return Finding("ok", f"{text}: keep them in a network of their own")


def check_weights(name: str, locator: WeightsLocator) -> Finding:
    """The weights with which a preset would be served, and whether they match their side-car."""
    file = locator.find()
    if file is None:
        advice = "train it, or start with --conf pretrained FILE, before it can segment"
        return Finding("warn", f"preset {name}: no weights", advice)
    try:
        side_car = read_json(file.side_car)
        if not isinstance(side_car, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError):
        return Finding("warn", f"preset {name}: {_describe(file)}", "its side-car (.json) is missing or damaged")
    if side_car.get("sha256") != sha256_of(file.path):
        advice = "the file is damaged or was replaced: restore it, or publish again"
        return Finding("FAIL", f"preset {name}: {_describe(file)} is not the file that its side-car describes", advice)
    return Finding("ok", f"preset {name}: {_describe(file)}{_promise(side_car)}")


def check_plan(name: str, image: Path | None, memory_budget: str = "", costs: Path | None = None) -> Finding:
    """How an image would be segmented with a preset's weights (or random ones), measured on this machine."""
    try:
        preset, budget = load_preset(name), parse_budget(memory_budget)
        volume = read_volume(image) if image is not None else usual_volume(preset)
        what = image.name if image is not None else f"a usual {preset.modality} of {volume.voxels.shape} voxels"
        device = resolve_device(None)
        dtype = resolve_precision("auto", device)
        network = InferenceNetwork(build_unetr(preset), device, dtype)
        planner = Planner(budget, CostBook(costs or Settings().model_dir / COSTS_FILE))
        segmenter = Segmenter(network, preset, device, planner=planner)
        compile_if_faster(segmenter, threading.Lock())
        return Finding("ok", f"{name}, {what}: {segmenter.plan(volume, what).explain()}")
    except UnetrError as error:
        return Finding("FAIL", str(error), "nothing was planned")


def check_training_plan(name: str, memory_budget: str = "", costs: Path | None = None) -> Finding:
    """How a step of a preset's recipe would be computed, measured on this machine."""
    try:
        preset, budget = load_preset(name), parse_budget(memory_budget)
        planner = StepPlanner(budget, CostBook(costs or Settings().model_dir / COSTS_FILE))
        plan = planner.plan(preset, preset.training.batch_size, resolve_device(None), always_measure=True)
        return Finding("ok", f"training of {name}: {plan.explain()}")
    except UnetrError as error:
        return Finding("FAIL", str(error), "nothing was planned")


def parse_budget(text: str) -> int | None:
    """Bytes of a size such as ``6GiB``, parsed like ``--conf memory_budget``; None for an empty text.

    Raises:
        ConfigError: for other values.
    """
    return Settings.from_conf({"memory_budget": text}).memory_budget if text else None


def usual_volume(preset: Preset) -> Volume:
    """A grid of usual size for the modality: an abdominal CT, or a head MR; all rows share the memory of one ramp."""
    shape, spacing_mm = ((512, 512, 300), (0.8, 0.8, 1.5)) if preset.modality == "CT" else ((256, 256, 180), (1, 1, 1))
    return Volume(np.broadcast_to(np.arange(shape[2], dtype=np.float32), shape), np.diag([*spacing_mm, 1.0]))


def _describe(file: WeightsFile) -> str:
    return f"{file.origin} weights {file.path.name} ({file.path.stat().st_size / 1e6:.1f} MB)"


def _promise(side_car: dict[str, object]) -> str:
    """The Dice in the side-car, if there is one."""
    held_out = side_car.get("held_out")
    dice = held_out.get("mean_dice") if isinstance(held_out, dict) else None
    return f", mean Dice {dice:.3f} on held-out cases" if isinstance(dice, float) else ""


if __name__ == "__main__":
    sys.exit(main())
