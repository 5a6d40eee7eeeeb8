"""The training on the page: the current run, or the result of the last one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.drawing.charts import Point, line_chart
from lib.server.pages.language import Language
from lib.server.tasks import TasksByName
from lib.server.work.jobs import Job, Jobs
from lib.trainers.reporting.progress import format_seconds, read_curve, read_progress
from lib.trainers.task import UnetrTrainTask


@dataclass(frozen=True)
class JobView:
    """A training; without ``state``, there has been none since the start of the server.

    ``outcome`` is the reason of a failure, or the result for the weights.
    """

    models: tuple[str, ...]
    state: str = ""
    model: str = ""
    ended: str = ""
    outcome: str = ""
    lines: tuple[str, ...] = ()
    policy: Mapping[str, str] = field(default_factory=dict)
    notices: Mapping[str, str] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()

    @property
    def open(self) -> bool:
        """Whether it runs or waits."""
        return self.state in ("SUBMITTED", "RUNNING")

    @property
    def eta(self) -> str:
        """The remaining time, in words."""
        seconds = self.progress.get("eta_seconds")
        return format_seconds(math.inf) if seconds is None else format_seconds(float(seconds))

    def __getattr__(self, name: str) -> Any:
        """The figures of the progress; 0 for counts and None for others that are unknown."""
        if name in ("epoch", "max_epochs", "step", "total_steps"):
            return self.progress.get(name, 0)
        if name in ("loss", "dice"):
            return self.progress.get(name)
        raise AttributeError(name)

    def chart(self, t: Language) -> str:
        """The loss over the steps."""
        points = [Point(step, loss) for step, loss in self.curve]
        return line_chart(points, t("job.curve"), t("job.step"), t("job.loss"))


def job_view(
    jobs: Jobs, trainers: TasksByName[UnetrTrainTask], policy: Mapping[str, str], notices: Mapping[str, str]
) -> JobView:
    """The current training, or otherwise the last one.

    Args:
        jobs: the server's jobs.
        trainers: the training task of each model.
        policy: the decision of the retraining policy for each model, in words.
        notices: notes for users before they start a training, by model.
    """
    models = tuple(sorted(trainers))
    trainings = jobs.of("train")
    job = jobs.current("train") or (trainings[-1] if trainings else None)
    if job is None:
        return JobView(models, policy=policy, notices=notices)
    model = str(job.request.get("model", ""))
    run = run_folder(trainers, job)
    return JobView(
        models=models,
        state=job.status,
        model=model,
        ended=job.end_ts or "",
        outcome=outcome_of(job),
        lines=tuple(job.details),
        policy=policy,
        notices=notices,
        progress=read_progress(run) if run is not None else {},
        curve=tuple(read_curve(run)) if run is not None else (),
    )


def run_folder(trainers: TasksByName[UnetrTrainTask], job: Job) -> Path | None:
    """The folder in which a training reports its progress."""
    model = str(job.request.get("model", ""))
    return trainers[model].runs / job.id if model in trainers else None


def outcome_of(job: Job) -> str:
    """The reason of a failed training, or the result for its weights; empty while it runs."""
    decision = job.result.get("decision") if isinstance(job.result, dict) else ""
    return job.reason or str(decision or "")
