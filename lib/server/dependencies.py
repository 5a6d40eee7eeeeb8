"""What routes ask for: single services of the running server, as FastAPI dependencies.

A route names only what it uses. A test puts its own object in place of one with ``app.dependency_overrides``, and
needs no server, app or studies for it. The dependencies are coroutines, since FastAPI would take a thread for each of
them otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import anyio
from fastapi import Depends
from monailabel.interfaces.datastore import Datastore
from monailabel.utils.sessions import Sessions

from lib.activelearning.pool_knowledge import PoolKnowledge
from lib.configs.preset import Preset
from lib.configs.settings import Settings
from lib.datastore.history import LabelHistory
from lib.datastore.leases import Leases
from lib.datastore.series import SeriesDatastore
from lib.infers.devices.lanes import Lanes
from lib.infers.task import UnetrInferTask
from lib.server.http.events import Changes
from lib.server.http.metrics import Metrics
from lib.server.images import Images
from lib.server.inference.answers import Answers
from lib.server.labels.segmentations import Segmentations
from lib.server.labels.submissions import Submissions
from lib.server.pages.cases.pictures import Pictures
from lib.server.pages.cases.view import CaseViews
from lib.server.presented.cases import PresentedCases
from lib.server.services import Services, get_services
from lib.server.tasks import TasksByName
from lib.server.work.image_checks import ImageInspector
from lib.server.work.jobs import Jobs
from lib.server.work.next_case import NextCase
from lib.server.work.pause import Pause
from lib.server.work.queue import InferenceQueue
from lib.trainers.task import UnetrTrainTask

AllServices = Annotated[Services, Depends(get_services)]


async def get_images(services: AllServices) -> Images:
    """Finds images by the ids that clients name."""
    return services.images


async def get_check_image(services: AllServices) -> Callable[[str], str]:
    """The check of an image's id: gives the id by which the studies have it, or refuses it."""
    return services.images.check


async def get_history(services: AllServices) -> LabelHistory:
    """Versions of labels, and the quarantine."""
    return services.store.history


async def get_leases(services: AllServices) -> Leases:
    """Who works on which case, and cases that are skipped."""
    return services.store.leases


async def get_segmentation_tasks(services: AllServices) -> TasksByName[UnetrInferTask]:
    """The models that segment by themselves."""
    return services.segmentation_tasks


async def get_train_tasks(services: AllServices) -> TasksByName[UnetrTrainTask]:
    """The training task of each model, with its runs and versions."""
    return services.train_tasks


async def get_model_info(services: AllServices) -> Callable[[str], dict[str, Any]]:
    """Checksum and figures of a model's weights, as MONAI Label gives them."""
    info: Callable[[str], dict[str, Any]] = services.instance.model_info
    return info


async def get_changes(services: AllServices) -> Changes:
    """The topics of page updates."""
    return services.changes


async def get_datastore(services: AllServices) -> Datastore:
    """Images and labels, as MONAI Label knows them."""
    return services.datastore


async def get_jobs(services: AllServices) -> Jobs:
    """Trainings, batch inferences and scorings, each in a process of its own."""
    return services.jobs


async def get_pause(services: AllServices) -> Pause:
    """Whether trainings make way for inference."""
    return services.pause


async def get_lanes(services: AllServices) -> Lanes:
    """The devices."""
    return services.inferences.lanes


async def get_image_checks(services: AllServices) -> anyio.CapacityLimiter:
    """The threads that read images or labels of a request, of which there are few, since each takes much memory."""
    return services.checks


async def get_scoring_methods(services: AllServices) -> Collection[str]:
    """The names of the scoring methods."""
    methods: Collection[str] = services.instance.scoring_methods
    return methods


async def get_store(services: AllServices) -> SeriesDatastore:
    """Files and DICOM series, and labels with all their versions."""
    return services.store


async def get_presets(services: AllServices) -> Mapping[str, Preset]:
    """The presets that are served, by name."""
    return services.presets


async def get_settings(services: AllServices) -> Settings:
    """What ``--conf`` says."""
    return services.settings


async def get_sessions(services: AllServices) -> Sessions:
    """Images that are kept for a while; refused where sessions are switched off."""
    return services.sessions


async def get_image_file(services: AllServices) -> Callable[[str], Path]:
    """The file or folder of an image, found by its id."""
    return services.images.file


async def get_infer_tasks(services: AllServices) -> TasksByName[UnetrInferTask]:
    """All inference tasks, those that take clicks or scribbles among them."""
    return services.infer_tasks


async def get_inferences(services: AllServices) -> InferenceQueue:
    """The queue in which inferences wait for a device."""
    return services.inferences


