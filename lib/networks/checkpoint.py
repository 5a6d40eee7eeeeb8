"""Reads and writes checkpoints, which hold weights together with their preset.

The project's own checkpoint is a dictionary with ``format``, ``preset`` (plain data), ``model`` (state dict) and
``info`` (plain data: version, metrics, recipe). Foreign files are also accepted, as bare state dicts or with the state
dict under a usual key. All files are read with ``weights_only=True``: a checkpoint is data, never code.
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

# The UNETR research code stores its best accuracy as a NumPy number next to the weights, which is plain data.
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
    """Weights and their description.

    Attributes:
        model: state dict.
        preset: the preset of the training; None for a file that this project did not write.
        info: plain data about the training.
    """

    model: StateDict
    preset: Preset | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


def read_data(path: Path) -> Any:
    """The content of a weights file: tensors, numbers and text.

    Raises:
        CheckpointError: if the file is missing, damaged, or contains code.
    """
    _check_stored(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path.name!r} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can raise many types, such as struct.error and IndexError
        raise CheckpointError(f"checkpoint {path.name!r} {_why_unreadable(error)}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: if the file is missing, damaged, contains code, or contains no weights.
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
    """Write a checkpoint; the file is replaced atomically.

    Args:
        path: the file; its folder is created.
        checkpoint: the checkpoint, which must have a preset.
        half: whether to store floating-point weights in fp16 (half of the size; about three decimal digits).

    Raises:
        StorageError: if the file cannot be written; the previous file is then unchanged.
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
    """Load weights of any supported key layout into ``network``, strictly.

    Raises:
        CheckpointError: naming the keys that are missing, unexpected, or of another shape.
    """
    network.load_state_dict(fitting(state, network), strict=True)


def fitting(state: Mapping[str, torch.Tensor], network: nn.Module) -> StateDict:
    """Weights of any supported layout, with the keys of a network, which may be on PyTorch's ``meta`` device.

    Raises:
        CheckpointError: see :func:`load_weights`.
    """
    reference = network.state_dict()
    current = to_current_layout(state, reference)
    problems = _describe_mismatch(current, reference)
    if problems:
        raise CheckpointError(f"the weights do not fit the network: {problems}")
    return current


def check_finite(state: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights with NaN or infinity, whose masks would be empty or noise.

    Raises:
        CheckpointError: naming the tensors.
    """
    bad = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"the weights hold values that are not finite (NaN or infinity): {_shorten(bad)}")


def _check_stored(path: Path) -> None:
    """Refuse a compressed archive: PyTorch writes none, and a small one may expand beyond the memory.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return  # another format or a damaged file, which PyTorch reports
    if packed:
        raise CheckpointError(f"checkpoint {path.name!r} is a packed archive; valid: as torch.save writes it")


def _check_tensors(state: StateDict, name: str) -> None:
    """Refuse tensors that are not plain arrays of numbers, or that are larger than their data in the file.

    Raises:
        CheckpointError: naming the tensors.
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
    """The training information, if it can be stored as JSON.

    Raises:
        CheckpointError: if it is not plain data, or too large.
    """
    try:
        size = len(json.dumps(without_nan(dict(info)), ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the info in checkpoint {name!r} is no plain data: {str(error)[:200]}") from error
    if size > MOST_INFO_BYTES:
        raise CheckpointError(f"the info in checkpoint {name!r} takes {size} bytes; valid: at most {MOST_INFO_BYTES}")
    return dict(info)


def _why_unreadable(error: Exception) -> str:
    """The end of the error sentence for a file that could not be loaded."""
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
