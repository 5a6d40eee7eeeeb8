"""The JSON bodies of requests, field by field: what ``/docs`` shows is what is checked.

Fields that stand in none of them are handed on to the task that they are for, which ignores what it does not know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lib.trainers.request import GPUS

MOST_WORKERS = 64
MOST_IMAGES = 100_000
LONGEST_MINUTES = 7 * 24 * 60
MOST_STEPS = 10_000_000
LONGEST_REASON = 500
Name = Annotated[str, Field(max_length=200)]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class BatchRequest(_Body):
    """Segment many images: which ones, where, and under which tag the masks are kept."""

    images: Literal["all", "labeled", "unlabeled"] | Annotated[list[Name], Field(max_length=MOST_IMAGES)] = "all"
    label_tag: Annotated[str, Field(max_length=32)] = "original"
    device: Name = ""
    multi_gpu: bool = True
    gpus: Annotated[str, Field(pattern=GPUS)] = "all"
    max_workers: Annotated[int, Field(ge=0, le=MOST_WORKERS)] = 2
    max_batch_size: Annotated[int, Field(ge=0, le=MOST_IMAGES)] = 0

    @field_validator("device", mode="before")
    @classmethod
    def _first_choice(cls, value: Any) -> Any:
        """A client that leaves the list of choices as it is means the first."""
        return value[0] if isinstance(value, list) and value else value


class ScoringRequest(_Body):
    """Score images: of which model (all unless given), for how many minutes at most; or pretraining's steps."""

    model: Name = ""
    minutes: Annotated[float, Field(ge=0, le=LONGEST_MINUTES)] = 0.0
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None


class ClientRequest(_Body):
    """Who asks."""

    client_id: Name | int = ""


class NextSampleRequest(ClientRequest):
    """The next case to label: who asks, and what it is chosen by."""

    model: Name = ""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    region: Literal["foreground", "volume", "patches"] = "foreground"


class SkipRequest(ClientRequest):
    """Have a case not handed out any more: why, and who says so."""

    reason: Annotated[str, Field(max_length=LONGEST_REASON)] = ""
