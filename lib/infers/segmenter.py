"""Segments volumes with one network and its preset."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from torch import nn

from lib.configs.preset import Preset
from lib.errors import MemoryBudgetError
from lib.infers.interruption import check_before_each_window
from lib.infers.memory import is_out_of_memory, release_memory
from lib.infers.plan import Plan, Planner
from lib.infers.predictor import Prediction, Stitching, predict
from lib.networks.checkpoint import Checkpoint, load_weights
from lib.networks.inference import InferenceNetwork
from lib.networks.placement import Placement
from lib.networks.precision import place, resolve_fallback, resolve_precision
from lib.networks.unetr import build_unetr
from lib.transforms.postprocess import (
    FULL_WEIGHT,
    Box,
    LabelArray,
    SecondLabels,
    boxes_after_restoring,
    drop_uncertain_components,
    interpolate_to_grid,
    keep_largest_components,
    restore_by_interpolation,
    restore_to_grid,
)
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import Affine, FloatArray, Volume, check_segmentable

logger = logging.getLogger("unetr.plan")


@dataclass(frozen=True)
class Segmentation:
    """The result, on the image's own grid.

    Attributes:
        labels: shape (X, Y, Z).
        entropy: of the blended probabilities, from 0 (certain) to 1 (all classes equally likely), shape (X, Y, Z); None
            if it was not requested.
        latencies_ms: milliseconds of each stage.
        plan: how it was computed, and the plans that did not fit.
        boxes: for each label value from 1 on, a box that holds all of its voxels, None for one without voxels; None if
            they are not known.
    """

    labels: npt.NDArray[np.uint8]
    plan: Plan
    entropy: FloatArray | None = None
    latencies_ms: dict[str, float] = field(default_factory=dict)
    boxes: Sequence[Box | None] | None = None


@dataclass(frozen=True)
class Computed:
    """The prediction on the network's grid; the device is not needed any more.

    Attributes:
        prediction: labels, and their entropy if it is needed.
        plan: how it was computed.
        name: name of the image, for errors.
        grid: affine of the network's grid, shape of the image and affine of the image.
        entropy, largest_component: as requested.
        reservation: memory reserved for the rest of the work; released by :meth:`Segmenter.restore`, or when this
            object is deleted.
    """

    prediction: Prediction
    plan: Plan
    name: str
    grid: tuple[Affine, tuple[int, ...], Affine]
    entropy: bool
    largest_component: bool | None
    clock: _Clock
    reservation: ExitStack


class Segmenter:
    """Segments volumes with one network.

    Args:
        network: a UNETR of the preset.
        preset: the preset.
        device: the device on which it computes.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        planner: chooses a plan that fits into memory; by default within the free memory.
        preprocess: preprocesses an image, on the host or on a given device.
    """

    def __init__(
        self,
        network: nn.Module,
        preset: Preset,
        device: torch.device,
        precision: str = "auto",
        planner: Planner | None = None,
        preprocess: Callable[..., MetaTensor] = preprocess_volume,
    ) -> None:
        self.preset = preset
        self.device = device
        self.dtype = resolve_precision(precision, device)
        self.network = place(network, device).eval()
        check_before_each_window(self.network)
        self.planner = planner or Planner()
        self._preprocess_volume = preprocess
        self._home = (self.device, self.dtype)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        preset: Preset,
        device: torch.device,
        precision: str = "auto",
        planner: Planner | None = None,
    ) -> Segmenter:
        """Build the preset's network, and load ``checkpoint`` into it strictly.

        Raises:
            CheckpointError: if the weights do not match the network.
        """
        network = build_unetr(preset)
        load_weights(network, checkpoint.model)
        graphs = planner is not None and planner.cuda_graphs
        ready = InferenceNetwork(network, device, resolve_precision(precision, device), graphs)
        return cls(ready, preset, device, precision, planner)

    @property
    def _smooth(self) -> bool:
        """Whether borders are placed between the voxels of the network's grid."""
        return self.preset.inference.restore == "linear"

    @property
    def placement(self) -> Placement:
        """The preset, the current device and the number format of the network."""
        return Placement(self.preset, self.device, self.dtype)

    def plan(self, volume: Volume, name: str = "image", entropy: bool = False) -> Plan:
        """The plan by which :meth:`segment` would compute a volume; the first plan on a device measures its costs.

        Raises:
            ImageError: if the volume cannot be segmented.
            MemoryBudgetError: if it does not fit into memory.
        """
        check_segmentable(volume, self.preset, name)
        self._return_home()
        return self.planner.plan(self.network, self.placement, volume, entropy, name)

    def segment(
        self,
        volume: Volume,
        largest_component: bool | None = None,
        name: str = "image",
        entropy: bool = False,
        on_image: Callable[[MetaTensor], None] | None = None,
    ) -> Segmentation:
        """Segment a volume.

        Args:
            volume: the image, on any grid.
            largest_component: whether to keep only the largest component of each label, or every component including
                uncertain ones; by default as the preset states.
            name: name of the image in errors.
            entropy: whether to return the entropy of each voxel.
            on_image: called with the preprocessed image.

        Raises:
            ImageError: if the volume cannot be segmented.
            MemoryBudgetError: if it does not fit into memory.
        """
        return self.restore(self.compute(volume, largest_component, name, entropy, on_image))

    def compute(
        self,
        volume: Volume,
        largest_component: bool | None = None,
        name: str = "image",
        entropy: bool = False,
        on_image: Callable[[MetaTensor], None] | None = None,
        margins: bool = False,
    ) -> Computed:
        """The part of :meth:`segment` that needs the device; :meth:`restore` does the rest, in any thread.

        Args:
            volume, largest_component, name, entropy, on_image: see :meth:`segment`.
            margins: whether the prediction includes logit margins.

        Raises:
            ImageError, MemoryBudgetError: as :meth:`segment`.
        """
        clock = _Clock()
        with ExitStack() as stack:
            with clock.stage("plan"):
                reservation = stack.enter_context(self.planner.reserving(lambda: self.plan(volume, name, entropy)))
                plan = reservation.plan
            with _refusing(name, plan):
                with clock.stage("preprocess"):
                    image, plan = self._preprocess(volume, plan)
                    affine = image.affine.cpu().numpy()
                    if on_image is not None:
                        on_image(image)
                with clock.stage("network"):
                    judged = bool(self.preset.inference.component_entropy)
                    prediction, plan = self._predict(image, plan, name, entropy, judged, margins)
                    plan = plan.after(prediction.windows)
                    del image  # frees its memory for the next steps
                    self._release_network()
            self.planner.release_network_share(reservation)
            grid = (affine, volume.voxels.shape, volume.affine_ras)
            return Computed(prediction, plan, name, grid, entropy, largest_component, clock, stack.pop_all())

    def restore(self, computed: Computed) -> Segmentation:
        """The prediction without rejected components, on the image's own grid; it needs no device.

        Raises:
            MemoryBudgetError: if memory runs out.
        """
        prediction, clock = computed.prediction, computed.clock
        with computed.reservation, _refusing(computed.name, computed.plan):
            with clock.stage("postprocess"):
                seen = self._clean(prediction, computed.largest_component)
            with clock.stage("restore"):
                if self._smooth:
                    labels = restore_by_interpolation(seen, *computed.grid, _second_labels(prediction, seen))
                else:
                    labels = restore_to_grid(seen, *computed.grid)
                boxes = boxes_after_restoring(seen, *computed.grid, self.preset.out_channels - 1)
                wanted = prediction.entropy if computed.entropy else None
                uncertainty = None if wanted is None else interpolate_to_grid(wanted, *computed.grid)
        logger.info("%s: %s", computed.name, computed.plan.explain())
        return Segmentation(labels, computed.plan, uncertainty, clock.milliseconds, boxes)

    def _clean(self, prediction: Prediction, largest_component: bool | None) -> LabelArray:
        """Remove uncertain components, and for the requested labels all but the largest component."""
        labels, limits = prediction.labels, self.preset.component_entropies
        if limits and prediction.entropy is not None and largest_component is not False:
            labels = drop_uncertain_components(labels, prediction.entropy, limits)
        if largest_component is None:
            indices = self.preset.largest_component_indices
        else:
            indices = frozenset(self.preset.label_indices.values()) if largest_component else frozenset()
        share = self.preset.inference.component_share
        return keep_largest_components(labels, indices, share) if indices else labels

    def _preprocess(self, volume: Volume, plan: Plan) -> tuple[MetaTensor, Plan]:
        """The preprocessed image, on the GPU if the plan has room for it there, otherwise on the host."""
        if plan.image_on_device:
            try:
                return self._preprocess_volume(volume, self.preset, self.device), plan
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            release_memory(self.device)
            what = f"preprocessing on {self.device}"
            plan = replace(plan, image_on_device=False, fallbacks=(*plan.fallbacks, what))
        return self._preprocess_volume(volume, self.preset), plan

    def _predict(
        self, image: torch.Tensor, plan: Plan, name: str, entropy: bool, judged: bool, margins: bool
    ) -> tuple[Prediction, Plan]:
        """Predict as planned; where memory runs out, use smaller and smaller plans, and finally the CPU."""
        while True:
            try:
                stitching = plan.stitching
                wanted = {"entropy": entropy or judged, "of_labels": not entropy, "margins": margins or self._smooth}
                return predict(self.network, image, self.placement, stitching, **wanted), plan
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the except clause, since the traceback of the error keeps references to memory that must be
            # freed.
            plan = self._smaller(plan, name)
            image = image if plan.image_on_device else image.cpu()

    def _smaller(self, plan: Plan, name: str) -> Plan:
        """Release the device's memory, and return the next fallback of the plan."""
        self._release_network()
        release_memory(self.device)
        smaller = self.planner.next_fallback(plan, self.placement)
        if smaller is None and self.device.type == "cuda":
            cpu = torch.device("cpu")
            smaller = replace(
                plan,
                device="cpu",
                stitching=Stitching(),
                image_on_device=False,
                fallbacks=(*plan.fallbacks, str(self.device)),
            )
            self._move(cpu, resolve_fallback(self.dtype))
        if smaller is None:
            raise MemoryBudgetError(
                f"memory ran out on image {name!r}, however little was done at once: {plan.explain()}"
            )
        logger.warning("memory ran out on %s; gave up %s", name, smaller.fallbacks[-1])
        return smaller

    def _release_network(self) -> None:
        """Free buffers that the network keeps between windows, after a request and before a fallback."""
        if isinstance(self.network, InferenceNetwork):
            self.network.release_memory()

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        if isinstance(self.network, InferenceNetwork):
            self.network.move(device, dtype)
        else:
            place(self.network, device)
        self.device, self.dtype = device, dtype

    def _return_home(self) -> None:
        """Move back to the GPU after a request that did not fit there, if there is memory now."""
        if (self.device, self.dtype) == self._home:
            return
        away = (self.device, self.dtype)
        try:
            self._move(*self._home)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._move(*away)


def _second_labels(prediction: Prediction, seen: LabelArray) -> SecondLabels | None:
    """The second most likely labels; none where a component was removed, which is certain background then."""
    margins = prediction.margins
    if margins is None:
        return None
    second = np.where(seen == prediction.labels, margins.second, 0).astype(np.uint8)
    return SecondLabels(second, margins.shares(FULL_WEIGHT))


@contextmanager
def _refusing(name: str, plan: Plan) -> Iterator[None]:
    """Raise an error with the memory figures if memory runs out outside of the network."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryBudgetError(f"memory ran out on image {name!r}; the plan was: {plan.explain()}") from error


class _Clock:
    """Duration of each stage in milliseconds."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.milliseconds[name] = round((time.perf_counter() - start) * 1000, 1)
