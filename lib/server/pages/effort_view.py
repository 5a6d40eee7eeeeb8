"""Annotation effort on the page: over time, and by model version of the initial mask."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lib.datastore.records import FINAL, LabelVersion
from lib.drawing.charts import Point, line_chart
from lib.server.pages.language import Language


@dataclass(frozen=True)
class EffortRow:
    """The labels that started from one model version; medians, None if no label states the value."""

    model: str
    version: str
    labels: int
    seconds: float | None
    prompts: float | None
    voxels: float | None


@dataclass(frozen=True)
class EffortView:
    """Labels that people submitted, oldest first, and their effort by model version."""

    labels: tuple[LabelVersion, ...]
    rows: tuple[EffortRow, ...]

    def charts(self, t: Language) -> str:
        """Seconds, prompts and changed voxels of each label, in order of time."""
        measures = (
            ("effort.seconds", seconds_of),
            ("effort.prompts", prompts_of),
            ("effort.voxels", voxels_of),
        )
        return "".join(
            f"<h4>{t(name)}</h4>{line_chart(points, t(name), t('effort.number'), t(name))}"
            for name, measure in measures
            if len(points := _points(self.labels, measure)) > 1
        )


def effort_view(versions: Iterable[LabelVersion]) -> EffortView:
    """The effort of labels that people submitted.

    Args:
        versions: oldest first; predictions, copies and labels of unknown effort are ignored.
    """
    labels = tuple(version for version in versions if version.tag == FINAL and _is_known(version))
    groups: dict[tuple[str, str], list[LabelVersion]] = {}
    for label in labels:
        groups.setdefault((label.preset, label.model_version), []).append(label)
    rows = [
        EffortRow(
            model, version, len(group),
            _median(group, seconds_of), _median(group, prompts_of), _median(group, voxels_of),
        )
        for (model, version), group in groups.items()
    ]  # fmt: skip
    return EffortView(labels, tuple(rows))


def seconds_of(label: LabelVersion) -> float | None:
    """Seconds from hand-out to submission."""
    return label.seconds_spent


def prompts_of(label: LabelVersion) -> float | None:
    """Number of requests to interactive models."""
    return label.prompts_used


def voxels_of(label: LabelVersion) -> float | None:
    """Number of voxels that differ from the automatic mask."""
    return label.voxels_changed


def _is_known(label: LabelVersion) -> bool:
    return label.is_drawn and not label.restored_from and label.prompts_used is not None


def _points(labels: Sequence[LabelVersion], measure: Callable[[LabelVersion], float | None]) -> list[Point]:
    values = ((number, measure(label)) for number, label in enumerate(labels, start=1))
    return [Point(number, float(value)) for number, value in values if value is not None]


def _median(labels: Sequence[LabelVersion], measure: Callable[[LabelVersion], float | None]) -> float | None:
    values = [float(value) for label in labels if (value := measure(label)) is not None]
    return statistics.median(values) if values else None
