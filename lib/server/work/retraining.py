"""Runs the retraining policy in the background: collects labels and past runs, decides, and submits trainings."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import Timeout
from monailabel.interfaces.datastore import Datastore

from lib.cases.labelled import Case, read_case
from lib.cases.metrics import dice_per_label, mean_known, without_missing
from lib.cases.split import MIN_CASES_FOR_VALIDATION, nothing_judges
from lib.configs.settings import Settings
from lib.datastore.records import LabelVersion
from lib.errors import ConfigError, ParameterError, TrainingError, UnetrError
from lib.infers.interruption import InterruptedWork
from lib.infers.task import UnetrInferTask
from lib.models.provenance import label_digests
from lib.server.http.events import Changes
from lib.server.tasks import TasksByName
from lib.server.work.jobs import Jobs
from lib.server.work.journal import Journal
from lib.server.work.pause import Pause
from lib.server.work.places import idle_place, pause_file
from lib.server.work.prefetch import PrefetchKey
from lib.server.work.queue import InferenceQueue
from lib.server.work.trials import Trial, Trials
from lib.storage.clock import PastTimes
from lib.trainers.retrain import Decision, History, Label, decide
from lib.trainers.submitted import undrawn_as_missing
from lib.trainers.task import UnetrTrainTask
from lib.transforms.volume import read_volume

logger = logging.getLogger("unetr.retrain")

SECONDS_BETWEEN_LOOKS = 5.0
SHARE_OF_TIME = 1 / 20
"""Largest share of one processor for the policy's thread, which reads the records of all labels."""
RUN_NAME = "retrain"
# Time limit of a trial of the live weights for an idle device; afterwards the policy continues, and tries later.
PATIENCE_SECONDS = 1.0


