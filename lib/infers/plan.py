"""Memory planning for inference: batch of windows, place of stitching, number of bands.

The bytes of tensors are computed from their shapes; the bytes and seconds of a window in the network are measured. A
request that does not fit in any way is refused before it starts.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from lib.configs.preset import Preset
from lib.errors import MemoryBudgetError
from lib.infers.costs import CostBook, Limits, WindowCost, cost_key, measure_windows
from lib.infers.logit_margins import BYTES_A_VOXEL
from lib.infers.memory import GIB, MIB, MemoryProbe, is_out_of_memory
from lib.infers.predictor import Stitching, choose_overlap, window_starts
from lib.networks.inference import InferenceNetwork
from lib.networks.placement import Placement
from lib.transforms.preprocess import network_shape
from lib.transforms.volume import Affine, Grid, Volume

logger = logging.getLogger("unetr.plan")

MOST_BANDS = 16
# Small batches leave a GPU partly idle; a CPU is fully used.
GPU_BATCH_FACTOR = 8
FLOAT_BYTES = 4
# Resident memory is sampled: the true peak may lie between two samples.
MEASUREMENT_MARGIN = 1.25


@dataclass(frozen=True)
class Plan:
    """How a request is computed, and its expected needs.

    Attributes:
        device: device that computes the windows.
        precision: number format of the network.
        stitching: batch size, place of the sums and number of bands.
        windows: upper limit of windows, since windows of air are skipped; in a response, the actual number.
        host_bytes: peak host memory besides the loaded image and weights.
        device_bytes: peak GPU memory; 0 on the CPU.
        host_left: available bytes on the host.
        device_left: available bytes on the GPU.
        seconds: expected time of the network for these windows, from measurements.
        image_on_device: whether the image is preprocessed on the GPU and stays there.
        fallbacks: descriptions of the plans that were tried and did not fit.
        engine: engine that computes the windows, ``pytorch`` or ``openvino``.
    """

    device: str
    precision: str
    stitching: Stitching
    windows: int
    host_bytes: int
    device_bytes: int
    host_left: int
    device_left: int
    seconds: float
    image_on_device: bool = False
    fallbacks: tuple[str, ...] = ()
    engine: str = "pytorch"
    restoring_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether the needs do not exceed the available memory."""
        return self.host_bytes <= self.host_left and self.device_bytes <= self.device_left

    def after(self, windows: int) -> Plan:
        """The plan with the actual number of windows."""
        return replace(self, windows=windows, seconds=self.seconds * windows / max(1, self.windows))

    def explain(self) -> str:
        """A one-line description for the log and for users."""
        where = "the device" if self.stitching.on_device else "the host"
        bands = f" in {self.stitching.bands} bands" if self.stitching.bands > 1 else ""
        gpu = f", {_gib(self.device_bytes)} of {_gib(self.device_left)} GiB on it" if self.device_left else ""
        gpu += " with the image" if self.image_on_device else ""
        batch, host = self.stitching.window_batch, f"{_gib(self.host_bytes)} of {_gib(self.host_left)} GiB of memory"
        return (
            f"{self.windows} windows on {self.device} in {self.precision} by {self.engine}, {batch} at a time{gpu}; "
            f"stitched slab by slab on {where}{bands}, {host}; about {self.seconds:.1f} s"
            + "".join(f"; gave up: {what}" for what in self.fallbacks)
        )

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON data for a response."""
        stitching = asdict(self.stitching)
        own = {
            key: value for key, value in asdict(self).items() if key not in ("stitching", "seconds", "restoring_bytes")
        }
        return {**own, **stitching, "seconds": round(self.seconds, 2), "text": self.explain()}


@dataclass(eq=False)
class Reservation:
    """Host memory that a plan reserves from other plans."""

    plan: Plan
    bytes: int


class Planner:
    """Plans requests within a budget.

    Args:
        budget: bytes that this process may use on the host; by default all free memory minus a reserve.
        book: store of measured costs.
        cuda_graphs: whether GPUs replay recorded kernels.
        memory: probe of the free memory.
        measure: measures a batch of windows.
    """

    def __init__(
        self,
        budget: int | None = None,
        book: CostBook | None = None,
        cuda_graphs: bool = False,
        memory: MemoryProbe | None = None,
        measure: Callable[[nn.Module, Placement, int], WindowCost] = measure_windows,
    ) -> None:
        self.budget, self.cuda_graphs = budget, cuda_graphs
        self.book = book or CostBook()
        self._memory, self._measure = memory or MemoryProbe(), measure
        self._reserved: list[Reservation] = []
        self._changed = threading.Condition()

    def plan(
        self,
        network: nn.Module,
        where: Placement,
        volume: Volume,
        entropy: bool = False,
        name: str = "image",
    ) -> Plan:
        """Choose the batch size and the place of stitching so that ``volume`` fits into memory.

        Raises:
            MemoryBudgetError: if no choice fits, with the required and the available memory.
        """
        preset, device = where.preset, where.device
        engine, host_left = engine_of(network), max(0, self.host_bytes_left() - self.reserved_bytes)
        limits = self.book.limits(cost_key(where, engine))
        # OpenVINO computes the windows of a batch one by one
        most = 1 if engine == "openvino" else preset.inference.window_batch_size
        sizes = _halvings(most * GPU_BATCH_FACTOR if device.type == "cuda" else most)
        if limits.window_batch:
            sizes = [size for size in sizes if size <= limits.window_batch] or [1]
        costs = {size: cost for size in sizes if (cost := self.cost(network, where, size))}
        if not costs:
            raise MemoryBudgetError(f"not even one window of {preset.name!r} fits into the memory of {device}")
        need = _Need(preset, volume.voxels.shape, volume.affine_ras, entropy)
        device_left = self._memory.of_device(device) if device.type == "cuda" else 0
        best: Plan | None = None
        for stitching in _choices(costs, device, limits):
            best = need.plan(stitching, costs[stitching.window_batch], where, host_left, device_left)
            best = replace(best, engine=engine)
            if best.fits:
                return best
        assert best is not None
        raise MemoryBudgetError(
            f"image {name!r} ({'x'.join(map(str, volume.voxels.shape))} voxels, {'x'.join(map(str, need.shape))} for "
            f"{preset.name!r}) needs {_gib(best.host_bytes)} GiB of memory on the host"
            + (f" and {_gib(best.device_bytes)} GiB on {device}" if best.device_left else "")
            + f"; there are {_gib(best.host_left)} GiB"
            + (f" and {_gib(best.device_left)} GiB" if best.device_left else "")
            + "; valid: a smaller image, or a larger --conf memory_budget"
        )

    @property
    def reserved_bytes(self) -> int:
        """Host memory that running plans reserve."""
        return sum(one.bytes for one in self._reserved)

    @contextmanager
    def reserving(self, make: Callable[[], Plan]) -> Iterator[Reservation]:
        """Make a plan, and reserve its host memory until the block ends.

        A plan that does not fit next to the running ones waits until they end.

        Args:
            make: makes the plan by :meth:`plan`.

        Raises:
            MemoryBudgetError: if it does not fit even alone.
        """
        with self._changed:
            while True:
                try:
                    plan = make()
                    break
                except MemoryBudgetError:
                    if not self._reserved:
                        raise
                self._changed.wait()
            reservation = Reservation(plan, plan.host_bytes)
            self._reserved.append(reservation)
        try:
            yield reservation
        finally:
            with self._changed:
                self._reserved.remove(reservation)
                self._changed.notify_all()

    def release_network_share(self, reservation: Reservation) -> None:
        """Release the part of a reservation that the network needed, once it has computed."""
        with self._changed:
            reservation.bytes = min(reservation.bytes, reservation.plan.restoring_bytes)
            self._changed.notify_all()

    def expected_seconds(self, where: Placement, grid: Grid) -> float | None:
        """Expected seconds of the windows of an image with that grid on a device; None if not measured yet."""
        for engine in ("openvino", "pytorch"):
            cost = self.book.cost(cost_key(where, engine), 1)
            if cost is not None:
                return cost.seconds * _Need(where.preset, grid.shape, grid.affine_ras, False).windows()
        return None

    def host_bytes_left(self) -> int:
        """Host memory that this process may still allocate, within the budget if there is one."""
        return self._memory.of_host(self.budget)

    def check_room(self, needed: int, name: str) -> None:
        """Refuse work that needs more host memory than is available, before it starts.

        Raises:
            MemoryBudgetError: with the required and the available memory.
        """
        left = self.host_bytes_left()
        if needed > left:
            raise MemoryBudgetError(
                f"{name} needs {_gib(needed)} GiB of memory on the host; there are {_gib(left)} GiB; valid: a smaller "
                "image, or a larger --conf memory_budget"
            )

    def cost(self, network: nn.Module, where: Placement, batch: int = 1) -> WindowCost | None:
        """The stored or measured cost of a batch of windows; None if the batch does not fit."""
        key = cost_key(where, engine_of(network))
        stored = self.book.cost(key, batch)
        if stored is not None:
            return stored
        with self._changed:  # memory that others allocate meanwhile would be attributed to the window
            self._changed.wait_for(lambda: not self._reserved)
            try:
                cost = self._measure(network, where, batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return None
            self.book.keep(key, batch, cost)
        logger.info("measured %s, batch %d: %.0f MiB, %.3f s", key, batch, cost.bytes / MIB, cost.seconds)
        return cost

    def next_fallback(self, plan: Plan, where: Placement) -> Plan | None:
        """The next plan after memory ran out on ``plan``, kept for a day; None if there is no smaller one.

        Smaller batches come first, since they cost almost nothing; bands compute some windows twice.
        """
        old = plan.stitching
        if old.window_batch > 1:
            new, what = replace(old, window_batch=old.window_batch // 2), f"a batch of {old.window_batch} windows"
        elif plan.image_on_device:
            return replace(plan, image_on_device=False, fallbacks=(*plan.fallbacks, f"the image on {plan.device}"))
        elif old.on_device:
            new, what = replace(old, on_device=False), f"stitching on {plan.device}"
        elif old.bands < MOST_BANDS:
            new, what = replace(old, bands=old.bands * 2), f"{old.bands} band{'s' * (old.bands > 1)} a slab"
        else:
            return None
        limits = Limits(new.window_batch, not new.on_device, new.bands)
        self.book.limit(cost_key(where, plan.engine), limits)
        return replace(plan, stitching=new, fallbacks=(*plan.fallbacks, what))


def engine_of(network: nn.Module) -> str:
    """The engine that computes a network's windows."""
    return network.engine if isinstance(network, InferenceNetwork) else "pytorch"


