"""Trainings that users start: validated before their process starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from monailabel.interfaces.datastore import Datastore

from lib.infers.devices.lanes import Lanes
from lib.server.readers import Readers
from lib.server.tasks import TasksByName
from lib.server.work.jobs import Job, Jobs
from lib.server.work.pause import Pause
from lib.server.work.places import pause_file
from lib.trainers.request import SERVER_FIELDS
from lib.trainers.task import UnetrTrainTask

# Fields that a client must not set, since they determine what runs and what it reads.
NOT_FROM_CLIENTS = ("model", "local_rank", "bundle_path", "begun_at", *SERVER_FIELDS)


@dataclass(frozen=True)
class Trainings:
    """Starts trainings.

    Args:
        trainers: the training task of each model.
        jobs: the jobs.
        pause: pauses them while their devices answer requests.
        lanes: the devices.
        datastore: images and labels.
        readers: threads that read labels.
        check_alone: refuses a training while another server trains the model on the same studies.
    """

    trainers: TasksByName[UnetrTrainTask]
    jobs: Jobs
    pause: Pause
    lanes: Lanes
    datastore: Datastore
    readers: Readers
    check_alone: Callable[[str], None]

    def check(self, model: str, params: Mapping[str, Any]) -> None:
        """Validate a training before its process starts.

        Raises:
            NotFoundError: for an unknown model.
            ParameterError: for an invalid field.
        """
        self.trainers.find(model).validate_request(own(params, model), strict=True)

    async def notice(self, model: str, params: Mapping[str, Any]) -> str:
        """A note on the result for the user who starts a training; empty if it will be judged as usual."""
        return await self.readers.read(lambda: self.trainers[model].forecast(params, self.datastore))

    async def labelled(self) -> list[str]:
        """The models with labels."""
        return [model for model, task in self.trainers.items() if await self._has_labels(task)]

    async def start(self, model: str, params: Mapping[str, Any], enqueue: bool) -> Job:
        """Start a training, or let it wait for the running one.

        Raises:
            TrainingError: if one is running and ``enqueue`` is not set, or if one is running on another server.
        """
        await anyio.to_thread.run_sync(self.check_alone, model)
        asked = own(params, model)
        by_hand = {"why": "by hand", "pause_file": str(pause_file(self.pause, self.lanes, asked))}
        return self.jobs.submit("train", asked | by_hand, enqueue)

    async def _has_labels(self, task: UnetrTrainTask) -> bool:
        return await self.readers.read(lambda: bool(task.submitted(self.datastore).cases))


def own(params: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A request for ``model``, without fields that clients must not set."""
    return {key: value for key, value in params.items() if key not in NOT_FROM_CLIENTS} | {"model": model}
