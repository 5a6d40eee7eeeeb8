"""MONAI Label's training task for a preset."""

from __future__ import annotations

import datetime
import json
import logging
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import device_list
from pydantic import ValidationError

from lib.cases.labelled import Case, read_case
from lib.cases.split import (
    RUNS_FOLDER,
    SPLIT_FILE,
    Split,
    extend_split,
    known_split,
    nothing_judges,
    shipped_split,
    write_split,
)
from lib.cases.studies import corrected_ids, subject_rule
from lib.configs.preset import Preset
from lib.configs.retraining import Retraining
from lib.errors import CheckpointError, InputError, ParameterError, TrainingError
from lib.infers.costs import CostBook
from lib.infers.plan import Planner
from lib.infers.segmenter import Segmenter
from lib.models.calibration import CALIBRATION_FILE
from lib.models.provenance import code_version, label_digests, trained_on
from lib.models.versions import Files, Version, VersionStore
from lib.models.weights import WeightsLocator, preset_for
from lib.networks.checkpoint import Checkpoint, check_finite, read_checkpoint
from lib.networks.layouts import StateDict
from lib.networks.precision import resolve_device
from lib.networks.unetr import build_unetr, load_encoder
from lib.storage.json_files import write_json
from lib.trainers.datasets import DATASET_KINDS, LOADER_KINDS
from lib.trainers.judging.champion import ServedWeights, read_served
from lib.trainers.judging.evaluate import Evaluation, evaluate
from lib.trainers.judging.gate import Champion, Rules, Verdict, judge
from lib.trainers.launch import launch
from lib.trainers.material import Material, divide, ids_of, keep_cases, kept_cases, read_replay, weigh
from lib.trainers.pretraining.loop import ENCODER_FILE
from lib.trainers.reporting.progress import format_seconds
from lib.trainers.reporting.report import as_json, render_html, report_data, worst_cases
from lib.trainers.reporting.runs import prune_runs
from lib.trainers.request import TrainRequest
from lib.trainers.resume import remove_state
from lib.trainers.run.job import TrainingJob, TrainingResult
from lib.trainers.submitted import SubmittedLabels, missing_labels, submitted_labels, undrawn_as_missing

logger = logging.getLogger("unetr.train")

STATS_FILE = "stats.json"


