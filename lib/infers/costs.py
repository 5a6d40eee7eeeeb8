"""Cost of a window on this machine, measured on first use and stored in a file for later starts."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from lib.infers.memory import PeakMemory, release_memory
from lib.networks.inference import InferenceNetwork
from lib.networks.placement import Placement
from lib.storage.json_files import read_json, write_json

logger = logging.getLogger(__name__)

COSTS_FILE = "costs.json"
"""Name of the cost file in the folder of models."""

SECONDS_TO_REMEMBER = 24 * 3600.0


@dataclass(frozen=True)
class WindowCost:
    """Cost of one batch of windows or training crops: bytes on the device besides weights and input, and seconds."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Limits:
    """Restrictions on memory plans for a while after memory ran out.

    Attributes:
        window_batch: largest batch of windows or training crops; 0 for no limit.
        on_host: whether the host must stitch the windows.
        bands: smallest number of bands.
        recompute: whether a training must recompute the transformer's activations.
        until: seconds since 1970 at which the limits end.
    """

    window_batch: int = 0
    on_host: bool = False
    bands: int = 1
    recompute: bool = False
    until: float = 0.0


_COST, _LIMITS = TypeAdapter(WindowCost), TypeAdapter(Limits)


class CostBook:
    """Measured costs and limits for each device, network and number format.

    Args:
        file: JSON file of the costs. Without one, and if it cannot be written, costs are kept in memory only.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._entries: dict[str, dict[str, Any]] | None = None
        self._lock = threading.Lock()

    def cost(self, key: str, batch: int) -> WindowCost | None:
        """The measured cost of a batch; None if it has not been measured."""
        entry = self._read().get(key, {}).get(str(batch))
        return WindowCost(int(entry["bytes"]), float(entry["seconds"])) if entry else None

    def keep(self, key: str, batch: int, cost: WindowCost) -> None:
        """Store the measured cost of a batch."""
        self._change(key, {str(batch): asdict(cost)})

    def limits(self, key: str) -> Limits:
        """The limits set within the last day; otherwise no limits."""
        entry = self._read().get(key, {}).get("limits")
        limits = Limits(**entry) if entry else Limits()
        left = limits.until - time.time()  # more than a day if the clock was set back
        return limits if 0 < left <= SECONDS_TO_REMEMBER else Limits()

    def limit(self, key: str, limits: Limits) -> None:
        """Store limits, which hold for a day."""
        self._change(key, {"limits": asdict(replace(limits, until=time.time() + SECONDS_TO_REMEMBER))})

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._entries is None:
            self._entries = _parse(self._file) if self._file is not None and self._file.is_file() else {}
        return self._entries

    def _change(self, key: str, values: Mapping[str, Any]) -> None:
        with self._lock:
            self._write(key, values)

    def _write(self, key: str, values: Mapping[str, Any]) -> None:
        entries = self._read()
        if self._file is not None and self._file.is_file():
            # trainings run in their own processes and write the same file
            entries |= {name: {**kept, **entries.get(name, {})} for name, kept in _parse(self._file).items()}
        entries[key] = {**entries.get(key, {}), **values}
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, entries)
        except OSError as error:
            logger.warning("measured costs are not kept in %s: %s", self._file, error.strerror or error)


def cost_key(where: Placement, engine: str = "pytorch") -> str:
    """The key of a cost: device, number format, engine, version of PyTorch, and shape of the network."""
    preset, device = where.preset, where.device
    shape = preset.model_dump_json(include={"roi_size", "network"}) + str(preset.out_channels)
    shape += f" {preset.in_channels} channels" if preset.channels else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"
    network = hashlib.sha256(shape.encode()).hexdigest()[:12]
    computing = "" if engine == "pytorch" else f" {engine}"
    return f"{name} {where.precision}{computing} torch-{torch.__version__} {network}"


def measure_windows(network: nn.Module, where: Placement, batch: int) -> WindowCost:
    """Run one batch of noise twice: the first run includes one-time initialisation, the second is timed.

    Raises:
        RuntimeError, MemoryError: if the batch does not fit.
    """
    if isinstance(network, InferenceNetwork):
        network.release_memory()
    release_memory(where.device)  # reuse of memory that the allocator holds would not be measured
    windows = torch.randn((batch, where.preset.in_channels, *where.preset.roi_size), device=where.device)
    with torch.inference_mode(), where.autocast():
        with PeakMemory(where.device) as peak:
            network(windows)
        start = time.perf_counter()
        network(windows).sum().item()  # waits for a GPU
        seconds = time.perf_counter() - start
    return WindowCost(peak.bytes, round(seconds, 5))


def _parse(file: Path) -> dict[str, dict[str, Any]]:
    """The entries of the file; a damaged file only means that all costs are measured again."""
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        logger.warning("measured costs in %s cannot be read, and are measured again: %s", file, error)
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {key: {name: one for name, one in _usable(value)} for key, value in entries if isinstance(value, dict)}


def _usable(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The valid values of an entry."""
    for name, one in entry.items():
        try:
            known: WindowCost | Limits = (_LIMITS if name == "limits" else _COST).validate_python(one)
        except ValidationError:
            continue
        yield name, asdict(known)
