"""A Train request: what MONAI Label's clients send, cast and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lib.configs.preset import Preset, Training
from lib.trainers.datasets import DATASET_KINDS, LOADER_KINDS

GPUS = r"^(all|\d{1,3}(,\d{1,3}){0,31})?$"
"""The choice of GPUs becomes an environment variable, so it is only that."""
SERVER_FIELDS = ("run", "resume", "pause_file", "why")
"""What a client may not set."""


class TrainRequest(BaseModel):
    """The fields of a Train request, as MONAI Label's clients know them, and the recipe's own."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,63}$")] = "train_01"
    pretrained: bool = True
    device: str = ""
    max_epochs: Annotated[int, Field(gt=0, le=100_000)]
    early_stop_patience: Annotated[int, Field(ge=-1, le=100_000)] = -1
    val_split: Annotated[float, Field(ge=0, lt=1)] = 0.2
    train_batch_size: Annotated[int, Field(gt=0, le=1024)]
    # Whole volumes of different sizes are validated one at a time; the field is there for clients that send it.
    val_batch_size: Annotated[int, Field(gt=0, le=1024)] = 1
    multi_gpu: bool = True
    gpus: Annotated[str, Field(pattern=GPUS)] = "all"
    dataset: Literal[DATASET_KINDS] = "PersistentDataset"  # type: ignore[valid-type]
    dataloader: Literal[LOADER_KINDS] = "ThreadDataLoader"  # type: ignore[valid-type]
    learning_rate: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
    crops_per_case: Annotated[int, Field(gt=0, le=64)]
    activation_checkpointing: bool
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    max_steps: Annotated[int, Field(gt=0, le=10**9)] | None = None
    # What only the server sets: the run's id, whether it goes on after an interruption, when it stands still, and why
    # it was started.
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,63}$")] | None = None
    resume: bool = False
    pause_file: Path | None = None
    why: str = ""

    @field_validator("device", "dataset", "dataloader", "precision", mode="before")
    @classmethod
    def _first_choice(cls, value: Any) -> Any:
        """A client that leaves the list of choices as it is means the first."""
        return value[0] if isinstance(value, list) and value else value

    @property
    def run_id(self) -> str:
        """The run's id; its name where the server gave none."""
        return self.run or self.name

    def recipe(self, preset: Preset) -> Training:
        """The preset's recipe with what the request changes."""
        changes = {
            "max_epochs": self.max_epochs,
            "batch_size": self.train_batch_size,
            "early_stop_patience": max(0, self.early_stop_patience),
            "learning_rate": self.learning_rate,
            "crops_per_case": self.crops_per_case,
            "activation_checkpointing": self.activation_checkpointing,
            "precision": self.precision,
            "seed": self.seed,
        }
        return preset.training.model_copy(update=changes)
