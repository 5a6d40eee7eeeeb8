"""The services of the running server, created once at its start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastapi import Request
from monailabel.config import settings as stock_settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.utils.sessions import Sessions

from lib.activelearning.pool_knowledge import PoolKnowledge
from lib.configs.preset import Preset
from lib.configs.settings import Settings
from lib.datastore.series import SeriesDatastore
from lib.datastore.store import VersionedDatastore
from lib.dicom.sources import FolderSource
from lib.infers.devices.lanes import Lanes
from lib.infers.task import UnetrInferTask
from lib.server.http.auth import Authenticator
from lib.server.http.devices import DeviceFigures
from lib.server.http.errors import ForbiddenError
from lib.server.http.events import TOPICS, Changes
from lib.server.http.metrics import Metrics
from lib.server.http.names import find_image
from lib.server.http.tokens import WatchedTokens
from lib.server.images import Images
from lib.server.inference.answers import Answers
from lib.server.labels.segmentations import Segmentations
from lib.server.labels.submissions import Submissions
from lib.server.loading import WeightsLoading
from lib.server.pages.cases.models import CaseModels
from lib.server.pages.cases.pictures import Pictures
from lib.server.pages.cases.view import CaseViews
from lib.server.presented.cases import PresentedCases
from lib.server.readers import Readers
from lib.server.tasks import (
    InferenceTask,
    TasksByName,
    Versioned,
    infer_tasks,
    segmentation_tasks,
    train_tasks,
    versioned_models,
)
from lib.server.work.image_checks import ImageInspector
from lib.server.work.jobs import KINDS, Job, Jobs
from lib.server.work.journal import Journal
from lib.server.work.next_case import NextCase
from lib.server.work.pause import Pause
from lib.server.work.places import devices_of, occupied, pooled_devices
from lib.server.work.prefetch import Prefetcher
from lib.server.work.queue import InferenceQueue
from lib.server.work.scoring import BackgroundScoring
from lib.storage.disk import MIB
from lib.trainers.task import UnetrTrainTask

logger = logging.getLogger("unetr.server")


@dataclass(frozen=True)
class Services:
    """The services of a running server."""

    instance: MONAILabelApp
    settings: Settings
    infer_tasks: TasksByName[InferenceTask]
    segmentation_tasks: TasksByName[UnetrInferTask]
    loading: WeightsLoading
    train_tasks: TasksByName[UnetrTrainTask]
    versioned_models: TasksByName[Versioned]
    inferences: InferenceQueue
    jobs: Jobs
    authenticator: Authenticator
    readers: Readers
    metrics: Metrics
    prefetcher: Prefetcher
    scoring: BackgroundScoring
    changes: Changes
    pause: Pause
    journal: Journal
    presented: PresentedCases
    images: Images
    submissions: Submissions
    segmentations: Segmentations
    answers: Answers
    image_inspector: ImageInspector
    next_case: NextCase
    case_views: CaseViews
    pictures: Pictures

    @classmethod
    def of(cls, instance: MONAILabelApp) -> Services:
        """Create the services for an app instance that has ``settings``.

        Raises:
            ConfigError: if the token file is invalid.
        """
        settings: Settings = instance.settings
        presets, store, studies = instance.presets, instance.datastore(), str(instance.studies)
        tokens = WatchedTokens(settings.tokens) if settings.tokens else None
        automatic, trainers = segmentation_tasks(instance.models), train_tasks(instance.trainers)
        metrics, changes, pause = Metrics(), Changes(), Pause()
        journal = Journal({name: task.runs for name, task in trainers.items()}, place_of(studies))
        jobs = _jobs(instance, journal, metrics, changes)
        inferences = InferenceQueue(settings.queue_size, instance.lanes, pause)
        find = partial(find_image, store, studies=studies, roots=settings.image_roots)
        prefetcher = Prefetcher(automatic.find, find, inferences, metrics, enabled=settings.result_cache_mib > 0)
        presented = _presented(store, find, presets, settings)
        images = Images(store, studies, settings.image_roots, presented.case_of)
        inspector = ImageInspector(store, presets, instance.knowledge_by_preset, images.file)
        named = {name: task.preset.name for name, task in infer_tasks(instance.models).items()}
        readers, limit_mib = Readers(), settings.unpacked_limit_mib
        submissions = Submissions(store, presets, images.file, metrics, limit_mib, named, readers=readers)
        segmentations = Segmentations(store, presented, presets, submissions)
        models = CaseModels(presets, infer_tasks(instance.models), automatic, store, images)
        _watch(metrics, instance, inferences, jobs, prefetcher)
        return cls(
            instance=instance,
            settings=settings,
            infer_tasks=models.tasks,
            segmentation_tasks=automatic,
            loading=WeightsLoading(automatic),
            train_tasks=trainers,
            versioned_models=versioned_models(instance.trainers, instance.models),
            inferences=inferences,
            jobs=jobs,
            authenticator=Authenticator(tokens, bool(stock_settings.MONAI_LABEL_AUTH_ENABLE)),
            readers=readers,
            metrics=metrics,
            prefetcher=prefetcher,
            scoring=BackgroundScoring(instance, jobs, inferences, settings.scoring_minutes),
            changes=changes,
            pause=pause,
            journal=journal,
            presented=presented,
            images=images,
            submissions=submissions,
            segmentations=segmentations,
            answers=Answers(images, store, segmentations, metrics, limit_mib),
            image_inspector=inspector,
            next_case=NextCase(instance.strategies, store, presets, inspector, automatic, prefetcher),
            case_views=CaseViews(store, models, trainers, presented),
            pictures=Pictures(store.history, models, trainers, inferences, MIB * settings.picture_cache_mib),
        )

    @property
    def datastore(self) -> Datastore:
        """The datastore, by MONAI Label's interface."""
        return self.instance.datastore()

    @property
    def store(self) -> SeriesDatastore:
        """The same datastore, with DICOM series and label history."""
        store: SeriesDatastore = self.instance.datastore()
        return store

    @property
    def sessions(self) -> Sessions:
        """Temporarily stored images.

        Raises:
            ForbiddenError: if they are disabled.
        """
        sessions: Sessions | None = self.instance.sessions()
        if sessions is None:
            raise ForbiddenError("sessions are switched off on this server (MONAI_LABEL_SESSIONS)")
        return sessions

    @property
    def presets(self) -> Mapping[str, Preset]:
        """The served presets, by name."""
        presets: Mapping[str, Preset] = self.instance.presets
        return presets

    @property
    def studies(self) -> str:
        """The folder of the studies, or the address of a DICOMweb server."""
        return str(self.instance.studies)

    @property
    def pool_knowledge(self) -> Mapping[str, PoolKnowledge]:
        """Stored scores of the images, by preset."""
        knowledge: Mapping[str, PoolKnowledge] = self.instance.knowledge_by_preset
        return knowledge


def place_of(studies: str) -> str:
    """An identifier of the studies that is the same for all servers on them, whatever their paths."""
    return studies if studies.startswith(("http://", "https://")) else str(Path(studies).resolve())


async def get_services(request: Request) -> Services:
    """The services of the running server, as a FastAPI dependency."""
    services: Services = request.app.state.services
    return services


def _jobs(instance: MONAILabelApp, journal: Journal, metrics: Metrics, changes: Changes) -> Jobs:
    """Training, batch inference and scoring jobs, with their notifications."""

    def on_end(job: Job) -> None:
        metrics.count_job(job.kind, job.status)
        changes.mark(*TOPICS)  # trainings publish, batch inferences add labels, scorings change the order

    def on_change(job: Job) -> None:
        journal.write(job)
        open_ones = [one for kind in KINDS for one in jobs.of(kind)]
        instance.lanes.occupy(occupied(open_ones, pooled_devices(instance.lanes)))

    jobs = Jobs(
        on_end,
        partial(_see_new_labels, instance),
        on_output=lambda job: changes.mark("job"),
        on_change=on_change,
        steps_of=journal.steps,
    )
    _share_devices(instance.lanes, jobs)
    return jobs


def _presented(
    store: SeriesDatastore, find: Callable[[str], Path], presets: Mapping[str, Preset], settings: Settings
) -> PresentedCases:
    """Files presented as DICOM series, if the studies are a folder; modalities are stored next to converted series."""
    index = store.source.index if isinstance(store.source, FolderSource) else None
    enabled, memory = settings.ohif_for_files and index is not None, store.volumes.folder.parent / "modalities.json"
    return PresentedCases(store, find, presets, MIB * settings.picture_cache_mib, enabled, index, memory)


def _see_new_labels(instance: MONAILabelApp, job: Job) -> None:
    """Read the labels folder again after a batch inference, which saved its masks in another process."""
    if job.kind != "batch_infer":
        return
    try:
        instance.datastore().refresh()
    except Exception:
        logger.exception("the labels of batch inference %s are seen later", job.id)


def _share_devices(lanes: Lanes, jobs: Jobs) -> None:
    """Pause a scoring while an inference runs or waits on its device."""

    def hold(in_use: frozenset[str]) -> None:
        scoring = jobs.current("scoring")
        own = devices_of(scoring.request if scoring else {}, "scoring", pooled_devices(lanes))
        jobs.hold("scoring", bool(in_use & own))

    lanes.watch(hold)


def _watch(
    metrics: Metrics, instance: MONAILabelApp, inferences: InferenceQueue, jobs: Jobs, prefetcher: Prefetcher
) -> None:
    """Register the metrics that are read on demand."""
    metrics.registry.register(DeviceFigures(instance.lanes))
    metrics.watch("unetr_prefetches_waiting", "Masks that are to be computed ahead", lambda: prefetcher.waiting)
    metrics.watch("unetr_result_cache_bytes", "Memory of masks that are ready", lambda: instance.results.size_bytes)
    metrics.watch("unetr_inferences_waiting", "Inferences that wait for a device", lambda: inferences.waiting)
    for kind in KINDS:
        metrics.watch(f"unetr_{kind}_open", f"Jobs ({kind}) that run or wait", partial(jobs.open, kind))
    studies = str(instance.studies)
    folder = None if studies.startswith(("http://", "https://")) else Path(studies)
    store: VersionedDatastore = instance.datastore()
    metrics.watch("unetr_label_versions", "Versions of labels in the store", store.history.index.count)
    metrics.watch("unetr_labels_in_quarantine", "Refused labels that are kept", store.history.quarantine.count)
    metrics.watch("unetr_leases", "Cases in clients' hands", lambda: len(store.leases.active()))
    metrics.watch_studies(instance.datastore().status, folder)
