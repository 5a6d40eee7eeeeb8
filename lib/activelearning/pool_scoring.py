"""Scores a whole pool in the background: embeddings first, then scores; newest cases first, within a time limit.

Each case is stored as soon as it is done, so that an interrupted scoring continues where it stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lib.activelearning.case_scores import CaseScores
from lib.activelearning.pool_knowledge import PoolKnowledge, version_key
from lib.activelearning.score_store import CaseScoreRecord, LabelDisagreement
from lib.activelearning.scoring_worker import (
    Depth,
    LabelledCase,
    MakeScoringWorker,
    ScoringResult,
    ScoringTask,
    ScoringWorker,
)
from lib.cases.metrics import mean_known
from lib.cluster.engine import Engine, Finished, Recipe
from lib.cluster.model import ModelFile
from lib.configs.preset import Preset
from lib.errors import CheckpointError, InputError, UnetrError
from lib.infers.interruption import InterruptedWork, interruptible_by
from lib.models.versions import VersionStore
from lib.models.weights import WeightsFile, preset_for
from lib.networks.checkpoint import read_checkpoint

logger = logging.getLogger("unetr.scoring")

MOST_IN_ENSEMBLE = 3
SECONDS_BETWEEN_LINES = 5.0
MAY_COMPUTE = threading.Event()
"""Cleared while an inference request waits; scoring pauses meanwhile."""
MAY_COMPUTE.set()


class PoolScorer:
    """Scores cases with a preset's live weights, or with random ones if there are none.

    Args:
        knowledge: the preset and the store of its scores.
        device: the device on which it computes.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        passes: see :func:`lib.activelearning.passes.choose_passes`.
        minutes: time limit of all scoring together.
        served_modalities: modalities of all served presets; an image that fits another one better is not scored.
        cluster: scores the cases instead of this process; its machines need the files under the same paths.

    Raises:
        CheckpointError: if the weights cannot be used.
        ParameterError: for passes that are impossible with the preset.
    """

    def __init__(
        self,
        knowledge: PoolKnowledge,
        device: torch.device,
        precision: str = "auto",
        passes: str = "auto",
        minutes: float = 30,
        served_modalities: Collection[str] = (),
        cluster: Engine | None = None,
    ) -> None:
        self._knowledge, self._cluster = knowledge, cluster
        self._until = time.monotonic() + 60 * minutes
        file = knowledge.locator.find()
        self.version = version_key(file)
        self._trained = file is not None
        files = [] if file is None else _files(knowledge, file, passes, precision)
        make = MakeScoringWorker(knowledge.preset, files, passes, precision, tuple(served_modalities))
        self._worker: ScoringWorker | None = None
        if cluster is None:
            self._worker = make(str(device))
        else:
            make = replace(make, files=[one.packed() for one in files])
        self._recipe = Recipe(f"{knowledge.preset.name} {self.version}", make)

    def score(self, images: Sequence[str], file_of: Callable[[str], Path], depth: Depth = "scores") -> dict[str, int]:
        """Score the images that this version has not scored yet.

        Args:
            images: image ids, the most important first.
            file_of: returns an image's file, which may have to be downloaded first.
            depth: whether to compute embeddings only, or all scores.

        Returns:
            Numbers of images: ``done``, ``known`` from before, ``failed``, and ``left`` when the time limit was
            reached.
        """
        stages: tuple[Depth, ...] = ("embedding", "scores") if depth == "scores" and self._trained else ("embedding",)
        counts = {"done": 0, "known": 0, "failed": 0, "left": 0}
        for stage in stages:
            known = self._knowledge.store.score_records(self.version)
            done = {image for image, record in known.items() if record.scored or stage == "embedding"}
            todo = [image for image in images if image not in done]
            counts["known"] = len(images) - len(todo)
            reached = self._score_images(
                todo,
                f"{stage} of {self._knowledge.preset.name}, {self.version}",
                partial(_task_for, file_of=file_of, stage=stage),
                partial(self._keep_scores, stage=stage, counts=counts),
            )
            counts["left"] = len(todo) - reached
        return counts

    def compare_labels(self, labels: Mapping[str, str], case_of: Callable[[str], LabelledCase]) -> dict[str, int]:
        """Compare labels with this version's predictions of their images.

        Args:
            labels: for each image, a value that changes with its label.
            case_of: returns an image's files.

        Returns:
            See :meth:`score`.
        """
        counts = {"done": 0, "known": 0, "failed": 0, "left": 0}
        if not self._trained:
            return counts | {"left": len(labels)}
        known = self._knowledge.store.disagreements(self.version)
        todo = [image for image, label in labels.items() if image not in known or known[image].label != label]
        counts["known"] = len(labels) - len(todo)
        reached = self._score_images(
            todo,
            f"labels of {self._knowledge.preset.name}, {self.version}",
            lambda image: ScoringTask(image, case_of(image)),
            partial(self._keep_comparison, labels=labels, counts=counts),
        )
        counts["left"] = len(todo) - reached
        return counts

    def _score_images(
        self,
        images: Sequence[str],
        what: str,
        task_of: Callable[[str], ScoringTask],
        keep: Callable[[str, Finished[ScoringTask, ScoringResult]], None],
    ) -> int:
        """Score images here or on the cluster within the time limit; returns the number of scored images."""
        if self._cluster is None:
            return _each(images, self._until, what, lambda image: keep(image, self._score_here(task_of, image)))
        tasks, reported_at, reached = _ClusterTasks(images, self._until, task_of, keep), time.monotonic(), 0
        for finished in self._cluster.run(tasks, lambda: self._recipe):
            keep(finished.item.image, finished)
            reached += 1
            if time.monotonic() - reported_at > SECONDS_BETWEEN_LINES:
                reported_at = time.monotonic()
                logger.info("%s, on the cluster: %d of %d", what, reached + tasks.failed, len(images))
        return reached + tasks.failed

    def _score_here(self, task_of: Callable[[str], ScoringTask], image: str) -> Finished[ScoringTask, ScoringResult]:
        assert self._worker is not None
        try:
            task = task_of(image)
            return Finished(task, self._worker.compute(self._worker.read(task)))
        except UnetrError as error:
            return _failed(image, error)

    def _keep_scores(
        self, image: str, finished: Finished[ScoringTask, ScoringResult], stage: Depth, counts: dict[str, int]
    ) -> None:
        if finished.answer is None:
            counts["failed"] += 1
            logger.warning("%s is not scored: %s", image, finished.problem)
            if not finished.refused:  # the image is unavailable now, but may be available later
                return
            record = CaseScoreRecord(CaseScores(), scored=True, problem=finished.problem)
        elif finished.answer.elsewhere:
            counts["failed"] += 1
            logger.warning("%s is not scored: %s", image, finished.answer.elsewhere)
            record = CaseScoreRecord(CaseScores(), scored=True, problem=finished.answer.elsewhere, elsewhere=True)
        else:
            record = CaseScoreRecord(finished.answer.scores, scored=stage == "scores")
            counts["done"] += stage == "scores" or not self._trained
        self._knowledge.store.keep(self.version, image, record)

    def _keep_comparison(
        self,
        image: str,
        finished: Finished[ScoringTask, ScoringResult],
        labels: Mapping[str, str],
        counts: dict[str, int],
    ) -> None:
        if finished.answer is None:
            counts["failed"] += 1
            logger.warning("the label of %s cannot be compared: %s", image, finished.problem)
            if not finished.refused:
                return
            disagreement = LabelDisagreement(image, labels[image], {}, 1.0)
        else:
            counts["done"] += 1
            dice = finished.answer.dice
            disagreement = LabelDisagreement(image, labels[image], dice, suspicion_of(dice))
        self._knowledge.store.keep_disagreement(self.version, disagreement)


def _task_for(image: str, file_of: Callable[[str], Path], stage: Depth) -> ScoringTask:
    return ScoringTask(image, file_of(image).absolute(), stage)


def _failed(image: str, error: UnetrError) -> Finished[ScoringTask, ScoringResult]:
    return Finished(ScoringTask(image, Path()), problem=str(error), refused=isinstance(error, InputError))


@dataclass
class _ClusterTasks:
    """The tasks of the cluster within the time limit; failures to read an image are stored at once."""

    images: Sequence[str]
    until: float
    task_of: Callable[[str], ScoringTask]
    keep: Callable[[str, Finished[ScoringTask, ScoringResult]], None]
    failed: int = 0

    def __iter__(self) -> Iterator[ScoringTask]:
        for image in self.images:
            if time.monotonic() > self.until:
                return
            try:
                yield self.task_of(image)
            except UnetrError as error:
                self.failed += 1
                self.keep(image, _failed(image, error))


def suspicion_of(dice: Mapping[str, float]) -> float:
    """From 0 where model and label agree to 1; 0 for a label without anything to compare."""
    return 1 - mean_known(dice.values()) if dice else 0.0


def newest_first(images: Iterable[str], added_at: Callable[[str], float]) -> list[str]:
    """Images sorted by the time at which they were added, newest first."""
    return sorted(images, key=lambda image: (-added_at(image), image))


def _each(ids: Sequence[str], until: float, what: str, work: Callable[[str], None]) -> int:
    """Process the ids until the time limit, and pause before each window while inference requests compute.

    Returns:
        The number of processed ids.
    """
    reported_at = time.monotonic()

    def check() -> None:
        if not MAY_COMPUTE.wait(max(0.0, until - time.monotonic())) or time.monotonic() > until:
            raise InterruptedWork

    for number, one in enumerate(ids):
        try:
            with interruptible_by(check):
                check()
                work(one)
        except InterruptedWork:
            logger.info("%s: time is up after %d of %d", what, number, len(ids))
            return number
        if time.monotonic() - reported_at > SECONDS_BETWEEN_LINES or number + 1 == len(ids):
            reported_at = time.monotonic()
            logger.info("%s: %d of %d", what, number + 1, len(ids))
    return len(ids)


def _files(knowledge: PoolKnowledge, file: WeightsFile, passes: str, precision: str) -> list[ModelFile]:
    """The live weights, and for an ensemble earlier published ones with the same preprocessing, newest first.

    Raises:
        CheckpointError: if the live weights cannot be used.
    """
    served = ModelFile.of(knowledge.preset, file, compiles=False, precision=precision)
    files = [served]
    versions = VersionStore(knowledge.locator.folder).list() if passes in ("auto", "ensemble") else []
    for version in reversed(versions):
        if len(files) >= MOST_IN_ENSEMBLE:
            break
        if version.status != "published" or version.name == version_key(file):
            continue
        try:
            if _preprocessing_of(version.weights, knowledge.preset) == _preprocessing_of(file.path, knowledge.preset):
                weights = WeightsFile(version.weights, "published")
                files.append(ModelFile.of(knowledge.preset, weights, compiles=False, precision=precision))
        except CheckpointError as error:
            logger.warning("version %s is left out of the ensemble: %s", version.name, error)
    return files


def _preprocessing_of(weights: Path, configured: Preset) -> tuple[object, ...]:
    """The parts of a checkpoint's preset that determine the preprocessing.

    Raises:
        CheckpointError: if the weights cannot be used.
    """
    preset = preset_for(read_checkpoint(weights), configured)
    return preset.axcodes, preset.spacing_mm, preset.roi_size, preset.intensity, preset.padding
