"""Background scoring, which starts if the live version has not scored all images and nothing else runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import anyio.to_thread
from monailabel.interfaces.app import MONAILabelApp

from lib.activelearning.pool_knowledge import PoolKnowledge
from lib.activelearning.score_store import UNTRAINED
from lib.activelearning.task import ALL_SCORES, label_stamps
from lib.server.background import in_background
from lib.server.work.jobs import Jobs
from lib.server.work.places import devices_of, idle_place, occupied, pooled_devices
from lib.server.work.queue import InferenceQueue

logger = logging.getLogger("unetr.server")

SECONDS_BETWEEN_LOOKS = 15.0
LONGEST_REST_SECONDS = 600.0


class BackgroundScoring:
    """Starts scoring jobs after a new model, a new image or a new label.

    A job is a low-priority process that pauses during inference requests and ends after its time limit; the next job
    continues there. A job that ends without progress is not restarted at once.

    Args:
        instance: the app with its ``knowledge_by_preset``.
        jobs: the jobs; nothing is started during a training or another scoring.
        inferences: the queue; nothing is started during inference on the device that the job would use.
        minutes: time limit of a job; 0 disables scoring.
    """

    def __init__(self, instance: MONAILabelApp, jobs: Jobs, inferences: InferenceQueue, minutes: float) -> None:
        self._instance, self._jobs, self._inferences, self._minutes = instance, jobs, inferences, minutes
        self._insights: Mapping[str, PoolKnowledge] = instance.knowledge_by_preset
        self._started_with: dict[str, int] = {}
        self._rest = SECONDS_BETWEEN_LOOKS

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watch for unscored images and labels until the block ends."""
        if self._minutes == 0:
            yield
            return
        async with in_background("background scoring", self._watch()):
            yield

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._rest)
            try:
                await anyio.to_thread.run_sync(self.start_if_wanted)
            except Exception:
                logger.exception("the background scoring could not be started")

    def start_if_wanted(self) -> bool:
        """Start a scoring job if there are unscored images or labels and a suitable device is idle."""
        if any(self._jobs.open(kind) for kind in ("batch_infer", "scoring")):
            return False
        lanes = self._inferences.lanes
        devices, place = pooled_devices(lanes), idle_place(lanes)
        own = devices_of(place, "scoring", devices)
        if not all(lanes.is_idle(device) for device in own) or own & occupied(self._jobs.of("train"), devices):
            return False
        wanted = {name: self.left(knowledge) for name, knowledge in self._insights.items()}
        if not any(wanted.values()):
            self._rest, self._started_with = SECONDS_BETWEEN_LOOKS, {}
            return False
        # images that one job could not score are unlikely to be scored by the next one
        again = wanted == self._started_with
        self._rest = min(2 * self._rest, LONGEST_REST_SECONDS) if again else SECONDS_BETWEEN_LOOKS
        self._started_with = wanted
        self._jobs.submit("scoring", {"method": ALL_SCORES, "minutes": self._minutes} | place, enqueue=True)
        logger.info("looking at the studies in the background: %s", wanted)
        return True

    def left(self, knowledge: PoolKnowledge) -> int:
        """Number of images and labels that the live version has not scored or compared."""
        datastore = self._instance.datastore()
        version = knowledge.version()
        records = knowledge.store.score_records(version)
        trained = version != UNTRAINED
        unlabelled = set(datastore.get_unlabeled_images())
        count = 0
        for image in datastore.list_images():
            record = records.get(image)
            count += record is None or (trained and image in unlabelled and not record.scored)
        if trained:
            disagreements = knowledge.store.disagreements(version)
            labels = label_stamps(datastore, knowledge.preset, self._instance.knowledge_by_preset)
            count += sum(
                image not in disagreements or disagreements[image].label != label for image, label in labels.items()
            )
        return count
