"""What routes ask for: single services of the running server, as FastAPI dependencies.

A route names only what it uses. A test puts its own object in place of one with ``app.dependency_overrides``, and
needs no server, app or studies for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import anyio
from fastapi import Depends

from lib.datastore.history import LabelHistory
from lib.datastore.leases import Leases
from lib.datastore.store import VersionedDatastore
from lib.infers.task import UnetrInferTask
from lib.server.http.events import Changes
from lib.server.http.metrics import Metrics
from lib.server.services import Services, get_services
from lib.server.tasks import TasksByName
from lib.server.work.jobs import Jobs
from lib.server.work.pause import Pause
from lib.trainers.task import UnetrTrainTask

AllServices = Annotated[Services, Depends(get_services)]


def get_datastore(services: AllServices) -> VersionedDatastore:
    """Images and labels."""
    return services.store


def get_check_image(services: AllServices) -> Callable[[str], str]:
    """The check of an image's id: gives the id by which the studies have it, or refuses it."""
    return services.check_image


def get_history(services: AllServices) -> LabelHistory:
    """Versions of labels, and the quarantine."""
    return services.store.history


def get_leases(services: AllServices) -> Leases:
    """Who works on which case, and cases that are skipped."""
    return services.store.leases


def get_jobs(services: AllServices) -> Jobs:
    """Trainings, batch inferences and scorings."""
    return services.jobs


def get_pause(services: AllServices) -> Pause:
    """What a training waits for while somebody waits for an inference."""
    return services.pause


def get_segmentation_tasks(services: AllServices) -> TasksByName[UnetrInferTask]:
    """The models that segment by themselves."""
    return services.segmentation_tasks


def get_train_tasks(services: AllServices) -> TasksByName[UnetrTrainTask]:
    """The training task of each model, with its runs and versions."""
    return services.train_tasks


def get_scoring_methods(services: AllServices) -> Mapping[str, Any]:
    """What is computed of all images in the background, by name."""
    methods: Mapping[str, Any] = services.instance.scoring_methods
    return methods


def get_model_info(services: AllServices) -> Callable[[str], dict[str, Any]]:
    """Checksum and figures of a model's weights, as MONAI Label gives them."""
    info: Callable[[str], dict[str, Any]] = services.instance.model_info
    return info


def get_changes(services: AllServices) -> Changes:
    """The topics of page updates."""
    return services.changes


def get_metrics(services: AllServices) -> Metrics:
    """Counters of the server."""
    return services.metrics


def get_checks(services: AllServices) -> anyio.CapacityLimiter:
    """The limit on uploads that are read at the same time."""
    return services.checks


DatastoreDep = Annotated[VersionedDatastore, Depends(get_datastore)]
CheckImageDep = Annotated[Callable[[str], str], Depends(get_check_image)]
HistoryDep = Annotated[LabelHistory, Depends(get_history)]
LeasesDep = Annotated[Leases, Depends(get_leases)]
JobsDep = Annotated[Jobs, Depends(get_jobs)]
PauseDep = Annotated[Pause, Depends(get_pause)]
SegmentationTasksDep = Annotated[TasksByName[UnetrInferTask], Depends(get_segmentation_tasks)]
TrainTasksDep = Annotated[TasksByName[UnetrTrainTask], Depends(get_train_tasks)]
ScoringMethodsDep = Annotated[Mapping[str, Any], Depends(get_scoring_methods)]
ModelInfoDep = Annotated[Callable[[str], dict[str, Any]], Depends(get_model_info)]
ChangesDep = Annotated[Changes, Depends(get_changes)]
MetricsDep = Annotated[Metrics, Depends(get_metrics)]
ChecksDep = Annotated[anyio.CapacityLimiter, Depends(get_checks)]
