"""The server's settings: every ``--conf key value``, cast once and checked."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator

from lib.configs.catalogue import load_preset, read_preset, shipped_preset_names
from lib.configs.preset import Preset, canonical_name, describe_validation_error
from lib.configs.retraining import Retraining
from lib.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
OWNED_BY_MONAI_LABEL = frozenset({"server_mode"})
# A preset's name before "=". Anything else with "=" in it is an address or a path.
NAMED_WEIGHTS = re.compile(r"(?:(?P<name>[A-Za-z0-9][\w\-]*)\s*=)?(?P<path>.*)", re.DOTALL)
LONGEST_FOLDER_SUFFIX = 60


class Settings(Retraining):
    """What ``--conf`` can say; what it can say about training is in ``lib.configs.retraining``.

    Attributes:
        models: presets to serve, comma-separated, or ``all``.
        preset: a YAML file with a preset of one's own, served too (alone, where ``models`` is not given).
        labels: comma-separated names of other structures to train from nothing, instead of the preset's.
        pretrained: path or URL of weights to start with; ``name=path`` for one of several presets.
        model_dir: folder of versions and training runs.
        device: where to compute; the best there is by default.
        devices: several, in place of ``device``: ``all``, or names with commas between. Each has weights of its own.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        memory_budget: memory of the host that the server's process may use, such as ``6GiB``; what is free by default.
        engine: what computes windows on a CPU: ``auto``, OpenVINO where it was measured to be faster, or ``pytorch``.
        cluster: a Ray cluster that computes batches and background scoring: ``auto``, ``host:port`` or ``ray://host:port``;
            this machine without.
        cuda_graphs: whether a GPU replays the recorded kernels of a window.
        strategy: the strategy for clients that name none.
        cold_start_labels: with fewer labels than this, strategies that need a model choose typical cases instead.
        passes: how several opinions on a case are made: ``auto``, ``tta``, ``ensemble`` or ``dropout``.
        scoring_minutes: longest background scoring after a new model; it goes on at the next quiet moment. 0: none.
        result_cache_mib: memory for masks that are ready, in MiB; 0 keeps none and computes nothing ahead.
        picture_cache_mib: memory in MiB for volumes behind case pages, and as much for files in viewers.
        upload_limit_mib: largest upload in MiB.
        unpacked_limit_mib: largest image or label in MiB once it is unpacked, as 32-bit numbers.
        queue_size: inference requests that may wait; more are answered 503.
        image_roots: folders outside the studies whose images may be segmented too, by path or through a link.
        tokens: YAML file of users, their roles and the SHA-256 of their tokens; everybody may do everything without.
        cors_origins: web pages that may call the server from a browser, as ``https://viewer.example``.
        connection_limit: most connections at a time.
        client_connection_limit: most connections of one address at a time; those of ``trusted_proxies`` have no limit.
        header_seconds: longest time in seconds until a request's header is complete.
        body_seconds: longest time in seconds for a request's body, beside one for each KiB that came, and longest time
            in which a client takes nothing of its answer.
        trusted_proxies: addresses or networks of reverse proxies whose ``X-Forwarded-For`` and ``-Proto`` are believed.
        log_format: lines for people (``text``) or for programs (``json``).
        free_disk_mib: free disk in MiB below which the server says that it is not ready.
        lease_minutes: how long a case that was handed out is a client's alone; its requests renew it.
        quarantine_limit_mib: most MiB of refused labels that are kept; the oldest go first.
        predictions_limit_mib: most MiB of predictions that are kept to compare corrections with.
        ohif_for_files: whether cases that are NIfTI or NRRD are shown in OHIF too, as DICOM series made when asked for.
        volumes_limit_mib: most MiB of converted DICOM series; those with a label stay in any case.
    """

    models: tuple[str, ...] = ()
    preset: Path | None = None
    labels: tuple[str, ...] = ()
    pretrained: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    model_dir: Path = REPOSITORY / "model"
    device: str = ""
    devices: str = ""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    memory_budget: Annotated[ByteSize, Field(gt=0)] | None = None
    engine: Literal["auto", "pytorch"] = "auto"
    cluster: Annotated[str, Field(pattern=r"^(auto|(ray://)?[^/\s:]+:\d{1,5})?$")] = ""
    cuda_graphs: bool = False
    strategy: str = "typical"
    cold_start_labels: Annotated[int, Field(ge=0)] = 5
    passes: Literal["auto", "tta", "ensemble", "dropout"] = "auto"
    scoring_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    result_cache_mib: Annotated[int, Field(ge=0)] = 256
    picture_cache_mib: Annotated[int, Field(ge=0)] = 512
    upload_limit_mib: Annotated[int, Field(gt=0)] = 2048
    unpacked_limit_mib: Annotated[int, Field(gt=0)] = 4096
    queue_size: Annotated[int, Field(ge=0)] = 16
    image_roots: tuple[Path, ...] = ()
    tokens: Path | None = None
    cors_origins: tuple[Annotated[str, Field(pattern=r"^https?://[^/\s*]+$")], ...] = ()
    connection_limit: Annotated[int, Field(ge=8)] = 512
    client_connection_limit: Annotated[int, Field(ge=4)] = 128
    header_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    body_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    trusted_proxies: tuple[str, ...] = ()
    log_format: Literal["text", "json"] = "text"
    free_disk_mib: Annotated[int, Field(ge=0)] = 512
    lease_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    quarantine_limit_mib: Annotated[int, Field(ge=0)] = 2048
    predictions_limit_mib: Annotated[int, Field(ge=0)] = 1024
    ohif_for_files: bool = True
    volumes_limit_mib: Annotated[int, Field(ge=0)] = 20_480

    @field_validator("models", "labels", "image_roots", "cors_origins", "trusted_proxies", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("trusted_proxies")
    @classmethod
    def _check_networks(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            ipaddress.ip_network(value)  # its error names what is wrong with the value
        return values

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            urlsplit(value).port  # noqa: B018 (its error names what is wrong with the host or the port)
        return values

    @field_validator("pretrained", mode="before")
    @classmethod
    def _split_pretrained(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        entries = re.split(r",(?=\s*[A-Za-z0-9][\w\-]*\s*=)", value)
        matches = [match for part in entries if part.strip() and (match := NAMED_WEIGHTS.fullmatch(part.strip()))]
        return {match["name"] or "": match["path"].strip() for match in matches}

    @model_validator(mode="after")
    def _check_devices(self) -> Settings:
        if self.device and self.devices:
            raise ValueError(f"device is {self.device!r} and devices {self.devices!r}; valid: one of the two")
        return self

    @classmethod
    def from_conf(cls, conf: Mapping[str, str]) -> Settings:
        """Cast MONAI Label's dictionary of strings.

        Raises:
            ConfigError: for an unknown key, with the known ones, or a value that is not valid.
        """
        try:
            return cls.model_validate({key: value for key, value in conf.items() if key not in OWNED_BY_MONAI_LABEL})
        except ValidationError as error:
            raise ConfigError(f"--conf: {describe_validation_error(error, cls)}") from error

    def load_presets(self) -> dict[str, Preset]:
        """The presets to serve, by name.

        Raises:
            ConfigError: when one does not exist or is not valid, or two have the same name.
        """
        own = [read_preset(self.preset)] if self.preset else []
        names = self.models or (() if own else ("hippocampus_mr",))
        names = tuple(shipped_preset_names()) if names == ("all",) else names
        wanted = [load_preset(name) for name in names if name not in {preset.name for preset in own}] + own
        presets = [preset.with_labels(list(self.labels)) if self.labels else preset for preset in wanted]
        if len({preset.name for preset in presets}) < len(presets):
            raise ConfigError(f"--conf models names a preset twice: {', '.join(names)}")
        served = {preset.name: preset for preset in presets}
        unserved = sorted(self.pretrained.keys() - served.keys() - {""})
        if unserved:
            raise ConfigError(f"--conf pretrained is for {', '.join(unserved)}; served: {', '.join(served)}")
        return served

    def pretrained_for(self, name: str, served: int) -> str | None:
        """Path or URL of the weights given for a preset.

        Args:
            name: the preset.
            served: how many presets are served.

        Raises:
            ConfigError: when weights are given without a name although several presets are served.
        """
        if "" in self.pretrained and served > 1:
            raise ConfigError("--conf pretrained must say which preset it is for: name=path")
        return self.pretrained.get(name) or self.pretrained.get("")

    @property
    def editor_file(self) -> Path:
        """The editor network's weights: those in ``model_dir``, else those that come with the project."""
        own, shipped = (folder / "editor" / "shipped.pt" for folder in (self.model_dir, REPOSITORY / "model"))
        return own if own.is_file() else shipped

    def weights_folder(self, preset: Preset) -> Path:
        """Where a preset's weights are; label sets of one's own get a folder of their own."""
        if not self.labels:
            return self.model_dir / preset.name
        suffix = "-".join(canonical_name(label.name) for label in preset.labels)
        if len(suffix) > LONGEST_FOLDER_SUFFIX:
            digest = hashlib.sha256(suffix.encode()).hexdigest()[:8]
            suffix = f"{suffix[: LONGEST_FOLDER_SUFFIX - 9]}-{digest}"
        return self.model_dir / f"{preset.name}-{suffix}"
