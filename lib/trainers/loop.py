"""The training loop: plain PyTorch, from a plan to the best weights; one process, or one of several."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from monai.data import DataLoader, SmartCacheDataset
from monai.utils import set_determinism
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lib.cases.labelled import MISSING, Case
from lib.cases.metrics import dice_per_label, mean_known, mean_per_label, without_missing
from lib.configs.preset import Preset
from lib.errors import InputError, TrainingError
from lib.infers.blender import LabelArray
from lib.infers.costs import CostBook
from lib.infers.memory import is_out_of_memory, keep_freed_memory, release_memory
from lib.infers.predictor import Stitching, predict
from lib.networks.checkpoint import Checkpoint, load_weights, write_checkpoint
from lib.networks.layouts import StateDict, strip_wrappers
from lib.networks.precision import autocast, place_for_training, resolve_precision
from lib.networks.unetr import Builder, build_unetr, load_encoder
from lib.trainers.datasets import SeededItems, build_crops, build_dataset, build_loader
from lib.trainers.memory import forward_in_parts
from lib.trainers.optimization import build_average, build_loss, build_optimizer, build_schedule, leave_out_missing
from lib.trainers.parallel import ResumableSampler, gather, loss_scale, rank_and_world_size
from lib.trainers.pause import wait_while_paused
from lib.trainers.plan import StepLadder, StepPlan, StepPlanner
from lib.trainers.reporting.progress import Progress, ProgressReporter, memory_in_use
from lib.trainers.reporting.tracking import Tracking
from lib.trainers.resume import fingerprint, read_state, write_state
from lib.transforms.preprocess import IMAGE, LABEL

logger = logging.getLogger("unetr.train")

BEST_FILE = "best.pt"
MAX_STEPS_WITHOUT_FINITE_GRADIENT = 20
# The base network's state is 1.5 GB: writing takes at most a twentieth of a run's time.
STATE_PAUSE_FACTOR = 20
# Each holds a case in memory while it draws from it.
MOST_LOADING_THREADS = 8
# of a run, kept as they are
COUNTS = ("step", "epoch", "step_of_epoch", "bad_steps", "losses", "epochs_since_best", "done")


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


def run_training(plan: TrainingJob, on_step: Callable[[int], None] | None = None) -> TrainingResult:
    """Train as planned.

    Args:
        plan: what to train.
        on_step: called after each step with its number; raising from it ends the run.

    Raises:
        TrainingError: when the gradients stay infinite or NaN.
        InputError: when a case turns out to be unusable.
    """
    run = None
    try:
        run = _Run(plan)
        return run.train(on_step)
    except RuntimeError as error:
        if (unusable := _input_error_in(error)) is not None:
            raise unusable from None
        raise
    finally:
        if run is not None:
            run.close()


def _input_error_in(error: BaseException) -> InputError | None:
    """The sentence about a case that MONAI's transforms wrap into "applying transform <...>"."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    return cause


