"""Does a clinician who corrects one organ only unteach the model the others? Played over REST against a real server.

    python benchmarks/one_organ.py --data <btcv_ct> [--organ spleen] [--grow-mm 4] [--out FILE]

Cases are segmented, and of each mask one organ alone is submitted, as the reference has it; then Train is pressed.
Other cases are segmented before and after, with the new weights whatever the gate decided. Prints the time of the
training and a table of Dice per label; writes JSON. The shipped weights were trained on all cases of the data set,
so that the table says what the training changed, not how good the weights are. With ``--grow-mm`` the organ is drawn
larger than the reference has it, in the cases that are submitted and in those that are judged: something to learn.
With ``--weights`` other weights are served first, such as those of a fold that saw none of the cases.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import psutil
from scipy import ndimage

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "benchmarks", "tests/integration")]

from measuring import copy_model, describe_machine  # noqa: E402
from server import Server, parse_multipart  # noqa: E402

from lib.cases.labelled import Case, find_cases  # noqa: E402
from lib.cases.metrics import dice_per_label, mean_per_label  # noqa: E402
from lib.configs.catalogue import load_preset  # noqa: E402
from lib.storage.json_files import read_json, write_json  # noqa: E402
from lib.transforms.volume import read_volume  # noqa: E402

PRESET = "abdomen_ct"
CORRECTED = ("btcv_0002", "btcv_0005", "btcv_0008", "btcv_0023", "btcv_0029")
JUDGED = ("btcv_0001", "btcv_0006", "btcv_0021", "btcv_0026", "btcv_0031")
SECONDS_FOR_TRAINING = 7200.0
SECONDS_TO_ANSWER = 1800.0


def main() -> int:
    """Play the clinician, and show what became of each label."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with images/ and labels/ of the 13 organs")
    parser.add_argument("--organ", default="spleen", help="the label that is corrected")
    parser.add_argument("--corrected", default=",".join(CORRECTED), help="cases whose label is submitted")
    parser.add_argument("--judged", default=",".join(JUDGED), help="cases that are segmented before and after")
    parser.add_argument(
        "--weights", type=Path, help="served first, with their JSON side-car; the shipped ones by default"
    )
    parser.add_argument("--grow-mm", type=float, default=0.0, help="how far the organ grows into what is unlabelled")
    parser.add_argument("--conf", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="of the server")
    parser.add_argument("--request", default="{}", help="body of the training request, JSON")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    cases = {case.case_id: case for case in find_cases(options.data / "images", options.data / "labels")}
    with tempfile.TemporaryDirectory() as name:
        # a copy, since versions are written beside the weights that come with the project
        models = Path(name) / "models"
        copy_model(PRESET, models, options.weights)
        conf = {"models": PRESET, "model_dir": str(models)} | dict(options.conf)
        server = Server(Path(name), conf, forked=False)
        server.seconds_to_answer = SECONDS_TO_ANSWER
        for case_id in options.corrected.split(","):
            shutil.copy(cases[case_id].image, server.studies / f"{study_of(case_id)}.nii.gz")
        server.start()
        try:
            judged = [cases[case_id] for case_id in options.judged.split(",")]
            corrected = [cases[case_id] for case_id in options.corrected.split(",")]
            drawing = Drawing(load_preset(PRESET).label_indices[options.organ], options.grow_mm)
            request = json.loads(options.request)
            outcome = play(server, corrected, judged, options.organ, drawing, request)
            outcome["training_minutes"] = training_minutes(models / PRESET / "runs")
        finally:
            server.stop()
    print(as_table(outcome))
    if options.out:
        write_json(options.out, outcome | {"machine": describe_machine()})
    return 0


@dataclass(frozen=True)
class Drawing:
    """How the clinician draws: the label's value in the reference, and by how much larger than there."""

    value: int
    grow_mm: float

    def __call__(self, reference: npt.NDArray[np.uint8], spacing_mm: Sequence[float]) -> npt.NDArray[np.uint8]:
        """The reference with the organ as the clinician draws it; other organs keep their voxels."""
        if not self.grow_mm:
            return reference
        distance = ndimage.distance_transform_edt(reference != self.value, sampling=spacing_mm)
        return np.where((reference == 0) & (distance <= self.grow_mm), self.value, reference).astype(np.uint8)


