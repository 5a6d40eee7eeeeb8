"""How a training step is computed within the memory that there is, and what follows when memory runs out.

The recipe says how many crops a step learns from; the plan says how many of them exist at a time, whether activations
are recomputed, and how many cases may be kept in memory beside them. What is learnt is the same with every plan.
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

# Beside what is kept for the backward pass: its own gradients, a convolution's scratch space, the allocator's gaps.
SCRATCH_FACTOR = 1.6
# Weights, AdamW's two moments, and the average; gradients come while activations go.
COPIES_OF_WEIGHTS = 4
# Of the loss, for each crop of the step: logits in fp32, their softmax, and a gradient.
COPIES_OF_LOGITS = 3
CACHE_SHARE = 0.25
# Of what is free, for the requests of a server on the same device: at least so much, and a window with the weights.
INFERENCE_SHARE = 0.1
TRANSFORMER_BLOCKS = 12  # of MONAI's UNETR
# Where a step fits so many times over, there is nothing to choose, and it is not measured.
ROOMY = 8
# Freed memory that is kept has gaps: 1.7 GiB beside 6.9 of a step of abdomen_ct in fp32 on a CPU.
KEEPING_FACTOR = 1.5


@dataclass(frozen=True)
class StepPlan:
    """How a training step is computed.

    Attributes:
        device: where it trains.
        precision: number format of the forward pass.
        crops: that a step learns from: the recipe's, whatever the plan.
        crops_per_case: of them.
        at_once: crops whose activations exist at the same time; the rest of a step waits.
        checkpointing: whether the transformer's activations are recomputed.
        needed_bytes: what weights, optimiser and a step take on the device.
        free_bytes: what there is.
        cache_bytes: of preprocessed cases that may be kept in the host's memory beside that.
        seconds: of a step; not a number where it was not measured.
        fallbacks: what did not fit when it was tried, in words.
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
        """Whether what it needs is there."""
        return self.needed_bytes <= self.free_bytes

    @property
    def keeps_freed_memory(self) -> bool:
        """Whether a process on the CPU may keep what it frees, gaps and all, for the sake of speed."""
        return self.device == "cpu" and KEEPING_FACTOR * self.needed_bytes <= self.free_bytes

    @property
    def parts(self) -> int:
        """How many batches a step is split into, whose gradients are accumulated."""
        return math.ceil(self.crops / self.at_once)

    def explain(self) -> str:
        """One line for the log and for people."""
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
        """Plain data for a run's status and report."""
        return {**asdict(self), "parts": self.parts, "text": self.explain()}


