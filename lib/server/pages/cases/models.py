"""Chooses the models that can segment an image, or correct its mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferType

from lib.configs.preset import Preset
from lib.datastore.records import LabelVersion
from lib.errors import ImageError, NotFoundError
from lib.infers.task import UnetrInferTask
from lib.server.images import Images
from lib.server.tasks import InferenceTask, TasksByName
from lib.server.work.modality import modality_of, models_for
from lib.transforms.inputs import sources_of


@dataclass(frozen=True)
class CaseModels:
    """Chooses the models of an image's page.

    Args:
        presets: the served presets, by name.
        tasks: all inference tasks, including those for clicks.
        automatic: the tasks for automatic segmentation.
        datastore: knows the modality of a series.
        images: finds the images.
    """

    presets: Mapping[str, Preset]
    tasks: TasksByName[InferenceTask]
    automatic: TasksByName[UnetrInferTask]
    datastore: Datastore
    images: Images

    def offered(self, image: str) -> list[str]:
        """The presets that are suitable for an image."""
        path = self.images.file(image)
        meant = models_for(self.presets, [modality_of(self.datastore, image)])
        return [name for name in meant if takes(self.presets[name], path)]

    def for_prediction(self, image: str, version: LabelVersion | None) -> str:
        """The model whose prediction is displayed: the label's own, otherwise the first with weights; empty for none.

        Models for another modality, and models that need missing sequences, are not offered.
        """
        ready = [name for name in self.offered(image) if name in self.automatic and self.automatic[name].is_valid()]
        wanted = version.preset if version is not None else ""
        return wanted if wanted in ready else next(iter(sorted(ready)), "")

    def for_clicks(self, image: str, version: LabelVersion | None) -> str:
        """The preset for clicks: like :meth:`for_prediction`, but also without weights; "" for none."""
        offered = self.offered(image)
        if version is not None and version.preset in offered:
            return version.preset
        return self.for_prediction(image, version) or next(iter(offered), "")

    def click_model(self, preset: str) -> str:
        """The model that corrects a preset's masks by clicks.

        Raises:
            NotFoundError: naming the known presets.
        """
        models = {task.preset.name: name for name, task in self.tasks.items() if task.type == InferType.DEEPEDIT}
        if preset not in models:
            raise NotFoundError("preset with clicks", preset, list(models))
        return models[preset]


def channels_of(path: Path, presets: Iterable[Preset]) -> tuple[Preset | None, tuple[str, ...]]:
    """The channels of an image that can be displayed, the display channel first; empty for a single image."""
    for preset in presets:
        if takes(preset, path) and preset.channels:
            names = [channel.name for channel in preset.channels if channel.name in sources_of(path, preset).files]
            display = preset.channels[preset.display_channel].name
            return preset, tuple(sorted(names, key=lambda name: name != display))
    return None, ()


def takes(preset: Preset, path: Path) -> bool:
    """Whether an image has the sequences that a preset's network needs, by its records only."""
    try:
        if preset.channels:
            sources_of(path, preset).check()
    except ImageError:
        return False
    return True
