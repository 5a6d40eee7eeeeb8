"""The server's settings: every ``--conf key value``, cast and validated once."""

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
    """The ``--conf`` settings; those of training are in ``lib.configs.retraining``.

    Attributes:
        models: presets to serve, comma-separated, or ``all``.
        preset: a YAML file with the user's own preset, which is served too (alone, if ``models`` is not given).
        labels: comma-separated names of other structures to train from random weights, instead of the preset's.
        pretrained: path or URL of initial weights; ``name=path`` for one of several presets.
        model_dir: folder of versions and training runs.
        device: computing device; the best available one by default.
        devices: several devices, instead of ``device``: ``all``, or names separated by commas. Each has its own copy of
            the weights.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        memory_budget: host memory that the server's process may use, such as ``6GiB``; by default the free memory.
        engine: engine for windows on a CPU: ``auto``, which uses OpenVINO if it was measured to be faster, or
            ``pytorch``.
        cluster: a Ray cluster for batches and background scoring: ``auto``, ``host:port`` or ``ray://host:port``; by
            default this machine.
        cuda_graphs: whether a GPU replays the recorded kernels of a window.
        strategy: the strategy for clients that do not name one.
        cold_start_labels: with fewer labels than this, strategies that need a model choose typical cases instead.
        passes: how several predictions for a case are made: ``auto``, ``tta``, ``ensemble`` or ``dropout``.
        scoring_minutes: time limit of background scoring after a new model; it continues when the server is idle again.
            0 disables it.
        result_cache_mib: memory for computed masks, in MiB; 0 disables this cache and prefetching.
        picture_cache_mib: memory in MiB for the volumes of case pages, and the same amount for files in viewers.
        upload_limit_mib: largest upload in MiB.
        unpacked_limit_mib: largest decompressed image or label in MiB, as 32-bit numbers.
        queue_size: number of inference requests that may wait; further ones get status 503.
        image_roots: folders outside the studies whose images may be segmented, by path or through a link.
        tokens: YAML file of users, their roles and the SHA-256 of their tokens; without it, everybody has all
            permissions.
        cors_origins: origins of web pages that may call the server from a browser, as ``https://viewer.example``.
        connection_limit: largest number of connections at a time.
        client_connection_limit: largest number of connections from one address; those of ``trusted_proxies`` are not
            limited.
        header_seconds: time limit in seconds until a request's header is complete; an idle connection is kept as long.
        body_seconds: time limit in seconds for a request's body, plus one second for each KiB received; also the time
            limit in which a client must accept a part of its response.
        trusted_proxies: addresses or networks of reverse proxies whose ``X-Forwarded-For`` and ``-Proto`` are trusted.
        log_format: log lines for people (``text``) or for programs (``json``).
        free_disk_mib: free disk space in MiB below which the server reports that it is not ready.
        lease_minutes: how long a case is reserved for the client that received it; its requests renew the lease.
        quarantine_limit_mib: size limit in MiB of refused labels; the oldest are removed first.
        predictions_limit_mib: size limit in MiB of stored predictions, with which corrections are compared.
        ohif_for_files: whether NIfTI and NRRD cases are shown in OHIF too, as DICOM series generated on demand.
        volumes_limit_mib: size limit in MiB of converted DICOM series; those with a label are always kept.
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
            ipaddress.ip_network(value)  # its error describes the problem of the value
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
            ConfigError: for an unknown key, with the known ones, or an invalid value.
        """
        try:
            return cls.model_validate({key: value for key, value in conf.items() if key not in OWNED_BY_MONAI_LABEL})
        except ValidationError as error:
            raise ConfigError(f"--conf: {describe_validation_error(error, cls)}") from error

    def load_presets(self) -> dict[str, Preset]:
        """The presets to serve, by name.

        Raises:
            ConfigError: if one does not exist or is invalid, or if two have the same name.
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
            name: name of the preset.
            served: number of served presets.

        Raises:
            ConfigError: if weights are given without a name although several presets are served.
        """
        if "" in self.pretrained and served > 1:
            raise ConfigError("--conf pretrained must say which preset it is for: name=path")
        return self.pretrained.get(name) or self.pretrained.get("")

    @property
    def editor_file(self) -> Path:
        """The editor network's weights: those in ``model_dir``, otherwise the shipped ones."""
        own, shipped = (folder / "editor" / "shipped.pt" for folder in (self.model_dir, REPOSITORY / "model"))
        return own if own.is_file() else shipped

    def weights_folder(self, preset: Preset) -> Path:
        """The folder of a preset's weights; custom label sets have their own folder."""
        if not self.labels:
            return self.model_dir / preset.name
        suffix = "-".join(canonical_name(label.name) for label in preset.labels)
        if len(suffix) > LONGEST_FOLDER_SUFFIX:
            digest = hashlib.sha256(suffix.encode()).hexdigest()[:8]
            suffix = f"{suffix[: LONGEST_FOLDER_SUFFIX - 9]}-{digest}"
        return self.model_dir / f"{preset.name}-{suffix}"
