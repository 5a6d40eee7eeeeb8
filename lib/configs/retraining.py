"""The settings of training in the server: when it retrains, on what, the gate, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lib.configs.preset import Model

Share = Annotated[float, Field(ge=0, lt=1)]


class Retraining(Model):
    """What ``--conf`` can say about training in the server.

    Attributes:
        retrain: ``auto``: when enough labels are new; ``schedule``: once a day, where labels are new; ``off``: by hand.
        retrain_after: new or changed labels that are enough.
        retrain_floor: mean Dice of the served model on the new labels below which any number is enough; 0: none.
        retrain_quiet_seconds: time without a new label before it starts.
        retrain_at: time of day of ``schedule``, as 02:00, in the server's time zone.
        retrain_recipe: fields of a Train request for these runs, as ``max_epochs=10,learning_rate=0.0003``.
        retrain_from_nothing: every how many runs one starts from nothing instead of the served weights; 0: none.
        oversample: how often a corrected case is trained on in an epoch, beside once for the others.
        replay: folder with ``images`` and ``labels`` of the cases that the shipped weights were trained on.
        subject_separator: what stands before it in an image's id names the subject; empty: each image is one.
        test_share: share of new subjects that are only tested on, from fifty cases on.
        gate_margin: how much the mean Dice of new weights must be above that of the served ones to be published.
        gate_tolerance: how much the Dice or normalised surface distance of one label may fall.
        keep_versions: how many published and how many rejected versions are kept besides the live one and its parent.
        keep_runs: how many runs' reports are kept.
        editor_training: whether a training is followed by one of the editor, the network that clicks are shown to;
            that takes the CPU for ``editor_training_minutes`` each time.
        editor_training_minutes: how long that takes at most, beside a few minutes in which it is compared.
        mlflow: address of an MLflow server or database that runs are logged to, as ``sqlite:///runs.db``.
    """

    retrain: Literal["auto", "schedule", "off"] = "auto"
    retrain_after: Annotated[int, Field(gt=0)] = 5
    retrain_floor: Share = 0.5
    retrain_quiet_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0
    retrain_at: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")] = "02:00"
    retrain_recipe: dict[str, str] = Field(default_factory=dict)
    retrain_from_nothing: Annotated[int, Field(ge=0)] = 10
    oversample: Annotated[int, Field(gt=0, le=20)] = 2
    replay: Path | None = None
    subject_separator: str = ""
    test_share: Share = 0.1
    gate_margin: Share = 0.001
    gate_tolerance: Share = 0.02
    keep_versions: Annotated[int, Field(gt=0)] = 10
    keep_runs: Annotated[int, Field(gt=0)] = 20
    editor_training: Literal["off", "on"] = "off"
    editor_training_minutes: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] = 20.0
    mlflow: str = ""

    @field_validator("retrain_recipe", mode="before")
    @classmethod
    def _split_recipe(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        entries = [part.strip() for part in value.split(",") if part.strip()]
        wrong = [part for part in entries if "=" not in part]
        if wrong:
            raise ValueError(f"valid: field=value, separated by commas; {wrong[0]!r} has no value")
        return {name.strip(): text.strip() for name, _, text in (part.partition("=") for part in entries)}
