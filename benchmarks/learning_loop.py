"""Does the model get better while clinicians label? A clinician is played over REST against the running server.

    python benchmarks/learning_loop.py [--quick] [--data FOLDER] [--out FILE]

A model is trained on eight cases. Then the clinician asks for the next case, gets the model's segmentation, submits the
reference label; when it pauses, the retrain policy trains. The same held-out cases, which the server never has, are
segmented over REST with whatever version is live after 8, 16, 32 and 64 labels. Prints a table, writes JSON and a
picture. ``--quick`` does it with synthetic cases and a small network in a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import torch
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "sample-data", "tests/integration")]

from server import Server, parse_multipart  # noqa: E402
from synthetic_hippocampus import draw_cases  # noqa: E402

from lib.cases.labelled import Case, find_cases  # noqa: E402
from lib.cases.metrics import dice_per_label, mean_per_label  # noqa: E402
from lib.cases.split import read_split, subject_from_consecutive_pair  # noqa: E402
from lib.configs.catalogue import load_preset  # noqa: E402
from lib.configs.preset import Preset, parse_preset  # noqa: E402
from lib.drawing.figures import drawn_figure  # noqa: E402
from lib.networks.checkpoint import Checkpoint, write_checkpoint  # noqa: E402
from lib.storage.files import sha256_of  # noqa: E402
from lib.storage.json_files import write_json  # noqa: E402
from lib.trainers.loop import run_training  # noqa: E402
from lib.trainers.run.job import TrainingJob  # noqa: E402
from lib.transforms.volume import read_volume  # noqa: E402

LABELS_AT = (8, 16, 32, 64)
CASES_AT_FIRST = 8
CASES_HELD_OUT = 42
SECONDS_FOR_A_RUN = 1800.0
# The clinician labels without a pause, and pauses where it is measured: there the policy finds it quiet.
SECONDS_OF_QUIET = 8.0


@dataclass(frozen=True)
class Setting:
    """One experiment.

    Attributes:
        preset: the task.
        first: cases that the first model is trained on.
        pool: cases that the clinician labels.
        held_out: cases that everything is measured on; the server never has them.
        labels_at: after how many labels it is measured.
        first_epochs: epochs of the first model.
        retrain_after: labels after which the policy trains.
        recipe: of the policy's runs.
    """

    preset: Preset
    first: tuple[Case, ...]
    pool: tuple[Case, ...]
    held_out: tuple[Case, ...]
    labels_at: tuple[int, ...]
    first_epochs: int
    retrain_after: int
    recipe: str


@dataclass(frozen=True)
class Point:
    """What is measured after so many labels."""

    labels: int
    version: str
    mean_dice: float
    dice: dict[str, float]


@dataclass
class Outcome:
    """The measured points, and all versions that were made on the way."""

    points: list[Point] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)

    def faults(self) -> list[str]:
        """What should not be: a published version that is no better on the validation set than the one before it."""
        published = [version for version in self.versions if version["status"] == "published"]
        worse = [v["version"] for v in published if v["difference"] is not None and v["difference"] <= 0]
        return [f"{name} is published and no better than the one before it" for name in worse]


def main() -> int:
    """Run one experiment and show it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="synthetic cases and a small network")
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "hippocampus_mr")
    parser.add_argument("--out", type=Path, help="JSON; the table (.md) and the picture (.png) go beside it")
    parser.add_argument("--first", type=Path, help="the first model, as an earlier call with the same seed trained it")
    parser.add_argument("--keep-first", type=Path, help="where to keep the first model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out = options.out or REPOSITORY / "benchmarks" / ("learning_loop_quick.json" if options.quick else
                                                      "learning_loop.json")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.monotonic()
        setting = quick_setting(folder, options.seed) if options.quick else real_setting(options.data, options.seed)
        first = options.first or options.keep_first or folder / "first.pt"
        if options.first is None:
            train_first(setting, first, folder / "first")
        outcome = run(
            setting, folder, first, lambda text: print(f"{time.monotonic() - start:5.0f} s  {text}", flush=True)
        )
        seconds = time.monotonic() - start
    machine = {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count(), "load": os.getloadavg()}
    data = asdict(outcome) | {"seconds": round(seconds), "machine": machine, "recipe": setting.recipe}
    write_json(out, data | {"held_out_cases": len(setting.held_out), "retrain_after": setting.retrain_after})
    print(as_table(outcome))
    out.with_suffix(".md").write_text(as_table(outcome), encoding="utf-8")
    draw(outcome, len(setting.held_out), out.with_suffix(".png"))
    for fault in outcome.faults():
        print(fault)
    return 1 if outcome.faults() else 0


def small_preset(name: str, hidden_size: int) -> Preset:
    """The hippocampus task with a network that a busy CPU trains in an hour: half of the features in each layer."""
    data = load_preset("hippocampus_mr").model_dump()
    data["name"] = name
    data["network"] |= {"feature_size": 8, "hidden_size": hidden_size, "mlp_dim": 2 * hidden_size, "num_heads": 4}
    data["training"] |= {"val_interval": 1000, "learning_rate": 2e-3}
    return parse_preset(data, source=name)


