"""MONAI Label's strategies (which case to label next) and scoring methods (which compute the scores for them)."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy

from lib.activelearning.case_scores import MEASURES, REGIONS
from lib.activelearning.passes import MonteCarloDropout, has_dropout, no_dropout
from lib.activelearning.pool_knowledge import PoolKnowledge, version_name
from lib.activelearning.pool_scoring import PoolScorer, newest_first
from lib.activelearning.score_store import UNTRAINED
from lib.activelearning.scoring_worker import LabelledCase
from lib.activelearning.selection import MEASURE_OF, STRATEGIES, Pick, select
from lib.cases.labelled import Case
from lib.cluster.engine import Engine
from lib.configs.preset import Preset
from lib.datastore.label_names import why_not_for
from lib.errors import ConfigError, NotFoundError, ParameterError
from lib.networks.precision import resolve_device

logger = logging.getLogger("unetr.scoring")

COLD_START = "typical"
WITHOUT_MODEL = ("random", "first")
DEFAULT_MINUTES = 30.0
KEPT_VERSIONS = 3
NEXT_LIKELY = 2
"""Number of further cases, besides the chosen one, whose predictions should be prefetched."""

DESCRIPTIONS = {
    "random": "A random unlabelled case",
    "random_foreground": "A random unlabelled case, the likelier the more of the labels the model sees in it",
    "first": "The first unlabelled case by name",
    "entropy": "The unlabelled case of whose labels the model is least sure (predictive entropy)",
    "class_balanced_entropy": "As entropy, with every label counting alike, however small",
    "margin": "The unlabelled case where two labels are closest to each other",
    "bald": "The unlabelled case about which several passes of the model disagree most (mutual information)",
    "dice_disagreement": "The unlabelled case where the masks of several passes overlap least",
    "power_entropy": "As entropy, with noise, so that cases in a row are not all alike",
    "power_bald": "As bald, with noise, so that cases in a row are not all alike",
    "core_set": "The unlabelled case least like those that are labelled (core-set)",
    "typical": "The most typical unlabelled case of a group without labels (TypiClust)",
    "hybrid": "Of the most uncertain unlabelled cases, the one least like those that are labelled",
}

FINAL = DefaultLabelTag.FINAL.value
ALL_SCORES, EMBEDDING, LABELS = "all", "embedding", "labels"


class PoolStrategy(Strategy):
    """One of ``selection.STRATEGIES``, applied to the studies.

    Args:
        name: name of the strategy.
        knowledge_by_preset: the stored scores of each preset; the first preset is used if a client names none.
        cold_start_labels: with fewer labels than this, or without weights, a strategy that needs a model chooses
            typical cases instead.
    """

    def __init__(self, name: str, knowledge_by_preset: Mapping[str, PoolKnowledge], cold_start_labels: int = 5) -> None:
        super().__init__(DESCRIPTIONS[name])
        self._name, self._insights, self._cold_start_labels = name, knowledge_by_preset, cold_start_labels

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Choose among the unlabelled images of the datastore.

        Args:
            request: ``seed`` makes the choice repeatable; ``model`` names the preset; ``region`` is the region over
                which uncertainty is averaged (``foreground``, ``volume`` or ``patches``).
            datastore: the studies, without the cases that other annotators are working on.

        Returns:
            The chosen image's ``id``, the ``reason``, the ``model`` for which it was chosen, and ``next``, the ids that
            are likely to follow; None if everything is labelled.

        Raises:
            ParameterError: for a seed that is not a whole number, or an unknown region.
            NotFoundError: for an unknown model.
        """
        knowledge, seed, region = self._parse(request)
        unlabelled = datastore.get_unlabeled_images()
        if not unlabelled:
            return None
        labelled = datastore.get_labeled_images()
        pool, version = knowledge.pool(unlabelled, labelled)
        name, why = self._name, ""
        if name in MEASURE_OF and (version == UNTRAINED or len(labelled) < self._cold_start_labels):
            name, why = COLD_START, self._cold(version, len(labelled))
        picks = select(name, pool, 1 + NEXT_LIKELY, seed, region)
        return {
            "id": picks[0].case_id,
            "reason": why + _reason(picks[0], name, version),
            "model": knowledge.preset.name,
            "next": [pick.case_id for pick in picks[1:]],
            "next_reasons": [why + _reason(pick, name, version) for pick in picks[1:]],
        }

    def _parse(self, request: Mapping[str, Any]) -> tuple[PoolKnowledge, int, str]:
        seed, region = request.get("seed"), request.get("region", REGIONS[0])
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
            raise ParameterError("seed", seed, "a whole number from 0")
        if region not in REGIONS:
            raise ParameterError("region", region, ", ".join(REGIONS))
        model = request.get("model") or next(iter(self._insights))
        if model not in self._insights:
            raise NotFoundError("model", str(model)[:200], list(self._insights))
        return self._insights[model], secrets.randbelow(2**32) if seed is None else seed, region

    def _cold(self, version: str, labels: int) -> str:
        if version == UNTRAINED:
            return f"no model to be {self._name} by yet: "
        return f"{labels} labelled so far, {self._name} begins at {self._cold_start_labels}: "