class StepPlanner:
    """Plans training steps within a budget.

    Args:
        budget: bytes of the host's memory that this process may use; all that is free, less a reserve, if not given.
        book: where measured costs are kept.
        memory: says how much is free.
        measure: measures a step.
        beside_server: whether a server answers requests on the same device, which are left some of its memory.
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
        self, preset: Preset, cases: int, device: torch.device, whole: bool = False, always_measure: bool = False
    ) -> StepPlan:
        """The fastest way that fits: all at once, with recomputed transformer blocks, in smaller parts, on the CPU.

        Args:
            preset: the task; checkpointing that its recipe asks for stays on.
            cases: that there are to train on; a batch has no more.
            device: where it would train.
            whole: a step may not be done in parts, nor elsewhere: other processes would have to do the same.
            always_measure: also where there is nothing to choose.

        Raises:
            TrainingError: when nothing fits, with what it takes and what there is.
        """
        plan = self._on(preset, cases, device, whole, always_measure)
        if plan.fits or whole:
            return plan
        if device.type == "cpu":
            raise TrainingError(
                f"a training step of {preset.name!r} ({plan.at_once} crop of {'x'.join(map(str, preset.roi_size))} at "
                f"a time) needs {plan.needed_bytes / GIB:.2f} GiB of memory; there are {plan.free_bytes / GIB:.2f}; "
                "valid: a preset with a smaller roi_size or network, or a larger --conf memory_budget"
            )
        on_cpu = self.plan(preset, cases, torch.device("cpu"), always_measure=always_measure)
        return replace(on_cpu, fallbacks=(f"{device} ({plan.needed_bytes / GIB:.2f} GiB)", *on_cpu.fallbacks))

    def _on(self, preset: Preset, cases: int, device: torch.device, whole: bool, always_measure: bool) -> StepPlan:
        """The fastest way on one device that fits, or else the smallest."""
        recipe, where = preset.training, placement_for(preset, device)
        crops = min(recipe.batch_size, cases) * recipe.crops_per_case
        host = self._memory.of_host(self.budget)
        free = self._memory.of_device(device) if device.type == "cuda" else host
        free -= self._for_inference(preset, device, free)
        limits = self.book.limits(step_key(where))
        ways = _ways(crops, recipe.activation_checkpointing or limits.recompute, limits.window_batch or crops, whole)
        plan: StepPlan | None = None
        for at_once, recompute in ways:
            needs = _Needs(preset, crops, recompute, where.dtype)
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
        """Bytes that a server's requests on the device are left."""
        if not self._beside_server:
            return 0
        dtype = resolve_precision("auto", device)
        window = self.book.cost(cost_key(Placement(preset, device, dtype)), 1)
        weights = count_kept_bytes(preset, False)[1] // FLOAT_BYTES * dtype.itemsize
        needed = 0 if window is None else window.bytes + weights
        return min(free, max(int(INFERENCE_SHARE * free), needed))

    def _costs(self, needs: _Needs, where: Placement, at_once: int, free: int, always: bool) -> list[WindowCost]:
        """Measured costs of one crop, and of two where more than one are done at once.

        Only what the count says will fit is measured: on a CPU, what does not fit ends the process.
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
        """The next plan after memory ran out on ``plan``, remembered for a day; None when nothing smaller is left."""
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
    """Runs steps as planned, and in smaller and smaller parts once memory has run out.

    Args:
        plan: to begin with.
        planner: remembers what did not fit.
        preset: the task.
        network: whose transformer's activations are recomputed in the end.
        may_shrink: false where other processes would have to shrink too.
    """

    def __init__(
        self, plan: StepPlan, planner: StepPlanner, preset: Preset, network: nn.Module, may_shrink: bool = True
    ) -> None:
        self.plan = plan
        self._planner, self._preset, self._network, self._may_shrink = planner, preset, network, may_shrink

    def run(self, step: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Call ``step`` with the number of crops at a time, and again with less at once while memory runs out.

        Raises:
            RuntimeError, MemoryError: when one crop does not fit.
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
            # outside of the clause: the error's traceback holds on to what is to be let go
            self.plan = smaller
            if smaller.checkpointing:
                recompute_blocks(self._network)
            release_memory(device)
            logger.warning("memory ran out in a training step; from now on: %s", self.plan.explain())


class _Needs:
    """Bytes and seconds of steps of one network."""

    def __init__(self, preset: Preset, crops: int, recompute: bool, dtype: torch.dtype) -> None:
        self.recompute = recompute
        self._crops, self._half = crops, dtype is not torch.float32
        self._kept, self._weights = count_kept_bytes(preset, recompute)
        if recompute:  # in the backward pass the activations of one block exist at a time
            self._kept += (count_kept_bytes(preset, False)[0] - self._kept) // TRANSFORMER_BLOCKS
        self._logits = COPIES_OF_LOGITS * FLOAT_BYTES * preset.out_channels * math.prod(preset.roi_size)

    def bytes(self, at_once: int, costs: Sequence[WindowCost]) -> int:
        """What weights, optimiser and a step take: measured, where it was, or counted."""
        waiting = (self._crops - at_once) * self._logits
        return COPIES_OF_WEIGHTS * self._weights + self._passes(at_once, costs) + waiting

    def seconds(self, at_once: int, costs: Sequence[WindowCost]) -> float:
        """Of a step; a part that is recomputed has one more forward pass, which takes half as long as a backward."""
        if not costs:
            return math.nan
        again = 4 / 3 if at_once < self._crops else 1.0
        return again * self._crops * costs[-1].seconds / len(costs)

    def _passes(self, crops: int, costs: Sequence[WindowCost]) -> int:
        """Forward and backward pass of so many crops: what the first takes, and what each more does."""
        if len(costs) < min(2, crops):
            # autocast keeps the weights in half precision too
            return int((self._kept * crops * SCRATCH_FACTOR + self._weights) / (1 + self._half)) + crops * self._logits
        # the second measurement finds some memory that the process has kept: never less than what is counted
        least = int(self._kept / (1 + self._half)) + self._logits
        more = max(least, costs[1].bytes - costs[0].bytes) if crops > 1 else 0
        return int(MEASUREMENT_MARGIN * (costs[0].bytes + (crops - 1) * more))


def count_step_bytes(preset: Preset, crops: int, recompute: bool, dtype: torch.dtype) -> int:
    """What weights, optimiser and a step of so many crops at once take, counted from shapes alone."""
    return _Needs(preset, crops, recompute, dtype).bytes(crops, [])


def placement_for(preset: Preset, device: torch.device) -> Placement:
    """A preset's network as it is trained on a device."""
    return Placement(preset, device, resolve_precision(preset.training.precision, device))


def step_key(where: Placement) -> str:
    """Under what a step's costs and limits are kept."""
    return f"training {cost_key(where)}"


def _ways(crops: int, recompute: bool, most: int, whole: bool) -> list[tuple[int, bool]]:
    """Crops at once and checkpointing, fastest first. A part is as slow as a checkpointed step, whatever its size."""
    sizes = [] if whole else _halvings(crops)[1:]
    kept = [(crops, False), (crops, True), *((size, False) for size in sizes)]
    last = [] if whole else [(1, True)]
    ways = [(crops, True), *((size, True) for size in sizes)] if recompute else [*kept, *last]
    return [way for way in dict.fromkeys(ways) if way[0] <= most or whole]


def _halvings(most: int) -> list[int]:
    return [most, *_halvings(most // 2)] if most > 1 else [1]
