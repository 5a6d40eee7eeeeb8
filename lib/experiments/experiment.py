"""Compares recipes and networks on the same cases: one YAML file for each experiment, resumable, paired by case.

    python -m lib.experiments.experiment docs/experiments/NAME.yaml --images DIR --labels DIR --split split.json \
        --out docs/experiments

Every arm trains with the ordinary loop, on the same cases and within the same budget, and is judged on the same
subjects. A finished run is stored and never repeated; an interrupted run is resumed. Several processes with the same
command share the runs.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from filelock import FileLock, Timeout
from pydantic import Field, ValidationError, model_validator

from lib.cases.labelled import Case, find_cases
from lib.cases.metrics import mean_known
from lib.cases.split import SUBJECT_RULES, Split, extend_split, read_split
from lib.commandline import run_command
from lib.configs.catalogue import find_preset
from lib.configs.preset import Model, PositiveFloat, PositiveInt, Preset, describe_validation_error, parse_preset
from lib.errors import ConfigError, TrainingError
from lib.experiments.comparison import Outcome, outcome_of, write_report
from lib.experiments.dynunet import build_dynunet
from lib.infers.segmenter import Segmenter
from lib.networks.checkpoint import load_weights, read_checkpoint
from lib.networks.precision import resolve_device
from lib.networks.unetr import Builder, build_unetr, parameter_count
from lib.storage.json_files import read_json, write_json
from lib.trainers.judging.certainty import suit_limits
from lib.trainers.judging.evaluate import evaluate
from lib.trainers.judging.masks import CaseMasks
from lib.trainers.loop import run_training
from lib.trainers.resume import remove_state
from lib.trainers.run.job import TrainingJob, TrainingResult

logger = logging.getLogger("unetr.experiment")

TRIAL_STEPS = 12
WARM_UP_STEPS = 4
"""First steps of the trial, which include one-time initialisation and are not timed."""
Train = Callable[[TrainingJob, Callable[[int], None] | None], TrainingResult]
NEVER = 10**9


class Budget(Model):
    """The budget of each run: a number of steps, or CPU minutes, which a trial converts to steps."""

    steps: PositiveInt | None = None
    cpu_minutes: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Budget:
        if (self.steps is None) == (self.cpu_minutes is None):
            raise ValueError("valid: either steps or cpu_minutes")
        return self


class Arm(Model):
    """One arm of an experiment: its changes to the preset.

    Attributes:
        preset: keys of the preset that are replaced; groups are merged.
        encoder: file of a pretrained encoder from which the network starts.
        dynunet: number of channels of each level of a DynUNet that replaces the UNETR.
    """

    preset: Mapping[str, Any] = Field(default_factory=dict)
    encoder: Path | None = None
    dynunet: Annotated[tuple[PositiveInt, ...], Field(min_length=3)] | None = None


class Experiment(Model):
    """An experiment, as defined in its YAML file.

    Attributes:
        preset: name of a shipped preset, or a YAML file.
        baseline: the arm with which the others are compared.
        arms: by name.
        labels: numbers of labelled training cases, or ``all``; for one seed, smaller sets are subsets of larger ones.
        judged_on: the split's held-out cases, or a fifth of its training subjects, for choices that must not be based
            on the reported cases.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,63}$")]
    question: str
    preset: str
    baseline: str
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    labels: tuple[PositiveInt | Literal["all"], ...] = ("all",)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    budget: Budget
    judged_on: Literal["held_out", "part_of_training"] = "held_out"
    subjects: Literal["stem", "consecutive-pairs"] = "stem"

    @model_validator(mode="after")
    def _check_baseline(self) -> Experiment:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is no arm; valid: {', '.join(self.arms)}")
        return self


@dataclass(frozen=True)
class Bench:
    """The environment of an experiment.

    Attributes:
        train, judged: training and judged cases.
        folder: folder of the runs.
        device: training device.
        subject_of: maps a case id to its subject.
        run: trains a job.
    """

    train: tuple[Case, ...]
    judged: tuple[Case, ...]
    folder: Path
    device: torch.device
    subject_of: Callable[[str], str]
    run: Train = run_training


