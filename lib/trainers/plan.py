"""Memory planning for training steps, and fallbacks after memory runs out.

The recipe states the number of crops of a step. The plan states how many of them are computed at a time, whether
activations are recomputed, and how many cases may be cached in memory. All plans yield the same gradients.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from lib.configs.preset import Preset
from lib.errors import TrainingError
from lib.infers.costs import CostBook, Limits, WindowCost, cost_key
from lib.infers.memory import GIB, MIB, MemoryProbe, is_out_of_memory, release_memory
from lib.infers.plan import MEASUREMENT_MARGIN
from lib.networks.placement import Placement
from lib.networks.precision import resolve_precision
from lib.networks.unetr import recompute_blocks
from lib.trainers.memory import FLOAT_BYTES, count_kept_bytes, measure_step

logger = logging.getLogger("unetr.train")

# Factor for memory besides stored activations: their gradients, scratch space of convolutions, and fragmentation.
SCRATCH_FACTOR = 1.6
# Weights, AdamW's two moments, and the average; gradients are allocated while activations are freed.
COPIES_OF_WEIGHTS = 4
# Arrays of the loss for each crop of the step: logits in fp32, their softmax, and a gradient.
COPIES_OF_LOGITS = 3
CACHE_SHARE = 0.25
# Smallest share of the free memory that is left for requests to a server on the same device, besides a window and the
# weights.
INFERENCE_SHARE = 0.1
TRANSFORMER_BLOCKS = 12  # of MONAI's UNETR
# A step that fits this many times needs no choice between plans, and is not measured.
ROOMY = 8
# Kept memory is fragmented: 1.7 GiB in addition to 6.9 GiB for a step of abdomen_ct in fp32 on a CPU.
KEEPING_FACTOR = 1.5


@dataclass(frozen=True)
class StepPlan:
    """How a training step is computed.

    Attributes:
        device: training device.
        precision: number format of the forward pass.
        crops: crops of a step, as in the recipe.
        crops_per_case: crops from each case.
        at_once: crops whose activations exist at the same time.
        checkpointing: whether the transformer's activations are recomputed.
        needed_bytes: memory of weights, optimiser and a step on the device.
        free_bytes: available memory.
        cache_bytes: host memory for preprocessed cases.
        seconds: duration of a step; NaN if it was not measured.
        fallbacks: descriptions of the plans that were tried and did not fit.
    """

    device: str
    precision: str
    crops: int
    crops_per_case: int
    at_once: int
    checkpointing: bool
    needed_bytes: int
    free_bytes: int
    cache_bytes: int = 0
    seconds: float = math.nan
    fallbacks: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the needs do not exceed the available memory."""
        return self.needed_bytes <= self.free_bytes

    @property
    def keeps_freed_memory(self) -> bool:
        """Whether a process on the CPU may keep freed memory for speed, despite fragmentation."""
        return self.device == "cpu" and KEEPING_FACTOR * self.needed_bytes <= self.free_bytes

    @property
    def parts(self) -> int:
        """Number of batches into which a step is split, whose gradients are accumulated."""
        return math.ceil(self.crops / self.at_once)

    def explain(self) -> str:
        """A one-line description for the log and for users."""
        cases = max(1, self.at_once // self.crops_per_case)
        batch = f"{cases} case{'s' * (cases > 1)} x {min(self.at_once, self.crops_per_case)} crops at a time"
        parts = f", {self.parts} parts a step" if self.parts > 1 else ""
        recomputed = "recomputed" if self.checkpointing else "kept"
        memory = f"{self.needed_bytes / GIB:.2f} of {self.free_bytes / GIB:.2f} GiB"
        keeping = ", freed memory is kept" if self.keeps_freed_memory else ""
        known = "counted" if math.isnan(self.seconds) else f"measured; about {self.seconds:.2g} s a step"
        return (
            f"{self.crops} crops a step on {self.device} in {self.precision}: {batch}{parts}, the transformer's "
            f"activations {recomputed}: {memory} ({known}){keeping}; "
            f"up to {self.cache_bytes / GIB:.2f} GiB of cases in memory"
            + "".join(f"; gave up: {what}" for what in self.fallbacks)
        )

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON data for a run's status and report."""
        return {**asdict(self), "parts": self.parts, "text": self.explain()}


class StepPlanner:
    """Plans training steps within a budget.

    Args:
        budget: bytes of host memory that this process may use; by default all free memory minus a reserve.
        book: store of measured costs.
        memory: probe of the free memory.
        measure: measures a step.
        beside_server: whether a server answers requests on the same device, for which memory is reserved.
    """

    def __init__(
        self,
        budget: int | None = None,
        book: CostBook | None = None,
        memory: MemoryProbe | None = None,
        measure: Callable[[Placement, int, bool], WindowCost] = measure_step,
        beside_server: bool = False,
    ) -> None:
        self.budget, self._beside_server = budget, beside_server
        self.book = book or CostBook()
        self._memory, self._measure_step = memory or MemoryProbe(), measure

    def plan(
        self,
        preset: Preset,
        cases: int,
        device: torch.device,
        whole: bool = False,
        always_measure: bool = False,
        with_teacher: bool = False,
    ) -> StepPlan:
        """The fastest plan that fits: all crops at once, recomputed transformer blocks, smaller parts, or the CPU.

        Args:
            preset: the preset; if its recipe requests checkpointing, the plan has it too.
            cases: number of training cases, which bounds the batch size.
            device: preferred device.
            whole: whether the step must neither be split nor moved to another device, since other processes would have
                to do the same.
            always_measure: whether to measure even if there is only one choice.
            with_teacher: whether a second network, which is not trained, gives the targets.

        Raises:
            TrainingError: if no plan fits, with the required and the available memory.
        """
        plan = self._on(preset, cases, device, whole, always_measure, with_teacher)
        if plan.fits or whole:
            return plan
        if device.type == "cpu":
            raise TrainingError(
                f"a training step of {preset.name!r} ({plan.at_once} crop of {'x'.join(map(str, preset.roi_size))} at "
                f"a time) needs {plan.needed_bytes / GIB:.2f} GiB of memory; there are {plan.free_bytes / GIB:.2f}; "
                "valid: a preset with a smaller roi_size or network, or a larger --conf memory_budget"
            )
        cpu = torch.device("cpu")
        on_cpu = self.plan(preset, cases, cpu, always_measure=always_measure, with_teacher=with_teacher)
        return replace(on_cpu, fallbacks=(f"{device} ({plan.needed_bytes / GIB:.2f} GiB)", *on_cpu.fallbacks))

    def _on(
        self, preset: Preset, cases: int, device: torch.device, whole: bool, always_measure: bool, with_teacher: bool
    ) -> StepPlan:
        """The fastest plan on one device that fits, or otherwise the smallest plan."""
        recipe, where = preset.training, placement_for(preset, device)
        crops = min(recipe.batch_size, cases) * recipe.crops_per_case
        host = self._memory.of_host(self.budget)
        free = self._memory.of_device(device) if device.type == "cuda" else host
        free -= self._for_inference(preset, device, free)
        limits = self.book.limits(step_key(where))
        ways = _ways(crops, recipe.activation_checkpointing or limits.recompute, limits.window_batch or crops, whole)
        plan: StepPlan | None = None
        for at_once, recompute in ways:
            needs = _Needs(preset, crops, recompute, where.dtype, with_teacher)
            costs = self._costs(needs, where, at_once, free, always_measure)
            needed = needs.bytes(at_once, costs)
            left = max(0, host - needed) if device.type == "cpu" else host
            plan = StepPlan(
                device=str(device),
                precision=where.precision,
                crops=crops,
                crops_per_case=recipe.crops_per_case,
                at_once=at_once,
                checkpointing=recompute,
                needed_bytes=needed,
                free_bytes=free,
                cache_bytes=int(CACHE_SHARE * left),
                seconds=needs.seconds(at_once, costs),
            )
            if plan.fits:
                break
        assert plan is not None
        return plan

    def _for_inference(self, preset: Preset, device: torch.device, free: int) -> int:
        """Bytes on the device that are reserved for requests to the server."""
        if not self._beside_server:
            return 0
        dtype = resolve_precision("auto", device)
        window = self.book.cost(cost_key(Placement(preset, device, dtype)), 1)
        weights = count_kept_bytes(preset, False)[1] // FLOAT_BYTES * dtype.itemsize
        needed = 0 if window is None else window.bytes + weights
        return min(free, max(int(INFERENCE_SHARE * free), needed))

    def _costs(self, needs: _Needs, where: Placement, at_once: int, free: int, always: bool) -> list[WindowCost]:
        """Measured costs of one crop, and of two crops if more than one is computed at once.

        Only steps whose computed memory fits are measured, because on a CPU a step that does not fit kills the process.
        """
        counted = needs.bytes(at_once, [])
        key = step_key(where) + (" recomputed" if needs.recompute else " kept")
        costs = []
        for crops in (1, 2)[:at_once]:
            cost = self.book.cost(key, crops)
            if cost is None and needs.bytes(crops, []) <= free and (always or ROOMY * counted > free):
                cost = self._measure(key, needs, where, crops)
            if cost is None:
                break
            costs.append(cost)
        return costs

    def _measure(self, key: str, needs: _Needs, where: Placement, crops: int) -> WindowCost | None:
        try:
            cost = self._measure_step(where, crops, needs.recompute)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        self.book.keep(key, crops, cost)
        logger.info("measured %s, %d crops: %.0f MiB, %.2f s", key, crops, cost.bytes / MIB, cost.seconds)
        return cost

    def next_fallback(self, plan: StepPlan, preset: Preset, device: torch.device) -> StepPlan | None:
        """The next plan after memory ran out on ``plan``, kept for a day; None if there is no smaller one."""
        if plan.at_once > 1:
            what = f"{plan.at_once} crops at a time"
            new = replace(plan, at_once=plan.at_once // 2, fallbacks=(*plan.fallbacks, what))
        elif not plan.checkpointing:
            new = replace(
                plan, checkpointing=True, fallbacks=(*plan.fallbacks, "keeping the transformer's activations")
            )
        else:
            return None
        key = step_key(placement_for(preset, device))
        self.book.limit(key, Limits(window_batch=new.at_once, recompute=new.checkpointing))
        return new


class StepLadder:
    """Runs steps as planned, and in smaller and smaller parts after memory has run out.

    Args:
        plan: initial plan.
        planner: stores the plans that did not fit.
        preset: the preset.
        network: network whose transformer activations are recomputed as the last fallback.
        may_shrink: false if other processes would have to shrink too.
    """

    def __init__(
        self, plan: StepPlan, planner: StepPlanner, preset: Preset, network: nn.Module, may_shrink: bool = True
    ) -> None:
        self.plan = plan
        self._planner, self._preset, self._network, self._may_shrink = planner, preset, network, may_shrink

    def run(self, step: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Call ``step`` with the number of crops at a time; repeat it with fewer crops while memory runs out.

        Raises:
            RuntimeError, MemoryError: if one crop does not fit.
        """
        device = torch.device(self.plan.device)
        while True:
            try:
                return step(self.plan.at_once)
            except (RuntimeError, MemoryError) as error:
                if not self._may_shrink or not is_out_of_memory(error):
                    raise
                smaller = self._planner.next_fallback(self.plan, self._preset, device)
                if smaller is None:
                    raise
            # outside of the except clause, since the error's traceback keeps references to memory that must be freed
            self.plan = smaller
            if smaller.checkpointing:
                recompute_blocks(self._network)
            release_memory(device)
            logger.warning("memory ran out in a training step; from now on: %s", self.plan.explain())


class _Needs:
    """Bytes and seconds of steps of one network, with or without a teacher."""

    def __init__(
        self, preset: Preset, crops: int, recompute: bool, dtype: torch.dtype, with_teacher: bool = False
    ) -> None:
        self.recompute = recompute
        self._crops, self._half = crops, dtype is not torch.float32
        self._kept, self._weights = count_kept_bytes(preset, recompute)
        if recompute:  # during the backward pass, the activations of only one block exist at a time
            self._kept += (count_kept_bytes(preset, False)[0] - self._kept) // TRANSFORMER_BLOCKS
        self._logits = COPIES_OF_LOGITS * FLOAT_BYTES * preset.out_channels * math.prod(preset.roi_size)
        # its forward pass is over before the trained network's begins; its logits become the targets
        self._teacher = with_teacher * (self._weights + crops * self._logits)

    def bytes(self, at_once: int, costs: Sequence[WindowCost]) -> int:
        """Bytes of weights, optimiser and a step: measured if available, otherwise computed from shapes."""
        waiting = (self._crops - at_once) * self._logits
        return COPIES_OF_WEIGHTS * self._weights + self._teacher + self._passes(at_once, costs) + waiting

    def seconds(self, at_once: int, costs: Sequence[WindowCost]) -> float:
        """Seconds of a step; a recomputed part has a second forward pass, half as long as a backward pass."""
        if not costs:
            return math.nan
        again = 4 / 3 if at_once < self._crops else 1.0
        return again * self._crops * costs[-1].seconds / len(costs)

    def _passes(self, crops: int, costs: Sequence[WindowCost]) -> int:
        """Bytes of forward and backward pass: those of the first crop, and those of each further one."""
        if len(costs) < min(2, crops):
            # autocast keeps the weights in half precision too
            return int((self._kept * crops * SCRATCH_FACTOR + self._weights) / (1 + self._half)) + crops * self._logits
        # the second measurement reuses some kept memory, so the computed bytes are a lower bound
        least = int(self._kept / (1 + self._half)) + self._logits
        more = max(least, costs[1].bytes - costs[0].bytes) if crops > 1 else 0
        return int(MEASUREMENT_MARGIN * (costs[0].bytes + (crops - 1) * more))


def count_step_bytes(preset: Preset, crops: int, recompute: bool, dtype: torch.dtype) -> int:
    """Bytes of weights, optimiser and a step of ``crops`` crops at once, computed from shapes."""
    return _Needs(preset, crops, recompute, dtype).bytes(crops, [])


def placement_for(preset: Preset, device: torch.device) -> Placement:
    """The preset, device and number format of a training."""
    return Placement(preset, device, resolve_precision(preset.training.precision, device))


def step_key(where: Placement) -> str:
    """The key under which costs and limits of a step are stored."""
    return f"training {cost_key(where)}"


def _ways(crops: int, recompute: bool, most: int, whole: bool) -> list[tuple[int, bool]]:
    """Crops at once and checkpointing, fastest first. Any part takes as long as a checkpointed step."""
    sizes = [] if whole else _halvings(crops)[1:]
    kept = [(crops, False), (crops, True), *((size, False) for size in sizes)]
    last = [] if whole else [(1, True)]
    ways = [(crops, True), *((size, True) for size in sizes)] if recompute else [*kept, *last]
    return [way for way in dict.fromkeys(ways) if way[0] <= most or whole]


def _halvings(most: int) -> list[int]:
    return [most, *_halvings(most // 2)] if most > 1 else [1]
