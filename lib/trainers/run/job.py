"""The parameters and the result of a training run."""

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

CACHE_FOLDER = "cache"
"""Of a run, or of all of them: what can be made again."""


@dataclass(frozen=True)
class TrainingJob:
    """The parameters of a run.

    Attributes:
        preset: the preset, with the recipe in ``preset.training``.
        train_cases: training cases.
        validation_cases: cases by which the best weights are chosen; if empty, the last weights are the result.
        run_dir: folder for progress, TensorBoard and caches.
        device: training device.
        start: initial weights; None for random ones.
        encoder: initial weights of the encoder only, from pretraining.
        teacher: weights whose predictions are the targets for what a label lacks (:attr:`Case.predicted`); None if no
            label of a training case has been completed.
        build: builds the network; by default the preset's UNETR, for which memory is planned in any case.
        dataset: one of ``datasets.DATASET_KINDS``.
        dataloader: one of ``datasets.LOADER_KINDS``.
        cache_dir: folder of preprocessed cases; by default inside of ``run_dir``.
        max_steps: largest number of steps, if given.
        resume: whether to resume from the state that a run with the same cases and recipe left in ``run_dir``, if there
            is one.
        state_seconds: interval between two stored states, or twenty times the duration of storing one, if that is
            longer; 0 stores the state after each step.
        pause_file: file that pauses the run while the server touches it.
        tracking: address of MLflow, if it is enabled.
        memory_budget: bytes of host memory that this process may use; by default the free memory.
        costs: file of measured costs.
    """

    preset: Preset
    train_cases: tuple[Case, ...]
    validation_cases: tuple[Case, ...]
    run_dir: Path
    device: torch.device
    start: Mapping[str, torch.Tensor] | None = None
    encoder: Mapping[str, torch.Tensor] | None = None
    teacher: Mapping[str, torch.Tensor] | None = None
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
        return self.cache_dir or self.run_dir / CACHE_FOLDER


@dataclass(frozen=True)
class Validation:
    """Dice of the averaged weights after a step, by label."""

    step: int
    dice: dict[str, float]


@dataclass(frozen=True)
class TrainingResult:
    """The averaged weights of the best epoch, the course of the run, and its last step plan."""

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
