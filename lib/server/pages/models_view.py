"""The models on the page: their versions, and a chart of their scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from lib.drawing.charts import REJECTED, Point, line_chart
from lib.models.versions import Version
from lib.server.pages.language import Language
from lib.server.tasks import Versioned

MOST_VERSIONS = 30
"""Number of newest versions that are displayed."""


@dataclass(frozen=True)
class VersionView:
    """One version as a row of the table.

    Attributes:
        state: live, published, rejected, unproven, damaged or shipped.
        mean_dice: on the cases on which it was judged, ``judged_on``.
        before: mean Dice of the previously live weights on the same cases.
    """

    model: str
    name: str
    number: int
    state: str
    mean_dice: float | None
    dice: Mapping[str, float | None]
    made: str
    judged_on: frozenset[str] = frozenset()
    before: float | None = None
    reason: str = ""
    never_compared: bool = False
    report_path: str | None = None

    def in_words(self, t: Language) -> str:
        """Its mean Dice, and that of the previous weights on the same cases."""
        dice = f"{self.name}: {self.mean_dice:.3f}"
        return dice if self.before is None else f"{dice} ({t('models.before', dice=f'{self.before:.3f}')})"

    @property
    def can_serve(self) -> bool:
        """Whether a version can be made live."""
        return self.state in ("published", "shipped", "unproven")

    @property
    def needs_reviewer(self) -> bool:
        """Whether a reviewer can make it live; other versions require an administrator."""
        return self.state == "unproven"

    @property
    def serve_path(self) -> str:
        """The path of the request to make it live."""
        if self.needs_reviewer:
            return f"/model/versions/{quote(self.model)}/{quote(self.name)}/serve"
        return f"/model/rollback/{quote(self.model)}?version={quote(self.name)}"


@dataclass(frozen=True)
class ModelView:
    """A model and its versions, newest first; ``problem`` states why the live version is not in use."""

    name: str
    versions: tuple[VersionView, ...] = field(default=())
    problem: str = ""

    def chart(self, t: Language) -> str:
        """Mean Dice by version: a filled circle for the live version, crosses for versions that were not published.

        Only versions that were scored on the same cases are connected, since means over different cases are not
        comparable.
        """
        points, cases_before = [], None
        for version in reversed(self.versions):
            if version.mean_dice is None:
                continue
            mark = _mark(version)
            begins = mark != REJECTED and cases_before is not None and version.judged_on != cases_before
            cases_before = version.judged_on if mark != REJECTED else cases_before
            points.append(Point(version.number, version.mean_dice, mark, version.in_words(t), begins))
        return line_chart(points, t("models.chart"), t("models.number"), t("models.dice"))


def models_view(trainers: Mapping[str, Versioned], trained: Mapping[str, Versioned]) -> list[ModelView]:
    """Every preset that is served or can be trained, and the editors with versions.

    Args:
        trainers: training tasks of the presets.
        trained: presets and editors.
    """
    shown = [name for name in sorted(trained) if name in trainers or trained[name].versions.list()]
    return [model_view(name, trained[name]) for name in shown]


def model_view(name: str, task: Versioned) -> ModelView:
    """One model, with its versions."""
    live, problem = task.serving()
    versions = sorted(task.versions.list(), key=lambda version: -version.number)[:MOST_VERSIONS]
    return ModelView(name, tuple(_view(name, version, live) for version in versions), problem)


def _view(model: str, version: Version, live: str) -> VersionView:
    scores: Mapping[str, Any] = version.details.get("held_out") or {}
    return VersionView(
        model=model,
        name=version.name,
        number=version.number,
        state="live" if version.name == live and not version.damage else version.status,
        mean_dice=scores.get("mean_dice"),
        dice=scores.get("dice") or {},
        judged_on=frozenset(scores.get("per_case") or ()),
        before=(version.details.get("held_out_before") or {}).get("mean_dice"),
        made=str(version.details.get("created", "")),
        reason=version.damage or str(version.details.get("reason", "")),
        never_compared=not version.compared,
        report_path=f"/model/versions/{quote(model)}/{quote(version.name)}/report" if version.report else None,
    )


def _mark(version: VersionView) -> str:
    return {"live": "champion", "rejected": REJECTED, "unproven": REJECTED}.get(version.state, "plain")
