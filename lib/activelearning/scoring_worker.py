"""Scores one case, in this process or on the machines of a cluster."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from monai.data import MetaTensor

from lib.activelearning.case_scores import CaseScores, score_case
from lib.activelearning.embedding import AnyUnetr, embed
from lib.activelearning.passes import Passes, choose_passes
from lib.cases.labelled import Case, read_case
from lib.cases.metrics import dice_per_label
from lib.cluster.model import ModelFile
from lib.configs.preset import Preset
from lib.errors import NotFoundError, OtherModalityError
from lib.infers.segmenter import Segmenter
from lib.networks.precision import resolve_device
from lib.networks.unetr import build_unetr
from lib.transforms.inputs import read_input
from lib.transforms.intensity_range import check_modality
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import check_segmentable

Depth = Literal["embedding", "scores"]


@dataclass(frozen=True)
class LabelledCase:
    """A case with its label.

    Attributes:
        case: the image and label files.
        ignored: names of labels that the mask does not annotate.
    """

    case: Case
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ScoringTask:
    """A scoring task.

    Attributes:
        image: id of the image.
        at: the image's file, or a case whose label is compared with the prediction.
        depth: how much is computed for an image.
    """

    image: str
    at: Path | LabelledCase
    depth: Depth = "embedding"


@dataclass(frozen=True)
class ScoringResult:
    """The result of a scoring task.

    Attributes:
        scores: scores of an image.
        dice: of each label of a labelled case.
        elsewhere: why the image fits another served preset better; empty if it does not.
    """

    scores: CaseScores = field(default_factory=CaseScores)
    dice: Mapping[str, float] = field(default_factory=dict)
    elsewhere: str = ""


class ScoringWorker:
    """Scores cases with a network on a device.

    Args:
        segmenter: with the live weights, or random ones.
        passes: several predictions; None if there are only random weights.
        served_modalities: modalities of all served presets; an image that fits another one better is not scored.
    """

    def __init__(self, segmenter: Segmenter, passes: Passes | None, served_modalities: Collection[str]) -> None:
        self._segmenter, self.passes, self._served_modalities = segmenter, passes, served_modalities

    def read(self, look: ScoringTask) -> tuple[ScoringTask, MetaTensor | str | None]:
        """The preprocessed image, or the reason why it fits another preset better.

        Raises:
            ImageError: if it cannot be read.
            NotFoundError: if the file does not exist on this machine.
        """
        if isinstance(look.at, LabelledCase):
            return look, None
        if not look.at.exists():  # a cluster's machine may lack the studies, which is no fault of the image
            raise NotFoundError("file", str(look.at))
        preset = self._segmenter.preset
        volume = read_input(look.at, preset)
        check_segmentable(volume, preset, look.at.name)
        try:
            check_modality(volume.voxels, preset, self._served_modalities, look.at.name)
        except OtherModalityError as error:
            return look, str(error)
        return look, preprocess_volume(volume, preset)

    def compute(self, ready: tuple[ScoringTask, MetaTensor | str | None]) -> ScoringResult:
        """Score the case that was read.

        Raises:
            InputError: if the case cannot be read.
        """
        look, picture = ready
        if isinstance(look.at, LabelledCase):
            return ScoringResult(dice=compare(self._segmenter, look.at))
        if isinstance(picture, str):
            return ScoringResult(elsewhere=picture)
        assert picture is not None
        segmenter = self._segmenter
        network, where = cast(AnyUnetr, segmenter.network), segmenter.placement
        if look.depth == "embedding":
            return ScoringResult(CaseScores(embedding=embed(network, picture, where)))
        return ScoringResult(score_case(network, picture, where, self.passes))


@dataclass(frozen=True)
class MakeScoringWorker:
    """A factory of workers, in this or in other processes.

    Attributes:
        preset: the preset.
        files: the live weights, and for an ensemble the other ones; empty for random weights.
        passes: see :func:`lib.activelearning.passes.choose_passes`.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        served_modalities: see :class:`ScoringWorker`.
    """

    preset: Preset
    files: Sequence[ModelFile]
    passes: str
    precision: str
    served_modalities: tuple[str, ...]

    def __call__(self, device: str) -> ScoringWorker:
        if not self.files:
            return ScoringWorker(untrained(self.preset, resolve_device(device), self.precision), None, ())
        segmenters = [file.load(device).segmenter for file in self.files]
        passes = choose_passes(self.passes, segmenters[0].preset, [one.network for one in segmenters])
        return ScoringWorker(segmenters[0], passes, self.served_modalities)


def untrained(preset: Preset, device: torch.device, precision: str) -> Segmenter:
    """A segmenter with random weights, the same at every start, so that embeddings stay comparable."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Segmenter(build_unetr(preset), preset, device, precision)


def compare(segmenter: Segmenter, one: LabelledCase) -> dict[str, float]:
    """Dice of each label that the mask annotates and that is present in the mask or in the prediction.

    Raises:
        InputError: if the case cannot be read.
    """
    volume, label = read_case(one.case, segmenter.preset)
    predicted = segmenter.segment(volume, name=one.case.case_id).labels
    indices = {name: index for name, index in segmenter.preset.label_indices.items() if name not in one.ignored}
    return {name: dice for name, dice in dice_per_label(predicted, label, indices).items() if not math.isnan(dice)}
