"""MONAI Label's inference tasks for corrections: clicks (``deepedit``) and scribbles (``scribbles``)."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from lib.configs.preset import Preset
from lib.errors import LabelError
from lib.infers.cache import CachedMask, CacheKey, Checksums, ResultCache
from lib.infers.devices.lane import device_in_use
from lib.infers.devices.schedule import Forecast
from lib.infers.logit_margins import LogitMargins
from lib.infers.network_images import NetworkImages
from lib.infers.plan import Planner
from lib.infers.request import InferRequest, parse_boolean
from lib.infers.writer import write_mask
from lib.interaction.answers import describe_answer, describe_time, only_labels, warnings_of
from lib.interaction.dialects import BACKGROUND, ClickRequest, ScribbleRequest, parse_clicks, parse_structure
from lib.interaction.editing import Edited, Scene, edit_clicks, edit_scribbles
from lib.interaction.editor import Editor
from lib.interaction.prompts import Prompts, parse_box
from lib.interaction.regions.single import kept_regions
from lib.interaction.served import ServedEditor
from lib.interaction.starting_mask import KEPT_MIB, StartingMask, StartingMasks, names_of, read_mask, read_values
from lib.models.versions import VersionStore
from lib.networks.precision import resolve_device
from lib.storage.bounded_cache import BoundedCache
from lib.transforms.inputs import read_input
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import Affine, Grid, check_segmentable, read_grid

logger = logging.getLogger(__name__)

LabelArray = npt.NDArray[np.uint8]

BACKGROUND_VALUE = 255
"""Value announced for ``background``, the name of negative clicks; OHIF would take 0 for the value of a label."""
MOST_GRIDS = 64
SENT = "label"
"""Name of the request part that carries a mask, and the name of this origin in the response."""
GROWTH, NETWORK = "growth", "editor"
"""Names of the methods in the response's ``model``: region growing without weights, and the editor network."""


class AutomaticSegmentation(Protocol):
    """The automatic segmentation task, as corrections use it."""

    preset: Preset
    checksums: Checksums

    def is_valid(self) -> bool:
        """Whether there are weights."""

    def preset_in_use(self) -> Preset:
        """The preset in the form that the current weights require."""

    def weights_stamp(self) -> tuple[object, ...]:
        """A value that changes whenever the weights change."""

    def mask_of(self, request: InferRequest) -> CachedMask:
        """The automatic mask."""

    def margins_of(self, request: InferRequest) -> LogitMargins | None:
        """The network's logit margin at each voxel; None where it is not cached."""


class _InteractiveTask(InferTask):
    """The common part of both tasks: the preprocessed image and the starting mask."""

    takes_prompts = True

    def __init__(
        self,
        kind: InferType,
        labels: dict[str, int],
        description: str,
        automatic: AutomaticSegmentation,
        images: NetworkImages,
        cache: ResultCache,
        device: str,
    ) -> None:
        super().__init__(kind, labels, 3, description, {})
        self.preset = automatic.preset
        self._automatic, self._images, self._cache = automatic, images, cache
        self._device = resolve_device(device)
        self._grids = BoundedCache(MOST_GRIDS)

    def is_valid(self) -> bool:
        """True: without weights, drawing starts from an empty mask."""
        return True

    def get_path(self, validate: bool = True) -> str | None:
        """None, because the task has no weights of its own."""
        return None

    def load(self) -> dict[str, str]:
        """The names of the weights in use, for the response."""
        return {"preset": self.preset.name, "version": GROWTH, "origin": "shipped"}

    def settle(self) -> None:
        """Do nothing: no work is prepared in the background."""

    def recall(self, request: Any) -> tuple[str, dict[str, Any]] | None:
        """The cached response, if there is one."""
        return None

    def is_kept(self, request: Any) -> bool:
        """Whether :meth:`recall` would return a response."""
        return False

    def forecast(self, request: InferRequest) -> Forecast:
        """The resources of a computation: the weights of the automatic mask."""
        return Forecast((self.preset.name, self._automatic.weights_stamp()))

    def _grid(self, image: Path, checksum: str) -> Grid:
        """The image's own grid."""
        return self._grids.get(checksum, lambda: read_grid(image))

    def _network_image(self, image: Path, checksum: str) -> MetaTensor:
        """The preprocessed image of the request, shared with automatic segmentation where it is cached.

        Its shape is (1, X, Y, Z). Of a case with several sequences it is the displayed one, on which the clicks were
        made.
        """
        preset = self._automatic.preset_in_use()
        kept = self._images.get(checksum, preset)
        if kept is None:
            volume = read_input(image, preset)
            check_segmentable(volume, preset, image.name)
            kept = preprocess_volume(volume, preset)
            self._images.put(checksum, preset, kept)
        place = preset.display_channel
        one = kept.as_subclass(torch.Tensor)[place : place + 1]
        return MetaTensor(one, affine=kept.affine) if preset.channels else kept


