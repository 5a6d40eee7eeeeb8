"""MONAI Label's training task for a preset."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import device_list
from pydantic import ValidationError

from lib.cases.labelled import Case
from lib.cases.split import RUNS_FOLDER, nothing_judges
from lib.configs.preset import Preset
from lib.configs.retraining import Retraining
from lib.errors import CheckpointError, ParameterError, UnetrError
from lib.infers.costs import CostBook
from lib.infers.memory import release_memory
from lib.infers.plan import Planner
from lib.models.versions import Version, VersionStore
from lib.models.weights import WeightsLocator, preset_for
from lib.networks.checkpoint import read_checkpoint
from lib.networks.layouts import StateDict
from lib.networks.precision import resolve_device
from lib.networks.unetr import build_unetr, load_encoder
from lib.storage.json_files import write_json
from lib.trainers.completion import COMPLETED_FOLDER, complete_labels, keep_teacher
from lib.trainers.datasets import DATASET_KINDS, LOADER_KINDS
from lib.trainers.gathering import CaseGatherer
from lib.trainers.judging.champion import ServedWeights, read_served
from lib.trainers.judging.publishing import STATS_FILE, Publisher, read_stats
from lib.trainers.launch import launch
from lib.trainers.material import EndedRun, FollowUp, divide
from lib.trainers.pretraining.loop import ENCODER_FILE
from lib.trainers.request import TrainRequest
from lib.trainers.run.job import CACHE_FOLDER, TrainingJob, TrainingResult
from lib.trainers.submitted import SubmittedLabels, labels_nowhere

logger = logging.getLogger("unetr.train")


class UnetrTrainTask(TrainTask):
    """Trains a preset on the datastore's final labels, and publishes the weights if they are better.

    Args:
        preset: the preset.
        locator: finds the live weights and the folder of versions.
        device: default device; by default the best one.
        settings: rules of the gate, and numbers of versions and runs to keep.
        memory_budget: bytes of host memory for a training; by default the free memory.
        costs: file of measured costs.
        served: names of all presets of this server, whose labels are excluded.
        launcher: trains a job; by default :func:`lib.trainers.launch.launch`.
        follow_up: task after a training, which cannot affect the result of the training; by default none.
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
        launcher: Callable[[TrainingJob, bool, str], TrainingResult] = launch,
        follow_up: FollowUp | None = None,
    ) -> None:
        super().__init__(f"Train {preset.description or preset.name}")
        self.preset, self._launcher, self._follow_up = preset, launcher, follow_up
        self.versions = VersionStore(locator.folder)
        self._locator = locator
        self._settings = settings or Retraining()
        self.runs = locator.folder / RUNS_FOLDER
        self._device, self._memory_budget, self._costs = device, memory_budget, costs
        self._gatherer = CaseGatherer(
            preset, locator.folder, self._settings, served, is_serving=lambda: bool(self.serving()[0])
        )
        planner = Planner(memory_budget, CostBook(costs))
        self._publisher = Publisher(preset, locator, self.runs, self._settings, planner)

    def config(self) -> dict[str, Any]:
        """The fields that clients may edit, with their defaults."""
        recipe = self.preset.training
        return {
            "name": "train_01",
            "pretrained": True,
            "device": device_list(),
            "max_epochs": self._max_epochs(self._locator.is_known()),
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

    def _max_epochs(self, from_weights: bool) -> int:
        recipe = self.preset.training
        return (from_weights and recipe.fine_tuning_epochs) or recipe.max_epochs

    def info(self) -> dict[str, Any]:
        """Description, fields and labels."""
        info: dict[str, Any] = super().info()
        return info | {"labels": self.preset.label_indices}

    def stats(self) -> dict[str, Any]:
        """Figures of the last finished run, in the form that MONAI Label's clients read."""
        stats = read_stats(self.runs)
        # 3D Slicer computes with this number, and accepts that it is absent
        return {name: value for name, value in stats.items() if name != "best_metric" or value is not None}

    def validate_request(self, request: Mapping[str, Any], strict: bool = False) -> TrainRequest:
        """Parse and validate a request without running it.

        Args:
            request: the fields.
            strict: whether each value must have its type already, as in JSON; otherwise text is cast, as with
                ``--conf``.

        Raises:
            ParameterError: naming the field, its value and the valid values.
        """
        try:
            given = {key: value for key, value in request.items() if value is not None}
            changes: dict[str, Any] = {}
            if not given.get("pretrained", True):
                changes = {"learning_rate": self._learning_rate(False), "max_epochs": self._max_epochs(False)}
            asked = TrainRequest.model_validate(self.config() | changes | given, strict=strict)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in problem["loc"])
            raise ParameterError(name, problem["input"], problem["msg"]) from error
        resolve_device(asked.device or self._device)
        return asked

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, compare with the live weights, and publish if better.

        An interrupted run (``resume``) keeps its cases and its state.

        Returns:
            The figures of the run.

        Raises:
            ParameterError: if a field is invalid.
            TrainingError: if there is nothing to train on, or if the run cannot be resumed.
        """
        asked = self.validate_request(request)
        started, run_dir = time.time(), self.runs / asked.run_id
        if asked.resume and (made := self._version_of(asked.run_id)):
            logger.info("the run had ended with %s already", made.name)
            write_json(self.runs / STATS_FILE, dict(made.details) | {"decision": made.details["reason"]})
            if self._follow_up is not None:
                self._follow(EndedRun(asked.run_id, self._gatherer.gather(datastore, asked, run_dir), run_dir))
            return self.stats()
        material = self._gatherer.gather(datastore, asked, run_dir)
        champion = read_served(self._locator, self.preset)[0] if asked.pretrained else None
        # Weights are trained further in their own network, even if the preset has been given another one since.
        preset = preset_for(champion.checkpoint, self.preset) if champion is not None else self.preset
        device = resolve_device(asked.device or self._device)
        train_cases, teacher = self._complete(material.train, champion, preset, device, run_dir)
        # a completed label lies in the run's folder, and what is made of it goes with it
        cache_dir = self.runs / CACHE_FOLDER if train_cases == material.train else None
        plan = TrainingJob(
            preset=preset.model_copy(update={"training": asked.recipe(self.preset)}),
            train_cases=train_cases,
            validation_cases=material.validation,
            run_dir=run_dir,
            device=device,
            start=champion.checkpoint.model if champion is not None else None,
            encoder=self._read_encoder() if champion is None else None,
            teacher=teacher,
            dataset=asked.dataset,
            dataloader=asked.dataloader,
            cache_dir=cache_dir,
            max_steps=asked.max_steps,
            resume=asked.resume,
            pause_file=asked.pause_file,
            tracking=self._settings.mlflow,
            memory_budget=self._memory_budget,
            costs=self._costs,
        )
        result = self._launcher(plan, asked.multi_gpu, asked.gpus)
        nowhere = labels_nowhere(material.train, preset)
        origin = {
            "run": asked.run_id,
            "started_from": champion.version if champion else "",
            "never_learnt": sorted(nowhere & champion.never_learnt if champion else nowhere),
            "why": asked.why,
        }
        self._publisher.conclude(plan, result, material, origin, started)
        if self._follow_up is not None:
            self._follow(EndedRun(asked.run_id, material, run_dir, asked.pause_file))
        return self.stats()

    def _complete(
        self,
        cases: tuple[Case, ...],
        champion: ServedWeights | None,
        preset: Preset,
        device: torch.device,
        run_dir: Path,
    ) -> tuple[tuple[Case, ...], StateDict | None]:
        """The cases with what they lack taken from the weights that the training goes on from, where there are some.

        Returns:
            The cases, and those weights; None if nothing has been taken from them.
        """
        if champion is None or self._settings.pseudo_labels == "off" or not any(case.missing for case in cases):
            return cases, None
        folder = run_dir / COMPLETED_FOLDER
        teacher = keep_teacher(replace(champion.checkpoint, preset=preset), folder)
        masks = self._publisher.masks(teacher, preset, device)
        completed = complete_labels(cases, masks, champion.never_learnt, folder)
        del masks
        release_memory(device)
        return completed, teacher.model if any(case.predicted for case in completed) else None

    def _follow(self, run: EndedRun) -> None:
        """Run the follow-up of a training, and store its outcome with the figures of the run.

        The new weights have been judged and stored by then, so that a failure of the follow-up is logged but does not
        make the run fail.
        """
        assert self._follow_up is not None
        try:
            outcome: Mapping[str, Any] = self._follow_up(run)
        except (UnetrError, OSError, RuntimeError, MemoryError) as error:
            logger.exception("what follows the training of %s failed", self.preset.name)
            outcome = {"status": "failed", "reason": str(error)}
        write_json(self.runs / STATS_FILE, self.stats() | {"editor": dict(outcome)})

    def _version_of(self, run: str) -> Version | None:
        return next((version for version in self.versions.list() if version.details.get("run") == run), None)

    def served_version(self) -> str:
        """Name of the live version; empty for none."""
        file = self._locator.find()
        return "" if file is None else file.version

    def serving(self) -> tuple[str, str]:
        """The version in use, empty for none; and the reason as a sentence if it is not the configured one."""
        try:
            return self.served_version(), self._locator.problem
        except CheckpointError as error:
            return "", str(error)

    def _read_encoder(self) -> StateDict | None:
        """The pretrained encoder; None if there is no matching one."""
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

    def forecast(self, request: Mapping[str, Any], datastore: Datastore) -> str:
        """A warning before a training that no held-out case will judge it; empty otherwise.

        Raises:
            ParameterError: if a field is invalid.
        """
        asked = self.validate_request(request)
        cases = self.submitted(datastore).cases
        if not cases or divide(cases, self._gatherer.plan_split(datastore, cases, asked.val_split)).validation:
            return ""
        return nothing_judges(len(cases), bool(self.serving()[0]))

    def submitted(self, datastore: Datastore) -> SubmittedLabels:
        """The datastore's final labels for this preset."""
        return self._gatherer.labels(datastore)
