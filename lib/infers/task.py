"""MONAI Label's inference task for a preset."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from monai.data import MetaTensor
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.utils.others.generic import device_list

from lib.configs.preset import Preset
from lib.errors import ImageError
from lib.infers.cache import CachedMask, CacheKey, Checksums, ResultCache
from lib.infers.devices.lane import ALL, Lane, lane_in_use
from lib.infers.devices.lanes import Lanes
from lib.infers.devices.schedule import Forecast
from lib.infers.logit_margins import BYTES_A_VOXEL, LogitMargins
from lib.infers.model_cache import LoadedModel, ModelCache
from lib.infers.network_images import NetworkImages
from lib.infers.plan import Planner
from lib.infers.request import InferRequest
from lib.infers.segmenter import Computed, Segmentation
from lib.infers.writer import write_map, write_mask
from lib.models.calibration import foreground_uncertainty
from lib.models.weights import WeightsLocator
from lib.networks.placement import Placement
from lib.networks.precision import resolve_precision
from lib.transforms.inputs import read_input
from lib.transforms.intensity_range import warnings_of
from lib.transforms.postprocess import measure_labels
from lib.transforms.preprocess import network_shape
from lib.transforms.volume import Affine, Volume, read_grid

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

SHARE_AHEAD = 1 / 16
"""Largest share of the free memory for an image that is read in advance."""


@dataclass(frozen=True)
class ReadImage:
    """An image in memory.

    Attributes:
        checksum: checksum of its file before it was read.
        warnings: warnings for the user.
        seconds: duration of reading.
    """

    checksum: str
    volume: Volume
    warnings: list[str]
    seconds: float


@dataclass(frozen=True)
class _ModelResult:
    """A prediction, its model, and the times at which the lane and the weights were ready."""

    model: LoadedModel
    computed: Computed
    began: float
    loaded: float


@dataclass(frozen=True)
class StartedRequest:
    """A request whose part on a device is done.

    Attributes:
        request: the request.
        made: the prediction and its model.
        checksum, warnings: of the image.
        affine_ras: affine of the image's grid.
        seconds: duration of each stage so far.
        cached: the cached response; all other fields are empty then.
    """

    request: InferRequest
    made: _ModelResult | None = None
    checksum: str = ""
    warnings: list[str] = field(default_factory=list)
    affine_ras: Affine | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    cached: tuple[str, dict[str, Any]] | None = None


class UnetrInferTask(InferTask):
    """Segments an image with the current weights of a preset.

    Args:
        preset: the preset.
        locator: finds its weights.
        device: default device if no ``lanes`` are given; the best available one if empty.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        cache: cache of masks for repeated or concurrent requests.
        planner: chooses a plan that fits into memory; by default within the free memory.
        compiles: whether models on the CPU are compiled in the background, and used if that is faster.
        images: cache of preprocessed images for clicks that correct the mask; by default none are kept.
        lanes: the devices, each with its own weights.
        read: function that reads an image.
    """

    takes_prompts = False

    def __init__(
        self,
        preset: Preset,
        locator: WeightsLocator,
        device: str = "",
        precision: str = "auto",
        cache: ResultCache | None = None,
        planner: Planner | None = None,
        compiles: bool = False,
        images: NetworkImages | None = None,
        lanes: Lanes | None = None,
        read: Callable[[Path, Preset], Volume] = read_input,
    ) -> None:
        self._lanes = lanes if lanes is not None else Lanes.of(device)
        # clients send the first value back, which would direct all requests to one device
        several = [ALL] if self._lanes.several else []
        options: dict[str, Any] = {"device": several + device_list()}
        # Clients send these options back: one value for all labels would override a choice for each label.
        if isinstance(preset.inference.largest_component, bool):
            options["largest_component"] = preset.inference.largest_component
        super().__init__(InferType.SEGMENTATION, preset.label_indices, 3, preset.description, options)
        self.preset = preset
        self._locator = locator
        self._precision, self._planner = precision, planner if planner is not None else Planner()
        self._models = ModelCache(preset, locator, precision, self._planner, compiles)
        self._cache = cache if cache is not None else ResultCache(0)
        self._images, self._read_image = images, read
        self.checksums = Checksums()

    def is_valid(self) -> bool:
        """Whether there are weights; a model without weights is not offered."""
        return self._locator.is_known()

    def get_path(self, validate: bool = True) -> str | None:
        """The weights in use; with ``validate`` false, the folder of the preset's versions."""
        file = self._locator.find() if validate else None
        return str(file.path) if file else None if validate else str(self._locator.folder)

    def load(self) -> dict[str, str]:
        """Load the current weights on the default device and describe them; they stay loaded.

        Raises:
            ModelNotReadyError, CheckpointError: if there are no usable weights.
        """
        return self._models.get(self._lanes.first).describe()

    def settle(self) -> None:
        """Wait for work in the background."""
        self._models.settle()

    def parse(self, request: Mapping[str, Any]) -> InferRequest:
        """Parse and validate a request's parameters; the other methods take the result.

        Raises:
            ParameterError: naming the parameter, its value and the valid values.
        """
        return InferRequest.parse(request, self._lanes.first.device)

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Segment an image through MONAI Label's task interface: :meth:`parse` followed by :meth:`segment`."""
        return self.segment(self.parse(request))

    def segment(self, request: InferRequest) -> tuple[str, dict[str, Any]]:
        """Segment an image.

        Returns:
            The mask's file, which the caller removes, and the JSON of the response.

        Raises:
            ImageError: if the image cannot be segmented.
            MemoryBudgetError: if it does not fit into memory.
            ModelNotReadyError, CheckpointError: if there are no usable weights.
        """
        return self.complete(self.begin(request))

    def begin(self, request: InferRequest, ahead: ReadImage | None = None) -> StartedRequest:
        """Do the part of a request that needs a device.

        Args:
            request: see :meth:`segment`.
            ahead: the image, if it was read in advance (:meth:`read_ahead`).

        Raises:
            As :meth:`segment`.
        """
        if (cached := self._recall(request, time.perf_counter())) is not None:
            return StartedRequest(request, cached=cached)
        image = self._read(request.image) if ahead is None or self._is_other(request.image, ahead) else ahead
        there = time.perf_counter()
        made = self._compute(request, image.volume, image.checksum, request.largest_component)
        seconds = {"read": image.seconds, "wait": made.began - there, "load": made.loaded - made.began}
        return StartedRequest(request, made, image.checksum, image.warnings, image.volume.affine_ras, seconds)

    def complete(self, begun: StartedRequest) -> tuple[str, dict[str, Any]]:
        """Do the rest of a request, which needs no device; returns what :meth:`segment` returns.

        Raises:
            MemoryBudgetError: if memory runs out.
        """
        if begun.cached is not None:
            return begun.cached
        assert begun.made is not None and begun.affine_ras is not None
        request, model, affine = begun.request, begun.made.model, begun.affine_ras
        result = model.segmenter.restore(begun.made.computed)
        restored = time.perf_counter()
        path = write_mask(result.labels, affine, model.preset, request.extension, request.dtype, request.compress)
        written = time.perf_counter()
        payload = describe_result(result, affine, begun.warnings, model)
        seconds = {**begun.seconds, "write": written - restored, "measure": time.perf_counter() - written}
        stages = {name: round(value * 1000, 1) for name, value in seconds.items()} | result.latencies_ms
        stages["total"] = round(sum(stages.values()), 1)
        logger.info("segmented %s with %s in %s ms", request.image.name, model.describe(), stages)
        payload |= describe_latencies(stages)
        self._keep(request, model, begun.checksum, CachedMask(result.labels, affine, payload))
        return str(path), payload | {"cache": {"hit": False}}

    def _is_other(self, image: Path, read: ReadImage) -> bool:
        """Whether the file was replaced after it was read."""
        return not image.exists() or self.checksums.of(image) != read.checksum

    def preset_in_use(self) -> Preset:
        """The preset with the spacing and intensities that the current weights require; without weights, as configured.

        Raises:
            CheckpointError: if the weights cannot be used.
        """
        return self._models.get(lane_in_use() or self._lanes.first).preset if self.is_valid() else self.preset

    def weights_stamp(self) -> tuple[object, ...]:
        """A value that changes with the weights; empty if there are none."""
        file = self._locator.find()
        return () if file is None else file.stamp

    def mask_of(self, request: InferRequest, read: ReadImage | None = None) -> CachedMask:
        """The mask of an image in memory: the cached one, or a new one, which is then cached.

        Args:
            request: the request, which names the image.
            read: the image, if it was read in advance (:meth:`read_ahead`).

        Raises:
            As :meth:`segment`.
        """
        start = time.perf_counter()
        key = self._key(request)
        if key is not None and (kept := self._cache.get(key)) is not None:
            return kept
        image = read if read is not None else self._read(request.image)
        made = self._compute(request, image.volume, image.checksum)
        model = made.model
        result = model.segmenter.restore(made.computed)
        payload = describe_result(result, image.volume.affine_ras, image.warnings, model)
        total = round((time.perf_counter() - start) * 1000, 1)
        payload |= describe_latencies({**_NO_TIME, **result.latencies_ms, "total": total})
        mask = CachedMask(result.labels, image.volume.affine_ras, payload)
        self._keep(request, model, image.checksum, mask)
        return mask

    def read_ahead(self, request: InferRequest) -> ReadImage | None:
        """Read an image in advance, so that no device waits for it.

        Returns:
            None if its mask is cached already, or if the image would take a large part of the free memory.

        Raises:
            ImageError: if it cannot be read.
        """
        if self.is_kept(request) or self.preset.channels or request.image.is_dir():
            return None
        size = np.dtype(np.float32).itemsize * math.prod(read_grid(request.image).shape)
        return self._read(request.image) if size <= SHARE_AHEAD * self._planner.host_bytes_left() else None

    def _read(self, image: Path) -> ReadImage:
        start = time.perf_counter()
        checksum = self.checksums.of(image) if image.exists() else ""
        volume = self._read_image(image, self.preset)
        return ReadImage(checksum, volume, warnings_of(volume, self.preset), time.perf_counter() - start)

    def forecast(self, request: InferRequest) -> Forecast:
        """The needs of a request, by which a device is chosen; only the image's header is read."""
        weights = (self.preset.name, self.weights_stamp())
        if self.preset.channels or request.image.is_dir():
            return Forecast(weights)  # reading the headers of several files takes long
        try:
            grid = read_grid(request.image)
        except (ImageError, OSError):
            return Forecast(weights)  # the error is reported when the image is read
        where = Placement(self.preset, request.device, resolve_precision(self._precision, request.device))
        return Forecast(weights, self._planner.expected_seconds(where, grid))

    def _compute(
        self, request: InferRequest, volume: Volume, checksum: str, largest_component: bool | None = None
    ) -> _ModelResult:
        """Segment with the weights of this thread's lane, or of a lane that is assigned to it."""

        def compute(lane: Lane) -> _ModelResult:
            began = time.perf_counter()
            model = self._models.get(lane)
            loaded = time.perf_counter()
            unsure, keep = model.calibration is not None, self._keeper(request, model, checksum)
            margins = keep is not None
            computed = model.segmenter.compute(volume, largest_component, request.image.name, unsure, keep, margins)
            self._keep_margins(request, model, checksum, computed.prediction.margins if margins else None)
            return _ModelResult(model, computed, began, loaded)

        return self._on_a_lane(request, compute)

    def _on_a_lane(self, request: InferRequest, compute: Callable[[Lane], Result]) -> Result:
        weights = (self.preset.name, self.weights_stamp())
        return self._lanes.run(self._lanes.work(request.requested_device, weights=weights), compute)

    def _keep(self, request: InferRequest, model: LoadedModel, checksum: str, mask: CachedMask) -> None:
        """Cache a response, unless the image was replaced while it was read or segmented.

        Args:
            checksum: checksum of the image before it was read; with a later one, the mask of replaced content could be
                cached under the checksum of the new content.
        """
        key = self._key(request, model.stamp)
        if key is not None and key.image == checksum:
            self._cache.put(key, mask)

    def _keeper(self, request: InferRequest, model: LoadedModel, checksum: str) -> Callable[[MetaTensor], None] | None:
        """A function that caches the preprocessed image, unless the file was replaced after ``checksum`` was taken."""
        images = self._images
        if images is None:
            return None

        def keep(image: MetaTensor) -> None:
            if self.checksums.of(request.image) == checksum:
                images.put(checksum, model.preset, image)

        return keep

    def _keep_margins(
        self, request: InferRequest, model: LoadedModel, checksum: str, margins: LogitMargins | None
    ) -> None:
        """Cache the logit margins, unless the file was replaced after ``checksum`` was computed."""
        if self._images is not None and margins is not None and self.checksums.of(request.image) == checksum:
            self._images.put_margins(checksum, model.preset, model.stamp, margins)

    def margins_of(self, request: InferRequest) -> LogitMargins | None:
        """The network's logit margin at each voxel of an image, on the network's grid.

        The margins are cached when the mask is computed. If they have been evicted since, they are computed again, so
        that the same clicks yield the same mask. If they are too large for the cache, the result is None.

        Raises:
            As :meth:`segment`.
        """
        if self._images is None:
            return None
        preset, checksum = self.preset_in_use(), self.checksums.of(request.image)
        cached = self._images.margins_of(checksum, preset, self.weights_stamp())
        if cached is not None:
            return cached
        image = self._read(request.image)
        shape = network_shape(image.volume.voxels.shape, image.volume.affine_ras, preset)
        if not self._images.has_room(BYTES_A_VOXEL * math.prod(shape)):
            return None
        computed = self._compute(request, image.volume, image.checksum).computed
        computed.reservation.close()
        return computed.prediction.margins

    def map_uncertainty(self, request: InferRequest) -> Path:
        """Write the model's uncertainty at each voxel of an image, as NIfTI on the image's own grid.

        Returns:
            A file of the entropies, from 0 (certain) to 1 (all classes equally likely), which the caller removes.

        Raises:
            As :meth:`segment`.
        """
        volume = self._read_image(request.image, self.preset)
        result = self._on_a_lane(
            request,
            lambda lane: self._models.get(lane).segmenter.segment(volume, name=request.image.name, entropy=True),
        )
        assert result.entropy is not None
        return write_map(result.entropy, volume.affine_ras)

    def recall(self, request: InferRequest) -> tuple[str, dict[str, Any]] | None:
        """The cached response, if there is one; nothing is computed and no device is needed."""
        return self._recall(request, time.perf_counter())

    def is_kept(self, request: InferRequest) -> bool:
        """Whether :meth:`recall` would return a response."""
        key = self._key(request)
        return key is not None and key in self._cache

    def kept(self, request: InferRequest) -> CachedMask | None:
        """The cached mask that :meth:`recall` would return, in memory."""
        key = self._key(request)
        return None if key is None else self._cache.get(key)

    def _recall(self, request: InferRequest, start: float) -> tuple[str, dict[str, Any]] | None:
        kept = self.kept(request)
        if kept is None:
            return None
        recalled = time.perf_counter()
        path = write_mask(kept.labels, kept.affine_ras, self.preset, request.extension, request.dtype, request.compress)
        done = time.perf_counter()
        stages = dict.fromkeys(STOCK_LATENCIES.values(), 0.0)
        stages |= {"read": round((recalled - start) * 1000, 1), "write": round((done - recalled) * 1000, 1)}
        stages["total"] = round((done - start) * 1000, 1)
        logger.info("segmented %s before: %s ms", request.image.name, stages["total"])
        hit = {"hit": True, "computed_in_ms": kept.payload["latencies_ms"]["total"]}
        return str(path), kept.payload | describe_latencies(stages) | {"cache": hit}

    def _key(self, request: InferRequest, stamp: tuple[object, ...] | None = None) -> CacheKey | None:
        """The cache key of a response; None if there are no weights or no image."""
        file = self._locator.find() if stamp is None else None
        stamp = file.stamp if file is not None else stamp
        if stamp is None or not request.image.exists():
            return None
        return CacheKey(self.checksums.of(request.image), self.preset.name, stamp, request.options)


