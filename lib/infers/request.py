"""Parsed and validated parameters of an inference request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lib.datastore.records import LabelVersion
from lib.errors import ParameterError
from lib.infers.devices.lane import ALL
from lib.infers.writer import DTYPES, EXTENSIONS
from lib.networks.precision import resolve_device

Parsed = TypeVar("Parsed", bound="InferRequest")


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """The parsed and validated parameters of a request.

    Attributes:
        device: the device that the request names, or the default one.
        requested_device: the device that the request names; None for any device of the server.
        label_file: the mask that a correction starts from.
        saved: the saved label version that a correction starts from, if there is no ``label_file``.
    """

    image: Path
    device: torch.device
    requested_device: torch.device | None
    extension: str
    dtype: str = "uint8"
    compress: bool = False
    largest_component: bool | None = None
    label_file: Path | None = None
    saved: LabelVersion | None = None

    @property
    def options(self) -> tuple[object, ...]:
        """The options that change the mask itself, and not only how it is written."""
        return self.device.type, self.largest_component  # devices of one kind give equal results

    @classmethod
    def parse(cls: type[Parsed], request: Mapping[str, Any], default: torch.device, **more: Any) -> Parsed:
        """Parse the fields that this server knows; other fields, which clients may send, are ignored.

        Args:
            request: the raw fields.
            default: device of a request that names none.
            more: additional fields of a special kind of request.

        Raises:
            ParameterError: naming the parameter, its value and the valid values.
        """
        image = request.get("image")
        if not isinstance(image, str | Path) or not str(image):
            raise ParameterError("image", image, "an image id or a file")
        device = request.get("device")
        device = device[0] if isinstance(device, list) and device else device
        requested_device = resolve_device(str(device)) if device and device != ALL else None
        return cls(
            image=Path(image),
            device=requested_device if requested_device is not None else default,
            requested_device=requested_device,
            extension=_choice("result_extension", request, EXTENSIONS, _extension_of(Path(image))),
            dtype=_choice("result_dtype", request, DTYPES, "uint8"),
            compress=bool(parse_boolean("result_compress", request, False)),
            largest_component=parse_boolean("largest_component", request, None),
            **more,
        )


def _extension_of(image: Path) -> str:
    """The image's own extension if masks can have it; NIfTI for DICOM."""
    name = image.name.lower()
    return next((e for e in (".nii.gz", ".nii", ".nrrd") if name.endswith(e)), ".nii.gz")


def _choice(name: str, request: Mapping[str, Any], valid: tuple[str, ...], default: str) -> str:
    value = request.get(name) or default
    if value not in valid:
        raise ParameterError(name, value, ", ".join(valid))
    return str(value)


def parse_boolean(name: str, request: Mapping[str, Any], default: bool | None) -> bool | None:
    """Parse a boolean option of a request.

    Raises:
        ParameterError: for values other than true and false.
    """
    value = request.get(name, default)
    if value is None or isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in words:
        raise ParameterError(name, value, "true, false")
    return words[str(value).lower()]
