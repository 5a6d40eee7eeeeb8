"""Settings of training in the server: when to retrain, on which cases, the gate, and how much is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lib.configs.preset import Model

Share = Annotated[float, Field(ge=0, lt=1)]


class Retraining(Model):
    """The ``--conf`` settings of training in the server.

    Attributes:
        retrain: ``auto``: when there are enough new labels; ``schedule``: once a day, if there are new labels; ``off``:
            manually.
        retrain_after: sufficient number of new or changed labels.
        retrain_floor: mean Dice of the live model on the new labels below which any number of labels is sufficient; 0
            disables it.
        retrain_quiet_seconds: time without a new label before a training starts.
        retrain_at: time of day for ``schedule``, as 02:00, in the server's time zone.
        retrain_recipe: fields of the train requests of these runs, as ``max_epochs=10,learning_rate=0.0003``.
        retrain_from_nothing: after how many runs one starts from random weights instead of the live ones; 0 for never.
        oversample: how often a corrected case occurs in an epoch, whereas others occur once.
        replay: folder with ``images`` and ``labels`` of the cases on which the shipped weights were trained.
        pseudo_labels: whether the live weights' probabilities are the targets for structures that a label lacks, if
            training starts with them.
        subject_separator: the part of an image's id before it names the subject; empty: each image is one subject.
        test_share: share of new subjects in the test set, from fifty cases on.
        gate_margin: by how much the mean Dice of new weights must exceed that of the live ones for publication.
        gate_tolerance: by how much the Dice or normalised surface distance of one label may fall.
        keep_versions: number of published and of rejected versions that are kept besides the live one and its parent.
        keep_runs: number of runs whose reports are kept.
        editor_training: whether a training is followed by a training of the editor, the network that processes clicks;
            it uses the CPU for ``editor_training_minutes`` each time.
        editor_training_minutes: time limit of that training, without a few minutes for the comparison.
        mlflow: address of an MLflow server or database for the logs of runs, as ``sqlite:///runs.db``.
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
    pseudo_labels: Literal["on", "off"] = "on"
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
