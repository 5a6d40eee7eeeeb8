"""A preset: everything that makes one segmentation task, as immutable data.

A preset travels inside every checkpoint, so that weights are never run with another spacing, window or label order
than the one that they were trained with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from lib.errors import ConfigError

MIN_ROI_VOXELS = 16
"""Of a window: the decoder's norms need more than one voxel at the coarsest resolution."""

LONGEST_QUOTE = 200
"""Of a refused value, in a message."""

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def canonical_name(name: str) -> str:
    """Return ``name`` as names are compared: lower case, with ``_`` for runs of anything but letters and digits.

    Letters of any script count, so that two Japanese names are two names.

    >>> canonical_name("Right  Kidney")
    'right_kidney'
    """
    return re.sub(r"[\W_]+", "_", name.casefold()).strip("_")


class Model(BaseModel):
    """Base of the configuration records: immutable, strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Code(Model):
    """A coded concept (PS3.3, 8.8), of SNOMED CT unless ``scheme`` names another terminology."""

    value: Annotated[str, Field(min_length=1, max_length=16)]
    meaning: Annotated[str, Field(min_length=1, max_length=64)]
    scheme: Annotated[str, Field(min_length=1, max_length=16)] = "SCT"


class Label(Model):
    """One structure: its value in the mask, its name, its colour, and other names that mean the same.

    ``code`` says in a terminology what it is, for DICOM SEG, and ``modifier`` which one (left or right, say).
    """

    index: Annotated[int, Field(ge=1, le=255)]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    color: tuple[Annotated[int, Field(ge=0, le=255)], ...] = Field((255, 0, 0), min_length=3, max_length=3)
    aliases: tuple[str, ...] = ()
    code: Code | None = None
    modifier: Code | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not canonical_name(name):
            raise ValueError("valid: a name with a letter or a digit in it")
        return name

    @model_validator(mode="after")
    def _check_modifier(self) -> Label:
        if self.modifier and not self.code:
            raise ValueError("modifier needs a code that it modifies")
        return self

    def names(self) -> set[str]:
        """Every name of this label in canonical form."""
        return {canonical_name(name) for name in (self.name, *self.aliases)}


class Window(Model):
    """Fixed intensity window, for CT: [lower, upper] in HU becomes [0, 1], clipped."""

    kind: Literal["window"]
    lower: Annotated[float, Field(allow_inf_nan=False)]
    upper: Annotated[float, Field(allow_inf_nan=False)]

    @model_validator(mode="after")
    def _check_order(self) -> Window:
        if self.lower >= self.upper:
            raise ValueError(f"lower ({self.lower}) must be below upper ({self.upper})")
        return self


class ZScore(Model):
    """Normalisation of each case by itself, for MR: clipped to two percentiles, then mean 0 and deviation 1."""

    kind: Literal["zscore"]
    lower_percentile: Annotated[float, Field(ge=0, lt=50)] = 0.5
    upper_percentile: Annotated[float, Field(gt=50, le=100)] = 99.5


class SeriesRules(Model):
    """What a DICOM series must have to be a channel, by the keywords of attributes; what is empty is not asked for.

    Each is a text with the wildcards ``*`` and ``?``, or a range of numbers such as ``80..120``.
    """

    SeriesDescription: str = ""
    ProtocolName: str = ""
    Modality: str = ""
    BodyPartExamined: str = ""
    ImageType: str = ""
    SequenceName: str = ""
    ScanningSequence: str = ""
    SequenceVariant: str = ""
    ContrastBolusAgent: str = ""
    EchoTime: str = ""
    RepetitionTime: str = ""
    InversionTime: str = ""

    def asked(self) -> dict[str, str]:
        """Keyword to rule, of those that there are."""
        return {keyword: rule for keyword, rule in self.model_dump().items() if rule}


class Channel(Model):
    """One sequence of a case, such as T1 or the arterial phase: a channel of the network's input.

    Attributes:
        name: of the channel; its order among the preset's channels is that of the network's input.
        aliases: other names that file names may use for it.
        series: what a DICOM series must have to be this channel; without any rule its SeriesDescription must have the
            name or an alias among its words.
        intensity: its normalisation; the preset's where not given.
        optional: whether a case may lack it: it is zeros then, and at random in training.
        display: whether labels lie on its grid; the first channel's where none says so.
    """

    name: Annotated[str, Field(min_length=1, max_length=64)]
    aliases: tuple[str, ...] = ()
    series: SeriesRules = SeriesRules()
    intensity: Annotated[Window | ZScore, Field(discriminator="kind")] | None = None
    optional: bool = False
    display: bool = False

    @model_validator(mode="after")
    def _check_names(self) -> Channel:
        if not all(canonical_name(name) for name in (self.name, *self.aliases)):
            raise ValueError("valid: names and aliases with a letter or a digit in them")
        if self.optional and self.display:
            raise ValueError(f"channel {self.name!r} is optional and display; valid: one of the two")
        return self

    def names(self) -> set[str]:
        """Every name of this channel in canonical form."""
        return {canonical_name(name) for name in (self.name, *self.aliases)}


class Network(Model):
    """Size of the UNETR (Hatamizadeh et al. 2021, arXiv 2103.10504), in the terms of ``monai.networks.nets.UNETR``.

    Attributes:
        patch_size: edge in voxels of the cubic patch that becomes one token: 16 as in the paper, or 8.
        norm_name: of the decoder; ``instance_affine`` also scales and shifts its result, as batch norm does.
    """

    patch_size: Literal[8, 16] = 16
    feature_size: PositiveInt = 16
    hidden_size: PositiveInt = 768
    mlp_dim: PositiveInt = 3072
    num_heads: PositiveInt = 12
    proj_type: Literal["perceptron", "conv"] = "perceptron"
    norm_name: Literal["instance", "instance_affine", "batch"] = "instance"
    res_block: bool = True
    conv_block: bool = True
    qkv_bias: bool = False
    dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _check_heads(self) -> Network:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; "
                f"valid: a multiple, such as {self.num_heads * max(1, self.hidden_size // self.num_heads)}"
            )
        return self


class Augmentation(Model):
    """Random changes to a training crop; every one is off at 0. Angles in degrees, shifts in voxels.

    ``slab_probability`` is how often only ``slab_planes`` (least and most) planes of the third axis are kept, as in a
    scan of few slices; the rest becomes 0, as padding is.
    """

    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 10.0
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.1
    translation_voxels: Annotated[float, Field(ge=0)] = 0.0
    spatial_probability: Fraction = 0.5
    elastic_probability: Fraction = 0.0
    noise_std: Annotated[float, Field(ge=0)] = 0.05
    noise_probability: Fraction = 0.2
    blur_probability: Fraction = 0.0
    gamma_probability: Fraction = 0.0
    intensity_scale: Annotated[float, Field(ge=0, lt=1)] = 0.1
    intensity_shift: Annotated[float, Field(ge=0)] = 0.1
    intensity_probability: Fraction = 0.5
    slab_probability: Fraction = 0.0
    slab_planes: tuple[PositiveInt, PositiveInt] = (12, 32)

    @model_validator(mode="after")
    def _check_slab(self) -> Augmentation:
        if self.slab_planes[0] > self.slab_planes[1]:
            raise ValueError(f"slab_planes is {list(self.slab_planes)}; valid: the least number first")
        return self


class Training(Model):
    """The training recipe. A request may override the fields that MONAI Label's clients know.

    ``crop_balance`` says what a crop with foreground is centred on: any foreground voxel (``voxels``), or a voxel of a
    label drawn at random (``labels``), so that an adrenal gland is shown as often as the liver.
    ``fine_tuning_learning_rate`` takes the place of ``learning_rate`` where training goes on from weights: a rate for
    random weights would undo in its first steps what they know.
    ``activation_checkpointing`` recomputes the transformer's activations always; without it, where memory asks for it.
    """

    max_epochs: PositiveInt = 50
    batch_size: PositiveInt = 1
    crops_per_case: PositiveInt = 2
    foreground_ratio: Annotated[float, Field(gt=0)] = 1.0
    crop_balance: Literal["voxels", "labels"] = "voxels"
    learning_rate: PositiveFloat = 1e-4
    fine_tuning_learning_rate: PositiveFloat | None = None
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    warmup_fraction: Fraction = 0.04
    gradient_clip_norm: PositiveFloat = 2.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.997
    dice_weight: Fraction = 0.7
    cross_entropy_weight: Fraction = 0.3
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    activation_checkpointing: bool = False
    early_stop_patience: Annotated[int, Field(ge=0)] = 0
    val_interval: PositiveInt = 1
    seed: Annotated[int, Field(ge=0)] = 0
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _check_loss(self) -> Training:
        if self.dice_weight + self.cross_entropy_weight == 0:
            raise ValueError("dice_weight and cross_entropy_weight are both 0; valid: at least one above 0")
        return self


EntropyLimit = tuple[str, Annotated[float, Field(gt=0, lt=1)]]


def _as_pairs(value: object) -> object:
    """A mapping as its pairs, which can be hashed."""
    return tuple(value.items()) if isinstance(value, Mapping) else value


class Inference(Model):
    """How a volume is segmented.

    Attributes:
        overlap: share of a window that its neighbour sees again, at least.
        min_overlap: the least that it may be reduced to where more than ``max_windows`` would be needed; not reduced
            if not given.
        max_windows: number of windows beyond which they overlap less.
        window_batch_size: most windows that go through the network at once.
        largest_component: whether only the largest connected component of each label is kept; or the names of the
            labels of which only that is kept.
        component_share: of the largest component's voxels, with which another component is kept too; at 1 only the
            largest is.
        component_entropy: by the label's name, the entropy from 0 (certain) to 1 that the most certain tenth of a
            component's voxels may have; a component above it is left out. What a network is nowhere sure of is rarely
            the structure.
        skip_air: whether what holds nothing but air is background without being looked at. Air is the lowest value
            after clipping; false where a label can lie in it.
        restore: how labels come back onto the image's grid: ``nearest``, or ``linear``, which interpolates each label
            and so gives smooth borders where the network's voxels are larger than the image's.
    """

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    min_overlap: Annotated[float, Field(ge=0, lt=1)] | None = None
    max_windows: PositiveInt = 20
    window_batch_size: PositiveInt = 1
    largest_component: bool | tuple[str, ...] = False
    component_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    component_entropy: Annotated[tuple[EntropyLimit, ...], BeforeValidator(_as_pairs)] = ()
    skip_air: bool = True
    restore: Literal["nearest", "linear"] = "nearest"

    @model_validator(mode="after")
    def _check_overlaps(self) -> Inference:
        if self.min_overlap is not None and self.min_overlap > self.overlap:
            raise ValueError(
                f"min_overlap {self.min_overlap} is above overlap {self.overlap}; valid: at most the overlap"
            )
        return self

    @property
    def overlaps(self) -> tuple[float, ...]:
        """The overlaps to choose from, largest first, a twentieth of a window apart."""
        least = self.overlap if self.min_overlap is None else self.min_overlap
        steps = math.ceil(round((self.overlap - least) * 20, 6))
        return (*(round(self.overlap - step / 20, 6) for step in range(steps)), least)


class Preset(Model):
    """One segmentation task.

    Attributes:
        labels: the structures, with values 1 to n without gaps; 0 is background.
        axcodes: anatomical directions of the axes that the network sees, in nibabel's letters.
        spacing_mm: voxel size that the network sees, in the order of ``axcodes``.
        roi_size: window of the network in voxels; multiples of ``network.patch_size``, of which each is a token.
        channels: the sequences of a case, in the order of the network's input channels; empty for one image a case.
        mirror_axes: axes along which a training crop may be mirrored. Empty where left and right differ in name.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,63}$")]
    description: str = ""
    modality: Literal["MR", "CT", "PT", "US", "OT"]
    labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=255)]
    ignore_unknown_labels: bool = False
    axcodes: Annotated[str, Field(pattern=r"^[RLAPSI]{3}$")] = "RAS"
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    roi_size: tuple[PositiveInt, PositiveInt, PositiveInt]
    intensity: Annotated[Window | ZScore, Field(discriminator="kind")]
    channels: Annotated[tuple[Channel, ...], Field(max_length=16)] = ()
    padding: Literal["constant", "edge"] = "constant"
    mirror_axes: tuple[Literal[0, 1, 2], ...] = ()
    network: Network = Network()
    inference: Inference = Inference()
    training: Training = Training()

    @model_validator(mode="after")
    def _check_roi(self) -> Preset:
        patch, roi = self.network.patch_size, self.roi_size
        if any(edge % patch or edge < MIN_ROI_VOXELS for edge in roi):
            valid = [max(MIN_ROI_VOXELS, round(edge / patch) * patch) for edge in roi]
            raise ValueError(
                f"'roi_size' is {list(roi)}: every edge must be a multiple of {patch} voxels (network.patch_size), and "
                f"at least {MIN_ROI_VOXELS}; valid: for example {valid}"
            )
        return self

    @field_validator("axcodes")
    @classmethod
    def _check_axcodes(cls, axcodes: str) -> str:
        axes = {frozenset("RL"): 0, frozenset("AP"): 0, frozenset("SI"): 0}
        for letter in axcodes:
            axes[next(pair for pair in axes if letter in pair)] += 1
        if set(axes.values()) != {1}:
            raise ValueError("needs one letter of each pair R/L, A/P, S/I; valid: for example RAS")
        return axcodes

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: tuple[Label, ...]) -> tuple[Label, ...]:
        indices = sorted(label.index for label in labels)
        if indices != list(range(1, len(labels) + 1)):
            raise ValueError(f"indices are {indices}; valid: 1 to {len(labels)}, each once")
        owner: dict[str, str] = {}
        for label in labels:
            for name in label.names():
                if name in owner:
                    raise ValueError(f"labels {owner[name]!r} and {label.name!r} share the name {name!r}")
                owner[name] = label.name
        return tuple(sorted(labels, key=lambda label: label.index))

    @model_validator(mode="after")
    def _check_channels(self) -> Preset:
        owner: dict[str, str] = {}
        for channel in self.channels:
            for name in channel.names():
                if name in owner:
                    raise ValueError(f"channels {owner[name]!r} and {channel.name!r} share the name {name!r}")
                owner[name] = channel.name
        shown = [channel.name for channel in self.channels if channel.display]
        if len(shown) > 1:
            raise ValueError(f"channels {', '.join(shown)} are all display; valid: one of them")
        if self.channels and self.channels[self.display_channel].optional:
            raise ValueError(
                f"channel {self.channels[self.display_channel].name!r} is shown and optional; valid: display: true "
                "at a channel that every case has"
            )
        return self

    @model_validator(mode="after")
    def _check_names_in_inference(self) -> Preset:
        chosen = self.inference.largest_component
        for key, names, others in (
            ("largest_component", () if isinstance(chosen, bool) else chosen, "true, false, or "),
            ("component_entropy", tuple(name for name, _ in self.inference.component_entropy), ""),
        ):
            if unknown := [name for name in names if name not in self.label_indices]:
                raise ValueError(
                    f"'inference.{key}' names {', '.join(map(repr, unknown))}; "
                    f"valid: {others}some of {', '.join(self.label_indices)}"
                )
        return self

    @property
    def largest_component_indices(self) -> frozenset[int]:
        """Values of the labels of which only the largest connected component is kept."""
        chosen = self.inference.largest_component
        if isinstance(chosen, bool):
            return frozenset(self.label_indices.values() if chosen else ())
        return frozenset(self.label_indices[name] for name in chosen)

    @property
    def component_entropies(self) -> dict[int, float]:
        """The limits of ``inference.component_entropy`` by the labels' values."""
        return {self.label_indices[name]: limit for name, limit in self.inference.component_entropy}

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return max(1, len(self.channels))

    @property
    def display_channel(self) -> int:
        """Place among the channels of the one that labels lie on."""
        return next((place for place, channel in enumerate(self.channels) if channel.display), 0)

    @property
    def out_channels(self) -> int:
        """Classes of the network: the labels and background."""
        return len(self.labels) + 1

    @property
    def label_indices(self) -> dict[str, int]:
        """Name to mask value, as MONAI Label's clients expect it."""
        return {label.name: label.index for label in self.labels}

    def find_label(self, name: str) -> Label | None:
        """Return the label of that name or alias; case, spaces and ``_`` do not matter."""
        wanted = canonical_name(name)
        return next((label for label in self.labels if wanted in label.names()), None)

    def with_labels(self, names: list[str]) -> Preset:
        """Return this task for other structures: ``names`` become 1 to n; known ones keep colour and aliases.

        The result has no trained weights of its own, and mirroring is off, since nothing is known of the sides.
        """
        labels = []
        for index, name in enumerate(names, start=1):
            known = self.find_label(name)
            fields = known.model_dump() | {"index": index} if known else {"index": index, "name": name}
            labels.append(fields)
        inference = self.inference.model_dump()
        left = {field["name"] for field in labels}
        if not isinstance(self.inference.largest_component, bool):
            inference["largest_component"] = sorted(left & set(self.inference.largest_component))
        inference["component_entropy"] = [pair for pair in self.inference.component_entropy if pair[0] in left]
        changes = {"labels": labels, "mirror_axes": (), "inference": inference}
        return parse_preset(self.model_dump() | changes, source=f"labels {names}")