class ClickTask(_InteractiveTask):
    """Corrects a mask by clicks.

    Args:
        automatic: the automatic segmentation.
        images, cache: caches of preprocessed images and of responses.
        other_labels: label names of other presets, whose clicks are ignored.
        device: default device.
        editor: finds the editor network; None for region growing without weights.
        planner: knows the available memory.
        starts: cache of starting masks; by default one of its own.
    """

    def __init__(
        self,
        automatic: AutomaticSegmentation,
        images: NetworkImages,
        cache: ResultCache,
        other_labels: Collection[str] = (),
        device: str = "",
        editor: ServedEditor | None = None,
        planner: Planner | None = None,
        starts: StartingMasks | None = None,
    ) -> None:
        labels = dict(automatic.preset.label_indices)
        if BACKGROUND not in labels and BACKGROUND_VALUE not in labels.values():
            labels[BACKGROUND] = BACKGROUND_VALUE
        description = f"Corrects {automatic.preset.name} by clicks"
        super().__init__(InferType.DEEPEDIT, labels, description, automatic, images, cache, device)
        self._other_labels, self._editor, self._planner = frozenset(other_labels), editor, planner or Planner()
        self._starts, self._regions = starts or StartingMasks(), kept_regions()

    def load(self) -> dict[str, str]:
        """The names of the weights in use, for the response."""
        if self._editor is None or self._editor.current() is None:
            return super().load()
        own = self._editor.version()
        editor = {"version": f"{NETWORK} {own}", "origin": "published"} if own else {"version": NETWORK}
        return super().load() | editor

    @property
    def versions(self) -> VersionStore | None:
        """The editors trained on this server; None where the server trains none."""
        return None if self._editor is None else self._editor.versions

    def serving(self) -> tuple[str, str]:
        """The served version of the editor, empty for none, and the reason if it is not the configured one."""
        return ("", "") if self._editor is None else self._editor.serving()

    def parse(self, request: Mapping[str, Any]) -> ClickRequest:
        """Parse and validate a request's parameters; the other methods take the result.

        Raises:
            ParameterError: naming the parameter or the point, and the valid values.
        """
        params = {key: value for key, value in request.items() if key not in ("image", "label")}
        clicks = params | {"label": request.get("label_name")}
        return ClickRequest.parse(
            request,
            self._device,
            all_labels=bool(parse_boolean("all_labels", request, False)),
            prompts=parse_clicks(clicks, self.preset, self._other_labels),
            label_info=request.get("label_info"),
        )

    def recall(self, request: ClickRequest) -> tuple[str, dict[str, Any]] | None:
        """The cached response to the same prompts on the same image and mask, if there is one."""
        start = time.perf_counter()
        kept = self._cache.get(self._key(request)) if request.label_file is None else None
        if kept is None:
            return None
        return self._write(kept.labels, kept.affine_ras, kept.payload, request, start, hit=True)

    def is_kept(self, request: ClickRequest) -> bool:
        """Whether :meth:`recall` would return a response."""
        return self._key(request) in self._cache

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Correct a mask through MONAI Label's task interface: :meth:`parse` followed by :meth:`segment`."""
        return self.segment(self.parse(request))

    def segment(self, request: ClickRequest) -> tuple[str, dict[str, Any]]:
        """Correct an image's mask.

        Returns:
            The mask's file, which the caller removes, and the JSON of the response. Both hold the labels that were
            prompted; with ``all_labels``, or without any prompt, they hold all labels.

        Raises:
            ImageError, LabelError: when image or mask cannot be used.
            ParameterError: if a point lies outside of the image.
            MemoryBudgetError: if the editor needs more memory than is available.
        """
        start, prompts = time.perf_counter(), request.prompts
        checksum = self._automatic.checksums.of(request.image)
        prompts.check_inside(self._grid(request.image, checksum).shape)
        before = self._start(request, checksum)
        edited = Edited(before.labels, ())
        began = time.perf_counter()
        if not prompts.is_empty:
            image, key = self._network_image(request.image, checksum), (checksum, self._automatic.weights_stamp())
            margins = self._margins(request, before)
            scene = Scene(image, before.labels, before.affine_ras, self._regions, key, margins)
            edited = edit_clicks(scene, prompts, self._ready_editor(scene, request))
        edit_ms = round((time.perf_counter() - began) * 1000, 1)
        details = {
            "start": before.origin,
            "prompts": len(prompts.points),
            "prompted": edited.values,
            "edit_ms": edit_ms,
        }
        details["warnings"] = warnings_of(self._grid(request.image, checksum))
        details["boxes"] = before.boxes_with(edited.part, edited.values)
        if request.label_file is None:
            self._cache.put(self._key(request), CachedMask(edited.labels, before.affine_ras, details))
        return self._write(edited.labels, before.affine_ras, details, request, start)

    def _margins(self, request: ClickRequest, before: StartingMask) -> LogitMargins | None:
        """The logit margins of the automatic mask; None for a mask that a viewer sends, whatever its origin."""
        editor = self._editor.current() if self._editor is not None else None
        if editor is not None or before.origin == SENT or not self._automatic.is_valid():
            return None
        return self._automatic.margins_of(self._plain(request))

    def _ready_editor(self, scene: Scene, request: ClickRequest) -> Editor | None:
        """The editor network, if there is one and enough memory for it."""
        shared = self._editor.current() if self._editor is not None else None
        if shared is None:
            return None
        editor = shared.on(device_in_use(request.device))
        self._planner.check_room(editor.bytes_for(scene.voxels.shape), f"a click on {request.image.name!r}")
        return editor

    def _write(
        self,
        labels: LabelArray,
        affine_ras: Affine,
        details: Mapping[str, Any],
        request: ClickRequest,
        start: float,
        hit: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        """Write the response's file, and compose its JSON."""
        values, boxes = details["prompted"], details["boxes"]
        whole = request.all_labels or not values
        named = {n: v for n, v in self.preset.label_indices.items() if whole or v in values}
        shown = labels if whole else only_labels(labels, values, boxes)
        path = write_mask(shown, affine_ras, self.preset, request.extension, request.dtype, request.compress)
        answer = describe_answer(self.preset, shown, affine_ras, details, named, boxes) | {"model": self.load()}
        total_ms = round((time.perf_counter() - start) * 1000, 1)
        return str(path), answer | describe_time(details["edit_ms"], total_ms, hit)

    def _start(self, request: ClickRequest, checksum: str) -> StartingMask:
        """The mask that the correction starts from."""
        grid, highest, saved = self._grid(request.image, checksum), len(self.preset.labels), request.saved
        if request.label_file is not None:
            names = names_of(request.label_info) if request.label_info else None
            read = read_mask(request.label_file, grid, self.preset, names, SENT)
            return StartingMask.of(read, grid.affine_ras, SENT, highest)

        def make() -> StartingMask:
            if saved is not None:
                names = {value: name for name, value in saved.label_map.items()} or None
                read = read_mask(saved.file, grid, self.preset, names, saved.version_id)
                return StartingMask.of(read, grid.affine_ras, saved.version_id, highest)
            if self._automatic.is_valid():
                mask = self._automatic.mask_of(self._plain(request))
                return StartingMask.of(mask.labels.copy(order="K"), mask.affine_ras, "automatic", highest)
            empty = np.zeros(grid.shape, dtype=np.uint8, order="F")
            return StartingMask.of(empty, grid.affine_ras, "empty", highest)

        stamp = (self._automatic.weights_stamp(), request.device.type) if saved is None else saved.version_id
        return self._starts.get((checksum, self.preset.name, stamp), make)

    @staticmethod
    def _plain(request: ClickRequest) -> InferRequest:
        """The request for the automatic mask of the same image."""
        return InferRequest(
            image=request.image,
            device=request.device,
            requested_device=request.requested_device,
            extension=request.extension,
        )

    def _key(self, request: ClickRequest) -> CacheKey:
        saved = "" if request.saved is None else request.saved.version_id
        options: tuple[Hashable, ...] = (request.device.type, saved, request.prompts.key())
        editor = self._editor.current() if self._editor is not None else None
        stamp = (*self._automatic.weights_stamp(), GROWTH if editor is None else editor.sha256)
        return CacheKey(self._automatic.checksums.of(request.image), f"{self.preset.name}_edit", stamp, options)


class ScribbleTask(_InteractiveTask):
    """Corrects one structure by scribbles, which arrive together with the current segmentation in the part ``label``.

    Args: as of :class:`ClickTask`.
    """

    def __init__(
        self, automatic: AutomaticSegmentation, images: NetworkImages, cache: ResultCache, device: str = ""
    ) -> None:
        labels, description = dict(automatic.preset.label_indices), f"Corrects {automatic.preset.name} by scribbles"
        super().__init__(InferType.SCRIBBLES, labels, description, automatic, images, cache, device)

    def parse(self, request: Mapping[str, Any]) -> ScribbleRequest:
        """Parse and validate a request's parameters.

        Raises:
            ParameterError: naming the parameter and the valid values.
        """
        box = parse_box(request.get("roi"))
        name, values = parse_structure(request)
        return ScribbleRequest.parse(request, self._device, name=name, values=values, box=box)

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Correct a structure through MONAI Label's task interface: :meth:`parse` followed by :meth:`segment`."""
        return self.segment(self.parse(request))

    def segment(self, request: ScribbleRequest) -> tuple[str, dict[str, Any]]:
        """Correct the structure that the request names.

        Returns:
            The mask's file with values 0 and 1, which the caller removes, and the JSON of the response.

        Raises:
            ImageError, LabelError: when image or mask cannot be used.
            ParameterError: if the box lies outside of the image.
        """
        start = time.perf_counter()
        selected, drawn_value, erased_value = request.values
        if request.label_file is None:
            raise LabelError("the part 'label' is missing: it carries the scribbles")
        checksum = self._automatic.checksums.of(request.image)
        grid = self._grid(request.image, checksum)
        box = None if request.box is None else request.box.clipped(grid.shape)
        drawing = read_values(request.label_file, grid, "label")
        drawn, erased = (
            np.argwhere(drawing == value) if value else np.zeros((0, 3), int) for value in (drawn_value, erased_value)
        )
        if box is not None:
            drawn, erased = (p[np.all((p >= box.start) & (p < box.stop), axis=1)] for p in (drawn, erased))
        structure = np.asfortranarray((drawing == selected).astype(np.uint8))
        began = time.perf_counter()
        if len(drawn) or len(erased):
            scene = Scene(self._network_image(request.image, checksum), structure, grid.affine_ras)
            structure = edit_scribbles(scene, drawn, erased, Prompts(box=box))
        edit_ms = round((time.perf_counter() - began) * 1000, 1)
        name = request.name
        known = self.preset.find_label(name)
        single = self.preset.with_labels([known.name if known is not None else name])
        path = write_mask(structure, grid.affine_ras, single, request.extension, request.dtype, request.compress)
        details = {"start": "label", "prompts": len(drawn) + len(erased), "warnings": warnings_of(grid)}
        answer = describe_answer(self.preset, structure, grid.affine_ras, details, {name: 1}, measured=single)
        total_ms = round((time.perf_counter() - start) * 1000, 1)
        return str(path), answer | {"model": self.load()} | describe_time(edit_ms, total_ms, hit=False)


def make_interactive_tasks(
    automatic: Mapping[str, AutomaticSegmentation],
    images: NetworkImages,
    cache: ResultCache,
    device: str,
    editors: Mapping[str, ServedEditor] | None = None,
    planner: Planner | None = None,
) -> dict[str, InferTask]:
    """The click and scribble tasks of each preset, all click tasks first.

    Args:
        editors: for each preset, what finds its editor network; a preset without one uses region growing.
        planner: knows the available memory.
    """
    names = {name: set(task.preset.label_indices) for name, task in automatic.items()}
    starts = StartingMasks(min(KEPT_MIB, cache.limit_mib))
    made: dict[str, InferTask] = {}
    for name, task in automatic.items():
        others: set[str] = set().union(*(labels for other, labels in names.items() if other != name))
        made[f"{name}_edit"] = ClickTask(
            task, images, cache, others, device, (editors or {}).get(name), planner, starts
        )
    return made | {f"{name}_scribbles": ScribbleTask(t, images, cache, device) for name, t in automatic.items()}
