"""Segments the images of a server's batch inference on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.cluster.engine import Engine, Recipe, Rest
from lib.cluster.model import Model, ModelFile
from lib.cluster.results import CaseResult, Masked
from lib.cluster.source import Fetched, ReadCase, read_case
from lib.cluster.worker import segment
from lib.configs.preset import Preset
from lib.datastore.records import MadeMask
from lib.errors import ImageError
from lib.models.weights import WeightsLocator


@dataclass(frozen=True)
class StudyImage:
    """An image of the studies, with its path on the server."""

    id: str
    file: Path


class StudiesWorker:
    """A model on a machine that has the studies folder under the same path as the server."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def read(self, image: StudyImage) -> ReadCase:
        """Read the image.

        Raises:
            ImageError: if it cannot be read, or does not exist on this machine.
        """
        if not image.file.exists():
            raise ImageError(
                f"image {image.id!r} is not on this machine as {str(image.file)!r}: all machines of the cluster must "
                "see the studies under the server's path (or run.py segment --studies URL --ray fetches them)"
            )
        return read_case(image.id, Fetched(image.file), self._model.segmenter.preset)

    def compute(self, ready: ReadCase) -> Rest[Masked]:
        """Segment the image.

        Raises:
            InputError: if it cannot be segmented.
        """
        return segment(ready, self._model)


@dataclass(frozen=True)
class MakeStudiesWorker:
    """A factory of workers in other processes."""

    model: ModelFile

    def __call__(self, device: str) -> StudiesWorker:
        return StudiesWorker(self.model.load(device))


class ServedModel:
    """The current live weights, ready to be sent; a version that is published later is sent from then on.

    Args:
        preset: the preset.
        locator: finds its weights.
        precision: see :class:`lib.infers.segmenter.Segmenter`.
        compiles: see :class:`ModelFile`.
    """

    def __init__(self, preset: Preset, locator: WeightsLocator, precision: str, compiles: bool) -> None:
        self._preset, self._locator = preset, locator
        self._precision, self._compiles = precision, compiles
        self._kept: tuple[object, Recipe[StudyImage, Masked]] | None = None

    def recipe(self) -> Recipe[StudyImage, Masked]:
        """The recipe for workers with these weights.

        Raises:
            CheckpointError: if there are no weights.
        """
        file = self._locator.find()
        stamp = None if file is None else file.stamp
        if self._kept is None or self._kept[0] != stamp:
            model = ModelFile.find(self._preset, self._locator, self._compiles, self._precision).packed()
            self._kept = (stamp, Recipe(model.sha256, MakeStudiesWorker(model)))
        return self._kept[1]


class ClusterBatch:
    """Segments the images of a batch inference on a cluster, for :class:`lib.datastore.batch.DrawnLabelsStay`.

    Args:
        engine: the cluster.
        models: the live weights, by name of the model.
    """

    def __init__(self, engine: Engine, models: Mapping[str, ServedModel]) -> None:
        self._engine, self._models = engine, models

    def __call__(self, model: str, images: Iterator[tuple[str, Path]]) -> Iterator[MadeMask]:
        """The mask of each image, in no particular order, or the reason why there is none.

        Args:
            model: name of the model.
            images: ids and files, consumed on demand.

        Raises:
            ConfigError: if the cluster cannot be reached.
            CheckpointError: if there are no weights.
        """
        items = (StudyImage(image, file.absolute()) for image, file in images)
        for finished in self._engine.run(items, self._models[model].recipe):
            masked = finished.answer
            if masked is None:
                yield MadeMask(finished.item.id, problem=finished.problem)
            else:
                yield MadeMask(finished.item.id, masked.mask, _answer(masked.result))


def _answer(result: CaseResult) -> dict[str, Any]:
    """The JSON of the corresponding inference response."""
    quality = None if result.estimated_dice is None else {"estimated_dice": result.estimated_dice}
    return {
        "label_names": result.label_names,
        "model": {"preset": result.model, "version": result.version},
        "engine": result.engine,
        "quality": quality,
        "volumes_ml": result.volumes_ml,
        "seconds": result.seconds,
    }
