"""Optimisation steps: loss, gradients, clipping, optimiser, schedule and weight averaging."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from monai.networks.utils import one_hot
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lib.configs.preset import Training
from lib.errors import TrainingError
from lib.networks.checkpoint import load_weights
from lib.networks.layouts import StateDict, strip_wrappers
from lib.networks.precision import autocast, place_for_training
from lib.networks.unetr import load_encoder
from lib.trainers.memory import forward_in_parts
from lib.trainers.optimization import build_average, build_loss, build_optimizer, build_schedule, leave_out_missing
from lib.trainers.parallel import gather, loss_scale, rank_and_world_size
from lib.trainers.plan import StepLadder
from lib.trainers.run.data import Batch
from lib.trainers.run.distillation import DistillationLoss, distilled_targets
from lib.trainers.run.job import TrainingJob
from lib.trainers.run.state import RunState, Stateful

logger = logging.getLogger("unetr.train")

MAX_STEPS_WITHOUT_FINITE_GRADIENT = 20

Forward = Callable[[nn.Module, torch.Tensor, int], torch.Tensor]
LossBuilder = Callable[[Training], nn.Module]


class StepTrainer:
    """Takes optimisation steps.

    Args:
        network: on the device of the ladder's plan.
        ladder: chooses how many crops are computed at a time.
        recipe: recipe of the run, whose seed makes steps reproducible.
        total_steps: number of steps of the run, over which the learning rate decays.
        dtype: number format of the forward pass.
        build_loss: builds the loss of a recipe.
        forward: computes the logits of all crops, a given number at a time.
        teacher: network whose predictions are the targets for structures that labels lack; None if they lack none.
    """

    def __init__(
        self,
        network: nn.Module,
        ladder: StepLadder,
        recipe: Training,
        total_steps: int,
        dtype: torch.dtype,
        build_loss: LossBuilder = build_loss,
        forward: Forward = forward_in_parts,
        teacher: nn.Module | None = None,
    ) -> None:
        self.network, self.ladder = network, ladder
        self._device, self._dtype, self._recipe = torch.device(ladder.plan.device), dtype, recipe
        self._trained = _distribute(network, self._device)
        self._loss, self._forward = build_loss(recipe), forward
        self._teacher, self._distillation_loss = teacher, DistillationLoss(recipe)
        self._optimizer = build_optimizer(network, recipe)
        self._schedule = build_schedule(self._optimizer, recipe, total_steps)
        self._average = build_average(network, recipe)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=dtype is torch.float16)

    @property
    def stateful(self) -> dict[str, Stateful]:
        """Everything that changes with each step, by name."""
        return {
            "network": self.network,
            "average": self._average,
            "optimizer": self._optimizer,
            "schedule": self._schedule,
            "scaler": self._scaler,
        }

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    @property
    def average(self) -> nn.Module:
        """The network with averaged weights."""
        return self._average.module

    def averaged_weights(self) -> StateDict:
        """A copy of the averaged weights in host memory."""
        state = strip_wrappers(self.average.state_dict())
        return {key: value.detach().cpu().clone() for key, value in state.items()}

    def begin_epoch(self) -> None:
        """Put the network into training mode."""
        self._trained.train()

    def take(self, state: RunState, batch: Batch, meanwhile: Callable[[], None] = lambda: None) -> float:
        """Compute one step; returns its loss.

        The host synchronises with a GPU once, for loss and norm together; the optimiser's kernels run asynchronously.

        Args:
            state: counts steps whose gradients are not finite.
            batch: the crops.
            meanwhile: called after the kernels of the gradients have been launched, before the host waits for them.

        Raises:
            TrainingError: if the gradients stay infinite or NaN.
        """
        rank = rank_and_world_size()[0]
        torch.manual_seed(hash((self._recipe.seed, state.step, rank)) % 2**63)  # makes dropout reproducible too
        batch = batch._replace(image=batch.image.to(memory_format=torch.channels_last_3d))
        begun = self._compute_gradients(batch, self._dtype)
        meanwhile()
        loss, norm = _read(*begun)
        if self._dtype is torch.bfloat16 and not math.isfinite(norm):
            logger.info("step %d: gradients in bf16 are not finite; computed again in fp32", state.step + 1)
            loss, norm = _read(*self._compute_gradients(batch, torch.float32))
        # The norm decides and not the loss, because a finite loss can have infinite gradients, and because all
        # processes have the same norm and so decide alike.
        if math.isfinite(norm):
            self._scaler.step(self._optimizer)
            self._schedule.step()
            self._average.update_parameters(self.network)
            state.bad_steps = 0
        else:
            self._count_bad_step(state)
        self._scaler.update()
        return loss

    def _compute_gradients(self, batch: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute and clip the gradients of a step; returns its loss and the norm before clipping."""
        loss = self.ladder.run(lambda at_once: self._backward(batch, at_once, dtype))
        self._scaler.unscale_(self._optimizer)
        return loss, nn.utils.clip_grad_norm_(self.network.parameters(), self._recipe.gradient_clip_norm)

    def _backward(self, batch: Batch, at_once: int, dtype: torch.dtype) -> torch.Tensor:
        """Compute the gradients of the loss over all crops, of which ``at_once`` are in the network at a time."""
        self._optimizer.zero_grad(set_to_none=True)
        guessed = self._ask_teacher(batch, at_once, dtype)
        with autocast(self._device, dtype):
            logits = self._forward(self._trained, batch.image, at_once)
        shown, label = leave_out_missing(logits.float(), batch.label.float(), batch.missing)
        loss: torch.Tensor
        if self._teacher is None:
            loss = self._loss(gather(shown), gather(label))
        else:  # all processes have a teacher, or none has, so that they gather the same tensors
            predicted = batch.predicted.to(self._device, torch.uint8)  # Gloo gathers no bool
            if guessed is None:
                targets = one_hot(label, shown.shape[1])
            else:
                targets = distilled_targets(guessed, label, predicted.bool())
            loss = self._distillation_loss(gather(shown), gather(targets), gather(predicted).bool())
        self._scaler.scale(loss * loss_scale()).backward()
        return loss

    @torch.no_grad()
    def _ask_teacher(self, batch: Batch, at_once: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The teacher's logits of all crops, without missing classes; None if no label has a predicted class."""
        if self._teacher is None or not batch.predicted.any():
            return None
        with autocast(self._device, dtype):
            logits = torch.cat([self._teacher(part) for part in batch.image.split(at_once)])
        return leave_out_missing(logits.float(), batch.label.float(), batch.missing)[0]

    def _count_bad_step(self, state: RunState) -> None:
        """Count a step with gradients that are not finite, which changes no weights; too many in a row end the run."""
        state.bad_steps += 1
        if state.bad_steps >= MAX_STEPS_WITHOUT_FINITE_GRADIENT:
            raise TrainingError(
                f"the gradients were not finite for {state.bad_steps} steps; lower learning_rate "
                f"({self._recipe.learning_rate:g}) or set precision to fp32"
            )


def _read(loss: torch.Tensor, norm: torch.Tensor) -> tuple[float, float]:
    """Both numbers on the host, with one synchronisation with a GPU."""
    first, second = torch.stack([loss.detach().float(), norm.detach().float()]).tolist()
    return first, second


def build_network(job: TrainingJob, device: torch.device, checkpointing: bool) -> nn.Module:
    """The job's network on the device, with its initial weights."""
    network = job.build(job.preset, checkpointing)
    if job.encoder is not None:
        load_encoder(network, job.encoder)
    if job.start is not None:
        load_weights(network, job.start)
    place_for_training(network, device)
    return network


def build_teacher(job: TrainingJob, device: torch.device) -> nn.Module | None:
    """The job's teacher on the device, whose weights stay as they are; None if the job has none."""
    if job.teacher is None:
        return None
    network = build_network(replace(job, start=job.teacher, encoder=None), device, False)
    return network.eval().requires_grad_(False)


def _distribute(network: nn.Module, device: torch.device) -> nn.Module:
    """Average gradients over processes, if there are several."""
    if rank_and_world_size()[1] == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    # MONAI's transformer blocks have a norm for cross-attention that no forward pass uses.
    return DistributedDataParallel(network, device_ids=ids, find_unused_parameters=True)