class _Need:
    """Bytes and windows that the segmentation of one volume needs."""

    def __init__(self, preset: Preset, shape: Sequence[int], affine_ras: Affine, entropy: bool) -> None:
        self._preset, self._entropy = preset, entropy or bool(preset.inference.component_entropy)
        self._restores_entropy = entropy
        self.shape = network_shape(shape, affine_ras, preset)
        self._image, self._seen = math.prod(shape), math.prod(self.shape)
        self._channels = preset.in_channels

    def plan(self, stitching: Stitching, cost: WindowCost, where: Placement, host_left: int, device_left: int) -> Plan:
        """The plan for these choices."""
        windows, slab = self.windows(stitching.bands), self._slab_bytes(stitching.bands)
        batch = stitching.window_batch
        window = self._channels * math.prod(self._preset.roi_size) * FLOAT_BYTES
        network = int(MEASUREMENT_MARGIN * cost.bytes) + 2 * batch * window
        device = where.device
        on_gpu, gpu = device.type == "cuda", 0
        preprocessing, with_image = self._preprocessing_bytes(), False
        host = slab * (not stitching.on_device) + network * (not on_gpu)
        if on_gpu:
            gpu = network + self._logits_bytes(batch) + slab * stitching.on_device
            there = max(preprocessing, FLOAT_BYTES * self._channels * self._seen + gpu)
            if with_image := there <= device_left:
                gpu, preprocessing = there, FLOAT_BYTES * self._channels * self._image
        return Plan(
            device=str(device),
            precision=where.precision,
            stitching=stitching,
            windows=windows,
            host_bytes=max(preprocessing, self._stitching_bytes() + host, self._restoring_bytes()),
            device_bytes=gpu,
            host_left=host_left,
            device_left=device_left,
            seconds=windows / batch * cost.seconds,
            image_on_device=with_image,
            restoring_bytes=self._restoring_bytes(),
        )

    def _preprocessing_bytes(self) -> int:
        """Bytes of the image, its contiguous copy if nothing is interpolated, interpolation by axis, and scaling."""
        between = max(self._image, self._seen)
        return FLOAT_BYTES * self._channels * (2 * self._image + between + self._seen)

    def _logits_bytes(self, batch: int) -> int:
        """Bytes of the logits of a batch that is fetched while the next batch is computed."""
        return batch * self._preset.out_channels * math.prod(self._preset.roi_size) * FLOAT_BYTES

    def _stitching_bytes(self) -> int:
        """Bytes of the preprocessed image, of the mask on its grid and of its margins, besides slab and windows."""
        return self._seen * (FLOAT_BYTES * self._channels + BYTES_A_VOXEL + 1 + 2 * self._entropy)

    def _restoring_bytes(self) -> int:
        """Bytes of the mask on both grids, of a reoriented or encoded copy of each, and of 32-bit component numbers."""
        labels = 2 * (self._seen + self._image)
        inference = self._preset.inference
        components = 7 * self._seen if inference.largest_component or inference.component_entropy else 0
        entropy = FLOAT_BYTES * (self._seen + 3 * self._image) if self._restores_entropy else 0
        return labels + components + entropy

    def _slab_bytes(self, bands: int) -> int:
        """Bytes of the sums of all classes for the planes of a window, over the rows that a band's windows cover."""
        axis, across, along = self._axes()
        roi = self._preset.roi_size
        rows = min(self.shape[across], math.ceil(self.shape[across] / bands) + 2 * roi[across])
        rows = self.shape[across] if bands == 1 else rows
        plane = rows * self.shape[along]
        classes = self._preset.out_channels + 1  # one more for the sum of weights
        return plane * (roi[axis] * classes * FLOAT_BYTES + self.shape[axis] * (BYTES_A_VOXEL + 2 * self._entropy))

    def windows(self, bands: int = 1) -> int:
        """Upper limit of the number of windows."""
        overlap = choose_overlap(self.shape, self._preset)
        starts = [
            window_starts(size, edge, overlap) for size, edge in zip(self.shape, self._preset.roi_size, strict=True)
        ]
        counts = [len(s) for s in starts]
        _, across, _ = self._axes()
        edge, size = self._preset.roi_size[across], self.shape[across]
        cuts = [round(size * band / bands) for band in range(1, bands)]
        twice = sum(start < cut < start + edge for cut in cuts for start in starts[across])
        return (counts[across] + twice) * math.prod(counts) // counts[across]

    def _axes(self) -> tuple[int, int, int]:
        """The axes sorted by length: slabs follow the longest axis, and bands divide the second longest."""
        long, middle, short = sorted(range(3), key=lambda axis: -self.shape[axis])
        return long, middle, short


def _choices(costs: dict[int, WindowCost], device: torch.device, limits: Limits) -> list[Stitching]:
    """Stitching choices, fastest first: device before host, one band before many, cheapest batches first."""
    batches = sorted(costs, key=lambda size: costs[size].seconds / size)
    # The smallest batch is the last choice, whatever its speed.
    batches = batches[: batches.index(1) + 1] if 1 in batches else batches
    places = [True, False] if device.type == "cuda" and not limits.on_host else [False]
    bands = [count for count in _doublings(MOST_BANDS) if count >= limits.bands]
    return [Stitching(batch, place, count) for count in bands for place in places for batch in batches]


def _halvings(most: int) -> list[int]:
    return [most, *_halvings(most // 2)] if most > 1 else [1]


def _doublings(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
