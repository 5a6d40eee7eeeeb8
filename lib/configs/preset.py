"""A preset: the complete definition of one segmentation task, as immutable data.

Every checkpoint contains its preset, so that weights are never used with another spacing, intensity window or label
order than in their training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from lib.errors import ConfigError

MIN_ROI_VOXELS = 16
"""Smallest window edge: the decoder's norms need more than one voxel at the coarsest resolution."""

LONGEST_QUOTE = 200
"""Length to which a refused value is shortened in a message."""

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def canonical_name(name: str) -> str:
    """Return ``name`` in the form in which names are compared: lower case, with ``_`` for other characters.

    Runs of anything but letters and digits become one ``_``. Letters of any script are kept, so that Japanese names
    stay distinct.

    >>> canonical_name("Right  Kidney")
    'right_kidney'
    """
    return re.sub(r"[\W_]+", "_", name.casefold()).strip("_")


class Model(BaseModel):
    """Base of the configuration records, which are immutable and refuse unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Code(Model):
    """A coded concept (PS3.3, 8.8), of SNOMED CT unless ``scheme`` names another terminology."""

    value: Annotated[str, Field(min_length=1, max_length=16)]
    meaning: Annotated[str, Field(min_length=1, max_length=64)]
    scheme: Annotated[str, Field(min_length=1, max_length=16)] = "SCT"


class Label(Model):
    """One structure: its value in the mask, its name, its colour, and synonyms.

    ``code`` identifies it in a terminology, for DICOM SEG, and ``modifier`` qualifies it (for example left or right).
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
    """Fixed intensity window, for CT: [lower, upper] in HU is mapped to [0, 1], with clipping."""

    kind: Literal["window"]
    lower: Annotated[float, Field(allow_inf_nan=False)]
    upper: Annotated[float, Field(allow_inf_nan=False)]

    @model_validator(mode="after")
    def _check_order(self) -> Window:
        if self.lower >= self.upper:
            raise ValueError(f"lower ({self.lower}) must be below upper ({self.upper})")
        return self


class ZScore(Model):
    """Normalisation of each image by itself, for MR: clip to two percentiles, then mean 0 and standard deviation 1."""

    kind: Literal["zscore"]
    lower_percentile: Annotated[float, Field(ge=0, lt=50)] = 0.5
    upper_percentile: Annotated[float, Field(gt=50, le=100)] = 99.5


class SeriesRules(Model):
    """Conditions on the attributes of a DICOM series that make it a channel; empty conditions are ignored.

    Each condition is a text with the wildcards ``*`` and ``?``, or a range of numbers such as ``80..120``.
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
        """Keyword to condition, without empty ones."""
        return {keyword: rule for keyword, rule in self.model_dump().items() if rule}


class Channel(Model):
    """One sequence of a case, such as T1 or the arterial phase, which is a channel of the network's input.

    Attributes:
        name: name of the channel; the order of the preset's channels is that of the network's input.
        aliases: synonyms for file names.
        series: conditions for a DICOM series; without any, its SeriesDescription must contain the name or an alias as
            words.
        intensity: its normalisation; by default that of the preset.
        optional: whether a case may lack it; it is then zero, and it is set to zero at random in training.
        display: whether labels have its grid; by default the first channel.
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
    """Size of the UNETR (Hatamizadeh et al. 2021, arXiv 2103.10504), by the names of ``monai.networks.nets.UNETR``.

    Attributes:
        patch_size: edge of the cubic patch of a token, in voxels: 16 as in the paper, or 8.
        norm_name: normalisation of the decoder; ``instance_affine`` has learnable scale and shift, like batch norm.
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


DRAWING = ("phantom_probability", "arm_probability")
"""Augmentations that draw body parts without any label."""
IN_HU = (*DRAWING, "unenhanced_probability")
"""Augmentations that compute in Hounsfield units."""


def _as_pairs(value: object) -> object:
    """A mapping as hashable pairs."""
    return tuple(value.items()) if isinstance(value, Mapping) else value


class Augmentation(Model):
    """Random augmentations of a training crop; each is disabled by 0. Angles in degrees, shifts in voxels.

    ``slab_probability`` is the probability of keeping only ``slab_planes`` (smallest and largest number) planes of the
    third axis, as in a scan with few slices; the rest becomes 0, like padding. ``phantom_probability`` is the
    probability of drawing a limb, a head or a chest in place of the crop, with nothing labelled; ``arm_probability``
    that of laying drawn arms beside the body of a case. ``unenhanced_probability`` is that of taking contrast medium
    out of the labels in ``unenhanced_hu``, which gives the density of each without any. All three are for CT only.
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
    phantom_probability: Fraction = 0.0
    arm_probability: Fraction = 0.0
    unenhanced_probability: Fraction = 0.0
    unenhanced_hu: Annotated[tuple[tuple[str, float], ...], BeforeValidator(_as_pairs)] = ()

    @model_validator(mode="after")
    def _check_slab(self) -> Augmentation:
        if self.slab_planes[0] > self.slab_planes[1]:
            raise ValueError(f"slab_planes is {list(self.slab_planes)}; valid: the least number first")
        return self