class PoolScoring(ScoringMethod):
    """Scores the images of the studies with the live weights in the background, and stores the results.

    Args:
        name: a measure, ``embedding``, ``labels`` (disagreement with labels), or ``all``.
        knowledge_by_preset: see :class:`PoolStrategy`.
        device: the device on which it computes; by default the best one.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        passes: how several predictions are made.
        minutes: time limit; 0, which only disables automatic starts, means half an hour.
        cluster: see :class:`PoolScorer`.
    """

    def __init__(
        self,
        name: str,
        knowledge_by_preset: Mapping[str, PoolKnowledge],
        device: str = "",
        precision: str = "auto",
        passes: str = "auto",
        minutes: float = DEFAULT_MINUTES,
        cluster: Engine | None = None,
    ) -> None:
        super().__init__(_scoring_description(name))
        self._name, self._insights, self._passes = name, knowledge_by_preset, passes
        self._device, self._precision, self._minutes = device, precision, minutes or DEFAULT_MINUTES
        self._cluster = cluster

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score the images that have not been scored.

        Args:
            request: ``model`` for one preset (by default all), ``minutes`` for another time limit, ``device`` for
                another device.
            datastore: the studies.

        Returns:
            For each preset: the version, and the numbers of images (and labels) that were done, known, failed and left.

        Raises:
            NotFoundError: for an unknown model.
            ParameterError: for an invalid time limit, or passes that are impossible with a preset.
            CheckpointError: if weights cannot be used.
        """
        minutes = request.get("minutes") or self._minutes
        if isinstance(minutes, bool) or not isinstance(minutes, int | float) or minutes < 0:
            raise ParameterError("minutes", minutes, "a number from 0")
        model = request.get("model")
        if model and model not in self._insights:
            raise NotFoundError("model", str(model)[:200], list(self._insights))
        chosen = [self._insights[model]] if model else list(self._insights.values())
        device = resolve_device(str(request.get("device") or self._device))
        return {one.preset.name: self._score(one, datastore, float(minutes), device) for one in chosen}

    def _score(
        self, knowledge: PoolKnowledge, datastore: Datastore, minutes: float, device: torch.device
    ) -> dict[str, Any]:
        modalities = [other.preset.modality for other in self._insights.values()]
        scorer = PoolScorer(knowledge, device, self._precision, self._passes, minutes, modalities, self._cluster)
        report: dict[str, Any] = {"version": scorer.version}
        if self._name != LABELS:
            unlabelled = newest_first(datastore.get_unlabeled_images(), lambda image: _added_at(datastore, image))

            def file_of(image: str) -> Path:
                return Path(datastore.get_image_uri(image))

            # labelled images only need an embedding
            everything = [*unlabelled, *datastore.get_labeled_images()]
            report["embedded"] = scorer.score(everything, file_of, "embedding")
            if self._name != EMBEDDING:
                report["scored"] = scorer.score(unlabelled, file_of)
        if self._name in (LABELS, ALL_SCORES):
            labels = label_stamps(datastore, knowledge.preset, self._insights)
            report["compared"] = scorer.compare_labels(
                labels, lambda image: labelled_case(datastore, image, knowledge.preset)
            )
        knowledge.store.prune(KEPT_VERSIONS)
        logger.info("%s: %s", knowledge.preset.name, report)
        return report


def make_strategies(
    knowledge_by_preset: Mapping[str, PoolKnowledge], cold_start_labels: int, default: str
) -> dict[str, Strategy]:
    """All strategies, by their names for clients; ``default`` is the first of them.

    Raises:
        ConfigError: for an unknown ``default``.
    """
    if default not in STRATEGIES:
        raise ConfigError(f"--conf strategy is {default!r}; valid: {', '.join(STRATEGIES)}")
    names = [default, *(name for name in STRATEGIES if name != default)]
    return {name: PoolStrategy(name, knowledge_by_preset, cold_start_labels) for name in names}


def check_passes(passes: str, presets: Mapping[str, Preset]) -> None:
    """Refuse dropout for presets without dropout when the server starts, and not only when it scores.

    Raises:
        ConfigError: naming the first of these presets.
    """
    without = [name for name, preset in presets.items() if not has_dropout(preset)]
    if passes == MonteCarloDropout.name and without:
        raise ConfigError(f"--conf passes: {no_dropout(presets[without[0]])}; valid: auto, tta, ensemble")


def make_scoring_methods(knowledge_by_preset: Mapping[str, PoolKnowledge], **options: Any) -> dict[str, ScoringMethod]:
    """All scoring methods, by name; for the options see :class:`PoolScoring`."""
    return {
        name: PoolScoring(name, knowledge_by_preset, **options) for name in (ALL_SCORES, EMBEDDING, LABELS, *MEASURES)
    }


def label_stamps(datastore: Datastore, preset: Preset, served: Collection[str]) -> dict[str, str]:
    """For each image with a final label of a preset, a value that changes with the label; no image is read.

    Args:
        datastore: the studies.
        preset: the preset.
        served: names of all presets of this server, whose labels are excluded.
    """
    stamps = {}
    for image in datastore.get_labeled_images():
        info = datastore.get_label_info(image, FINAL) or {}
        if not why_not_for(preset, info.get("preset") or "", info.get("label_map") or {}, served):
            try:
                status = Path(datastore.get_label_uri(image, FINAL)).stat()
            except FileNotFoundError:  # it has been removed meanwhile
                continue
            stamps[image] = f"{status.st_size}-{status.st_mtime_ns}"
    return stamps


def labelled_case(datastore: Datastore, image: str, preset: Preset) -> LabelledCase:
    """An image with its final label, its values by name, and the names of labels that it does not annotate."""
    info = datastore.get_label_info(image, FINAL) or {}
    label = Path(datastore.get_label_uri(image, FINAL))
    indices = {name: known.index for name in info.get("label_map") or {} if (known := preset.find_label(name))}
    values = {info["label_map"][name]: index for name, index in indices.items()} or None
    case = Case(image, Path(datastore.get_image_uri(image)), label, values)
    return LabelledCase(case, frozenset(info.get("missing_labels", ())))


def _added_at(datastore: Datastore, image: str) -> float:
    """Time at which an image was added, in seconds since 1970; 0 if unknown."""
    return float(datastore.get_image_info(image).get("ts", 0))


def _reason(pick: Pick, name: str, version: str) -> str:
    return pick.reason if name in WITHOUT_MODEL else f"{pick.reason}, model {version_name(version)}"


def _scoring_description(name: str) -> str:
    special = {
        ALL_SCORES: "Embedding and all scores of the unlabelled images, then doubts about labels",
        EMBEDDING: "Where each image lies among the others (pooled tokens of the encoder)",
        LABELS: "How far the newest model is from each label",
    }
    return special.get(name, f"{name.replace('_', ' ')} of the unlabelled images, with all other scores")
