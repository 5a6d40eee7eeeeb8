"""What routes ask for: single services of the running server, as FastAPI dependencies.

A route names only what it uses. A test puts its own object in place of one with ``app.dependency_overrides``, and
needs no server, app or studies for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends

from lib.datastore.history import LabelHistory
from lib.datastore.leases import Leases
from lib.infers.task import UnetrInferTask
from lib.server.http.events import Changes
from lib.server.services import Services, get_services
from lib.server.tasks import TasksByName
from lib.trainers.task import UnetrTrainTask

AllServices = Annotated[Services, Depends(get_services)]


def get_check_image(services: AllServices) -> Callable[[str], str]:
    """The check of an image's id: gives the id by which the studies have it, or refuses it."""
    return services.check_image


def get_history(services: AllServices) -> LabelHistory:
    """Versions of labels, and the quarantine."""
    return services.store.history


def get_leases(services: AllServices) -> Leases:
    """Who works on which case, and cases that are skipped."""
    return services.store.leases


def get_segmentation_tasks(services: AllServices) -> TasksByName[UnetrInferTask]:
    """The models that segment by themselves."""
    return services.segmentation_tasks


def get_train_tasks(services: AllServices) -> TasksByName[UnetrTrainTask]:
    """The training task of each model, with its runs and versions."""
    return services.train_tasks


def get_model_info(services: AllServices) -> Callable[[str], dict[str, Any]]:
    """Checksum and figures of a model's weights, as MONAI Label gives them."""
    info: Callable[[str], dict[str, Any]] = services.instance.model_info
    return info


def get_changes(services: AllServices) -> Changes:
    """The topics of page updates."""
    return services.changes


CheckImageDep = Annotated[Callable[[str], str], Depends(get_check_image)]
HistoryDep = Annotated[LabelHistory, Depends(get_history)]
LeasesDep = Annotated[Leases, Depends(get_leases)]
SegmentationTasksDep = Annotated[TasksByName[UnetrInferTask], Depends(get_segmentation_tasks)]
TrainTasksDep = Annotated[TasksByName[UnetrTrainTask], Depends(get_train_tasks)]
ModelInfoDep = Annotated[Callable[[str], dict[str, Any]], Depends(get_model_info)]
ChangesDep = Annotated[Changes, Depends(get_changes)]
