"""Which models can segment an image, or correct its mask."""

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
    """Chooses the model of an image's page.

    Args:
        presets: those that are served, by name.
        tasks: all inference tasks, those that take clicks among them.
        automatic: those that segment by themselves.
        datastore: knows the modality of a series.
        images: finds the images.
    """

    presets: Mapping[str, Preset]
    tasks: TasksByName[InferenceTask]
    automatic: TasksByName[UnetrInferTask]
    datastore: Datastore
    images: Images

    def offered(self, image: str) -> list[str]:
        """The presets that are meant for an image and can take it."""
        path = self.images.file(image)
        meant = models_for(self.presets, [modality_of(self.datastore, image)])
        return [name for name in meant if takes(self.presets[name], path)]

    def for_prediction(self, image: str, version: LabelVersion | None) -> str:
        """The model whose prediction is shown: the label's own, or else the first with weights; empty for none.

        Models for images of another modality are not offered, nor those that need sequences which the image lacks.
        """
        ready = [name for name in self.offered(image) if name in self.automatic and self.automatic[name].is_valid()]
        wanted = version.preset if version is not None else ""
        return wanted if wanted in ready else next(iter(sorted(ready)), "")

    def for_clicks(self, image: str, version: LabelVersion | None) -> str:
        """The preset whose labels can be clicked: as :meth:`for_prediction`, but also without weights; "" for none."""
        offered = self.offered(image)
        if version is not None and version.preset in offered:
            return version.preset
        return self.for_prediction(image, version) or next(iter(offered), "")

    def click_model(self, preset: str) -> str:
        """The model that corrects a preset's masks by clicks.

        Raises:
            NotFoundError: with the known presets.
        """
        models = {task.preset.name: name for name, task in self.tasks.items() if task.type == InferType.DEEPEDIT}
        if preset not in models:
            raise NotFoundError("preset with clicks", preset, list(models))
        return models[preset]


def channels_of(path: Path, presets: Iterable[Preset]) -> tuple[Preset | None, tuple[str, ...]]:
    """The channels that can be shown of an image, the one that stands for it first; none of a single image."""
    for preset in presets:
        if takes(preset, path) and preset.channels:
            names = [channel.name for channel in preset.channels if channel.name in sources_of(path, preset).files]
            display = preset.channels[preset.display_channel].name
            return preset, tuple(sorted(names, key=lambda name: name != display))
    return None, ()


def takes(preset: Preset, path: Path) -> bool:
    """Whether an image has the sequences that a preset's network needs; nothing but records is read."""
    try:
        if preset.channels:
            sources_of(path, preset).check()
    except ImageError:
        return False
    return True
