"""Looking at a whole pool in the background: embeddings first, then scores; the newest case first, for a limited time.

Every case is kept as soon as it is done, so that whoever is interrupted goes on there.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch

from lib.activelearning.case_scores import CaseScores, score_case
from lib.activelearning.embedding import AnyUnetr, embed
from lib.activelearning.passes import Passes, choose_passes
from lib.activelearning.pool_knowledge import PoolKnowledge, version_key
from lib.activelearning.score_store import CaseScoreRecord, LabelDisagreement
from lib.cases.labelled import Case, read_case
from lib.cases.metrics import dice_per_label, mean_known
from lib.configs.preset import Preset
from lib.errors import CheckpointError, ImageError, InputError, UnetrError
from lib.infers.interruption import InterruptedWork, giving_way
from lib.infers.segmenter import Segmenter
from lib.models.versions import VersionStore
from lib.models.weights import WeightsFile, preset_for
from lib.networks.checkpoint import Checkpoint, read_checkpoint
from lib.networks.unetr import build_unetr
from lib.transforms.intensity_range import misfit
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import check_segmentable, read_volume

logger = logging.getLogger("unetr.scoring")

Depth = Literal["embedding", "scores"]
MOST_IN_ENSEMBLE = 3
SECONDS_BETWEEN_LINES = 5.0
MAY_COMPUTE = threading.Event()
"""Clear while somebody waits for an inference; the work waits with it."""
MAY_COMPUTE.set()


@dataclass(frozen=True)
class LabelledCase:
    """A case with its label.

    Attributes:
        case: image and label files.
        ignored: names of labels that the mask does not speak of.
    """

    case: Case
    ignored: frozenset[str] = frozenset()


class PoolScorer:
    """Looks at cases with a preset's newest weights; with random ones where there are none yet.

    Args:
        knowledge: the preset and where its scores are kept.
        device: where to compute.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        passes: see :func:`lib.activelearning.passes.choose_passes`.
        minutes: longest time for all that is asked of it.
        served_modalities: of all presets that are served; an image that fits another one better is not scored.

    Raises:
        CheckpointError: when the weights cannot be used.
        ParameterError: for passes that the preset cannot make.
    """

    def __init__(
        self,
        knowledge: PoolKnowledge,
        device: torch.device,
        precision: str = "auto",
        passes: str = "auto",
        minutes: float = 30,
        served_modalities: Collection[str] = (),
    ) -> None:
        self._knowledge, self._served_modalities = knowledge, served_modalities
        self._until = time.monotonic() + 60 * minutes
        file = knowledge.locator.find()
        self.version = version_key(file)
        self._trained = file is not None
        self._segmenter = _segmenter(file, knowledge.preset, device, precision)
        self._network = cast(AnyUnetr, self._segmenter.network)
        self._passes = self._make_passes(passes, device, precision) if file is not None else None

    def score(self, images: Sequence[str], file_of: Callable[[str], Path], depth: Depth = "scores") -> dict[str, int]:
        """Score the images that this version has not scored yet.

        Args:
            images: ids, the most important first.
            file_of: gives an image's file, which may have to be fetched first.
            depth: only to embed them, or to score them too.

        Returns:
            How many were ``done``, ``known`` before, ``failed``, and are ``left`` since the time was up.
        """
        stages: tuple[Depth, ...] = ("embedding", "scores") if depth == "scores" and self._trained else ("embedding",)
        counts = {"done": 0, "known": 0, "failed": 0, "left": 0}
        for stage in stages:
            known = self._knowledge.store.score_records(self.version)
            done = {image for image, record in known.items() if record.scored or stage == "embedding"}
            todo = [image for image in images if image not in done]
            counts["known"] = len(images) - len(todo)
            reached = _each(
                todo,
                self._until,
                f"{stage} of {self._knowledge.preset.name}, {self.version}",
                partial(self._score_image, file_of=file_of, stage=stage, counts=counts),
            )
            counts["left"] = len(todo) - reached
        return counts

    def compare_labels(self, labels: Mapping[str, str], case_of: Callable[[str], LabelledCase]) -> dict[str, int]:
        """Compare labels with what this version makes of their images.

        Args:
            labels: what changes with an image's label, by image.
            case_of: gives an image's files.

        Returns:
            As :meth:`score`.
        """
        counts = {"done": 0, "known": 0, "failed": 0, "left": 0}
        if not self._trained:
            return counts | {"left": len(labels)}
        known = self._knowledge.store.disagreements(self.version)
        todo = [image for image, label in labels.items() if image not in known or known[image].label != label]
        counts["known"] = len(labels) - len(todo)
        reached = _each(
            todo,
            self._until,
            f"labels of {self._knowledge.preset.name}, {self.version}",
            partial(self._compare_label, labels=labels, case_of=case_of, counts=counts),
        )
        counts["left"] = len(todo) - reached
        return counts

    def _score_image(self, image: str, file_of: Callable[[str], Path], stage: Depth, counts: dict[str, int]) -> None:
        try:
            record = CaseScoreRecord(self._examine(file_of(image), stage), scored=stage == "scores")
            counts["done"] += stage == "scores" or not self._trained
        except UnetrError as error:
            counts["failed"] += 1
            logger.warning("%s is not scored: %s", image, error)
            if not isinstance(error, InputError):  # it cannot be had now, and may be later
                return
            record = CaseScoreRecord(CaseScores(), scored=True, problem=str(error))
        self._knowledge.store.keep(self.version, image, record)

    def _examine(self, path: Path, stage: Depth) -> CaseScores:
        segmenter = self._segmenter
        volume = read_volume(path)
        check_segmentable(volume, segmenter.preset, path.name)
        if reason := misfit(volume.voxels, segmenter.preset.modality, self._served_modalities):
            raise ImageError(f"image {path.name!r} is not for {segmenter.preset.name!r}: {reason}")
        picture = preprocess_volume(volume, segmenter.preset)
        where = (segmenter.preset, segmenter.device, segmenter.dtype)
        if stage == "embedding":
            return CaseScores(embedding=embed(self._network, picture, *where))
        return score_case(self._network, picture, *where, self._passes)

    def _compare_label(
        self, image: str, labels: Mapping[str, str], case_of: Callable[[str], LabelledCase], counts: dict[str, int]
    ) -> None:
        try:
            dice = compare(self._segmenter, case_of(image))
        except UnetrError as error:
            counts["failed"] += 1
            logger.warning("the label of %s cannot be compared: %s", image, error)
            if not isinstance(error, InputError):
                return
            disagreement = LabelDisagreement(image, labels[image], {}, 1.0)
        else:
            counts["done"] += 1
            disagreement = LabelDisagreement(image, labels[image], dice, suspicion_of(dice))
        self._knowledge.store.keep_disagreement(self.version, disagreement)

    def _make_passes(self, name: str, device: torch.device, precision: str) -> Passes:
        networks = [self._segmenter.network]
        if name in ("auto", "ensemble"):
            networks += [s.network for s in _earlier(self._knowledge, self._segmenter, device, precision)]
        return choose_passes(name, self._segmenter.preset, networks)


def compare(segmenter: Segmenter, one: LabelledCase) -> dict[str, float]:
    """Dice of each label that the mask speaks of and that either the mask or the model sees.

    Raises:
        InputError: when the case cannot be read.
    """
    volume, label = read_case(one.case, segmenter.preset)
    predicted = segmenter.segment(volume, name=one.case.case_id).labels
    indices = {name: index for name, index in segmenter.preset.label_indices.items() if name not in one.ignored}
    return {name: dice for name, dice in dice_per_label(predicted, label, indices).items() if not math.isnan(dice)}


def suspicion_of(dice: Mapping[str, float]) -> float:
    """0 where model and label agree, to 1; a label without anything to compare is not suspicious."""
    return 1 - mean_known(dice.values()) if dice else 0.0


def newest_first(images: Iterable[str], added_at: Callable[[str], float]) -> list[str]:
    """Images by the time at which they came, the newest first."""
    return sorted(images, key=lambda image: (-added_at(image), image))


def _each(ids: Sequence[str], until: float, what: str, work: Callable[[str], None]) -> int:
    """Do the work of each until the time is up, and wait before each window while somebody else computes.

    Returns:
        How many were done.
    """
    said = time.monotonic()

    def check() -> None:
        if not MAY_COMPUTE.wait(max(0.0, until - time.monotonic())) or time.monotonic() > until:
            raise InterruptedWork

    for number, one in enumerate(ids):
        try:
            with giving_way(check):
                check()
                work(one)
        except InterruptedWork:
            logger.info("%s: time is up after %d of %d", what, number, len(ids))
            return number
        if time.monotonic() - said > SECONDS_BETWEEN_LINES or number + 1 == len(ids):
            said = time.monotonic()
            logger.info("%s: %d of %d", what, number + 1, len(ids))
    return len(ids)


def _segmenter(file: WeightsFile | None, preset: Preset, device: torch.device, precision: str) -> Segmenter:
    if file is not None:
        checkpoint = read_checkpoint(file.path)
        return Segmenter.from_checkpoint(checkpoint, preset_for(checkpoint, preset), device, precision)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same random weights at every start, so that embeddings stay comparable
        return Segmenter(build_unetr(preset), preset, device, precision)


def _earlier(knowledge: PoolKnowledge, current: Segmenter, device: torch.device, precision: str) -> list[Segmenter]:
    """The published versions before the served one that see images as it does, the newest first."""
    found: list[Segmenter] = []
    served = version_key(knowledge.locator.find())
    for version in reversed(VersionStore(knowledge.locator.folder).list()):
        if len(found) + 1 >= MOST_IN_ENSEMBLE:
            break
        if version.status != "published" or version.name == served:
            continue
        try:
            checkpoint: Checkpoint = read_checkpoint(version.weights)
            preset = preset_for(checkpoint, knowledge.preset)
            if _sees(preset) == _sees(current.preset):
                found.append(Segmenter.from_checkpoint(checkpoint, preset, device, precision))
        except CheckpointError as error:
            logger.warning("version %s is left out of the ensemble: %s", version.name, error)
    return found


def _sees(preset: Preset) -> tuple[object, ...]:
    """What an image becomes before the network."""
    return preset.axcodes, preset.spacing_mm, preset.roi_size, preset.intensity, preset.padding
