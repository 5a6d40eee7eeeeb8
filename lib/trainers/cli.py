"""Training and evaluation from the command line.

python -m lib.trainers.cli split    --images DIR --labels DIR --out split.json
python -m lib.trainers.cli train    --preset hippocampus_mr --images DIR --labels DIR --split split.json --out FILE
python -m lib.trainers.cli evaluate --weights FILE --images DIR --labels DIR --split split.json
python -m lib.trainers.cli task     --folder Task09_Spleen --preset abdomen_ct --out DIR   all of it

torchrun --nproc-per-node 4 --max-restarts 3 -m lib.trainers.cli train ...    trains in several processes
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import monai
import torch

from lib.cases.data_sets import read_task
from lib.cases.labelled import Case, find_cases, find_channel_cases
from lib.cases.split import SUBJECT_RULES, Split, extend_split, read_split, subject_until, write_split
from lib.commandline import run_command
from lib.configs.catalogue import find_preset, shipped_preset_names, write_preset
from lib.configs.preset import Preset, parse_preset
from lib.errors import ConfigError, UnetrError
from lib.infers.segmenter import Segmenter
from lib.models.calibration import calibration_file
from lib.networks.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from lib.networks.precision import resolve_device
from lib.networks.unetr import build_unetr, parameter_count
from lib.storage.files import sha256_of
from lib.storage.json_files import read_json, without_nan, write_json
from lib.trainers.judging.certainty import is_sure, suit_limits_of_weights
from lib.trainers.judging.evaluate import Evaluation, evaluate
from lib.trainers.judging.masks import CaseMasks
from lib.trainers.loop import run_training
from lib.trainers.parallel import joined_processes, rank_and_world_size
from lib.trainers.run.job import TrainingJob, TrainingResult

Sides = tuple[tuple[Case, ...], tuple[Case, ...]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with a sentence if the input was wrong."""
    options = build_parser().parse_args(arguments)
    return run_command(lambda: options.run(options), options.threads)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lib.trainers.cli", description="Train and evaluate a preset.")
    commands = parser.add_subparsers(required=True)
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--images", type=Path, required=True, help="folder of NIfTI images")
    data.add_argument("--labels", type=Path, required=True, help="folder of NIfTI labels of the same names")
    data.add_argument("--label-values", type=Path, help="JSON file: name to value in the label files, mapped by name")
    data.add_argument("--split", type=Path, help="persisted split (JSON)")
    data.add_argument("--device", help="cpu, cuda, cuda:1 ...; the best there is by default")
    data.add_argument("--threads", type=int, help="CPU threads; PyTorch's default if not given")

    split = commands.add_parser("split", parents=[data], help="assign cases to training and validation by subject")
    split.add_argument("--validation-share", type=float, default=0.2)
    split.add_argument("--subjects", choices=sorted(SUBJECT_RULES), default="stem", help="what makes a subject")
    split.add_argument("--test-share", type=float, default=0.0, help="from 50 cases on")
    split.add_argument("--subject-separator", default="", help="what stands before it in a stem names the subject")
    split.add_argument("--preset", default="", help="a preset with channels, where cases have several sequences")
    split.add_argument("--out", type=Path, required=True)
    split.set_defaults(run=_split)

    train = commands.add_parser("train", parents=[data], help="train, evaluate on the held-out cases, write weights")
    train.add_argument("--preset", required=True, help=f"{', '.join(shipped_preset_names())}, or a YAML file")
    train.add_argument("--out", type=Path, required=True, help="weights file; a JSON side-car is written beside it")
    train.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="recipe override")
    # torchrun takes --start for an abbreviation of options of its own
    train.add_argument("--start", "--start-weights", type=Path, help="weights to start from; random if not given")
    train.add_argument(
        "--encoder", type=Path, help="pretrained encoder to start from (python -m lib.trainers.pretraining)"
    )
    train.add_argument("--run-dir", type=Path, help="progress, TensorBoard and cache; runs/<preset> by default")
    train.add_argument("--dataset", default="PersistentDataset")
    train.add_argument("--max-steps", type=int)
    train.add_argument("--resume", action="store_true", help="go on with a run that was interrupted in --run-dir")
    train.add_argument("--state-seconds", type=float, default=30.0, help="time between two states of the run on disk")
    train.add_argument("--data-name", default="", help="name of the data, for the side-car")
    train.add_argument("--data-licence", default="", help="licence of the data, for the side-car")
    train.set_defaults(run=_train)

    task = commands.add_parser("task", help="from a Decathlon or BTCV folder to a trained and evaluated preset")
    task.add_argument("--folder", type=Path, required=True, help="with dataset.json, or with img and label (BTCV)")
    task.add_argument("--preset", default="abdomen_ct", help="whose spacing, window, network and recipe are taken")
    task.add_argument(
        "--out", type=Path, required=True, help="folder of preset.yaml, split.json, weights.pt, weights.json"
    )
    task.add_argument("--validation-share", type=float, default=0.2)
    task.add_argument("--subjects", choices=sorted(SUBJECT_RULES), default="stem", help="what makes a subject")
    task.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="recipe override")
    task.add_argument("--encoder", type=Path, help="pretrained encoder to start from")
    task.add_argument("--max-steps", type=int)
    task.add_argument("--device", help="cpu, cuda, cuda:1 ...; the best there is by default")
    task.add_argument("--threads", type=int, help="CPU threads; PyTorch's default if not given")
    task.set_defaults(run=_task)

    score = commands.add_parser("evaluate", parents=[data], help="score weights on a split's held-out cases, or on all")
    score.add_argument("--weights", type=Path, required=True)
    score.add_argument("--json", type=Path, help="write the scores of every case here")
    score.add_argument("--calibrate", action="store_true", help="write beside the weights what Dice is estimated with")
    score.set_defaults(run=_evaluate)
    return parser


