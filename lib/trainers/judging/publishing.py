"""Publishes new weights if they are better than the live ones, with a report and the figures of the run."""

from __future__ import annotations

import datetime
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from lib.configs.preset import Preset
from lib.configs.retraining import Retraining
from lib.infers.plan import Planner
from lib.models.calibration import CALIBRATION_FILE
from lib.models.provenance import code_version, trained_on
from lib.models.versions import Files, VersionStore
from lib.models.weights import WeightsLocator, preset_for
from lib.networks.checkpoint import Checkpoint, check_finite
from lib.storage.json_files import read_json, write_json
from lib.trainers.completion import COMPLETED_FOLDER
from lib.trainers.judging.certainty import is_sure, suit_limits_of_weights
from lib.trainers.judging.champion import ServedWeights, read_served
from lib.trainers.judging.evaluate import Evaluation, evaluate
from lib.trainers.judging.gate import Champion, Rules, Verdict, judge
from lib.trainers.judging.likeness import compare_masks, unjudged_labels
from lib.trainers.judging.masks import MASKS_FOLDER, CaseMasks, digest_of_weights, prune_masks
from lib.trainers.material import Material, ids_of
from lib.trainers.reporting.progress import format_seconds
from lib.trainers.reporting.report import as_json, render_html, report_data, worst_cases
from lib.trainers.reporting.runs import prune_runs
from lib.trainers.resume import remove_state
from lib.trainers.run.job import CACHE_FOLDER, TrainingJob, TrainingResult
from lib.trainers.submitted import missing_labels

logger = logging.getLogger("unetr.train")

STATS_FILE = "stats.json"


class _Stats(BaseModel):
    """The figures of the last run that clients need; the file holds further ones."""

    model_config = ConfigDict(strict=True)

    epoch: Annotated[int, Field(ge=0)] = 0
    max_epochs: Annotated[int, Field(ge=1)] = 1
    total_epochs: Annotated[int, Field(ge=1)] = 1
    total_time: str = ""
    best_metric: float | None = None


def read_stats(runs: Path) -> dict[str, Any]:
    """The figures of the last finished run; empty if there is none or the file is damaged, which is logged."""
    file = runs / STATS_FILE
    try:
        stats: dict[str, Any] = read_json(file)
        _Stats.model_validate(stats)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be used: %s", file, str(error).splitlines()[0])
        return {}
    return stats


