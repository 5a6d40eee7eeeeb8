"""The JSON fields of requests, in a body or in the part ``params`` of a form, declared so that ``/docs`` shows them.

Undeclared fields are passed to the task of the request, which ignores unknown ones.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from lib.datastore.label_names import MOST_NAMES
from lib.infers.request import parse_boolean
from lib.infers.writer import DTYPES, EXTENSIONS
from lib.interaction.prompts import MOST_POINTS
from lib.trainers.request import GPUS

MOST_WORKERS = 64
MOST_IMAGES = 100_000
LONGEST_MINUTES = 7 * 24 * 60
MOST_STEPS = 10_000_000
LONGEST_REASON = 500
LONGEST_IMAGE = 4096
Name = Annotated[str, Field(max_length=200)]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class BatchRequest(_Body):
    """A request to segment many images: which images, on which devices, and with which tag masks are saved."""

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
        """3D Slicer returns an unchanged list of choices: the first one is selected."""
        return value[0] if isinstance(value, list) and value else value


class ScoringRequest(_Body):
    """A request to score images: the model (by default all), a time limit in minutes; or the steps of a pretraining."""

    model: Name = ""
    minutes: Annotated[float, Field(ge=0, le=LONGEST_MINUTES)] = 0.0
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None


class ClientRequest(_Body):
    """A request that may name its client."""

    client_id: Name | int = ""


class NextSampleRequest(ClientRequest):
    """A request for the next case to label: the client, and the options of the strategy."""

    model: Name = ""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    region: Literal["foreground", "volume", "patches"] = "foreground"


class SkipRequest(ClientRequest):
    """A request to exclude a case from being handed out: the reason and the client."""

    reason: Annotated[str, Field(max_length=LONGEST_REASON)] = ""


_POINTS = {"items": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3}}
Points = Annotated[list[Any], Field(max_length=MOST_POINTS, json_schema_extra=_POINTS)]
# The modules that use these fields validate them with better messages; a label that they refuse goes into quarantine.
_NAMES = {"type": "object", "properties": {"name": {"type": "string"}, "idx": {"type": "integer"}}}
LabelNames = Annotated[Any, Field(json_schema_extra={"type": "array", "items": _NAMES, "maxItems": MOST_NAMES})]
Truth = Annotated[Any, Field(json_schema_extra={"type": "boolean"})]


def _check_flag(value: Any, info: ValidationInfo) -> Any:
    """Refuse a value that is neither true nor false, with the message of the parser."""
    name = str(info.field_name)
    if value != "":  # as forms send what was left empty
        parse_boolean(name, {name: value}, None)
    return value


Flag = Annotated[Truth, AfterValidator(_check_flag)]
Texts = Annotated[Any, Field(json_schema_extra={"type": "array", "items": {"type": "string"}})]
Count = Annotated[Any, Field(json_schema_extra={"type": "integer", "minimum": 0})]


class InferParams(ClientRequest):
    """Parameters of a segmentation; in addition, points of each label under its name for a model that takes clicks."""

    image: Annotated[str, Field(max_length=LONGEST_IMAGE)] = ""
    device: Name | Annotated[list[Name], Field(max_length=100)] = ""
    result_extension: Annotated[str, Field(max_length=20, json_schema_extra={"enum": ["", *EXTENSIONS]})] = ""
    result_dtype: Annotated[str, Field(max_length=20, json_schema_extra={"enum": ["", *DTYPES]})] = ""
    result_compress: Flag = False
    largest_component: Flag = None
    save_label: Flag = False
    label_tag: Annotated[str, Field(max_length=32)] = ""
    label: Name = ""
    foreground: Points = []
    background: Points = []
    roi: Annotated[list[Any], Field(max_length=6, json_schema_extra={"items": {"type": "number"}})] = []
    selected_label_name: Name = ""
    label_info: LabelNames = []


class LabelParams(ClientRequest):
    """Description of a label: its model, the names of its values, its completeness; other fields are stored with it."""

    model: Name = ""
    preset: Name = ""
    label_info: LabelNames = []
    complete: Truth = False
    missing_labels: Texts = []
    prompts_used: Count = None
    source: Name = ""
    model_version: Annotated[str, Field(max_length=LONGEST_REASON)] = ""
    engine: Annotated[str, Field(max_length=LONGEST_REASON)] = ""


def described_by(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI schema of a form part that is a JSON object with a model's fields, all of which are optional."""
    schema = model.model_json_schema()
    return {name: value for name, value in schema.items() if name != "required"} | {"default": {}}