class Training(Model):
    """The training recipe. A request may override the fields that MONAI Label's clients know.

    ``crop_balance`` states the centre of a foreground crop: any foreground voxel (``voxels``), or a voxel of a randomly
    drawn label (``labels``), so that an adrenal gland occurs as often as the liver. ``fine_tuning_learning_rate``
    replaces ``learning_rate`` if training starts from weights, since a learning rate for random weights would destroy
    them in the first steps; ``fine_tuning_epochs`` then replaces ``max_epochs``. ``activation_checkpointing`` always
    recomputes the transformer's activations; without it, this is done only if memory requires it.
    """

    max_epochs: PositiveInt = 50
    batch_size: PositiveInt = 1
    crops_per_case: PositiveInt = 2
    foreground_ratio: Annotated[float, Field(gt=0)] = 1.0
    crop_balance: Literal["voxels", "labels"] = "voxels"
    learning_rate: PositiveFloat = 1e-4
    fine_tuning_learning_rate: PositiveFloat | None = None
    fine_tuning_epochs: PositiveInt | None = None
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


class Inference(Model):
    """How a volume is segmented.

    Attributes:
        overlap: smallest share of a window that the next one covers too.
        min_overlap: lower limit of the overlap if more than ``max_windows`` would be needed; by default the overlap is
            not reduced.
        max_windows: number of windows above which the overlap is reduced.
        window_batch_size: largest number of windows in one forward pass.
        largest_component: whether only the largest connected component of each label is kept, or the names of the
            labels for which this is done.
        component_share: size, as a share of the largest component, from which other components are kept too; 1 keeps
            only the largest.
        component_entropy: for each label name, the largest entropy, from 0 (certain) to 1, of the most certain tenth of
            a component's voxels; a component above it is removed, since it is rarely the structure. After a training
            from random weights, limits that the new weights cannot meet are raised.
        skip_air: whether windows that contain only air become background without computation. Air is the lowest value
            after clipping; set it to false if a label can lie in air.
        restore: how labels are resampled to the image's grid: ``nearest``, or ``linear``, which interpolates the
            weights of each voxel's two most likely labels, so that borders lie between the network's voxels.
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
        """The possible overlaps, largest first, in steps of a twentieth."""
        least = self.overlap if self.min_overlap is None else self.min_overlap
        steps = math.ceil(round((self.overlap - least) * 20, 6))
        return (*(round(self.overlap - step / 20, 6) for step in range(steps)), least)


class Preset(Model):
    """One segmentation task.

    Attributes:
        labels: the structures, with values 1 to n without gaps; 0 is background.
        axcodes: anatomical directions of the axes of the network's input, in nibabel's letters.
        spacing_mm: voxel size of the network's input, in the order of ``axcodes``.
        roi_size: window of the network in voxels; multiples of ``network.patch_size``, the edge of a token's patch.
        channels: the sequences of a case, in the order of the network's input channels; empty if a case is one image.
        mirror_axes: axes along which a training crop may be flipped. Empty if labels distinguish left and right.
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

    @model_validator(mode="after")
    def _check_augmentations_in_hu(self) -> Preset:
        change = self.training.augmentation
        used = [name for name in IN_HU if getattr(change, name)]
        if used and (self.modality != "CT" or not isinstance(self.intensity, Window) or self.channels):
            raise ValueError(
                f"{' and '.join(used)} above 0 need HU; valid: 0, or modality CT with intensity kind window and no "
                "channels"
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
    def _check_label_names(self) -> Preset:
        chosen, unenhanced = self.inference.largest_component, self.training.augmentation.unenhanced_hu
        for key, names, others in (
            ("inference.largest_component", () if isinstance(chosen, bool) else chosen, "true, false, or "),
            ("inference.component_entropy", tuple(name for name, _ in self.inference.component_entropy), ""),
            ("training.augmentation.unenhanced_hu", tuple(name for name, _ in unenhanced), ""),
        ):
            if unknown := [name for name in names if name not in self.label_indices]:
                raise ValueError(
                    f"'{key}' names {', '.join(map(repr, unknown))}; "
                    f"valid: {others}some of {', '.join(self.label_indices)}"
                )
        return self

    @property
    def largest_component_indices(self) -> frozenset[int]:
        """Values of the labels for which only the largest connected component is kept."""
        chosen = self.inference.largest_component
        if isinstance(chosen, bool):
            return frozenset(self.label_indices.values() if chosen else ())
        return frozenset(self.label_indices[name] for name in chosen)

    @property
    def component_entropies(self) -> dict[int, float]:
        """The limits of ``inference.component_entropy`` by label value."""
        return {self.label_indices[name]: limit for name, limit in self.inference.component_entropy}

    @property
    def in_channels(self) -> int:
        """Number of channels of the network's input."""
        return max(1, len(self.channels))

    @property
    def display_channel(self) -> int:
        """Index of the channel whose grid the labels have."""
        return next((place for place, channel in enumerate(self.channels) if channel.display), 0)

    @property
    def out_channels(self) -> int:
        """Number of classes of the network: the labels and the background."""
        return len(self.labels) + 1

    @property
    def label_indices(self) -> dict[str, int]:
        """Name to mask value, as MONAI Label's clients expect it."""
        return {label.name: label.index for label in self.labels}

    def find_label(self, name: str) -> Label | None:
        """Return the label with this name or alias; case, spaces and ``_`` are ignored."""
        wanted = canonical_name(name)
        return next((label for label in self.labels if wanted in label.names()), None)

    def with_component_entropy(self, limits: Mapping[str, float]) -> Preset:
        """Return this preset with other limits of ``inference.component_entropy``, by label name."""
        inference = self.inference.model_copy(update={"component_entropy": tuple(limits.items())})
        return self.model_copy(update={"inference": inference})

    def with_labels(self, names: list[str]) -> Preset:
        """Return this preset for other structures: ``names`` become 1 to n; known names keep colour and aliases.

        The result has no trained weights of its own, and flipping is disabled, since the new labels may distinguish
        sides.
        """
        known = [self.find_label(name) for name in names]
        labels = [
            (label.model_dump() if label else {"name": name}) | {"index": index}
            for index, (name, label) in enumerate(zip(names, known, strict=True), start=1)
        ]
        inference = self.inference.model_dump()
        left = {field["name"] for field in labels}
        if not isinstance(self.inference.largest_component, bool):
            inference["largest_component"] = sorted(left & set(self.inference.largest_component))
        inference["component_entropy"] = [pair for pair in self.inference.component_entropy if pair[0] in left]
        training = self.training.model_dump()
        change = training["augmentation"]
        change["unenhanced_hu"] = [pair for pair in self.training.augmentation.unenhanced_hu if pair[0] in left]
        if None in known:
            change |= dict.fromkeys(DRAWING, 0.0)
        changes = {"labels": labels, "mirror_axes": (), "inference": inference, "training": training}
        return parse_preset(self.model_dump() | changes, source=f"labels {names}")


def without_own_anatomy(training: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what is about a preset's own labels in CT: drawn body parts, and organs without contrast medium.

    Args:
        training: plain data of :class:`Training`.
    """
    nothing = {**dict.fromkeys(IN_HU, 0.0), "unenhanced_hu": {}}
    return {**training, "augmentation": {**training.get("augmentation", {}), **nothing}}


def parse_preset(data: Mapping[str, Any], source: str) -> Preset:
    """Create a preset from plain data, or raise an error that names the wrong key.

    Args:
        data: keys of :class:`Preset`.
        source: origin of the data, for the error.

    Raises:
        ConfigError: naming the key, the value and the valid values.
    """
    try:
        return Preset.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe_validation_error(error, Preset)}") from error


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """Describe a validation error in words: the key, the value, and the valid values."""
    problems = []
    errors = error.errors(include_url=False)
    for problem in errors:
        depth = len(problem["loc"])
        if any(len(other["loc"]) > depth and other["loc"][:depth] == problem["loc"] for other in errors):
            continue  # the nested error describes the problem
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
    """The Pydantic models that occur in a type annotation, including unions and containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