async def get_metrics(services: AllServices) -> Metrics:
    """Figures for Prometheus."""
    return services.metrics


async def get_presented(services: AllServices) -> PresentedCases:
    """NIfTI and NRRD files as the DICOM series that OHIF is shown."""
    return services.presented


async def get_pool_knowledge(services: AllServices) -> Mapping[str, PoolKnowledge]:
    """What the scoring found of the images, by preset."""
    return services.pool_knowledge


async def get_studies(services: AllServices) -> str:
    """The folder of the studies, or the address of a DICOMweb server."""
    return services.studies


async def get_image_inspector(services: AllServices) -> ImageInspector:
    """Which images cannot be segmented, and why."""
    return services.image_inspector


async def get_app_info(services: AllServices) -> Callable[[], dict[str, Any]]:
    """What MONAI Label's app says of itself."""
    info: Callable[[], dict[str, Any]] = services.instance.info
    return info


async def get_next_case(services: AllServices) -> NextCase:
    """Chooses the next case to label."""
    return services.next_case


async def get_case_views(services: AllServices) -> CaseViews:
    """Puts together what the pages of images show."""
    return services.case_views


async def get_pictures(services: AllServices) -> Pictures:
    """Reads and computes what the pictures of cases are drawn from."""
    return services.pictures


async def get_answers(services: AllServices) -> Answers:
    """Answers requests for a mask."""
    return services.answers


async def get_find_sessions(services: AllServices) -> Callable[[], Sessions]:
    """As :func:`get_sessions`, for requests of which only some are about a session."""
    return lambda: services.sessions


async def get_submissions(services: AllServices) -> Submissions:
    """Takes labels in."""
    return services.submissions


async def get_segmentations(services: AllServices) -> Segmentations:
    """Takes DICOM SEGs in as labels, and shows labels as DICOM SEGs."""
    return services.segmentations


ImagesDep = Annotated[Images, Depends(get_images)]
CheckImageDep = Annotated[Callable[[str], str], Depends(get_check_image)]
HistoryDep = Annotated[LabelHistory, Depends(get_history)]
LeasesDep = Annotated[Leases, Depends(get_leases)]
SegmentationTasksDep = Annotated[TasksByName[UnetrInferTask], Depends(get_segmentation_tasks)]
TrainTasksDep = Annotated[TasksByName[UnetrTrainTask], Depends(get_train_tasks)]
ModelInfoDep = Annotated[Callable[[str], dict[str, Any]], Depends(get_model_info)]
ChangesDep = Annotated[Changes, Depends(get_changes)]
DatastoreDep = Annotated[Datastore, Depends(get_datastore)]
JobsDep = Annotated[Jobs, Depends(get_jobs)]
PauseDep = Annotated[Pause, Depends(get_pause)]
LanesDep = Annotated[Lanes, Depends(get_lanes)]
ImageChecksDep = Annotated[anyio.CapacityLimiter, Depends(get_image_checks)]
ScoringMethodsDep = Annotated[Collection[str], Depends(get_scoring_methods)]
StoreDep = Annotated[SeriesDatastore, Depends(get_store)]
PresetsDep = Annotated[Mapping[str, Preset], Depends(get_presets)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
SessionsDep = Annotated[Sessions, Depends(get_sessions)]
ImageFileDep = Annotated[Callable[[str], Path], Depends(get_image_file)]
InferTasksDep = Annotated[TasksByName[UnetrInferTask], Depends(get_infer_tasks)]
InferencesDep = Annotated[InferenceQueue, Depends(get_inferences)]
MetricsDep = Annotated[Metrics, Depends(get_metrics)]
PresentedDep = Annotated[PresentedCases, Depends(get_presented)]
PoolKnowledgeDep = Annotated[Mapping[str, PoolKnowledge], Depends(get_pool_knowledge)]
StudiesDep = Annotated[str, Depends(get_studies)]
ImageInspectorDep = Annotated[ImageInspector, Depends(get_image_inspector)]
SubmissionsDep = Annotated[Submissions, Depends(get_submissions)]
SegmentationsDep = Annotated[Segmentations, Depends(get_segmentations)]
AppInfoDep = Annotated[Callable[[], dict[str, Any]], Depends(get_app_info)]
NextCaseDep = Annotated[NextCase, Depends(get_next_case)]
CaseViewsDep = Annotated[CaseViews, Depends(get_case_views)]
PicturesDep = Annotated[Pictures, Depends(get_pictures)]
AnswersDep = Annotated[Answers, Depends(get_answers)]
FindSessionsDep = Annotated[Callable[[], Sessions], Depends(get_find_sessions)]
