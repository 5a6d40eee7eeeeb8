"""What the page says of the models: their versions, and a chart of how they have become better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from lib.models.versions import Version
from lib.server.pages.charts import Point, line_chart
from lib.server.pages.language import Language
from lib.server.services import Services

MOST_VERSIONS = 30
"""The newest ones are shown."""


@dataclass(frozen=True)
class VersionView:
    """One version as a line of the table: ``state`` is live, published, rejected, unproven, damaged or shipped."""

    model: str
    name: str
    number: int
    state: str
    mean_dice: float | None
    dice: Mapping[str, float | None]
    made: str
    reason: str = ""
    never_compared: bool = False
    report_path: str | None = None

    @property
    def can_serve(self) -> bool:
        """Whether it may be served in place of the live one."""
        return self.state in ("published", "shipped", "unproven")

    @property
    def needs_reviewer(self) -> bool:
        """Whether a reviewer may serve it; the others are an administrator's to serve."""
        return self.state == "unproven"

    @property
    def serve_path(self) -> str:
        """Where to send the wish to serve it."""
        if self.needs_reviewer:
            return f"/model/versions/{quote(self.model)}/{quote(self.name)}/serve"
        return f"/model/rollback/{quote(self.model)}?version={quote(self.name)}"


@dataclass(frozen=True)
class ModelView:
    """A model and its versions, the newest first; ``problem`` says why the live one is not served."""

    name: str
    versions: tuple[VersionView, ...] = field(default=())
    problem: str = ""

    def chart(self, t: Language) -> str:
        """Mean Dice by version: a filled circle for the one that is served, crosses for rejected ones."""
        points = [
            Point(version.number, version.mean_dice, _mark(version), f"{version.name}: {version.mean_dice:.3f}")
            for version in reversed(self.versions)
            if version.mean_dice is not None
        ]
        return line_chart(points, t("models.chart"), t("models.number"), t("models.dice"))


def models_view(parts: Services) -> list[ModelView]:
    """Every model that is served or can be trained."""
    return [model_view(parts, name) for name in sorted(parts.instance._trainers)]


def model_view(parts: Services, name: str) -> ModelView:
    """One model."""
    task = parts.train_task(name)
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
        made=str(version.details.get("created", "")),
        reason=version.damage or str(version.details.get("reason", "")),
        never_compared=not version.compared,
        report_path=f"/model/versions/{quote(model)}/{quote(version.name)}/report" if version.report else None,
    )


def _mark(version: VersionView) -> str:
    return {"live": "champion", "rejected": "rejected", "unproven": "rejected"}.get(version.state, "plain")
