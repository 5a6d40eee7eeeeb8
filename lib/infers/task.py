"""MONAI Label's inference task for a preset."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from monai.data import MetaTensor
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.utils.others.generic import device_list

from lib.configs.preset import Preset
from lib.infers.cache import CachedMask, CacheKey, Checksums, ResultCache
from lib.infers.model_cache import LoadedModel, ModelCache
from lib.infers.network_images import NetworkImages
from lib.infers.plan import Planner
from lib.infers.request import InferRequest
from lib.infers.segmenter import Segmentation
from lib.infers.writer import write_map, write_mask
from lib.models.calibration import foreground_uncertainty
from lib.models.weights import WeightsLocator
from lib.networks.precision import resolve_device
from lib.transforms.inputs import read_input
from lib.transforms.intensity_range import range_warning
from lib.transforms.postprocess import measure_labels
from lib.transforms.volume import Volume, reading_warning

logger = logging.getLogger(__name__)

# One computation at a time in this process: two on one device are slower than one after the other, and need twice
# the memory. The server's queue decides who waits and for how long.
COMPUTING = threading.Lock()


class UnetrInferTask(InferTask):
    """Segments an image with a preset's newest weights.

    Args:
        preset: the task.
        locator: where its weights are.
        device: default device; the best there is if empty.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        cache: where masks are kept for those who ask again, or were not the first to ask.
        planner: chooses what fits into memory; by what is free if not given.
        compiles: whether models on the CPU are compiled in the background, and used so where that is faster.
        images: where preprocessed images are kept for clicks that correct the mask; none are kept if not given.
    """

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
    ) -> None:
        options: dict[str, Any] = {"device": device_list()}
        # Clients send these options back: one for all labels would override a choice label by label.
        if isinstance(preset.inference.largest_component, bool):
            options["largest_component"] = preset.inference.largest_component
        super().__init__(InferType.SEGMENTATION, preset.label_indices, 3, preset.description, options)
        self.preset = preset
        self._locator = locator
        self._device = device
        self._models = ModelCache(preset, locator, precision, planner, COMPUTING if compiles else None)
        self._cache = cache if cache is not None else ResultCache(0)
        self._images = images
        self.checksums = Checksums()

    def is_valid(self) -> bool:
        """Whether there are weights to answer with; a model without any is not offered."""
        return self._locator.is_known()

    def get_path(self, validate: bool = True) -> str | None:
        """The weights in use; with ``validate`` false, the folder of the preset's versions."""
        file = self._locator.find() if validate else None
        return str(file.path) if file else None if validate else str(self._locator.folder)

    def load(self) -> dict[str, str]:
        """Load the newest weights on the default device, and say what they are; they stay loaded.

        Raises:
            ModelNotReadyError, CheckpointError: when there are no usable weights.
        """
        return self._models.get(resolve_device(self._device)).describe()

    def settle(self) -> None:
        """Wait for what is prepared in the background."""
        self._models.settle()

    def validate_request(self, request: Mapping[str, Any]) -> None:
        """Check a request's parameters without running it.

        Raises:
            ParameterError: naming the parameter, its value and what would be valid.
        """
        InferRequest.parse(request, self._device)

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Segment ``request["image"]``.

        Returns:
            The mask's file, to be removed by the caller, and the answer's JSON.

        Raises:
            ImageError: when the image cannot be segmented.
            MemoryBudgetError: when it does not fit into memory.
            ParameterError: when a parameter is not valid.
            ModelNotReadyError, CheckpointError: when there are no usable weights.
        """
        asked = InferRequest.parse(request, self._device)
        start = time.perf_counter()
        if (known := self._recall(asked, start)) is not None:
            return known
        checksum = self.checksums.of(asked.image) if asked.image.exists() else ""
        volume = read_input(asked.image, self.preset)
        read = time.perf_counter()
        with COMPUTING:
            waited = time.perf_counter()
            model = self._models.get(asked.device)
            loaded = time.perf_counter()
            unsure = model.calibration is not None
            result = model.segmenter.segment(
                volume,
                asked.largest_component,
                asked.image.name,
                entropy=unsure,
                on_image=self._keeper(asked, model, checksum),
            )
        computed = time.perf_counter()
        path = write_mask(result.labels, volume.affine_ras, model.preset, asked.extension, asked.dtype, asked.compress)
        written = time.perf_counter()
        said = describe_result(result, volume, model)
        done = time.perf_counter()
        timings = {"read": read - start, "wait": waited - read, "load": loaded - waited}
        timings |= {"write": written - computed, "measure": done - written}
        stages = {name: round(seconds * 1000, 1) for name, seconds in timings.items()} | result.latencies_ms
        stages["total"] = round((done - start) * 1000, 1)
        logger.info("segmented %s with %s in %s ms", asked.image.name, model.describe(), stages)
        said |= describe_latencies(stages)
        self._keep(asked, model, checksum, CachedMask(result.labels, volume.affine_ras, said))
        return str(path), said | {"cache": {"hit": False}}

    def preset_in_use(self) -> Preset:
        """The preset with the spacing and intensities that the newest weights want; as configured without weights.

        Raises:
            CheckpointError: when the weights cannot be used.
        """
        return self._models.get(resolve_device(self._device)).preset if self.is_valid() else self.preset

    def weights_stamp(self) -> tuple[object, ...]:
        """Changes with the weights; empty for none."""
        file = self._locator.find()
        return () if file is None else file.stamp

    def mask_of(self, request: Mapping[str, Any]) -> CachedMask:
        """The mask of ``request["image"]`` in memory: the one that is kept, or else a new one, which is kept then.

        Raises:
            As :meth:`__call__`.
        """
        asked = InferRequest.parse(request, self._device)
        key = self._key(asked)
        if key is not None and (kept := self._cache.get(key)) is not None:
            return kept
        checksum = self.checksums.of(asked.image) if asked.image.exists() else ""
        volume = read_input(asked.image, self.preset)
        with COMPUTING:
            model = self._models.get(asked.device)
            unsure, keep = model.calibration is not None, self._keeper(asked, model, checksum)
            result = model.segmenter.segment(volume, None, asked.image.name, entropy=unsure, on_image=keep)
        said = describe_result(result, volume, model) | describe_latencies({**_NO_TIME, **result.latencies_ms})
        mask = CachedMask(result.labels, volume.affine_ras, said)
        self._keep(asked, model, checksum, mask)
        return mask

    def _keep(self, asked: InferRequest, model: LoadedModel, checksum: str, mask: CachedMask) -> None:
        """Keep an answer, unless the image was replaced while it was read or segmented.

        Args:
            checksum: of the image before it was read: under the new content's, the old one's mask would be kept.
        """
        key = self._key(asked, model.stamp)
        if key is not None and key.image == checksum:
            self._cache.put(key, mask)

    def _keeper(self, asked: InferRequest, model: LoadedModel, checksum: str) -> Callable[[MetaTensor], None] | None:
        """Keeps the preprocessed image, unless the file was replaced after ``checksum`` was taken."""
        images = self._images
        if images is None:
            return None

        def keep(image: MetaTensor) -> None:
            if self.checksums.of(asked.image) == checksum:
                images.put(checksum, model.preset, image)

        return keep

    def map_uncertainty(self, request: Mapping[str, Any]) -> Path:
        """Write how unsure the model is at each voxel of ``request["image"]``, as NIfTI on the image's own grid.

        Returns:
            A file of the entropies, 0 (certain) to 1 (all classes alike), to be removed by the caller.

        Raises:
            As :meth:`__call__`.
        """
        asked = InferRequest.parse(request, self._device)
        volume = read_input(asked.image, self.preset)
        with COMPUTING:
            segmenter = self._models.get(asked.device).segmenter
            result = segmenter.segment(volume, name=asked.image.name, entropy=True)
        assert result.entropy is not None
        return write_map(result.entropy, volume.affine_ras)

    def recall(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
        """The answer, where it is kept: nothing is computed, and nobody waits for a device.

        Raises:
            ParameterError: when a parameter is not valid.
        """
        return self._recall(InferRequest.parse(request, self._device), time.perf_counter())

    def is_kept(self, request: Mapping[str, Any]) -> bool:
        """Whether :meth:`recall` would answer."""
        key = self._key(InferRequest.parse(request, self._device))
        return key is not None and key in self._cache

    def _recall(self, asked: InferRequest, start: float) -> tuple[str, dict[str, Any]] | None:
        key = self._key(asked)
        kept = self._cache.get(key) if key is not None else None
        if kept is None:
            return None
        found = time.perf_counter()
        path = write_mask(kept.labels, kept.affine_ras, self.preset, asked.extension, asked.dtype, asked.compress)
        done = time.perf_counter()
        stages = dict.fromkeys(STOCK_LATENCIES.values(), 0.0)
        stages |= {"read": round((found - start) * 1000, 1), "write": round((done - found) * 1000, 1)}
        stages["total"] = round((done - start) * 1000, 1)
        logger.info("segmented %s before: %s ms", asked.image.name, stages["total"])
        hit = {"hit": True, "computed_in_ms": kept.said["latencies_ms"]["total"]}
        return str(path), kept.said | describe_latencies(stages) | {"cache": hit}

    def _key(self, asked: InferRequest, stamp: tuple[object, ...] | None = None) -> CacheKey | None:
        """Under what the answer is kept; None where it cannot be: no weights yet, or no image."""
        file = self._locator.find() if stamp is None else None
        stamp = file.stamp if file is not None else stamp
        if stamp is None or not asked.image.exists():
            return None
        return CacheKey(self.checksums.of(asked.image), self.preset.name, stamp, asked.options)


def describe_result(result: Segmentation, volume: Volume, model: LoadedModel) -> dict[str, Any]:
    """The answer's JSON but for the time it took: names, colours, centroids, volumes, the model, its plan.

    ``label_names`` and ``centroids`` have the form that MONAI Label's clients read.
    """
    preset = model.preset
    found = (range_warning(volume.voxels, preset.modality), reading_warning(volume.grid), *volume.notes)
    measures = measure_labels(result.labels, volume.affine_ras, preset)
    centroids: dict[str, list[float]] = {name: m["centroid_voxels"] for name, m in measures.items()}  # type: ignore[misc]
    return {
        "label_names": preset.label_indices,
        "label_colors": {label.name: list(label.color) for label in preset.labels},
        "centroids": {name: [str(round(c)) for c in centroid] for name, centroid in centroids.items()},
        "label_statistics": measures,
        "model": model.describe(),
        "engine": result.plan.engine,
        "quality": estimate_quality(result, model),
        "warnings": [warning for warning in found if warning],
        "channels": [channel.name for channel in preset.channels],
        "plan": result.plan.as_json(),
    }


def estimate_quality(result: Segmentation, model: LoadedModel) -> dict[str, Any] | None:
    """The mask's probable Dice, with its error; None for weights that were never calibrated, and empty masks."""
    if model.calibration is None or result.entropy is None:
        return None
    return model.calibration.estimate(foreground_uncertainty(result.entropy, result.labels))


def describe_latencies(stages: Mapping[str, float]) -> dict[str, Any]:
    """The milliseconds of each stage, and the same in seconds under the names that MONAI Label's clients read."""
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