def _split(options: argparse.Namespace) -> None:
    preset = find_preset(options.preset) if options.preset else None
    ids = [case.case_id for case in _find(options, preset, None)]
    separator = options.subject_separator
    subject_of = subject_until(separator) if separator else SUBJECT_RULES[options.subjects]
    split = extend_split(Split((), ()), ids, options.validation_share, subject_of, options.test_share)
    rule = f"stem up to {separator!r}" if separator else options.subjects
    how = f"hash of the subject ({rule}), {options.validation_share:g} of the subjects held out"
    write_split(options.out, split, how)
    print(f"{len(split.train)} training and {len(split.validation)} validation cases -> {options.out}")


def _train(options: argparse.Namespace) -> None:
    preset = _preset_with_recipe(options.preset, options.set)
    start = read_checkpoint(options.start) if options.start else None
    more = {"dataset": options.dataset, "state_seconds": options.state_seconds}
    run_dir = options.run_dir or Path("runs") / preset.name
    _train_and_write(options, preset, _cases(options, preset), run_dir, options.resume, start, **more)


def _task(options: argparse.Namespace) -> None:
    """Write the preset and the split once, train or resume a training, and write scored weights."""
    published = read_task(options.folder)
    preset = published.preset(_preset_with_recipe(options.preset, options.set))
    cases = published.cases(preset)
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    write_preset(folder / "preset.yaml", preset)
    options.split = folder / "split.json"
    known = read_split(options.split) if options.split.is_file() else Split((), ())
    ids = [case.case_id for case in cases]
    split = extend_split(known, ids, options.validation_share, SUBJECT_RULES[options.subjects])
    how = f"hash of the subject ({options.subjects}), {options.validation_share:g} held out"
    write_split(options.split, split, how)
    options.out, options.data_name, options.data_licence = folder / "weights.pt", published.name, published.licence
    _train_and_write(options, preset, _sides(cases, split), folder / "run", resume=True)


def _train_and_write(
    options: argparse.Namespace,
    preset: Preset,
    sides: Sides,
    run_dir: Path,
    resume: bool,
    start: Checkpoint | None = None,
    **more: Any,
) -> None:
    """Train, in as many processes as were started, and write the weights once."""
    with joined_processes(resolve_device(options.device)) as joined:
        plan = TrainingJob(
            preset=preset,
            train_cases=sides[0],
            validation_cases=sides[1],
            run_dir=run_dir,
            device=joined.device,
            start=start.model if start else None,
            encoder=read_checkpoint(options.encoder).model if options.encoder else None,
            max_steps=options.max_steps,
            resume=resume or joined.restarted,
            **more,
        )
        result = run_training(plan)
        if rank_and_world_size()[0] != 0:
            return
        if not is_sure(start.preset if start else None, preset):
            plan = replace(plan, preset=suit_limits_of_weights(preset, result.weights, plan.train_cases, plan.device))
        _write(options, plan, result)