class UnetrTrainTask(TrainTask):
    """Trains a preset on the datastore's final labels and publishes the weights if they are better.

    Args:
        preset: the task.
        locator: where its weights are, and where they are published.
        device: default device; the best there is if empty.
        settings: the gate's rules, and what is kept.
        memory_budget: bytes of the host's memory that a training may use; what is free if not given.
        costs: file of measured costs.
        served: names of all tasks of this server, whose labels are not this one's.
    """

    def __init__(
        self,
        preset: Preset,
        locator: WeightsLocator,
        device: str = "",
        settings: Retraining | None = None,
        memory_budget: int | None = None,
        costs: Path | None = None,
        served: Collection[str] = (),
    ) -> None:
        super().__init__(f"Train {preset.description or preset.name}")
        self.preset = preset
        self.versions = VersionStore(locator.folder)
        self._locator = locator
        self._settings = settings or Retraining()
        self.runs = locator.folder / RUNS_FOLDER
        self._device, self._served = device, tuple(served)
        self._memory_budget, self._costs = memory_budget, costs
        self._planner = Planner(memory_budget, CostBook(costs))

    def config(self) -> dict[str, Any]:
        """The fields that clients offer for editing, with their defaults."""
        recipe = self.preset.training
        return {
            "name": "train_01",
            "pretrained": True,
            "device": device_list(),
            "max_epochs": recipe.max_epochs,
            "early_stop_patience": recipe.early_stop_patience or -1,
            "val_split": 0.2,
            "train_batch_size": recipe.batch_size,
            "val_batch_size": 1,
            "multi_gpu": True,
            "gpus": "all",
            "dataset": list(DATASET_KINDS),
            "dataloader": list(LOADER_KINDS),
            "learning_rate": self._learning_rate(self._locator.is_known()),
            "crops_per_case": recipe.crops_per_case,
            "activation_checkpointing": recipe.activation_checkpointing,
            "precision": [recipe.precision, *(p for p in ("auto", "fp32", "bf16", "fp16") if p != recipe.precision)],
            "seed": recipe.seed,
        }

    def _learning_rate(self, from_weights: bool) -> float:
        recipe = self.preset.training
        return (from_weights and recipe.fine_tuning_learning_rate) or recipe.learning_rate

    def info(self) -> dict[str, Any]:
        """Description, fields and labels."""
        info: dict[str, Any] = super().info()
        return info | {"labels": self.preset.label_indices}

    def stats(self) -> dict[str, Any]:
        """Figures of the last run that ended, in the form that MONAI Label's clients read."""
        path = self.runs / STATS_FILE
        stats: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        # 3D Slicer computes with it, and knows that it may be absent
        return {name: value for name, value in stats.items() if name != "best_metric" or value is not None}

    def validate_request(self, request: Mapping[str, Any], strict: bool = False) -> TrainRequest:
        """Cast and check a request without running it.

        Args:
            request: its fields.
            strict: whether each value must have its type already, as in JSON; else text is cast, as of ``--conf``.

        Raises:
            ParameterError: naming the field, its value and what would be valid.
        """
        try:
            given = {key: value for key, value in request.items() if value is not None}
            rate = {} if given.get("pretrained", True) else {"learning_rate": self._learning_rate(False)}
            asked = TrainRequest.model_validate(self.config() | rate | given, strict=strict)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in problem["loc"])
            raise ParameterError(name, problem["input"], problem["msg"]) from error
        resolve_device(asked.device or self._device)
        return asked

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, compare with the served weights, and publish if better.

        A run that was interrupted (``resume``) goes on with the cases and the state that it had.

        Returns:
            The run's figures.

        Raises:
            ParameterError: when a field is not valid.
            TrainingError: when there is nothing to train on, or the run cannot go on.
        """
        asked = self.validate_request(request)
        started, run_dir = time.time(), self.runs / asked.run_id
        if asked.resume and (made := self._version_of(asked.run_id)):
            logger.info("the run had ended with %s already", made.name)
            write_json(self.runs / STATS_FILE, dict(made.details) | {"decision": made.details["reason"]})
            return self.stats()
        material = self._gather(datastore, asked, run_dir)
        champion = self._read_served()[0] if asked.pretrained else None
        # Weights go on in the network that they were trained in, also where the preset has another one by now.
        preset = preset_for(champion.checkpoint, self.preset) if champion is not None else self.preset
        plan = TrainingJob(
            preset=preset.model_copy(update={"training": asked.recipe(self.preset)}),
            train_cases=material.train,
            validation_cases=material.validation,
            run_dir=run_dir,
            device=resolve_device(asked.device or self._device),
            start=champion.checkpoint.model if champion is not None else None,
            encoder=self._read_encoder() if champion is None else None,
            dataset=asked.dataset,
            dataloader=asked.dataloader,
            cache_dir=self.runs / "cache",
            max_steps=asked.max_steps,
            resume=asked.resume,
            pause_file=asked.pause_file,
            tracking=self._settings.mlflow,
            memory_budget=self._memory_budget,
            costs=self._costs,
        )
        result = launch(plan, asked.multi_gpu, asked.gpus)
        origin = {"run": asked.run_id, "started_from": champion.version if champion else "", "why": asked.why}
        return self._conclude(plan, result, material, origin, started)

    def _conclude(
        self, plan: TrainingJob, result: TrainingResult, material: Material, origin: dict[str, Any], started: float
    ) -> dict[str, Any]:
        """Compare on the same validation cases, publish if better, and keep the figures and the report."""
        check_finite(result.weights)
        checkpoint = Checkpoint(result.weights, plan.preset)
        new = Segmenter.from_checkpoint(checkpoint, plan.preset, plan.device, planner=self._planner)
        scores = evaluate(new, plan.validation_cases)
        served, before, verdict = self._pass_gate(scores, plan, material)
        logger.info("%s", verdict.reason)
        tested = evaluate(new, material.test) if material.test else None
        details = origin | {
            "parent": served.version if served else "",
            "status": verdict.status,
            "reason": verdict.reason,
            "compared": verdict.compared,
            "comparison": verdict.comparison or None,
            "held_out": scores.summary(),
            "held_out_before": before.summary() if before else None,
            "tested": tested.summary() if tested else None,
            "recipe": plan.preset.training.model_dump(mode="json"),
            "memory_plan": result.step_plan.as_json() if result.step_plan else None,
            "split": {side: ids_of(getattr(material, side)) for side in ("train", "validation", "test")},
            "replayed": list(material.replayed),
            "left_out": dict(material.left_out or {}),
            "missing_labels": missing_labels((*material.train, *material.validation, *material.test), plan.preset),
            "trained_on": trained_on(material.train),
            "label_digests": dict(material.labels),
            "code": code_version(),
        }
        report = report_data(details | {"model": self.preset.name}, scores, before, tested, result)
        pictures = worst_cases(new, plan.validation_cases, scores)
        files: Files = {
            "report.html": lambda name: render_html(report | {"version": name}, pictures),
            "report.json": lambda name: as_json(report | {"version": name}),
        }
        if calibration := scores.calibration():
            text = calibration.to_json()
            files = {**files, CALIBRATION_FILE: lambda _: text}
        version = self.versions.add(verdict.status, result.weights, plan.preset, details, files)
        for name in ("report.html", "report.json"):
            shutil.copyfile(version.folder / name, plan.run_dir / name)
        return self._tidy(plan, details | {"version": version.name}, _stock_stats(plan, result, scores, started))

    def _tidy(self, plan: TrainingJob, figures: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
        """Keep the figures for clients, and remove what is no longer needed."""
        write_json(self.runs / STATS_FILE, {"decision": figures["reason"]} | figures | stock)
        remove_state(plan.run_dir)
        self.versions.prune(self._settings.keep_versions)
        prune_runs(self.runs, self._settings.keep_runs)
        return self.stats()

    def _version_of(self, run: str) -> Version | None:
        return next((version for version in self.versions.list() if version.details.get("run") == run), None)

    def served_version(self) -> str:
        """Name of the version that is served now; empty for none."""
        file = self._locator.find()
        return "" if file is None else file.version

    def serving(self) -> tuple[str, str]:
        """The version that is served now, empty for none; and why it is not the one that should be, in words."""
        try:
            return self.served_version(), self._locator.problem
        except CheckpointError as error:
            return "", str(error)

    def _pass_gate(
        self, scores: Evaluation, plan: TrainingJob, material: Material
    ) -> tuple[ServedWeights | None, Evaluation | None, Verdict]:
        """Judge new weights against those that are served now; somebody may have published while they trained."""
        rules = Rules(self._settings.gate_margin, self._settings.gate_tolerance)
        while True:
            served, unusable = self._read_served()
            champion = self._score(served, plan, material) if served else None
            verdict = judge(scores, champion, rules, unusable)
            still = self._read_served()[0]
            if (still and still.version) == (served and served.version):
                before = champion.scores if champion and champion.scores.cases else None
                return served, before, verdict

    def _score(self, served: ServedWeights, plan: TrainingJob, material: Material) -> Champion:
        """Try the served weights on the validation cases, and on labels that are new to them."""
        preset = preset_for(served.checkpoint, self.preset)
        segmenter = Segmenter.from_checkpoint(served.checkpoint, preset, plan.device, planner=self._planner)
        return Champion(
            evaluate(segmenter, plan.validation_cases),
            served.familiar(material.labels),
            served.promised,
            evaluate(segmenter, served.new_cases(material)),
        )

    def _read_served(self) -> tuple[ServedWeights | None, str]:
        return read_served(self._locator, self.preset)

    def _read_encoder(self) -> StateDict | None:
        """The pretrained encoder; None where there is none that fits."""
        path = self._locator.folder / ENCODER_FILE
        if not path.is_file():
            return None
        try:
            encoder = read_checkpoint(path).model
            load_encoder(build_unetr(self.preset), encoder)
        except CheckpointError as error:
            logger.warning("the training does not start from %s: %s", ENCODER_FILE, error)
            return None
        logger.info("the training starts from %s", ENCODER_FILE)
        return encoder

    def _gather(self, datastore: Datastore, asked: TrainRequest, run_dir: Path) -> Material:
        """What to train on and to judge on; a run that goes on has what it had."""
        labelled = self.submitted(datastore)
        usable, left_out = self._usable(labelled)
        for name, reason in left_out.items():
            logger.warning("left out %s: %s", name, reason)
        if not usable:
            why = f"; {len(left_out)} labels cannot be used: {next(iter(left_out.values()))}" if left_out else ""
            raise TrainingError(f"there is no usable labelled case for {self.preset.name!r}{why}")
        split = self._extend_split(datastore, usable, asked.val_split)
        material = divide(usable, split)
        logger.info("%d training, %d validation, %d test cases", *map(len, (material.train, material.validation,
                                                                             material.test)))  # fmt: skip
        if not material.validation:
            logger.warning("%s", nothing_judges(len(usable), bool(self.serving()[0])))
        replay = self._replay(split)
        corrected = corrected_ids(datastore, ids_of(material.train))
        train = weigh(material.train, corrected, replay, self._settings.oversample)
        replayed = tuple(sorted(set(ids_of(train)) - set(ids_of(material.train))))
        material = replace(
            material, train=train, replayed=replayed, left_out=left_out, labels=label_digests(labelled.cases)
        )
        kept = kept_cases(run_dir) if asked.resume else None
        if kept is not None:
            return material.narrowed(kept)
        keep_cases(run_dir, material)
        return material

    def _replay(self, split: Split) -> list[Case]:
        if self._settings.replay is None:
            return []
        held_out = {*split.validation, *split.test}
        return read_replay(self._settings.replay, shipped_split(self._locator.folder), held_out)

    def _extend_split(self, datastore: Datastore, cases: Sequence[Case], validation_share: float) -> Split:
        """Assign new cases to a side, for good."""
        split = self._planned_split(datastore, cases, validation_share)
        write_split(
            self.runs / SPLIT_FILE,
            split,
            f"hash of the subject, {validation_share:g} of new subjects held out; append-only",
        )
        return split

    def _planned_split(self, datastore: Datastore, cases: Sequence[Case], validation_share: float) -> Split:
        return extend_split(
            known_split(self._locator.folder),
            ids_of(cases),
            validation_share,
            subject_rule(datastore, cases, self._settings.subject_separator),
            self._settings.test_share,
            shipped_split(self._locator.folder),
        )

    def forecast(self, request: Mapping[str, Any], datastore: Datastore) -> str:
        """What whoever asks for a training should know before it: that nothing will judge it; empty otherwise.

        Raises:
            ParameterError: when a field is not valid.
        """
        asked = self.validate_request(request)
        cases = self.submitted(datastore).cases
        if not cases or divide(cases, self._planned_split(datastore, cases, asked.val_split)).validation:
            return ""
        return nothing_judges(len(cases), bool(self.serving()[0]))

    def submitted(self, datastore: Datastore) -> SubmittedLabels:
        """The datastore's final labels that are for this preset."""
        return submitted_labels(datastore, self.preset, self._served)

    def _usable(self, labels: SubmittedLabels) -> tuple[list[Case], dict[str, str]]:
        """Read every case once: one bad label among a thousand must not end a run at night."""
        usable, left_out = [], dict(labels.left_out)
        for case in labels.cases:
            try:
                _, label = read_case(case, self.preset)
            except InputError as error:
                left_out[case.case_id] = str(error)
                continue
            known = case if case.case_id in labels.complete else undrawn_as_missing(case, label, self.preset)
            if len(known.missing) < len(self.preset.labels):
                usable.append(known)
            else:
                left_out[case.case_id] = f"label of {case.case_id!r} speaks of none of the labels"
        return usable, left_out


def _stock_stats(plan: TrainingJob, result: TrainingResult, scores: Evaluation, started: float) -> dict[str, Any]:
    """The figures under the names that MONAI Label's clients show."""
    best = None if not plan.validation_cases else scores.mean_dice
    metrics = {"loss": result.losses[-1], "first_loss": result.losses[0]}
    return {
        "epoch": plan.preset.training.max_epochs,
        "max_epochs": plan.preset.training.max_epochs,
        "start_ts": int(started),
        "end": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "total_time": format_seconds(max(0.0, time.time() - started)),
        "best_metric": best,
        "best_epoch": result.best_epoch,
        "steps": len(result.losses),
        "device": str(plan.device),
        "gpu": torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else None,
        "train": {"metrics": metrics},
        "eval": {"metrics": {"mean_dice": best, **scores.dice}, "key_metric_name": "mean_dice", "best_metric": best},
    }
