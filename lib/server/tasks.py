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
    """The interface of every inference task, including those for clicks and scribbles."""

    preset: Preset
    type: InferType
    takes_prompts: bool

    def is_valid(self) -> bool:
        """Whether it can segment."""

    def parse(self, request: Mapping[str, Any]) -> InferRequest:
        """Parse and validate a request's parameters; the other methods take the result."""

    def recall(self, request: InferRequest) -> tuple[str, dict[str, Any]] | None:
        """The cached response, if there is one."""

    def forecast(self, request: InferRequest) -> Forecast:
        """The needs of a computation."""

    def segment(self, request: InferRequest) -> tuple[str, dict[str, Any]]:
        """The mask's file, which the caller removes, and the JSON of the response."""


class TasksByName(Mapping[str, Task], Generic[Task]):
    """Tasks of one kind by name; the error for an unknown name lists the known ones.

    Args:
        tasks: the tasks by name.
        kind: name of such a task in the error.
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
        """The task with this name.

        Raises:
            NotFoundError: naming the known ones.
        """
        if name not in self._tasks:
            raise NotFoundError(self._kind, name[:LONGEST_NAME_IN_ERRORS], list(self._tasks))
        return self._tasks[name]


class Versioned(Protocol):
    """A model that is trained on this server: a preset, or the editor for its clicks."""

    @property
    def versions(self) -> VersionStore:
        """All of its versions."""

    def serving(self) -> tuple[str, str]:
        """The version in use, empty for none; and the reason if it is not the configured one."""


def infer_tasks(tasks: Mapping[str, Any]) -> TasksByName[InferenceTask]:
    """All inference tasks, including those for clicks and scribbles."""
    return TasksByName(tasks, "model")


def segmentation_tasks(tasks: Mapping[str, Any]) -> TasksByName[UnetrInferTask]:
    """The tasks for automatic segmentation, with weights."""
    automatic = {name: task for name, task in tasks.items() if not getattr(task, "takes_prompts", False)}
    return TasksByName(automatic, "model")


def train_tasks(tasks: Mapping[str, Any]) -> TasksByName[UnetrTrainTask]:
    """The training task of each model."""
    return TasksByName(tasks, "model to train")


def versioned_models(trainers: Mapping[str, Any], models: Mapping[str, Any]) -> TasksByName[Versioned]:
    """Models with versions: the training task of each preset, and the click tasks for their editors."""
    editors = {name: task for name, task in models.items() if getattr(task, "versions", None) is not None}
    return TasksByName({**trainers, **editors}, "model to train")