def read_experiment(path: Path) -> Experiment:
    """Read an experiment's file.

    Raises:
        ConfigError: if it cannot be read, or naming the key, the value and the valid values.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Experiment.model_validate(data)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"experiment {str(path)!r} cannot be read: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"experiment {str(path)!r}: {describe_validation_error(error, Experiment)}") from error


def run_experiment(experiment: Experiment, bench: Bench) -> list[Outcome]:
    """Run all missing runs, seed by seed, so that early results are comparable.

    Raises:
        UnetrError: if an arm's preset, its encoder or a case is invalid.
    """
    counts = [len(bench.train) if count == "all" else count for count in experiment.labels]
    if max(counts) > len(bench.train):
        raise ConfigError(f"'labels' asks for {max(counts)} cases; valid: up to {len(bench.train)}, or all")
    presets = {name: _preset_of(experiment, name) for name in experiment.arms}
    runs = [
        _Run(name, arm, presets[name], count, seed, experiment.budget, bench)
        for seed in experiment.seeds
        for count in counts
        for name, arm in experiment.arms.items()
    ]
    for run in runs:
        try:
            run.outcome(wait=False)
        except Timeout:
            logger.info("%s is another process's", run.name)
    return [run.outcome(wait=True) for run in runs]


def draw_cases(cases: Sequence[Case], count: int, seed: int) -> tuple[Case, ...]:
    """The first ``count`` cases in an order that depends on the seed: smaller sets are subsets of larger ones."""

    def place(case: Case) -> str:
        return hashlib.sha256(f"{seed}:{case.case_id}".encode()).hexdigest()

    return tuple(sorted(sorted(cases, key=place)[:count], key=lambda case: case.case_id))


def _preset_of(experiment: Experiment, name: str) -> Preset:
    """The preset of an arm."""
    data = _merged(find_preset(experiment.preset).model_dump(mode="json"), experiment.arms[name].preset)
    return parse_preset(data, source=f"arm {name!r}")


def _merged(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(data)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def _only_one(file: Path, wait: bool) -> FileLock:
    """A lock for creating a file that several processes may create."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file.with_suffix(".lock"), blocking=wait)


