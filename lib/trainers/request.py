"""A train request of MONAI Label's clients, parsed and validated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lib.configs.preset import Preset, Training
from lib.trainers.datasets import DATASET_KINDS, LOADER_KINDS

GPUS = r"^(all|\d{1,3}(,\d{1,3}){0,31})?$"
"""Valid choice of GPUs, which is restricted because it becomes an environment variable."""
SERVER_FIELDS = ("run", "resume", "pause_file", "why")
"""Fields that only the server may set."""


class TrainRequest(BaseModel):
    """The fields of a train request: those of MONAI Label's clients, and those of the recipe."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,63}$")] = "train_01"
    pretrained: bool = True
    device: str = ""
    max_epochs: Annotated[int, Field(gt=0, le=100_000)]
    early_stop_patience: Annotated[int, Field(ge=-1, le=100_000)] = -1
    val_split: Annotated[float, Field(ge=0, lt=1)] = 0.2
    train_batch_size: Annotated[int, Field(gt=0, le=1024)]
    # Whole volumes of different sizes are validated one at a time; the field exists for clients that send it.
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
    # Fields that only the server sets: id of the run, whether it is resumed, its pause file, and the reason of its
    # start.
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,63}$")] | None = None
    resume: bool = False
    pause_file: Path | None = None
    why: str = ""

    @field_validator("device", "dataset", "dataloader", "precision", mode="before")
    @classmethod
    def _first_choice(cls, value: Any) -> Any:
        """A client that returns the whole list of choices selects the first one."""
        return value[0] if isinstance(value, list) and value else value

    @property
    def run_id(self) -> str:
        """The id of the run, or its name if the server gave no id."""
        return self.run or self.name

    def recipe(self, preset: Preset) -> Training:
        """The preset's recipe with the changes of the request."""
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
