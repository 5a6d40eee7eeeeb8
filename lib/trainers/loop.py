"""The training loop: plain PyTorch, from a job to the best weights; in one process, or in one of several."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from monai.utils import set_determinism
from torch import nn

from lib.errors import InputError
from lib.infers.costs import CostBook
from lib.infers.memory import MemoryProbe, keep_freed_memory
from lib.infers.predictor import Prediction, predict
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.placement import Placement
from lib.networks.precision import resolve_precision
from lib.trainers.memory import forward_in_parts
from lib.trainers.optimization import build_loss
from lib.trainers.parallel import rank_and_world_size
from lib.trainers.pause import wait_while_paused
from lib.trainers.plan import StepLadder, StepPlanner
from lib.trainers.reporting.progress import Progress, ProgressReporter, memory_in_use
from lib.trainers.reporting.tracking import Tracking
from lib.trainers.run.data import TrainingData, build_validation_loader
from lib.trainers.run.job import TrainingJob, TrainingResult, Validation
from lib.trainers.run.state import RunState, StateKeeper
from lib.trainers.run.step import Forward, LossBuilder, StepTrainer, build_network, build_teacher
from lib.trainers.run.validation import Validator

logger = logging.getLogger("unetr.train")

BEST_FILE = "best.pt"


@dataclass(frozen=True)
class RunFunctions:
    """The functions that a run calls, which tests may replace.

    Attributes:
        build_loss: builds the loss of a recipe.
        forward: computes the logits of all crops of a step.
        predict: predicts one image during validation.
        validate: returns the Dice of each label for a network; by default a :class:`Validator`.
        keep_freed_memory: called once if there is enough memory to keep freed memory for reuse.
        wait: waits while inference requests have the device, given the job's pause file.
        memory: probe of the free memory.
    """

    build_loss: LossBuilder = build_loss
    forward: Forward = forward_in_parts
    predict: Callable[..., Prediction] = predict
    validate: Callable[[nn.Module], dict[str, float]] | None = None
    keep_freed_memory: Callable[[], object] = keep_freed_memory
    wait: Callable[[Path | None], float] = wait_while_paused
    memory: MemoryProbe = field(default_factory=MemoryProbe)


def run_training(
    job: TrainingJob, on_step: Callable[[int], None] | None = None, functions: RunFunctions | None = None
) -> TrainingResult:
    """Run a training job.

    Args:
        job: the job.
        on_step: called after each step with its number; an exception from it ends the run.
        functions: functions that the run calls; by default the real ones.

    Raises:
        TrainingError: if the gradients stay infinite or NaN.
        InputError: if a case is unusable.
    """
    run = None
    try:
        run = _Run(job, functions or RunFunctions())
        return run.train(on_step)
    except RuntimeError as error:
        if (unusable := _input_error_in(error)) is not None:
            raise unusable from None
        raise
    finally:
        if run is not None:
            run.close()


def _input_error_in(error: BaseException) -> InputError | None:
    """The error about a case that MONAI's transforms wrap into "applying transform <...>"."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    return cause


