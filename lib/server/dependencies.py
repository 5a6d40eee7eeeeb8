"""FastAPI dependencies: each gives a route one service of the running server.

A route names only the services that it uses. A test replaces one by its own object with ``app.dependency_overrides``,
and needs neither a server nor an app nor studies. The dependencies are coroutines, since FastAPI would otherwise use a
thread for each of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

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
from lib.server.loading import WeightsLoading
from lib.server.pages.cases.pictures import Pictures
from lib.server.pages.cases.view import CaseViews
from lib.server.presented.cases import PresentedCases
from lib.server.readers import Readers
from lib.server.services import Services, get_services
from lib.server.tasks import InferenceTask, TasksByName, Versioned
from lib.server.work.image_checks import ImageInspector
from lib.server.work.jobs import Jobs
from lib.server.work.journal import Journal
from lib.server.work.next_case import NextCase
from lib.server.work.pause import Pause
from lib.server.work.queue import InferenceQueue
from lib.trainers.task import UnetrTrainTask

AllServices = Annotated[Services, Depends(get_services)]
Service = TypeVar("Service")


def _reading(read: Callable[[Services], Service]) -> Callable[[Services], Awaitable[Service]]:
    """The dependency that returns one service."""

    async def dependency(services: AllServices) -> Service:
        return read(services)

    return dependency


get_images = _reading(lambda services: services.images)
"""Finds images by their ids."""
ImagesDep = Annotated[Images, Depends(get_images)]

get_check_image = _reading(lambda services: services.images.check)
"""The check of an image's id, which returns the id in the studies or refuses the request."""
CheckImageDep = Annotated[Callable[[str], str], Depends(get_check_image)]

get_history = _reading(lambda services: services.store.history)
"""Label versions, and the quarantine."""
HistoryDep = Annotated[LabelHistory, Depends(get_history)]

get_leases = _reading(lambda services: services.store.leases)
"""Leases of cases to clients, and skipped cases."""
LeasesDep = Annotated[Leases, Depends(get_leases)]

get_segmentation_tasks = _reading(lambda services: services.segmentation_tasks)
"""The models for automatic segmentation."""
SegmentationTasksDep = Annotated[TasksByName[UnetrInferTask], Depends(get_segmentation_tasks)]

get_weights_loading = _reading(lambda services: services.loading)
"""Loads the weights of these models, and reports which are loaded."""
WeightsLoadingDep = Annotated[WeightsLoading, Depends(get_weights_loading)]

get_train_tasks = _reading(lambda services: services.train_tasks)
"""The training task of each model, with its runs and versions."""
TrainTasksDep = Annotated[TasksByName[UnetrTrainTask], Depends(get_train_tasks)]

get_versioned_models = _reading(lambda services: services.versioned_models)
"""Presets and editors, with their versions."""
VersionedModelsDep = Annotated[TasksByName[Versioned], Depends(get_versioned_models)]

get_model_info = _reading(lambda services: services.instance.model_info)
"""Checksum and figures of a model's weights, as MONAI Label reports them."""
ModelInfoDep = Annotated[Callable[[str], dict[str, Any]], Depends(get_model_info)]

get_changes = _reading(lambda services: services.changes)
"""The topics of page updates."""
ChangesDep = Annotated[Changes, Depends(get_changes)]

get_datastore = _reading(lambda services: services.datastore)
"""Images and labels, by MONAI Label's datastore interface."""
DatastoreDep = Annotated[Datastore, Depends(get_datastore)]

get_jobs = _reading(lambda services: services.jobs)
"""Training, batch inference and scoring jobs, each in its own process."""
JobsDep = Annotated[Jobs, Depends(get_jobs)]

get_journal = _reading(lambda services: services.journal)
"""Stored states of trainings and unfinished batches, including those of other servers on the same studies."""
JournalDep = Annotated[Journal, Depends(get_journal)]

get_pause = _reading(lambda services: services.pause)
"""Pauses trainings for inference."""
PauseDep = Annotated[Pause, Depends(get_pause)]

get_lanes = _reading(lambda services: services.inferences.lanes)
"""The computing devices."""
LanesDep = Annotated[Lanes, Depends(get_lanes)]