def count_loading_threads(device: torch.device, processes: int) -> int:
    """Threads that prepare cases and draw crops: one beside a CPU that trains, several for a GPU, which is faster."""
    if device.type == "cpu":
        return 1
    return max(1, min(MOST_LOADING_THREADS, (os.cpu_count() or 1) // (2 * processes)))


class _Run:
    """One run's state."""

    def __init__(self, plan: TrainingJob) -> None:
        self.plan, self.preset, self.recipe = plan, plan.preset, plan.preset.training
        self.rank, self.world_size = rank_and_world_size()
        set_determinism(self.recipe.seed)
        planner, alone = StepPlanner(plan.memory_budget, CostBook(plan.costs)), self.world_size == 1
        step_plan = planner.plan(self.preset, len(plan.train_cases), plan.device, whole=not alone)
        logger.info("%s", step_plan.explain())
        self.device = torch.device(step_plan.device)
        if step_plan.keeps_freed_memory:
            keep_freed_memory()
        self.dtype = resolve_precision(self.recipe.precision, self.device)
        self.network = self._build_network(step_plan.checkpointing)
        self.ladder = StepLadder(step_plan, planner, self.preset, self.network, may_shrink=alone)
        self.trained = self._distribute(self.network)
        self.crops, self.sampler, self.loader = self._build_train_loader()
        self.validation = self._build_validation_loader()
        self.windows_at_once = self.preset.inference.window_batch_size
        steps = self.recipe.max_epochs * len(self.loader)
        self.total_steps = min(steps, plan.max_steps or steps)
        self.loss = build_loss(self.recipe)
        self.optimizer = build_optimizer(self.network, self.recipe)
        self.schedule = build_schedule(self.optimizer, self.recipe, self.total_steps)
        self.average = build_average(self.network, self.recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.reporter = self._build_reporter() if self.rank == 0 else None
        self.step, self.epoch, self.step_of_epoch, self.bad_steps = 0, 1, 0, 0
        self.losses, self.validations = list[float](), list[Validation]()
        self.best: tuple[float, int, dict[str, float], StateDict] | None = None
        self.epochs_since_best = 0
        self.done = False
        self.seconds_before = 0.0
        if plan.resume:
            self._restore()
        self.started = self.state_written = time.monotonic()
        self.state_pause = plan.state_seconds
        self.steps_before = self.step

    def train(self, on_step: Callable[[int], None] | None) -> TrainingResult:
        while not self.done:
            self._train_epoch(on_step)
            last = self.epoch == self.recipe.max_epochs or self.step >= self.total_steps
            if self.validation is not None and (last or self.epoch % self.recipe.val_interval == 0):
                self._validate_and_keep()
            self.done = self._agree_to_stop() or last
            self.epoch, self.step_of_epoch = self.epoch + (not self.done), 0
            if self.done or self._state_is_due():
                self._keep_state()
        return self._result()

    def close(self) -> None:
        """Flush what is reported, and end the threads that prefetch."""
        if self.reporter is not None:
            self.reporter.close()
        if isinstance(self.crops.items, SmartCacheDataset):
            self.crops.items.shutdown()

    def _train_epoch(self, on_step: Callable[[int], None] | None) -> None:
        self.trained.train()
        self._begin_epoch()
        for batch in self.loader:
            wait_while_paused(self.plan.pause_file)
            self.losses.append(self._train_step(*self.crops.change(batch, self.device), batch[MISSING]))
            self.step, self.step_of_epoch = self.step + 1, self.step_of_epoch + 1
            if self.reporter is not None:
                self.reporter.step(self._progress())
            if on_step is not None:
                on_step(self.step)
            if self.step >= self.total_steps:
                break
            if self._state_is_due() and self.step_of_epoch < len(self.loader):
                self._keep_state()
        if isinstance(self.crops.items, SmartCacheDataset):
            self.crops.items.update_cache()

    def _begin_epoch(self) -> None:
        """Which crops are drawn follows from the seed and the epoch, so that a resumed run draws the same."""
        self.crops.epoch = self.epoch
        self.sampler.begin(self.epoch, self.step_of_epoch * int(self.loader.batch_size or 1))

    def _state_is_due(self) -> bool:
        return self.rank == 0 and time.monotonic() - self.state_written >= self.state_pause

    def _keep_state(self) -> None:
        """Write all that the rest of the run depends on."""
        if self.rank != 0:
            return
        moving = {name: getattr(self, name).state_dict() for name in self._stateful}
        counts = {name: getattr(self, name) for name in COUNTS}
        seconds = self.seconds_before + time.monotonic() - self.started
        validations = [(validation.step, validation.dice) for validation in self.validations]
        plain = {"best": self.best, "validations": validations, "seconds": seconds}
        start = time.monotonic()
        write_state(self.plan.run_dir, {"fingerprint": self._fingerprint} | moving | counts | plain)
        self.state_written = time.monotonic()
        if self.plan.state_seconds:
            self.state_pause = max(self.plan.state_seconds, STATE_PAUSE_FACTOR * (self.state_written - start))

    def _restore(self) -> None:
        """Go on where the state on disk was written."""
        state = read_state(self.plan.run_dir, self._fingerprint)
        if state is None:
            return
        for name in self._stateful:
            getattr(self, name).load_state_dict(state[name])
        for name in COUNTS:
            setattr(self, name, state[name])
        self.best = state["best"]
        self.validations = [Validation(step, dice) for step, dice in state["validations"]]
        self.seconds_before = state["seconds"]
        logger.info("resumed after step %d of %d", self.step, self.total_steps)

    @property
    def _stateful(self) -> tuple[str, ...]:
        return ("network", "average", "optimizer", "schedule", "scaler")

    @property
    def _fingerprint(self) -> str:
        train, held_out = ([case.case_id for case in c] for c in (self.plan.train_cases, self.plan.validation_cases))
        return fingerprint(self.preset, train, held_out, self.plan.max_steps)

    def _train_step(self, image: torch.Tensor, label: torch.Tensor, missing: torch.Tensor) -> float:
        torch.manual_seed(hash((self.recipe.seed, self.step, self.rank)) % 2**63)  # dropout repeats itself, too
        image = image.to(memory_format=torch.channels_last_3d)
        loss, norm = self._compute_gradients(image, label, missing, self.dtype)
        if self.dtype is torch.bfloat16 and not torch.isfinite(norm):
            logger.info("step %d: gradients in bf16 are not finite; computed again in fp32", self.step + 1)
            loss, norm = self._compute_gradients(image, label, missing, torch.float32)
        # The norm and not the loss: a finite loss can have infinite gradients, and all processes see the same norm, so
        # that they decide alike.
        if torch.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.schedule.step()
            self.average.update_parameters(self.network)
            self.bad_steps = 0
        else:
            self._count_bad_step()
        self.scaler.update()
        return float(loss.detach())

    def _compute_gradients(
        self, image: torch.Tensor, label: torch.Tensor, missing: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clipped gradients of a step; returns its loss and the norm before clipping."""
        loss = self.ladder.run(lambda at_once: self._backward(image, label, missing, at_once, dtype))
        self.scaler.unscale_(self.optimizer)
        return loss, nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.gradient_clip_norm)

    def _backward(
        self, image: torch.Tensor, label: torch.Tensor, missing: torch.Tensor, at_once: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Gradients of the loss over all crops, of which ``at_once`` go through the network at a time."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, dtype):
            logits = forward_in_parts(self.trained, image, at_once)
        shown, target = leave_out_missing(logits.float(), label.float(), missing)
        loss: torch.Tensor = self.loss(gather(shown), gather(target))
        self.scaler.scale(loss * loss_scale()).backward()
        return loss

    def _count_bad_step(self) -> None:
        """Gradients that are not finite change nothing; too many such steps in a row end the run."""
        self.bad_steps += 1
        if self.bad_steps >= MAX_STEPS_WITHOUT_FINITE_GRADIENT:
            raise TrainingError(
                f"the gradients were not finite for {self.bad_steps} steps; lower learning_rate "
                f"({self.recipe.learning_rate:g}) or set precision to fp32"
            )

    def _validate_and_keep(self) -> None:
        """Validate the averaged weights, and keep them if they are the best so far."""
        dice = self._validate(self.average.module)
        mean = mean_known(dice.values())
        self.validations.append(Validation(self.step, dice))
        self.epochs_since_best += self.recipe.val_interval
        if self.best is None or mean > self.best[0] or math.isnan(self.best[0]):
            self.epochs_since_best = 0
            self.best = (mean, self.epoch, dice, self._averaged_weights())
            info = {"epoch": self.epoch, "mean_dice": mean, "dice": dice}
            write_checkpoint(self.plan.run_dir / BEST_FILE, Checkpoint(self.best[3], self.preset, info))
        if self.reporter is not None:
            self.reporter.validation(self._progress(dice))

    def _agree_to_stop(self) -> bool:
        """Whether validation has not improved for the patience; rank 0 decides for all."""
        stop = 0 < self.recipe.early_stop_patience <= self.epochs_since_best
        if self.world_size == 1:
            return stop
        decision = torch.tensor(int(stop), device=self.device)
        dist.broadcast(decision, src=0)
        return bool(decision.item())

    def _validate(self, network: nn.Module) -> dict[str, float]:
        network.eval()
        rows = []
        for item in self.validation or ():
            image, label = item[IMAGE][0], item[LABEL][0, 0].numpy()
            predicted = self._predict(network, image)
            dice = dice_per_label(predicted, label, self.preset.label_indices)
            rows.append(without_missing(dice, self.preset.label_indices, item[MISSING][0].nonzero().ravel().tolist()))
        return mean_per_label(rows)

    def _predict(self, network: nn.Module, image: torch.Tensor) -> LabelArray:
        """Labels of one image; with fewer windows at once from the first time on that memory runs out."""
        while True:
            try:
                stitching = Stitching(self.windows_at_once)
                return predict(network, image, self.preset, self.device, self.dtype, stitching).labels
            except (RuntimeError, MemoryError) as error:
                if self.windows_at_once == 1 or not is_out_of_memory(error):
                    raise
            self.windows_at_once //= 2
            release_memory(self.device)
            logger.warning("memory ran out in a validation; from now on: %d windows at a time", self.windows_at_once)

    def _result(self) -> TrainingResult:
        mean, epoch, dice, weights = self.best or (math.nan, self.epoch, {}, self._averaged_weights())
        seconds = self.seconds_before + time.monotonic() - self.started
        logger.info("finished after %d steps; best epoch %d, mean dice %.4f", self.step, epoch, mean)
        return TrainingResult(
            weights, epoch, dice, tuple(self.losses), seconds, tuple(self.validations), self.ladder.plan
        )

    def _progress(self, dice: Mapping[str, float] | None = None) -> Progress:
        steps = self.step - self.steps_before
        eta = (time.monotonic() - self.started) / steps * (self.total_steps - self.step) if steps else math.inf
        known = dice if dice is not None else self.best[2] if self.best else {}
        return Progress(
            epoch=self.epoch,
            max_epochs=self.recipe.max_epochs,
            step=self.step,
            total_steps=self.total_steps,
            loss=self.losses[-1],
            learning_rate=float(self.schedule.get_last_lr()[0]),
            eta_seconds=eta,
            dice=known,
            best_mean_dice=self.best[0] if self.best else None,
            memory=memory_in_use(self.device),
            plan=self.ladder.plan.explain(),
        )

    def _build_reporter(self) -> ProgressReporter:
        recipe = self.recipe.model_dump(mode="json", exclude={"augmentation"})
        params = recipe | {"preset": self.preset.name, "training_cases": len(self.plan.train_cases)}
        return ProgressReporter(self.plan.run_dir, Tracking(self.plan.tracking, self.plan.run_dir.name, params))

    def _averaged_weights(self) -> StateDict:
        state = strip_wrappers(self.average.module.state_dict())
        return {key: value.detach().cpu().clone() for key, value in state.items()}

    def _build_network(self, checkpointing: bool) -> nn.Module:
        network = self.plan.build(self.preset, checkpointing)
        if self.plan.encoder is not None:
            load_encoder(network, self.plan.encoder)
        if self.plan.start is not None:
            load_weights(network, self.plan.start)
        place_for_training(network, self.device)
        return network

    def _distribute(self, network: nn.Module) -> nn.Module:
        """Average gradients over processes, where there are several."""
        if self.world_size == 1:
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        # MONAI's transformer blocks hold a norm for cross-attention that no forward pass uses.
        return DistributedDataParallel(network, device_ids=ids, find_unused_parameters=True)

    def _build_train_loader(self) -> tuple[SeededItems, ResumableSampler, DataLoader]:
        cases, count = self.plan.train_cases, self.recipe.crops_per_case
        kind, memory = self.plan.dataset, self.ladder.plan.cache_bytes
        # A GPU changes crops in no time; those of a step would take a tenth of a second of a core.
        later = self.device.type == "cuda"
        crops = build_crops(cases, self.preset, kind, self._cache_dir, count, memory, later)
        if isinstance(crops.items, SmartCacheDataset):
            crops.items.start()
        sampler = ResumableSampler(crops, self.recipe.seed)
        batch_size = min(self.recipe.batch_size, len(cases))
        threads = count_loading_threads(self.device, self.world_size)
        return crops, sampler, build_loader(crops, self.plan.dataloader, batch_size, sampler, threads)

    def _build_validation_loader(self) -> DataLoader | None:
        if not self.plan.validation_cases or self.rank != 0:
            return None
        kind = "Dataset" if self.plan.dataset == "Dataset" else "PersistentDataset"
        dataset = build_dataset(self.plan.validation_cases, self.preset, kind, self._cache_dir)
        return build_loader(dataset, "DataLoader", batch_size=1)

    @property
    def _cache_dir(self) -> Path:
        return self.plan.cache_dir or self.plan.run_dir / "cache"