class _Run:
    """One arm with one seed and one number of labels."""

    def __init__(
        self, name: str, arm: Arm, preset: Preset, count: int, seed: int, budget: Budget, bench: Bench
    ) -> None:
        self.name, self.seed, self.count, self.bench, self._budget = name, seed, count, bench, budget
        self.cases = draw_cases(bench.train, count, seed)
        recipe = preset.training.model_copy(update={"seed": seed, "max_epochs": NEVER})
        self.preset = preset.model_copy(update={"training": recipe})
        self.build: Builder = functools.partial(build_dynunet, filters=arm.dynunet) if arm.dynunet else build_unetr
        self.encoder = read_checkpoint(arm.encoder).model if arm.encoder else None
        self._arm, self._judged = arm, [case.case_id for case in bench.judged]

    def outcome(self, wait: bool) -> Outcome:
        """The result of the run, which is trained and judged if necessary.

        Args:
            wait: whether to wait for another process that computes it.

        Raises:
            Timeout: if another process computes it and ``wait`` is false.
        """
        arm, budget = self._arm.model_dump(mode="json"), self._budget.model_dump()
        digest = self._digest([arm, budget, self._judged], self.cases)
        kept = self.bench.folder / f"{self.name}-{self.count}-{self.seed}-{digest}.json"
        with _only_one(kept, wait):
            if not kept.is_file():
                logger.info("%s, %d labels, seed %d", self.name, self.count, self.seed)
                write_json(kept, self._train(kept.with_suffix(".run"), self._steps()).__dict__)
            return outcome_of(read_json(kept))

    def _train(self, run_dir: Path, steps: int) -> Outcome:
        started = time.process_time()
        result = self.bench.run(self._plan(run_dir, steps, self.cases, resume=True), None)
        cpu_seconds = time.process_time() - started
        network = self.build(self.preset, False)
        load_weights(network, result.weights)

        def segmenter_of(preset: Preset) -> Segmenter:
            return Segmenter(network, preset, self.bench.device)

        preset = suit_limits(self.preset, segmenter_of, self.cases)
        scores = evaluate(CaseMasks(segmenter_of(preset)), self.bench.judged)
        remove_state(run_dir)
        shutil.rmtree(run_dir, ignore_errors=True)
        return Outcome(
            arm=self.name,
            labels=self.count,
            seed=self.seed,
            steps=len(result.losses),
            cpu_seconds=round(cpu_seconds, 1),
            parameters=parameter_count(network),
            dice={case.case_id: mean_known(case.dice.values()) for case in scores.cases},
            dice_by_label=scores.dice,
            hd95_mm=scores.hd95_mm,
        )

    def _plan(self, run_dir: Path, steps: int, cases: tuple[Case, ...], resume: bool) -> TrainingJob:
        return TrainingJob(
            preset=self.preset,
            train_cases=cases,
            validation_cases=(),
            run_dir=run_dir,
            device=self.bench.device,
            encoder=self.encoder,
            build=self.build,
            cache_dir=self.bench.folder / "cache",
            max_steps=steps,
            resume=resume,
        )

    def _steps(self) -> int:
        """Number of steps of the budget, measured once for each network and recipe, and shared by similar runs."""
        if self._budget.steps is not None:
            return self._budget.steps
        digest = self._digest([self._arm.dynunet, self._budget.model_dump()], self.bench.train)
        file = self.bench.folder / f"{digest}.steps.json"
        with _only_one(file, wait=True):
            if not file.is_file():
                assert self._budget.cpu_minutes is not None
                steps = max(1, int(60 * self._budget.cpu_minutes / self._seconds_of_a_step()))
                write_json(file, {"steps": steps})
            return int(read_json(file)["steps"])

    def _seconds_of_a_step(self) -> float:
        """CPU seconds of a step, including all other work of a run."""
        marks: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            plan = self._plan(Path(folder), TRIAL_STEPS, self.bench.train, resume=False)
            self.bench.run(plan, lambda _: marks.append(time.process_time()))
        return (marks[-1] - marks[WARM_UP_STEPS]) / (len(marks) - 1 - WARM_UP_STEPS)

    def _digest(self, what: Sequence[Any], cases: Sequence[Case]) -> str:
        """Digest of the recipe, of further parameters, and of the training cases."""
        recipe = self.preset.model_dump(mode="json")
        recipe["training"].pop("seed")
        contents = json.dumps([recipe, what, [case.case_id for case in cases]], sort_keys=True)
        return hashlib.sha256(contents.encode()).hexdigest()[:12]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an experiment and write its results; 0 on success, 2 with a sentence if the input was wrong."""
    options = build_parser().parse_args(arguments)
    return run_command(functools.partial(_compare, options), options.threads)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.experiments.experiment", description="Compare recipes and networks on the same cases."
    )
    parser.add_argument("experiment", type=Path, help="YAML file of the experiment")
    parser.add_argument("--images", type=Path, required=True, help="folder of NIfTI images")
    parser.add_argument("--labels", type=Path, required=True, help="folder of NIfTI labels of the same names")
    parser.add_argument("--split", type=Path, required=True, help="persisted split (JSON)")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="what has been run is kept here")
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"), help="JSON, table and plot go here")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; the best there is by default")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    return parser


def _compare(options: argparse.Namespace) -> None:
    experiment = read_experiment(options.experiment)
    bench = _bench(options, experiment)
    outcomes = run_experiment(experiment, bench)
    file = options.out / experiment.name
    print(write_report(file, experiment.question, experiment.baseline, outcomes, bench.subject_of))


def _bench(options: argparse.Namespace, experiment: Experiment) -> Bench:
    """The training and the judged cases.

    Raises:
        TrainingError: if there are no cases for training or judging.
    """
    split, rule = read_split(options.split), SUBJECT_RULES[experiment.subjects]
    if experiment.judged_on == "part_of_training":
        split = extend_split(Split((), ()), split.train, 0.2, rule)
    cases = find_cases(options.images, options.labels)
    train = tuple(case for case in cases if case.case_id in split.train)
    judged = tuple(case for case in cases if case.case_id in split.validation)
    if not train or not judged:
        raise TrainingError(f"split {str(options.split)!r}: {len(train)} cases to train on, {len(judged)} to judge on")
    return Bench(train, judged, options.runs / experiment.name, resolve_device(options.device), rule)


if __name__ == "__main__":
    sys.exit(main())
