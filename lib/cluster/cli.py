"""Segment a folder of images: ``python3 run.py segment --studies DIR --model NAME --out DIR``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib.cluster.results import ResultFolder
from lib.cluster.source import Shard, find_images
from lib.cluster.worker import Model, Outcome, segment_cases
from lib.commandline import run_command
from lib.configs.catalogue import find_preset
from lib.errors import CheckpointError, ConfigError
from lib.infers.segmenter import Segmenter
from lib.models.calibration import read_calibration
from lib.models.weights import WeightsLocator, preset_for
from lib.networks.checkpoint import read_checkpoint
from lib.networks.precision import resolve_device
from lib.storage.files import sha256_of
from lib.storage.full_disk import writing
from lib.storage.json_files import write_json

MODEL_FOLDER = Path(__file__).resolve().parents[2] / "model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 when every case has its mask, 1 when some have not, 2 with a sentence when the input was wrong."""
    options = build_parser().parse_args(arguments)
    failed: dict[str, str] = {}
    code = run_command(lambda: failed.update(_segment(options).failed), options.threads, logging.WARNING)
    return code or (1 if failed else 0)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="run.py segment", description="Segment a folder of images, without a server.")
    parser.add_argument("--studies", required=True, help="folder of NIfTI and NRRD files and of folders of DICOM files")
    parser.add_argument(
        "--model", required=True, help="preset whose published or shipped weights segment, or a YAML file"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of masks, records and the summary")
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="take the K-th of N shares of the cases")
    parser.add_argument("--model-dir", type=Path, default=MODEL_FOLDER, help="folder of the weights of each preset")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; the best there is by default")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's default if not given")
    return parser


def _segment(options: argparse.Namespace) -> Outcome:
    if "://" in options.studies:
        raise ConfigError(f"--studies {options.studies!r} is a URL; run.py segment reads folders only")
    shard = Shard.parse(options.shard)
    found = find_images(Path(options.studies))
    images = {case: path for case, path in found.images.items() if case in shard}
    model = load_model(options.model, options.model_dir, options.device)
    results = ResultFolder(options.out)
    with tqdm(total=len(images), unit="case", file=sys.stderr) as bar:
        outcome = segment_cases(images, model, results, lambda case: bar.update() and None)
    outcome.failed |= {name: reason for name, reason in found.broken.items() if name in shard}
    print(as_table(outcome))
    name = "summary.json" if shard.count == 1 else f"summary-{shard.number}-of-{shard.count}.json"
    with writing("the summary"):
        write_json(options.out / name, summary(outcome, model))
    return outcome


def load_model(name: str, model_dir: Path, device: str | None) -> Model:
    """The preset with the weights that a server would serve.

    Raises:
        ConfigError: when there is no such preset.
        CheckpointError: when it has no weights, or damaged ones.
    """
    preset = find_preset(name)
    file = WeightsLocator(model_dir / preset.name).find()
    if file is None:
        raise CheckpointError(f"there are no weights of {preset.name!r} in {str(model_dir / preset.name)!r}")
    checkpoint = read_checkpoint(file.path)
    segmenter = Segmenter.from_checkpoint(checkpoint, preset_for(checkpoint, preset), resolve_device(device))
    return Model(segmenter, preset.name, file.version, sha256_of(file.path), read_calibration(file.path))


def summary(outcome: Outcome, model: Model) -> dict[str, Any]:
    """What became of the cases, in plain data."""
    cases = outcome.done | outcome.skipped
    return {
        "model": model.name,
        "version": model.version,
        "finished_now": len(outcome.done),
        "finished_before": len(outcome.skipped),
        "failed": outcome.failed,
        "seconds": round(sum(case.seconds for case in outcome.done.values()), 3),
        "cases": [asdict(cases[case]) for case in sorted(cases)],
    }


def as_table(outcome: Outcome) -> str:
    """A line for each case."""
    rows = [f"{'case':<32} {'seconds':>8} {'est. Dice':>9}  volumes (ml)"]
    for case, result in sorted((outcome.done | outcome.skipped).items()):
        dice = "-" if result.estimated_dice is None else f"{result.estimated_dice:.3f}"
        volumes = ", ".join(f"{label} {volume:g}" for label, volume in result.volumes_ml.items() if volume)
        note = " (finished before)" if case in outcome.skipped else ""
        rows.append(f"{case:<32} {result.seconds:>8.2f} {dice:>9}  {volumes or 'nothing found'}{note}")
    rows += [f"{case:<32} FAILED: {reason}" for case, reason in sorted(outcome.failed.items())]
    counts = f"{len(outcome.done)} finished, {len(outcome.skipped)} finished before, {len(outcome.failed)} failed"
    return "\n".join([*rows, counts])


if __name__ == "__main__":
    sys.exit(main())