class _Run:
    """The epochs of one training run, with validation, storage of the best weights, and progress reports."""

    def __init__(self, job: TrainingJob, functions: RunFunctions) -> None:
        self.job, self.preset, self.recipe, self._wait = job, job.preset, job.preset.training, functions.wait
        self.rank, self.world_size = rank_and_world_size()
        set_determinism(self.recipe.seed)
        beside = job.pause_file is not None
        planner = StepPlanner(job.memory_budget, CostBook(job.costs), functions.memory, beside_server=beside)
        alone = self.world_size == 1
        with_teacher = job.teacher is not None
        plan = planner.plan(self.preset, len(job.train_cases), job.device, whole=not alone, with_teacher=with_teacher)
        logger.info("%s", plan.explain())
        self.device = torch.device(plan.device)
        if plan.keeps_freed_memory:
            functions.keep_freed_memory()
        dtype = resolve_precision(self.recipe.precision, self.device)
        network, teacher = build_network(job, self.device, plan.checkpointing), build_teacher(job, self.device)
        ladder = StepLadder(plan, planner, self.preset, network, may_shrink=alone)
        self.data = TrainingData(job, self.device, self.world_size, plan.cache_bytes)
        self.validate = self._build_validation(dtype, functions)
        steps = self.recipe.max_epochs * len(self.data.loader)
        self.total_steps = min(steps, job.max_steps or steps)
        self.trainer = StepTrainer(
            network, ladder, self.recipe, self.total_steps, dtype, functions.build_loss, functions.forward, teacher
        )
        self.reporter = self._build_reporter() if self.rank == 0 else None
        self.state = RunState()
        self.keeper = StateKeeper(job, self.state, self.trainer.stateful, writes=self.rank == 0)
        if self.keeper.restored:
            logger.info("resumed after step %d of %d", self.state.step, self.total_steps)

    def train(self, on_step: Callable[[int], None] | None) -> TrainingResult:
        state = self.state
        while not state.done:
            self._train_epoch(on_step)
            last = state.epoch == self.recipe.max_epochs or state.step >= self.total_steps
            if self.validate is not None and (last or state.epoch % self.recipe.val_interval == 0):
                self._validate_and_keep(self.validate)
            state.done = self._agree_to_stop() or last
            state.epoch, state.step_of_epoch = state.epoch + (not state.done), 0
            if state.done or self.keeper.is_due():
                self.keeper.write()
        return self._result()

    def close(self) -> None:
        """Flush the reports, and end the prefetching threads."""
        if self.reporter is not None:
            self.reporter.close()
        self.data.close()

    def _train_epoch(self, on_step: Callable[[int], None] | None) -> None:
        self.trainer.begin_epoch()
        self.data.begin_epoch(self.state.epoch, self.state.step_of_epoch)
        for batch, prepare in self.data.batches(self.device):
            self._wait(self.job.pause_file)
            # the next step's crops are augmented while the GPU computes this step's gradients
            self.state.losses.append(self.trainer.take(self.state, batch, prepare))
            self.state.step, self.state.step_of_epoch = self.state.step + 1, self.state.step_of_epoch + 1
            if self.reporter is not None:
                self.reporter.step(self._progress())
            if on_step is not None:
                on_step(self.state.step)
            if self.state.step >= self.total_steps:
                break
            if self.keeper.is_due() and self.state.step_of_epoch < len(self.data.loader):
                self.keeper.write()
        self.data.end_epoch()

    def _validate_and_keep(self, validate: Callable[[nn.Module], dict[str, float]]) -> None:
        """Validate the averaged weights, and store them if they are the best so far."""
        dice = validate(self.trainer.average)
        self.state.validations.append(Validation(self.state.step, dice))
        self.state.epochs_since_best += self.recipe.val_interval
        best = self.state.keep_if_best(dice, self.trainer.averaged_weights)
        if best is not None:
            info = {"epoch": best.epoch, "mean_dice": best.mean, "dice": dice}
            write_checkpoint(self.job.run_dir / BEST_FILE, Checkpoint(best.weights, self.preset, info))
        if self.reporter is not None:
            self.reporter.validation(self._progress(dice))

    def _agree_to_stop(self) -> bool:
        """Whether validation has not improved for the patience; rank 0 decides for all processes."""
        stop = 0 < self.recipe.early_stop_patience <= self.state.epochs_since_best
        if self.world_size == 1:
            return stop
        decision = torch.tensor(int(stop), device=self.device)
        dist.broadcast(decision, src=0)
        return bool(decision.item())

    def _result(self) -> TrainingResult:
        state, best = self.state, self.state.best
        epoch, mean, dice = (best.epoch, best.mean, best.dice) if best else (state.epoch, math.nan, {})
        weights = best.weights if best else self.trainer.averaged_weights()
        logger.info("finished after %d steps; best epoch %d, mean dice %.4f", state.step, epoch, mean)
        plan = self.trainer.ladder.plan
        return TrainingResult(
            weights, epoch, dice, tuple(state.losses), self.keeper.seconds, tuple(state.validations), plan
        )

    def _progress(self, dice: Mapping[str, float] | None = None) -> Progress:
        state, best = self.state, self.state.best
        known = dice if dice is not None else best.dice if best else {}
        return Progress(
            epoch=state.epoch,
            max_epochs=self.recipe.max_epochs,
            step=state.step,
            total_steps=self.total_steps,
            loss=state.losses[-1],
            learning_rate=self.trainer.learning_rate,
            eta_seconds=self.keeper.seconds_for(self.total_steps - state.step),
            dice=known,
            best_mean_dice=best.mean if best else None,
            memory=memory_in_use(self.device),
            plan=self.trainer.ladder.plan.explain(),
        )

    def _build_reporter(self) -> ProgressReporter:
        recipe = self.recipe.model_dump(mode="json", exclude={"augmentation"})
        params = recipe | {"preset": self.preset.name, "training_cases": len(self.job.train_cases)}
        return ProgressReporter(self.job.run_dir, Tracking(self.job.tracking, self.job.run_dir.name, params))

    def _build_validation(
        self, dtype: torch.dtype, functions: RunFunctions
    ) -> Callable[[nn.Module], dict[str, float]] | None:
        """The validation function; None without validation cases, and in all processes except rank 0."""
        if not self.job.validation_cases or self.rank != 0:
            return None
        if functions.validate is not None:
            return functions.validate
        return Validator(
            build_validation_loader(self.job), Placement(self.preset, self.device, dtype), functions.predict
        )