def describe_result(
    result: Segmentation, affine_ras: Affine, warnings: Sequence[str], model: LoadedModel
) -> dict[str, Any]:
    """The JSON of a response without its latencies: names, colours, centroids, volumes, model and plan.

    ``label_names`` and ``centroids`` have the form that MONAI Label's clients read.
    """
    preset = model.preset
    measures = measure_labels(result.labels, affine_ras, preset, result.boxes)
    centroids: dict[str, list[float]] = {name: m["centroid_voxels"] for name, m in measures.items()}  # type: ignore[misc]
    return {
        "label_names": preset.label_indices,
        "label_colors": {label.name: list(label.color) for label in preset.labels},
        "centroids": {name: [str(round(c)) for c in centroid] for name, centroid in centroids.items()},
        "label_statistics": measures,
        "model": model.describe(),
        "engine": result.plan.engine,
        "quality": estimate_quality(result, model),
        "warnings": list(warnings),
        "channels": [channel.name for channel in preset.channels],
        "plan": result.plan.as_json(),
    }


def estimate_quality(result: Segmentation, model: LoadedModel) -> dict[str, Any] | None:
    """The mask's expected Dice with its error; None for uncalibrated weights and for empty masks."""
    if model.calibration is None or result.entropy is None:
        return None
    return model.calibration.estimate(foreground_uncertainty(result.entropy, result.labels))


def describe_latencies(stages: Mapping[str, float]) -> dict[str, Any]:
    """The milliseconds of each stage, and the same in seconds under the keys that MONAI Label's clients read."""
    seconds = {name: round(stages[ours] / 1000, 3) for name, ours in STOCK_LATENCIES.items()}
    return {"latencies": seconds, "latencies_ms": dict(stages)}


STOCK_LATENCIES = {
    "pre": "preprocess",
    "infer": "network",
    "invert": "restore",
    "post": "postprocess",
    "write": "write",
    "total": "total",
}

_NO_TIME: dict[str, float] = {**dict.fromkeys(STOCK_LATENCIES.values(), 0.0), "read": 0.0}