def parse_preset(data: Mapping[str, Any], source: str) -> Preset:
    """Make a preset from plain data, or say which key is wrong.

    Args:
        data: keys of :class:`Preset`.
        source: where the data came from, for the error's text.

    Raises:
        ConfigError: naming the key, the value and what would be valid.
    """
    try:
        return Preset.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe_validation_error(error, Preset)}") from error


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """Say in words what a record refused: the key, the value, and what would be valid."""
    problems = []
    errors = error.errors(include_url=False)
    for problem in errors:
        depth = len(problem["loc"])
        if any(len(other["loc"]) > depth and other["loc"][:depth] == problem["loc"] for other in errors):
            continue  # what is wrong is inside, and said there
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(sorted(_known_keys(model, problem["loc"][:-1])))
            problems.append(f"unknown key {key!r}; valid: {known}")
        elif problem["type"] == "missing":
            problems.append(f"key {key!r} is missing")
        else:
            text = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{key!r} is {_quoted(problem['input'])}: {text}" if key else text)
    return "; ".join(problems)


def _quoted(value: object) -> str:
    words = repr(value)
    return words if len(words) <= LONGEST_QUOTE else f"{words[:LONGEST_QUOTE]}..."


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """Field names of the record at ``path`` inside ``model``."""
    candidates = [model]
    for part in map(str, path):
        fields = [c.model_fields[part] for c in candidates if part in c.model_fields]
        tagged = [c for c in candidates if c.__name__.lower() == part]
        candidates = tagged or [m for field in fields for m in _models_in(field.annotation)] or candidates
    return set(candidates[0].model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The Pydantic models that occur in a type annotation, inside unions and containers too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
