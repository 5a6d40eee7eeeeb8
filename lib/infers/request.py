"""The parameters of an inference request, cast and checked."""

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
    """A request's parameters, cast and checked.

    Attributes:
        device: that the request names; the default one where it names none.
        wanted: that it names; None: any of the server's.
        label_file: a mask that a correction starts from.
        saved: a saved version of the label that one starts from, where there is no ``label_file``.
    """

    image: Path
    device: torch.device
    wanted: torch.device | None
    extension: str
    dtype: str = "uint8"
    compress: bool = False
    largest_component: bool | None = None
    label_file: Path | None = None
    saved: LabelVersion | None = None

    @property
    def options(self) -> tuple[object, ...]:
        """What changes the mask itself, and not only how it is written."""
        return self.device.type, self.largest_component  # devices of a kind say the same

    @classmethod
    def parse(cls: type[Parsed], request: Mapping[str, Any], default: torch.device, **more: Any) -> Parsed:
        """Cast the fields that are ours; clients send others too, which are none of our business.

        Args:
            request: as it came.
            default: the device of a request that names none.
            more: fields that a request of another kind has beside these.

        Raises:
            ParameterError: naming the parameter, its value and what would be valid.
        """
        image = request.get("image")
        if not isinstance(image, str | Path) or not str(image):
            raise ParameterError("image", image, "an image id or a file")
        device = request.get("device")
        device = device[0] if isinstance(device, list) and device else device
        wanted = resolve_device(str(device)) if device and device != ALL else None
        return cls(
            image=Path(image),
            device=wanted if wanted is not None else default,
            wanted=wanted,
            extension=_choice("result_extension", request, EXTENSIONS, _extension_of(Path(image))),
            dtype=_choice("result_dtype", request, DTYPES, "uint8"),
            compress=bool(parse_boolean("result_compress", request, False)),
            largest_component=parse_boolean("largest_component", request, None),
            **more,
        )


def _extension_of(image: Path) -> str:
    """The image's own kind, where masks can be of it; NIfTI for DICOM."""
    name = image.name.lower()
    return next((e for e in (".nii.gz", ".nii", ".nrrd") if name.endswith(e)), ".nii.gz")


def _choice(name: str, request: Mapping[str, Any], valid: tuple[str, ...], default: str) -> str:
    value = request.get(name) or default
    if value not in valid:
        raise ParameterError(name, value, ", ".join(valid))
    return str(value)


def parse_boolean(name: str, request: Mapping[str, Any], default: bool | None) -> bool | None:
    """A flag of a request.

    Raises:
        ParameterError: for anything else than true and false.
    """
    value = request.get(name, default)
    if value is None or isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in words:
        raise ParameterError(name, value, "true, false")
    return words[str(value).lower()]