def real_setting(data: Path, seed: int) -> Setting:
    """Real hippocampi: the shipped split's validation side is measured on, the rest is there to be labelled."""
    split = read_split(REPOSITORY / "model" / "hippocampus_mr" / "split.json")
    cases = {case.case_id: case for case in find_cases(data / "images", data / "labels")}
    subjects: dict[str, list[Case]] = {}
    for name in split.train:
        subjects.setdefault(subject_from_consecutive_pair(name), []).append(cases[name])
    order = sorted(subjects)
    random.Random(seed).shuffle(order)
    ordered = [case for subject in order for case in subjects[subject]]
    held_out = tuple(cases[name] for name in split.validation[:CASES_HELD_OUT])
    return Setting(
        preset=small_preset("hippocampus_loop", 96),
        first=tuple(ordered[:CASES_AT_FIRST]),
        pool=tuple(ordered[CASES_AT_FIRST : CASES_AT_FIRST + max(LABELS_AT)]),
        held_out=held_out,
        labels_at=LABELS_AT,
        first_epochs=75,
        retrain_after=8,
        recipe="max_epochs=6,max_steps=150,learning_rate=0.001",
    )


def quick_setting(folder: Path, seed: int) -> Setting:
    """Synthetic hippocampi and a network of a tenth of the size."""
    cases = []
    for number, case in enumerate(draw_cases(20, seed=seed + 11)):
        files = []
        for kind, voxels in (("images", case.image), ("labels", case.label)):
            path = folder / "cases" / kind / f"case_{2 * number + 1:03d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, case.affine_ras), path)
            files.append(path)
        cases.append(Case(files[0].name.removesuffix(".nii.gz"), *files))
    return Setting(
        preset=small_preset("loop", 48),
        first=tuple(cases[:2]),
        pool=tuple(cases[2:14]),
        held_out=tuple(cases[14:]),
        labels_at=(6, 12),
        first_epochs=70,
        retrain_after=6,
        recipe="max_epochs=60,max_steps=100,learning_rate=0.002",
    )


def run(setting: Setting, folder: Path, first: Path, say: Callable[[str], None]) -> Outcome:
    """Start the server with the first model, and play the clinician."""
    server = prepare(setting, folder, first)
    say(f"the first model has been trained on {len(setting.first)} cases")
    server.start()
    try:
        return play(setting, server, say)
    finally:
        server.stop()


def prepare(setting: Setting, folder: Path, first: Path) -> Server:
    """A server with the first model as its shipped one, the pool's images, and the first model's cases to replay."""
    preset = folder / "preset.yaml"
    preset.write_text(yaml.safe_dump(setting.preset.model_dump(mode="json")), encoding="utf-8")
    conf = {
        "preset": str(preset),
        "retrain": "auto",
        "retrain_after": str(setting.retrain_after),
        "retrain_quiet_seconds": str(SECONDS_OF_QUIET),
        "retrain_floor": "0",
        "retrain_from_nothing": "0",
        "retrain_recipe": setting.recipe,
        "subject_separator": "-",
        "replay": str(folder / "replay"),
    }
    server = Server(folder / "server", conf)
    for case in setting.pool:
        shutil.copy(case.image, server.studies / f"{study_of(case)}.nii.gz")
    for case in setting.first:
        for kind, file in (("images", case.image), ("labels", case.label)):
            target = folder / "replay" / kind / f"{study_of(case)}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    target = server.models / setting.preset.name
    target.mkdir()
    shutil.copy(first, target / "shipped.pt")
    write_json(target / "shipped.json", {"sha256": sha256_of(first)})
    return server


def train_first(setting: Setting, target: Path, run_dir: Path) -> None:
    """Train the model that the server starts with."""
    torch.set_num_threads(1)
    changes = {"max_epochs": setting.first_epochs, "val_interval": setting.first_epochs}
    recipe = setting.preset.training.model_copy(update=changes)
    preset = setting.preset.model_copy(update={"training": recipe})
    result = run_training(TrainingJob(preset, setting.first, (), run_dir, torch.device("cpu")))
    write_checkpoint(target, Checkpoint(result.weights, setting.preset, {"version": "shipped"}))


def study_of(case: Case) -> str:
    """An id that tells the subject before a separator: both hippocampi of a head belong together."""
    subject = subject_from_consecutive_pair(case.case_id).rsplit("_", 1)[1]
    return f"s{subject}-{case.case_id.rsplit('_', 1)[1]}"


def play(setting: Setting, server: Server, say: Callable[[str], None]) -> Outcome:
    """Label case after case; pause where it is to be measured, until the policy's run has ended."""
    references = {study_of(case): case.label for case in setting.pool}
    outcome = Outcome([measure(setting, server, 0)])
    say(describe(outcome.points[-1]))
    for count in range(1, max(setting.labels_at) + 1):
        label_next(setting, server, references)
        if count in setting.labels_at:
            say(wait_for_run(setting, server, len(outcome.versions) + 1))
            outcome.versions = [line(server, setting, v) for v in versions(server, setting)]
            outcome.points.append(measure(setting, server, count))
            say(describe(outcome.points[-1]))
    return outcome


