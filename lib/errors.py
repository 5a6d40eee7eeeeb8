"""The project's exceptions, one tree.

    UnetrError
    |-- ConfigError        a preset, a --conf key or a setting is wrong (the administrator's to fix)
    |-- InputError         an image, a label or a request parameter is wrong (the client's to fix)
    |   |-- ImageError     the image cannot be segmented: unreadable, not 3D, tiny, not finite ...
    |   |   `-- FileKindError  a file of a format that is not read here, whatever its name says
    |   |-- LabelError     the label does not belong to its image or to the preset
    |   |-- MemoryBudgetError the image needs more memory than there is
    |   `-- ParameterError a request parameter has a value outside what is valid
    |-- DeviceError        no device that may compute something works
    |-- ConflictError      something of that name is there already, is busy, or is not to be replaced
    |-- NotFoundError      no model, image, label or strategy of that name
    |-- CheckpointError    weights that do not fit the network, or a file that holds none
    |-- ModelNotReadyError the preset has no trained weights yet
    |-- StorageError       the label store cannot write: disk full, folder read-only
    |-- UpstreamError      a server behind this one (a PACS) does not answer, or refuses
    `-- TrainingError      a training run cannot start or cannot go on

Each message names what was wrong, the value, and what would be valid. ``lib.server`` maps them to HTTP status codes.
"""

from __future__ import annotations


class UnetrError(Exception):
    """Base of everything that this project raises on purpose."""


class ConfigError(UnetrError):
    """A setting or preset is wrong."""


class InputError(UnetrError):
    """Something that a client sent is wrong."""


class ImageError(InputError):
    """An image that cannot be segmented."""


class OtherModalityError(ImageError):
    """An image that is rather for another preset that is served: nothing is wrong with it."""


class FileKindError(ImageError):
    """A file of a format that is not read here."""


class MemoryBudgetError(InputError):
    """An image that needs more memory than there is, or than the server may use."""


class LabelError(InputError):
    """A label that does not belong to its image or to the preset."""


class ParameterError(InputError):
    """A request parameter outside its valid values."""

    def __init__(self, name: str, value: object, valid: str) -> None:
        super().__init__(f"parameter {name!r} is {value!r}; valid: {valid}")
        self.name = name


class DeviceError(UnetrError):
    """None of the devices that may compute something works.

    Args:
        message: the sentence.
        retry_after_seconds: when one of them is tried again.
    """

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ConflictError(UnetrError):
    """Something of that name is there already, is busy, or is not to be replaced."""


class NotFoundError(UnetrError):
    """Nothing of that name."""

    def __init__(self, kind: str, name: str, known: list[str] | None = None) -> None:
        listing = "" if known is None else f"; known: {', '.join(sorted(known)) or 'none'}"
        super().__init__(f"there is no {kind} {name!r}{listing}")


class CheckpointError(UnetrError):
    """A checkpoint that holds no weights, or weights that do not fit the network."""


class ModelNotReadyError(UnetrError):
    """The preset has no trained weights yet: train it, or give some with ``--conf pretrained``."""


class StorageError(UnetrError):
    """The label store cannot write, and has kept nothing of what it was given."""


class TrainingError(UnetrError):
    """A training run that cannot start or cannot go on."""


class UpstreamError(UnetrError):
    """A server behind this one does not answer, or refuses what it is asked."""
