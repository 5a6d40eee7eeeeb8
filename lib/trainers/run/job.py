"""What a training run is asked for, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lib.cases.labelled import Case
from lib.cases.metrics import mean_known
from lib.configs.preset import Preset
from lib.errors import TrainingError
from lib.networks.layouts import StateDict
from lib.networks.unetr import Builder, build_unetr
from lib.trainers.plan import StepPlan


@dataclass(frozen=True)
class TrainingJob:
    """All that a run needs.

    Attributes:
        preset: the task, with the recipe in ``preset.training``.
        train_cases: what is trained on.
        validation_cases: what weights are chosen on; empty: the last weights are the result.
        run_dir: folder for progress, TensorBoard and caches.
        device: where it trains.
        start: weights to start from; None: random.
        encoder: weights for the encoder alone to start from, from pretraining.
        build: makes the network; the preset's UNETR if not given, which is also what memory is planned for.
        dataset: one of ``datasets.DATASET_KINDS``.
        dataloader: one of ``datasets.LOADER_KINDS``.
        cache_dir: folder of preprocessed cases; inside ``run_dir`` if not given.
        max_steps: stop after so many steps, where given.
        resume: go on from the state that a run of the same cases and recipe left in ``run_dir``, where there is one.
        state_seconds: time between two states on disk, or twenty times as long as writing one takes, if that is longer;
            0: one after each step.
        pause_file: the run stands still while the server touches it.
        tracking: address of MLflow, where it is switched on.
        memory_budget: bytes of the host's memory that this process may use; what is free if not given.
        costs: file of measured costs.
    """

    preset: Preset
    train_cases: tuple[Case, ...]
    validation_cases: tuple[Case, ...]
    run_dir: Path
    device: torch.device
    start: Mapping[str, torch.Tensor] | None = None
    encoder: Mapping[str, torch.Tensor] | None = None
    build: Builder = build_unetr
    dataset: str = "PersistentDataset"
    dataloader: str = "ThreadDataLoader"
    cache_dir: Path | None = None
    max_steps: int | None = None
    resume: bool = False
    state_seconds: float = 30.0
    pause_file: Path | None = None
    tracking: str = ""
    memory_budget: int | None = None
    costs: Path | None = None

    def __post_init__(self) -> None:
        if not self.train_cases:
            raise TrainingError("there is no labelled case to train on; save at least one label first")

    @property
    def case_folder(self) -> Path:
        """Folder of preprocessed cases."""
        return self.cache_dir or self.run_dir / "cache"


@dataclass(frozen=True)
class Validation:
    """Dice by label of the averaged weights after a step."""

    step: int
    dice: dict[str, float]


@dataclass(frozen=True)
class TrainingResult:
    """The averaged weights of the best epoch, how the run went, and how its steps were computed in the end."""

    weights: StateDict
    best_epoch: int
    dice: dict[str, float]
    losses: tuple[float, ...] = field(repr=False)
    seconds: float = 0.0
    validations: tuple[Validation, ...] = ()
    step_plan: StepPlan | None = None

    @property
    def mean_dice(self) -> float:
        """Mean over labels; NaN without validation."""
        return mean_known(self.dice.values())