def play(
    server: Server,
    corrected: Sequence[Case],
    judged: Sequence[Case],
    organ: str,
    drawing: Drawing,
    request: Mapping[str, Any],
) -> dict[str, Any]:
    """Correct, train, and measure before and after."""
    before = measure(server, judged, drawing)
    print(f"before: {before}", flush=True)
    for case in corrected:
        correct(server, case, organ, drawing)
    start, cpu_before = time.monotonic(), cpu_seconds(server)
    server.post(f"/train/{PRESET}", json=dict(request)).raise_for_status()
    status = server.wait_for("/train/", SECONDS_FOR_TRAINING)
    minutes = (time.monotonic() - start) / 60
    cpu_minutes = (cpu_seconds(server) - cpu_before) / 60
    if status["status"] != "DONE":
        raise RuntimeError(f"the training ended as {status['status']}: {status.get('reason')}")
    made = [v for v in server.get(f"/model/versions/{PRESET}").json()["versions"] if v["status"] != "shipped"][-1]
    version = made["version"]
    if made["status"] == "unproven":
        server.post(f"/model/versions/{PRESET}/{version}/serve").raise_for_status()
    elif made["status"] != "published":
        query = {"version": version, "rejected": "true"}
        server.post(f"/model/rollback/{PRESET}", params=query).raise_for_status()
    run = server.get(f"/runs/{PRESET}").json()
    return {
        "organ": organ,
        "grow_mm": drawing.grow_mm,
        "minutes": round(minutes, 1),
        "cpu_minutes": round(cpu_minutes, 1),
        "decision": {"status": made["status"], "reason": made["reason"]},
        "before": before,
        "after": measure(server, judged, drawing),
        "runs": run,
    }


def study_of(case_id: str) -> str:
    """Another name: a case that the shipped weights name as one of theirs would judge nothing."""
    return f"patient_{case_id.rsplit('_', 1)[1]}"


def cpu_seconds(server: Server) -> float:
    """CPU time that the server has taken, with the processes that it has started, also those that have ended."""
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    return sum(sum(process.cpu_times()[:4]) for process in (root, *server.children()))


def training_minutes(runs: Path) -> float:
    """Of the last run's steps and validations alone."""
    report = max(runs.glob("*/report.json"), key=lambda path: path.stat().st_mtime)
    return round(float(read_json(report)["training"]["seconds"]) / 60, 1)


def correct(server: Server, case: Case, organ: str, drawing: Drawing) -> None:
    """Ask for a mask as a clinician does, and submit one organ of it, as the reference has it."""
    server.infer(PRESET, study_of(case.case_id)).raise_for_status()
    reference = nib.load(case.label)
    drawn = drawing(np.asarray(reference.dataobj).round().astype(np.uint8), reference.header.get_zooms()[:3])
    voxels = (drawn == drawing.value).astype(np.uint8)
    content = nib.Nifti1Image(voxels, reference.affine).to_bytes()
    params = {"label_info": [{"name": organ, "idx": 1}], "model": PRESET, "client_id": "clinician"}
    files = {"params": (None, json.dumps(params)), "label": ("label.nii", content)}
    answer = server.put("/datastore/label", params={"image": study_of(case.case_id), "tag": "final"}, files=files)
    answer.raise_for_status()
    print(f"{case.case_id}: {organ} submitted, {len(answer.json()['missing_labels'])} labels left open", flush=True)


def measure(server: Server, judged: Sequence[Case], drawing: Drawing) -> dict[str, float]:
    """Mean Dice of each label over the cases, segmented over REST as uploads with the live version."""
    rows = []
    for case in judged:
        upload = {"params": (None, '{"result_extension": ".nii"}'), "file": ("image.nii.gz", case.image.read_bytes())}
        answer = server.post(f"/infer/{PRESET}", files=upload)
        answer.raise_for_status()
        mask = server.folder / "mask.nii"
        mask.write_bytes(parse_multipart(answer)["image"][1])
        volumes = [read_volume(path) for path in (mask, case.label)]
        predicted, label = (volume.voxels.round().astype(np.uint8) for volume in volumes)
        reference = drawing(label, volumes[1].spacing_mm)
        rows.append(dice_per_label(predicted, reference, load_preset(PRESET).label_indices))
    return {name: round(value, 4) for name, value in mean_per_label(rows).items()}


def as_table(outcome: Mapping[str, Any]) -> str:
    """Dice of each label before and after, as Markdown."""
    before, after = outcome["before"], outcome["after"]
    times = [outcome[name] for name in ("minutes", "training_minutes", "cpu_minutes")]
    lines = ["{} minutes, of which the steps took {}; {} of CPU".format(*times)]
    lines += ["", f"{outcome['decision']['status']}: {outcome['decision']['reason']}", ""]
    lines += ["| label | before | after | change |", "|---|---|---|---|"]
    for name in before:
        lines.append(f"| {name} | {before[name]:.3f} | {after[name]:.3f} | {after[name] - before[name]:+.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
