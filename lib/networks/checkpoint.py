"""Reading and writing checkpoints: weights together with the preset that they belong to.

A file of ours is a dictionary of ``format``, ``preset`` (plain data), ``model`` (state dict) and ``info`` (plain data:
version, metrics, recipe). Files of others are read too, as bare state dicts or under a usual key. Everything is read
with ``weights_only=True``: a checkpoint is data, never code.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.configs.preset import Preset, parse_preset
from lib.errors import CheckpointError, ConfigError
from lib.networks.layouts import StateDict, to_current_layout
from lib.storage.files import replacing
from lib.storage.full_disk import writing
from lib.storage.json_files import without_nan

FORMAT = "unetr_radiology/1"
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip
MOST_INFO_BYTES = 2**20
STATE_KEYS = ("model", "state_dict", "model_state_dict", "net", "network")

# UNETR's research code keeps its best accuracy as a NumPy number beside the weights. A number is data too.
_NUMPY_SCALAR: Any = np.float64(0).__reduce__()[0]
torch.serialization.add_safe_globals(
    [
        (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
        (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
    ]
)


@dataclass(frozen=True)
class Checkpoint:
    """Weights and what they are.

    Attributes:
        model: state dict.
        preset: what the weights were trained for; None for a file that was not written by this project.
        info: plain data about the training.
    """

    model: StateDict
    preset: Preset | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


def read_data(path: Path) -> Any:
    """What a file of weights holds: tensors, numbers and text.

    Raises:
        CheckpointError: when it is missing, damaged, or holds code.
    """
    _check_stored(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path.name!r} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file ends in any of a dozen kinds, struct.error and IndexError among them
        raise CheckpointError(f"checkpoint {path.name!r} {_why_unreadable(error)}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: when the file is missing, damaged, holds code instead of tensors, or holds no weights.
    """
    data = read_data(path)
    state = _find_state(data)
    if state is None:
        valid = f"a state dict, bare or as {', '.join(STATE_KEYS)}"
        raise CheckpointError(f"checkpoint {path.name!r} holds no weights; valid: {valid}")
    _check_tensors(state, path.name)
    if data.get("format") != FORMAT:
        return Checkpoint(state)
    try:
        preset = parse_preset(data["preset"], source=f"checkpoint {path.name!r}")
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the preset in checkpoint {path.name!r} cannot be used: {error}") from error
    return Checkpoint(state, preset, _plain_info(data.get("info", {}), path.name))


def write_checkpoint(path: Path, checkpoint: Checkpoint, half: bool = False) -> None:
    """Write a checkpoint so that no reader ever sees half of it.

    Args:
        path: the file; its folder is made.
        checkpoint: what to write; its preset is needed.
        half: keep floating-point weights in fp16 (half the size; about three decimal digits).

    Raises:
        StorageError: when the disk does not take it; then the file is as it was before.
    """
    if checkpoint.preset is None:
        raise CheckpointError("a checkpoint without its preset would be run with the wrong one; give the preset")
    state = {key: _to_storage(value, half) for key, value in checkpoint.model.items()}
    data = {
        "format": FORMAT,
        "preset": checkpoint.preset.model_dump(mode="json"),
        "model": state,
        "info": dict(checkpoint.info),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(f"checkpoint {path.name!r}"), replacing(path, durable=True) as file:
        torch.save(data, file)


def load_weights(network: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load weights of any known layout into ``network``, strictly.

    Raises:
        CheckpointError: naming the keys that are missing, left over, or of another shape.
    """
    network.load_state_dict(fitting(state, network), strict=True)


def fitting(state: Mapping[str, torch.Tensor], network: nn.Module) -> StateDict:
    """Weights of any known layout under the keys of a network, which may be on PyTorch's device ``meta``.

    Raises:
        CheckpointError: as :func:`load_weights`.
    """
    reference = network.state_dict()
    current = to_current_layout(state, reference)
    problems = _describe_mismatch(current, reference)
    if problems:
        raise CheckpointError(f"the weights do not fit the network: {problems}")
    return current


def check_finite(state: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that hold NaN or infinity, whose masks would be empty or noise.

    Raises:
        CheckpointError: naming the tensors.
    """
    bad = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"the weights hold values that are not finite (NaN or infinity): {_shorten(bad)}")


def _check_stored(path: Path) -> None:
    """Refuse a packed archive: PyTorch packs none, and a small one may unpack to more than memory holds.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return  # another format, or damaged, which PyTorch says
    if packed:
        raise CheckpointError(f"checkpoint {path.name!r} is a packed archive; valid: as torch.save writes it")


def _check_tensors(state: StateDict, name: str) -> None:
    """Refuse tensors that are no plain arrays of numbers, or larger than what the file holds of them.

    Raises:
        CheckpointError: naming them.
    """
    odd = [key for key, value in state.items() if not _is_plain(value)]
    if odd:
        raise CheckpointError(
            f"checkpoint {name!r} holds tensors that are no plain arrays of real numbers, or larger than their data: "
            f"{_shorten(odd)}"
        )


def _is_plain(value: torch.Tensor) -> bool:
    if value.layout is not torch.strided or value.device.type != "cpu" or value.dtype not in DTYPES:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _plain_info(info: Any, name: str) -> dict[str, Any]:
    """What is known of a training, if it can be kept as JSON.

    Raises:
        CheckpointError: when it is no such data, or too much of it.
    """
    try:
        size = len(json.dumps(without_nan(dict(info)), ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the info in checkpoint {name!r} is no plain data: {str(error)[:200]}") from error
    if size > MOST_INFO_BYTES:
        raise CheckpointError(f"the info in checkpoint {name!r} takes {size} bytes; valid: at most {MOST_INFO_BYTES}")
    return dict(info)


def _why_unreadable(error: Exception) -> str:
    """The end of a sentence on a file that could not be loaded."""
    if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"holds code ({code[1]}), which is never run; valid: tensors, numbers and text"
    lines = str(error).splitlines()
    return f"is damaged or no checkpoint: {lines[0][:200] if lines else type(error).__name__}"


def _find_state(data: Any) -> StateDict | None:
    if not isinstance(data, Mapping):
        return None
    for candidate in (*(data.get(key) for key in STATE_KEYS), data):
        if isinstance(candidate, Mapping) and candidate and all(map(_is_entry, candidate.items())):
            return dict(candidate)
    return None


def _is_entry(entry: tuple[Any, Any]) -> bool:
    return isinstance(entry[0], str) and torch.is_tensor(entry[1])


def _to_storage(value: torch.Tensor, half: bool) -> torch.Tensor:
    value = value.detach().cpu()
    return value.half() if half and value.is_floating_point() else value.clone()


def _describe_mismatch(state: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> str:
    missing = [key for key in reference if key not in state]
    left_over = [key for key in state if key not in reference]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(reference[key].shape)}"
        for key in reference
        if key in state and state[key].shape != reference[key].shape
    ]
    kinds = [("missing", missing), ("left over", left_over), ("of another shape", shapes)]
    return "; ".join(f"{len(keys)} {what}: {_shorten(keys)}" for what, keys in kinds if keys)


def _shorten(keys: list[str], most: int = 6) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest
