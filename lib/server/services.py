"""What the routes work with: the app instance and the server's own parts, made once when the server starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import anyio
from fastapi import Depends, Request
from monailabel.config import settings as stock_settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.utils.sessions import Sessions

from lib.activelearning.pool_knowledge import PoolKnowledge
from lib.configs.preset import Preset
from lib.configs.settings import Settings
from lib.datastore.records import LabelVersion
from lib.datastore.series import SeriesDatastore
from lib.datastore.store import VersionedDatastore
from lib.dicom.sources import FolderSource
from lib.errors import NotFoundError
from lib.infers.devices.lanes import Lanes
from lib.infers.devices.schedule import Forecast
from lib.infers.task import UnetrInferTask
from lib.server.http.auth import Authenticator
from lib.server.http.devices import DeviceFigures
from lib.server.http.errors import ForbiddenError
from lib.server.http.events import TOPICS, Changes
from lib.server.http.metrics import Metrics
from lib.server.http.names import check_image_known, find_image
from lib.server.http.tokens import WatchedTokens
from lib.server.tasks import TasksByName, infer_tasks, segmentation_tasks, train_tasks
from lib.server.work.image_checks import ImageInspector
from lib.server.work.jobs import KINDS, Job, Jobs
from lib.server.work.journal import Journal
from lib.server.work.pause import Pause
from lib.server.work.places import devices_of, occupied, pooled_devices
from lib.server.work.prefetch import Prefetcher
from lib.server.work.presented import PresentedCases
from lib.server.work.queue import InferenceQueue
from lib.server.work.scoring import BackgroundScoring
from lib.storage.disk import MIB
from lib.trainers.task import UnetrTrainTask

logger = logging.getLogger("unetr.server")

# How many uploaded images are read at the same time to see whether they can be; each takes its size in memory.
CHECKS_AT_ONCE = 2


@dataclass(frozen=True)
class Services:
    """The parts of a running server.

    Attributes:
        label_hooks: called with each label that has been saved, after it is safe; append to it to hear of them.
    """

    instance: MONAILabelApp
    settings: Settings
    inferences: InferenceQueue
    jobs: Jobs
    authenticator: Authenticator
    checks: anyio.CapacityLimiter
    metrics: Metrics
    prefetcher: Prefetcher
    scoring: BackgroundScoring
    changes: Changes
    pause: Pause
    journal: Journal
    presented: PresentedCases
    label_hooks: list[Callable[[LabelVersion], None]] = field(default_factory=list)

    @classmethod
    def of(cls, instance: MONAILabelApp) -> Services:
        """Build the parts around an app instance that has ``settings``.

        Raises:
            ConfigError: when the token file is not valid.
        """
        settings: Settings = instance.settings
        tokens = WatchedTokens(settings.tokens) if settings.tokens else None
        metrics, changes = Metrics(), Changes()

        def on_end(job: Job) -> None:
            metrics.count_job(job.kind, job.status)
            changes.mark(*TOPICS)  # a training publishes, a batch inference labels, a scoring reorders

        def on_change(job: Job) -> None:
            journal.write(job)
            open_ones = [one for kind in KINDS for one in jobs.of(kind)]
            instance.lanes.occupy(occupied(open_ones, pooled_devices(instance.lanes)))

        pause = Pause()
        folders = {name: task.runs for name, task in instance.trainers.items()}
        journal = Journal(folders, str(instance.studies))
        jobs = Jobs(
            on_end,
            partial(_see_new_labels, instance),
            on_output=lambda job: changes.mark("job"),
            on_change=on_change,
            steps_of=journal.steps,
        )
        inferences = InferenceQueue(settings.queue_size, instance.lanes, pause)
        _share_devices(instance.lanes, jobs)
        prefetcher = Prefetcher(
            segmentation_tasks(instance.models).find,
            lambda image: find_image(instance.datastore(), image, instance.studies, settings.image_roots),
            inferences,
            metrics,
            enabled=settings.result_cache_mib > 0,
        )
        _watch(metrics, instance, inferences, jobs)
        metrics.registry.register(DeviceFigures(instance.lanes))
        metrics.watch("unetr_prefetches_waiting", "Masks that are to be computed ahead", lambda: prefetcher.waiting)
        metrics.watch("unetr_result_cache_bytes", "Memory of masks that are ready", lambda: instance.results.size_bytes)
        return cls(
            instance=instance,
            settings=settings,
            inferences=inferences,
            jobs=jobs,
            authenticator=Authenticator(tokens, bool(stock_settings.MONAI_LABEL_AUTH_ENABLE)),
            checks=anyio.CapacityLimiter(CHECKS_AT_ONCE),
            metrics=metrics,
            prefetcher=prefetcher,
            scoring=BackgroundScoring(instance, jobs, inferences, settings.scoring_minutes),
            changes=changes,
            pause=pause,
            journal=journal,
            presented=PresentedCases(
                instance.datastore(),
                lambda image: find_image(instance.datastore(), image, instance.studies, settings.image_roots),
                instance.presets,
                MIB * settings.picture_cache_mib,
                settings.ohif_for_files and isinstance(getattr(instance.datastore(), "source", None), FolderSource),
                getattr(getattr(instance.datastore(), "source", None), "index", None),
                _modalities_file(instance.datastore()),
            ),
        )

    @property
    def datastore(self) -> Datastore:
        """Where images and labels are."""
        return self.instance.datastore()

    @property
    def store(self) -> VersionedDatastore:
        """The same, as what keeps a history of labels."""
        store: VersionedDatastore = self.instance.datastore()
        return store

    @property
    def sessions(self) -> Sessions:
        """Images that are kept for a while.

        Raises:
            ForbiddenError: when they are switched off.
        """
        sessions: Sessions | None = self.instance.sessions()
        if sessions is None:
            raise ForbiddenError("sessions are switched off on this server (MONAI_LABEL_SESSIONS)")
        return sessions

    @property
    def presets(self) -> Mapping[str, Preset]:
        """The tasks that are served, by name."""
        presets: Mapping[str, Preset] = self.instance.presets
        return presets

    @property
    def studies(self) -> str:
        """The folder of the studies, or the address of a DICOMweb server."""
        return str(self.instance.studies)

    @property
    def pool_knowledge(self) -> Mapping[str, PoolKnowledge]:
        """What the scoring found of the images, by preset."""
        knowledge: Mapping[str, PoolKnowledge] = self.instance.knowledge_by_preset
        return knowledge

    @property
    def image_inspector(self) -> ImageInspector:
        """Which images cannot be segmented, and why."""
        return ImageInspector(self.store, self.presets, self.pool_knowledge, self.image_file)

    @property
    def infer_tasks(self) -> TasksByName[UnetrInferTask]:
        """All inference tasks, those that take clicks or scribbles among them."""
        return infer_tasks(self.instance.models)

    @property
    def segmentation_tasks(self) -> TasksByName[UnetrInferTask]:
        """The inference tasks that segment by themselves."""
        return segmentation_tasks(self.instance.models)

    @property
    def train_tasks(self) -> TasksByName[UnetrTrainTask]:
        """The training task of each model."""
        return train_tasks(self.instance.trainers)

    def on_label_saved(self, version: LabelVersion) -> None:
        """Tell everybody who asked to hear of saved labels; what goes wrong there does not undo the save."""
        for hook in self.label_hooks:
            try:
                hook(version)
            except Exception:
                logger.exception("after the save of %s, %r failed", version.version_id, hook)

    def infer_task(self, model: str) -> UnetrInferTask:
        """The inference task of that name.

        Raises:
            NotFoundError: with the known ones.
        """
        return self.infer_tasks.find(model)

    def forecast(self, model: str, image: Path | None) -> Forecast:
        """What segmenting an image needs, where there are several devices to choose from."""
        if image is None or not self.inferences.lanes.several:
            return Forecast()
        return self.infer_task(model).forecast({"image": str(image)})

    def segmentation_task(self, model: str) -> UnetrInferTask:
        """The inference task of that name that segments by itself, with weights: none that takes clicks.

        Raises:
            NotFoundError: with the known ones.
        """
        return self.segmentation_tasks.find(model)

    def click_model(self, preset: str) -> str:
        """The model that corrects a preset's masks by clicks.

        Raises:
            NotFoundError: with the known presets.
        """
        models = {
            task.preset.name: name
            for name, task in infer_tasks(self.instance.models).items()
            if task.type == InferType.DEEPEDIT
        }
        if preset not in models:
            raise NotFoundError("preset with clicks", preset, list(models))
        return models[preset]

    def train_task(self, model: str) -> UnetrTrainTask:
        """The training task of that name.

        Raises:
            NotFoundError: with the known ones.
        """
        return self.train_tasks.find(model)

    def check_image(self, image_id: str) -> str:
        """The id of an image of the studies; a file may also be named by the UIDs of the series that presents it.

        Raises:
            NotFoundError: when there is none.
        """
        return check_image_known(self.datastore, self.presented.case_of(image_id) or image_id)

    def known_id(self, image_id: str) -> str:
        """The id under which the studies have an image; a path below ``image_roots`` as it is."""
        try:
            return self.check_image(image_id)
        except NotFoundError:
            return image_id

    def image_file(self, image_id: str) -> Path:
        """The file or folder of an image.

        Raises:
            NotFoundError, ForbiddenError: as :func:`lib.server.http.names.find_image`.
        """
        image_id = self.presented.case_of(image_id) or image_id
        return find_image(self.datastore, image_id, self.instance.studies, self.settings.image_roots)


async def get_services(request: Request) -> Services:
    """The parts of the running server, as a FastAPI dependency."""
    services: Services = request.app.state.services
    return services


def _modalities_file(datastore: Datastore) -> Path | None:
    """Where the modalities of files are kept, beside the converted series."""
    return datastore.volumes.folder.parent / "modalities.json" if isinstance(datastore, SeriesDatastore) else None


Parts = Annotated[Services, Depends(get_services)]


def _see_new_labels(instance: MONAILabelApp, job: Job) -> None:
    """The labels that a batch inference saved in its own process are there as soon as it has ended."""
    if job.kind != "batch_infer":
        return
    try:
        instance.datastore().refresh()
    except Exception:
        logger.exception("the labels of batch inference %s are seen later", job.id)


def _share_devices(lanes: Lanes, jobs: Jobs) -> None:
    """A scoring stands still while somebody computes on its device, or waits for it."""

    def hold(in_use: frozenset[str]) -> None:
        scoring = jobs.current("scoring")
        own = devices_of(scoring.request if scoring else {}, "scoring", pooled_devices(lanes))
        jobs.hold("scoring", bool(in_use & own))

    lanes.watch(hold)


def _watch(metrics: Metrics, instance: MONAILabelApp, inferences: InferenceQueue, jobs: Jobs) -> None:
    """The figures that are read when they are asked for."""
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