def label_next(setting: Setting, server: Server, references: dict[str, Path]) -> None:
    """As a clinician: next sample, segmentation, and the reference as the corrected label."""
    image = server.post("/activelearning/random", json={"client_id": "clinician"}).json()["id"]
    answer = server.infer(setting.preset.name, image, client_id="clinician", result_extension=".nii.gz")
    answer.raise_for_status()
    names = list(setting.preset.label_indices)
    info = [{"name": name, "idx": setting.preset.label_indices[name]} for name in names]
    params = {"label_info": info, "model": setting.preset.name, "client_id": "clinician"}
    files = {"params": (None, json.dumps(params)), "label": ("label.nii.gz", references[image].read_bytes())}
    server.put("/datastore/label", params={"image": image, "tag": "final"}, files=files).raise_for_status()


def wait_for_run(setting: Setting, server: Server, number: int) -> str:
    """Wait until the policy's run has made its version; returns what was decided."""
    deadline = time.monotonic() + SECONDS_FOR_A_RUN
    while time.monotonic() < deadline:
        made = versions(server, setting)
        state = server.get("/retrain/").json()[setting.preset.name]
        if len(made) >= number and not state["running"] and state["new_labels"] < setting.retrain_after:
            return f"{made[-1]['version']}: {made[-1]['reason']}"
        time.sleep(1)
    raise TimeoutError(f"no run has ended: {state}; {server.get('/train/').json()}")


def versions(server: Server, setting: Setting) -> list[dict[str, Any]]:
    """All versions that runs have made."""
    listed = server.get(f"/model/versions/{setting.preset.name}").json()["versions"]
    return [version for version in listed if version["status"] != "shipped"]


def line(server: Server, setting: Setting, version: dict[str, Any]) -> dict[str, Any]:
    """What matters of a version: the gate's comparison on the validation set."""
    details = server.get(f"/model/versions/{setting.preset.name}/{version['version']}").json()
    mean = (details.get("comparison") or {}).get("mean_dice") or {}
    sides = {side: len(cases) for side, cases in details["split"].items()}
    return {"version": version["version"], "status": version["status"], "reason": version["reason"],
            "difference": mean.get("difference"), "cases": sides}  # fmt: skip


def measure(setting: Setting, server: Server, labels: int) -> Point:
    """Segment the held-out cases over REST, as uploads, with the live version."""
    rows, version = [], ""
    for case in setting.held_out:
        upload = {"params": (None, '{"result_extension": ".nii.gz"}'),
                  "file": ("image.nii.gz", case.image.read_bytes())}  # fmt: skip
        answer = server.post(f"/infer/{setting.preset.name}", files=upload)
        answer.raise_for_status()
        parts = parse_multipart(answer)
        version = json.loads(parts["params"][1])["model"]["version"]
        mask = server.folder / "mask.nii.gz"
        mask.write_bytes(parts["image"][1])
        predicted, reference = (read_volume(path).voxels.astype(np.uint8) for path in (mask, case.label))
        rows.append(dice_per_label(predicted, reference, setting.preset.label_indices))
    dice = mean_per_label(rows)
    return Point(labels, version, sum(dice.values()) / len(dice), dice)


def describe(point: Point) -> str:
    """One line."""
    parts = ", ".join(f"{name} {value:.3f}" for name, value in point.dice.items())
    return f"{point.labels} labels, {point.version}: mean Dice {point.mean_dice:.4f} ({parts})"


def as_table(outcome: Outcome) -> str:
    """The points and the versions as Markdown."""
    names = list(outcome.points[0].dice)
    rows = ["| labels | live version | mean Dice | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for point in outcome.points:
        cells = [str(point.labels), point.version, f"{point.mean_dice:.4f}"]
        rows.append("| " + " | ".join(cells + [f"{point.dice[name]:.4f}" for name in names]) + " |")
    rows += ["", "| version | trained on, judged on | the gate |", "|---|---|---|"]
    for version in outcome.versions:
        cases = version["cases"]
        rows.append(f"| {version['version']} | {cases['train']}, {cases['validation']} | {version['reason']} |")
    return "\n".join(rows) + "\n"


def draw(outcome: Outcome, cases: int, path: Path) -> None:
    """The points as a picture."""
    labels = [point.labels for point in outcome.points]
    with drawn_figure(path, "labels submitted", f"Dice on {cases} held-out cases", (6.4, 3.8)) as axes:
        axes.plot(labels, [point.mean_dice for point in outcome.points], "o-", color="#222222", label="mean")
        for name, color in zip(outcome.points[0].dice, ("#dc7828", "#3c8cdc"), strict=False):
            dice = [point.dice[name] for point in outcome.points]
            axes.plot(labels, dice, "o--", color=color, label=name, linewidth=1)
        for point in outcome.points:
            place = (point.labels, point.mean_dice)
            axes.annotate(point.version, place, textcoords="offset points", xytext=(4, -12), fontsize=8)
        axes.set_xticks(labels)


if __name__ == "__main__":
    sys.exit(main())