class Publisher:
    """Judges the weights of a run, and publishes them if they are better than the live ones.

    Args:
        preset: the preset.
        locator: finds the live weights and the folder of versions.
        runs: folder of the preset's runs.
        settings: rules of the gate, and numbers of versions and runs to keep.
        planner: memory planner of the evaluation.
    """

    def __init__(
        self, preset: Preset, locator: WeightsLocator, runs: Path, settings: Retraining, planner: Planner
    ) -> None:
        self._preset, self._locator, self._runs = preset, locator, runs
        self._settings, self._planner = settings, planner
        self._versions = VersionStore(locator.folder)
        self._masks_folder = runs / CACHE_FOLDER / MASKS_FOLDER

    def conclude(
        self, job: TrainingJob, result: TrainingResult, material: Material, origin: dict[str, Any], started: float
    ) -> None:
        """Compare with the live weights on the same validation cases, publish if better, and store figures and report.

        Args:
            job: the run.
            result: the new weights.
            material: the cases of all sets.
            origin: details of the version that were known before the training.
            started: start time, in seconds since 1970.
        """
        check_finite(result.weights)
        job = self._with_suited_limits(job, result)
        checkpoint = Checkpoint(result.weights, job.preset)
        new = self.masks(checkpoint, job.preset, job.device)
        scores = evaluate(new, job.validation_cases)
        served, before, verdict = self._pass_gate(new, scores, job, material)
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
            "recipe": job.preset.training.model_dump(mode="json"),
            "memory_plan": result.step_plan.as_json() if result.step_plan else None,
            "split": {side: ids_of(getattr(material, side)) for side in ("train", "validation", "test")},
            "replayed": list(material.replayed),
            "left_out": dict(material.left_out or {}),
            "missing_labels": missing_labels((*material.train, *material.validation, *material.test), job.preset),
            "trained_on": trained_on(material.train),
            "label_digests": dict(material.labels),
            "code": code_version(),
        }
        report = report_data(details | {"model": self._preset.name}, scores, before, tested, result)
        pictures = worst_cases(new, job.validation_cases, scores)
        files: Files = {
            "report.html": lambda name: render_html(report | {"version": name}, pictures),
            "report.json": lambda name: as_json(report | {"version": name}),
        }
        if calibration := scores.calibration():
            text = calibration.to_json()
            files = {**files, CALIBRATION_FILE: lambda _: text}
        version = self._versions.add(verdict.status, result.weights, job.preset, details, files)
        for name in ("report.html", "report.json"):
            shutil.copyfile(version.folder / name, job.run_dir / name)
        compared = [result.weights, *([served.checkpoint.model] if served else [])]
        prune_masks(self._masks_folder, [digest_of_weights(weights) for weights in compared])
        self._tidy(job, details | {"version": version.name}, _stock_stats(job, result, scores, started))

    def masks(self, checkpoint: Checkpoint, preset: Preset, device: torch.device) -> CaseMasks:
        """A model's masks of cases, stored for later use in this training or the next one."""
        return CaseMasks.of_weights(checkpoint, preset, device, self._planner, self._masks_folder)

    def _with_suited_limits(self, job: TrainingJob, result: TrainingResult) -> TrainingJob:
        """The job with limits of certainty that its weights can meet, if those that it started from could not."""
        if is_sure(None if job.start is None else job.preset, self._preset):
            return job
        asked = job.preset.with_component_entropy(dict(self._preset.inference.component_entropy))
        suited = suit_limits_of_weights(asked, result.weights, job.train_cases, job.device, self._planner)
        return replace(job, preset=suited)

    def _tidy(self, job: TrainingJob, figures: dict[str, Any], stock: dict[str, Any]) -> None:
        """Store the figures for clients, and remove old versions and runs."""
        write_json(self._runs / STATS_FILE, {"decision": figures["reason"]} | figures | stock)
        remove_state(job.run_dir)
        shutil.rmtree(job.run_dir / CACHE_FOLDER, ignore_errors=True)
        shutil.rmtree(job.run_dir / COMPLETED_FOLDER, ignore_errors=True)
        self._versions.prune(self._settings.keep_versions)
        prune_runs(self._runs, self._settings.keep_runs)

    def _pass_gate(
        self, new: CaseMasks, scores: Evaluation, job: TrainingJob, material: Material
    ) -> tuple[ServedWeights | None, Evaluation | None, Verdict]:
        """Judge new weights against the current live ones, which may have changed during the training."""
        rules = Rules(self._settings.gate_margin, self._settings.gate_tolerance)
        while True:
            served, unusable = read_served(self._locator, self._preset)
            champion = self._score(served, new, scores, job, material) if served else None
            verdict = judge(scores, champion, rules, unusable)
            still = read_served(self._locator, self._preset)[0]
            if (still and still.version) == (served and served.version):
                before = champion.scores if champion and champion.scores.cases else None
                return served, before, verdict

    def _score(
        self, served: ServedWeights, new: CaseMasks, scores: Evaluation, job: TrainingJob, material: Material
    ) -> Champion:
        """Score the live weights on the validation cases and on new labels, and compare masks for the other labels."""
        preset = preset_for(served.checkpoint, self._preset)
        masks = self.masks(served.checkpoint, preset, job.device)
        theirs = evaluate(masks, job.validation_cases)
        unjudged = set(unjudged_labels(scores, theirs)) - served.never_learnt
        likeness = None
        if unjudged:
            images = (*job.validation_cases, *material.train)
            likeness = compare_masks(new, masks, images, served.learnt_cases(material))
        return Champion(
            theirs,
            served.previously_validated(material.labels),
            served.reported_dice,
            evaluate(masks, served.new_cases(material)),
            served.reported_by_label,
            sorted(unjudged),
            likeness,
        )


def _stock_stats(job: TrainingJob, result: TrainingResult, scores: Evaluation, started: float) -> dict[str, Any]:
    """The figures under the names that MONAI Label's clients show."""
    best = None if not job.validation_cases else scores.mean_dice
    metrics = {"loss": result.losses[-1], "first_loss": result.losses[0]}
    return {
        "epoch": job.preset.training.max_epochs,
        "max_epochs": job.preset.training.max_epochs,
        "start_ts": int(started),
        "end": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "total_time": format_seconds(max(0.0, time.time() - started)),
        "best_metric": best,
        "best_epoch": result.best_epoch,
        "steps": len(result.losses),
        "device": str(job.device),
        "gpu": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else None,
        "train": {"metrics": metrics},
        "eval": {"metrics": {"mean_dice": best, **scores.dice}, "key_metric_name": "mean_dice", "best_metric": best},
    }