def _write(options: argparse.Namespace, plan: TrainingJob, result: TrainingResult) -> None:
    """Write the weights and their side-car with the scores of the written file, and print the scores."""
    info = {"version": "shipped", "created": datetime.date.today().isoformat()}
    write_checkpoint(options.out, Checkpoint(result.weights, plan.preset, info), half=True)
    # The scores are those of the written half-precision weights, from image file to mask, as they will be served.
    scores = _score(options.out, plan.preset, plan.validation_cases, options)
    write_json(options.out.with_suffix(".json"), _side_car(options, plan, result, scores))
    print(json.dumps(without_nan(scores.summary()), indent=1))


def _evaluate(options: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(options.weights)
    if checkpoint.preset is None:
        raise UnetrError(f"{options.weights.name!r} does not say its preset; train or publish it with this project")
    train_cases, held_out = _cases(options, checkpoint.preset)
    cases = held_out if options.split else train_cases
    scores = _score(options.weights, checkpoint.preset, cases, options)
    if options.calibrate:
        calibration = scores.calibration()
        if calibration is None:
            raise UnetrError(f"{len(cases)} cases are too few to calibrate on, or all alike")
        calibration_file(options.weights).write_text(calibration.to_json(), encoding="utf-8")
    if options.json:
        write_json(options.json, scores.summary() | {"per_case": [asdict(case) for case in scores.cases]})
    print(json.dumps(without_nan(scores.summary()), indent=1))


def _preset_with_recipe(name: str, overrides: Sequence[tuple[str, str]]) -> Preset:
    """The named preset with ``training.<key>`` replaced; the preset's own validation casts the values."""
    data = find_preset(name).model_dump()
    for key, value in overrides:
        target = data["training"]
        *parents, leaf = key.split(".")
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                groups = ", ".join(name for name, part in target.items() if isinstance(part, dict)) or "none"
                raise ConfigError(f"--set {key}: there is no group {parent!r} in the recipe; valid: {groups}")
            target = target[parent]
        target[leaf] = value
    return parse_preset(data, source="--set")


def _cases(options: argparse.Namespace, preset: Preset) -> Sides:
    """Training and held-out cases; without a split, no case is held out."""
    values = _label_values(options.label_values, preset)
    cases = _find(options, preset, values)
    everything = Split(tuple(case.case_id for case in cases), ())
    return _sides(cases, read_split(options.split) if options.split else everything)


def _find(options: argparse.Namespace, preset: Preset | None, values: Mapping[int, int] | None) -> list[Case]:
    """The labelled cases, with several sequences if the preset has channels."""
    if preset is not None and preset.channels:
        return find_channel_cases(options.images, options.labels, preset, values)
    return find_cases(options.images, options.labels, values)


def _sides(cases: Sequence[Case], split: Split) -> Sides:
    """Training and held-out cases."""
    train = tuple(case for case in cases if case.case_id in split.train)
    return train, tuple(case for case in cases if case.case_id in split.validation)


def _label_values(path: Path | None, preset: Preset) -> dict[int, int] | None:
    """Value in the files to value of the preset, by name; labels that the preset lacks become background."""
    if path is None:
        return None
    try:
        named = {str(name): int(value) for name, value in read_json(path).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"--label-values {str(path)!r} is no JSON file of names and values: {error}") from error
    labels = {value: preset.find_label(name) for name, value in named.items()}
    return {value: label.index if label else 0 for value, label in labels.items()}


def _score(weights: Path, preset: Preset, cases: Sequence[Case], options: argparse.Namespace) -> Evaluation:
    segmenter = Segmenter.from_checkpoint(read_checkpoint(weights), preset, resolve_device(options.device))
    return evaluate(CaseMasks(segmenter), cases)


def _side_car(
    options: argparse.Namespace, plan: TrainingJob, result: TrainingResult, scores: Evaluation
) -> dict[str, Any]:
    """The content of the weights' side-car: recipe, data and scores."""
    return {
        "preset": plan.preset.model_dump(mode="json"),
        "labels": plan.preset.label_indices,
        "parameters": parameter_count(build_unetr(plan.preset)),
        "sha256": sha256_of(options.out),
        "bytes": options.out.stat().st_size,
        "held_out": scores.summary(),
        "data": {
            "name": options.data_name,
            "licence": options.data_licence,
            "training_cases": len(plan.train_cases),
            "validation_cases": len(plan.validation_cases),
            "split": options.split.name if options.split else None,
        },
        "training": {
            "steps": len(result.losses),
            "best_epoch": result.best_epoch,
            "seconds": round(result.seconds),
            "device": str(plan.device),
            "torch": torch.__version__.split("+")[0],
            "monai": monai.__version__,
            "python": platform.python_version(),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