get_readers = _reading(lambda services: services.readers)
"""The few threads that read images or labels of requests, each of which needs much memory."""
ReadersDep = Annotated[Readers, Depends(get_readers)]

get_scoring_methods = _reading(lambda services: services.instance.scoring_methods)
"""The names of the scoring methods."""
ScoringMethodsDep = Annotated[Collection[str], Depends(get_scoring_methods)]

get_store = _reading(lambda services: services.store)
"""Files and DICOM series, and labels with all their versions."""
StoreDep = Annotated[SeriesDatastore, Depends(get_store)]

get_presets = _reading(lambda services: services.presets)
"""The served presets, by name."""
PresetsDep = Annotated[Mapping[str, Preset], Depends(get_presets)]

get_settings = _reading(lambda services: services.settings)
"""The ``--conf`` settings."""
SettingsDep = Annotated[Settings, Depends(get_settings)]

get_sessions = _reading(lambda services: services.sessions)
"""Temporarily stored images; refused if sessions are disabled."""
SessionsDep = Annotated[Sessions, Depends(get_sessions)]

get_image_file = _reading(lambda services: services.images.file)
"""The file or folder of an image, found by its id."""
ImageFileDep = Annotated[Callable[[str], Path], Depends(get_image_file)]

get_infer_tasks = _reading(lambda services: services.infer_tasks)
"""All inference tasks, including those for clicks and scribbles."""
InferTasksDep = Annotated[TasksByName[InferenceTask], Depends(get_infer_tasks)]

get_inferences = _reading(lambda services: services.inferences)
"""The queue of inference requests."""
InferencesDep = Annotated[InferenceQueue, Depends(get_inferences)]

get_metrics = _reading(lambda services: services.metrics)
"""Metrics for Prometheus."""
MetricsDep = Annotated[Metrics, Depends(get_metrics)]

get_presented = _reading(lambda services: services.presented)
"""NIfTI and NRRD files presented as DICOM series to OHIF."""
PresentedDep = Annotated[PresentedCases, Depends(get_presented)]

get_pool_knowledge = _reading(lambda services: services.pool_knowledge)
"""Stored scores of the images, by preset."""
PoolKnowledgeDep = Annotated[Mapping[str, PoolKnowledge], Depends(get_pool_knowledge)]

get_studies = _reading(lambda services: services.studies)
"""The folder of the studies, or the address of a DICOMweb server."""
StudiesDep = Annotated[str, Depends(get_studies)]

get_image_inspector = _reading(lambda services: services.image_inspector)
"""Checks which images cannot be segmented, and why."""
ImageInspectorDep = Annotated[ImageInspector, Depends(get_image_inspector)]

get_app_info = _reading(lambda services: services.instance.info)
"""The description of MONAI Label's app."""
AppInfoDep = Annotated[Callable[[], dict[str, Any]], Depends(get_app_info)]

get_next_case = _reading(lambda services: services.next_case)
"""Chooses the next case to label."""
NextCaseDep = Annotated[NextCase, Depends(get_next_case)]

get_case_views = _reading(lambda services: services.case_views)
"""Composes the pages of images."""
CaseViewsDep = Annotated[CaseViews, Depends(get_case_views)]

get_pictures = _reading(lambda services: services.pictures)
"""Reads and computes the data of case pictures."""
PicturesDep = Annotated[Pictures, Depends(get_pictures)]

get_answers = _reading(lambda services: services.answers)
"""Answers mask requests."""
AnswersDep = Annotated[Answers, Depends(get_answers)]

get_find_sessions = _reading(lambda services: lambda: services.sessions)
"""Like :func:`get_sessions`, for routes of which only some requests use a session."""
FindSessionsDep = Annotated[Callable[[], Sessions], Depends(get_find_sessions)]

get_submissions = _reading(lambda services: services.submissions)
"""Accepts labels."""
SubmissionsDep = Annotated[Submissions, Depends(get_submissions)]

get_segmentations = _reading(lambda services: services.segmentations)
"""Accepts DICOM SEGs as labels, and publishes labels as DICOM SEGs."""
SegmentationsDep = Annotated[Segmentations, Depends(get_segmentations)]
