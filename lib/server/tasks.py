"""The tasks of the served models, found by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

from monailabel.interfaces.tasks.infer_v2 import InferType

from lib.configs.preset import Preset
from lib.errors import NotFoundError
from lib.infers.devices.schedule import Forecast
from lib.infers.request import InferRequest
from lib.infers.task import UnetrInferTask
from lib.models.versions import VersionStore
from lib.trainers.task import UnetrTrainTask

LONGEST_NAME_IN_ERRORS = 200
Task = TypeVar("Task")


class InferenceTask(Protocol):
    """What the server asks of every inference task, of those that take clicks or scribbles too."""

    preset: Preset
    type: InferType
    takes_prompts: bool

    def is_valid(self) -> bool:
        """Whether it can answer."""

    def parse(self, request: Mapping[str, Any]) -> InferRequest:
        """Cast and check a request's parameters; the other methods take the result."""

    def recall(self, request: InferRequest) -> tuple[str, dict[str, Any]] | None:
        """The answer, where it is kept."""

    def forecast(self, request: InferRequest) -> Forecast:
        """What computing it needs."""

    def segment(self, request: InferRequest) -> tuple[str, dict[str, Any]]:
        """The mask's file, to be removed by the caller, and the answer's JSON."""


class TasksByName(Mapping[str, Task], Generic[Task]):
    """Tasks of one kind by name; the error for an unknown name lists the known ones.

    Args:
        tasks: the tasks by name.
        kind: what a task is called in the error.
    """

    def __init__(self, tasks: Mapping[str, Task], kind: str) -> None:
        self._tasks, self._kind = tasks, kind

    def __getitem__(self, name: str) -> Task:
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def find(self, name: str) -> Task:
        """The task of that name.

        Raises:
            NotFoundError: with the known ones.
        """
        if name not in self._tasks:
            raise NotFoundError(self._kind, name[:LONGEST_NAME_IN_ERRORS], list(self._tasks))
        return self._tasks[name]


class Versioned(Protocol):
    """A model that is trained here: a preset, or the editor that its clicks are shown to."""

    @property
    def versions(self) -> VersionStore:
        """All of its versions."""

    def serving(self) -> tuple[str, str]:
        """The version that is served, empty for none; and why it is not the one that should be."""


def infer_tasks(tasks: Mapping[str, Any]) -> TasksByName[InferenceTask]:
    """All inference tasks, those that take clicks or scribbles among them."""
    return TasksByName(tasks, "model")


def segmentation_tasks(tasks: Mapping[str, Any]) -> TasksByName[UnetrInferTask]:
    """Those that segment by themselves, with weights."""
    automatic = {name: task for name, task in tasks.items() if not getattr(task, "takes_prompts", False)}
    return TasksByName(automatic, "model")


def train_tasks(tasks: Mapping[str, Any]) -> TasksByName[UnetrTrainTask]:
    """The training task of each model."""
    return TasksByName(tasks, "model to train")


def versioned_models(trainers: Mapping[str, Any], models: Mapping[str, Any]) -> TasksByName[Versioned]:
    """What has versions: the training task of each preset, and the models that take clicks, for their editors."""
    editors = {name: task for name, task in models.items() if getattr(task, "versions", None) is not None}
    return TasksByName({**trainers, **editors}, "model to train")