class Retrainer:
    """Decides for each model in a separate thread, after each new label and at short intervals.

    Args:
        settings: settings of the policy, and the recipe of its runs.
        trainers: the training task of each model.
        datastore: images and labels.
        jobs, journal: jobs and stored states of trainings.
        inferences: the queue in which trials of the live weights wait for an idle device.
        pause: pauses trainings for inference.
        models: the tasks for automatic segmentation.
        changes: notified when a decision changes.

    Raises:
        ConfigError: if the recipe of these runs is invalid.
    """

    def __init__(
        self,
        settings: Settings,
        trainers: TasksByName[UnetrTrainTask],
        datastore: Datastore,
        jobs: Jobs,
        journal: Journal,
        inferences: InferenceQueue,
        pause: Pause,
        models: TasksByName[UnetrInferTask],
        changes: Changes,
    ) -> None:
        self._settings, self._trainers, self._datastore = settings, trainers, datastore
        self._jobs, self._journal, self._inferences, self._pause = jobs, journal, inferences, pause
        self._models, self._changes = models, changes
        self._times = PastTimes()
        self._reasons: dict[str, str] = {}
        self._notices: dict[str, str] = {}
        self._trials = Trials(self._try_on)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="retrain", daemon=True)
        for model, task in trainers.items():
            try:
                task.validate_request(self.request(model, "", False))
            except ParameterError as error:
                raise ConfigError(f"--conf retrain_recipe: {error}") from error

    def start(self) -> None:
        """Start the thread; called on the event loop, on which trials of the live weights wait for an idle device."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def on_label_saved(self, _version: LabelVersion) -> None:
        """Decide again soon; labels that arrive in a row are considered together."""
        self._news.set()

    def stop(self) -> None:
        """Stop the thread; a running training is not affected."""
        self._closing.set()
        self._news.set()
        self._thread.join(SECONDS_BETWEEN_LOOKS)

    def describe(self) -> dict[str, Any]:
        """The current decision for each model, and the data from which it follows."""
        return {model: self._describe(model) for model in self._trainers}

    def words(self) -> dict[str, str]:
        """The last decision for each model in words, without deciding again."""
        return dict(self._reasons)

    def notices(self) -> dict[str, str]:
        """A note for each model with so few labels that no held-out case judges a training."""
        return dict(self._notices)

    def train_now(self, model: str, user: str) -> dict[str, Any]:
        """Submit a run with the policy's recipe, whatever it would decide.

        Raises:
            TrainingError: if a training is running, here or on another server on the same studies.
        """
        self._journal.check_alone(model)
        job = self._jobs.submit("train", self.request(model, f"by hand, by {user}", False))
        return job.describe()

    def request(self, model: str, why: str, from_nothing: bool) -> dict[str, Any]:
        """The train request of a run."""
        recipe = dict(self._settings.retrain_recipe)
        start = {"pretrained": False} if from_nothing else {}
        place = idle_place(self._inferences.lanes)
        place |= {"multi_gpu": False} if place else {}
        asked = {"name": RUN_NAME} | place | recipe | start | {"model": model, "why": why}
        return asked | {"pause_file": str(pause_file(self._pause, self._inferences.lanes, asked))}

    def look(self, model: str, review: bool = False) -> tuple[History, Decision]:
        """The history of a model's labels and runs, and the decision.

        Args:
            model: name of the model.
            review: whether the live model may be scored on new labels, if a floor is set.
        """
        task, settings = self._trainers.find(model), self._settings
        cases = task.submitted(self._datastore).cases
        digests = label_digests(cases)
        labels = {c.case_id: Label(digests[c.case_id], self._saved_at(c.label)) for c in cases if digests[c.case_id]}
        runs = [version for version in task.versions.list() if version.details.get("label_digests")]
        last = runs[-1] if runs else None
        last_run_at = datetime.fromisoformat(last.details["created"]).timestamp() if last else 0.0
        ended_at = self._times.of((model, last.name), last_run_at) if last else 0.0
        failed = self._journal.failures(model, last_run_at if last_run_at <= time.time() else 0.0)
        history = History(
            settings=settings,
            now=time.time(),
            labels=labels,
            seen=last.details["label_digests"] if last else {},
            last_version=last.name if last else "",
            last_run_at=ended_at,
            runs=len(runs),
            running=self._jobs.open("train") > 0 or self._journal.others_running(model),
            waits_for_room=any(job.request.get("model") == model for job in self._jobs.waiting_for_room()),
            serving=bool(task.serving()[0]),
            failures=len(failed),
            failed_at=self._times.of((model, "failure"), failed[-1]) if failed else 0.0,
            utc_offset_seconds=time.localtime().tm_gmtoff,
        )
        self._notices.pop(model, None)
        if 0 < len(labels) < MIN_CASES_FOR_VALIDATION:
            self._notices[model] = nothing_judges(len(labels), history.serving)
        new = [case for case in cases if case.case_id in history.new]
        history = self._with_review(history, model, new, review)
        return history, decide(history)

    def _saved_at(self, label: Path) -> float:
        try:
            return self._times.of(label, label.stat().st_mtime)
        except OSError:
            return 0.0

    def _describe(self, model: str) -> dict[str, Any]:
        history, decision = self.look(model)
        settings = self._settings
        policy = {name: getattr(settings, name) for name in type(settings).model_fields if name.startswith("retrain")}
        known = {"labels": len(history.labels), "last_version": history.last_version, "running": history.running}
        return asdict(decision) | known | {"runs": history.runs, "failures": history.failures, "policy": policy}

    def _work(self) -> None:
        while not self._closing.is_set():
            wait, began = SECONDS_BETWEEN_LOOKS, time.thread_time()
            for model in self._trainers:
                try:
                    wait = min(wait, self._act(model))
                except (UnetrError, OSError) as error:  # a damaged version, a full disk: reported, and tried again
                    self._say(model, f"cannot decide: {error}")
                except Exception:
                    logger.exception("%s: the retrain policy failed", model)
            pause = (time.thread_time() - began) * (1 / SHARE_OF_TIME - 1)
            self._closing.wait(pause)  # labels that are saved meanwhile are considered together
            self._news.wait(max(wait - pause, 0.1))
            self._news.clear()

    def _act(self, model: str) -> float:
        """Decide for a model, and carry out the decision; returns the seconds until the next decision.

        Of several servers on the same folders, one decides at a time, so that the next one sees the running training.
        """
        try:
            with self._journal.lock(model).acquire(timeout=0):
                return self._decide_and_submit(model)
        except Timeout:
            return SECONDS_BETWEEN_LOOKS

    def _decide_and_submit(self, model: str) -> float:
        _, decision = self.look(model, review=True)
        self._say(model, decision.reason if decision.train else decision.reason.split("; waits until")[0])
        if decision.train and not self._journal.others_running(
            model
        ):  # another server may have started one during the decision
            try:
                self._jobs.submit("train", self.request(model, decision.reason, decision.from_nothing))
            except TrainingError as error:  # a user has started a training at the same moment
                logger.info("%s: %s", model, error)
        return SECONDS_BETWEEN_LOOKS if decision.wait_seconds is None else decision.wait_seconds

    def _say(self, model: str, reason: str) -> None:
        """Log a decision if it has changed."""
        if self._reasons.get(model) != reason:
            logger.info("%s: %s", model, reason)
            self._reasons[model] = reason
            self._changes.mark("job")

    def _with_review(self, history: History, model: str, new: Sequence[Case], review: bool) -> History:
        """Add the live model's mean Dice on the new labels to the history; only with a floor and few new labels."""
        settings, served = self._settings, self._trainers.find(model).serving()[0]
        if not served or not settings.retrain_floor or len(new) >= settings.retrain_after or not new:
            return history
        dice = []
        for case in new:
            trial = Trial(model, served, case.case_id, history.labels[case.case_id].digest)
            if review and not history.running:
                review = self._trials.run(trial, case)  # if the device is in use, the next decision continues here
            dice.append(self._trials.known(trial))
        mean = mean_known(dice)
        return replace(history, dice_on_new=None if math.isnan(mean) else mean)

    def _try_on(self, model: str, case: Case, begin: Callable[[], None]) -> float:
        """Mean Dice of the live model on a label; NaN if it cannot be computed.

        Args:
            model: name of the model.
            case: the case of the label.
            begin: called when the computation starts.

        Raises:
            InterruptedWork: if foreground work uses the device, or needs it meanwhile.
        """
        preset = self._trainers.find(model).preset
        try:
            _, reference = read_case(case, preset)
            mask = self._segment_when_idle(model, case, begin)
            try:
                predicted = read_volume(mask).voxels.astype("uint8")
            finally:
                mask.unlink(missing_ok=True)
        except UnetrError as error:
            logger.warning("%s could not be tried on %s: %s", model, case.case_id, error)
            return math.nan
        dice = dice_per_label(predicted, reference, preset.label_indices)
        missing = undrawn_as_missing(case, reference, preset).missing
        return mean_known(without_missing(dice, preset.label_indices, missing).values())

    def _segment_when_idle(self, model: str, case: Case, begin: Callable[[], None]) -> Path:
        """The live model's mask of a case, computed in an idle slot of the device, like prefetched masks."""
        if self._loop is None:
            raise InterruptedWork
        task = self._models.find(model)
        request = task.parse({"image": str(case.image), "result_extension": ".nii.gz"})

        def segment() -> Path:
            begin()
            return Path(task.segment(request)[0])

        what = PrefetchKey(model, case.case_id)
        return self._inferences.run_when_idle(self._loop, None, what, segment, PATIENCE_SECONDS)
