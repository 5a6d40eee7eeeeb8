"""The exceptions of this project, which form one tree.

    UnetrError
    |-- ConfigError        a preset, a --conf key or a setting is wrong (to be fixed by the administrator)
    |-- InputError         an image, a label or a request parameter is wrong (to be fixed by the client)
    |   |-- ImageError     the image cannot be segmented: unreadable, not 3D, tiny, not finite ...
    |   |   `-- FileKindError  the format of a file is not supported, whatever its name
    |   |-- LabelError     the label does not match its image or the preset
    |   |-- MemoryBudgetError the image needs more memory than is available
    |   `-- ParameterError a request parameter has an invalid value
    |-- DeviceError        no suitable device works
    |-- ConflictError      something with this name exists already, is busy, or must not be replaced
    |-- NotFoundError      no model, image, label or strategy with this name
    |-- CheckpointError    weights that do not match the network, or a file without weights
    |-- ModelNotReadyError the preset has no trained weights yet
    |-- StorageError       the label store cannot write: disk full, folder read-only
    |-- UpstreamError      an upstream server (a PACS) does not respond, or refuses a request
    `-- TrainingError      a training run cannot start or cannot continue

Each message names the problem, the value, and the valid values. ``lib.server`` maps the exceptions to HTTP status
codes.
"""

from __future__ import annotations


class UnetrError(Exception):
    """Base class of all exceptions that this project raises on purpose."""


class ConfigError(UnetrError):
    """A setting or preset is wrong."""


class InputError(UnetrError):
    """Data from a client are wrong."""


class ImageError(InputError):
    """An image that cannot be segmented."""


class OtherModalityError(ImageError):
    """An image that fits another served preset better, and is itself intact."""


class FileKindError(ImageError):
    """A file of an unsupported format."""


class MemoryBudgetError(InputError):
    """An image that needs more memory than is available, or than the server may use."""


class LabelError(InputError):
    """A label that does not match its image or the preset."""


class ParameterError(InputError):
    """A request parameter with an invalid value."""

    def __init__(self, name: str, value: object, valid: str) -> None:
        super().__init__(f"parameter {name!r} is {value!r}; valid: {valid}")
        self.name = name


class DeviceError(UnetrError):
    """None of the suitable devices works.

    Args:
        message: the error message.
        retry_after_seconds: time until one of them is tested again.
    """

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ConflictError(UnetrError):
    """Something with this name exists already, is busy, or must not be replaced."""


class NotFoundError(UnetrError):
    """Nothing with this name exists."""

    def __init__(self, kind: str, name: str, known: list[str] | None = None) -> None:
        listing = "" if known is None else f"; known: {', '.join(sorted(known)) or 'none'}"
        super().__init__(f"there is no {kind} {name!r}{listing}")


class CheckpointError(UnetrError):
    """A checkpoint without weights, or with weights that do not match the network."""


class ModelNotReadyError(UnetrError):
    """The preset has no trained weights yet: train it, or give weights with ``--conf pretrained``."""


class StorageError(UnetrError):
    """The label store cannot write, and has stored nothing of its input."""


class TrainingError(UnetrError):
    """A training run cannot start or cannot continue."""


class UpstreamError(UnetrError):
    """An upstream server does not respond, or refuses a request."""
