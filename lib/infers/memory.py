"""Measures free memory and the peak memory of a computation, and recognises out-of-memory errors."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import torch

MIB = 2**20
GIB = 2**30
RESERVE_SHARE = 0.05
SECONDS_BETWEEN_LOOKS = 0.002
# Parameters of glibc's mallopt, and their largest value.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST_BYTES = 2**31 - 1
CGROUP = Path("/sys/fs/cgroup")

# Messages of PyTorch, oneDNN and the C++ library; only CUDA has an exception type.
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc|could not allocate", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the host or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def free_bytes(device: torch.device, cgroup: Path = CGROUP) -> int:
    """Free memory of a device, minus a reserve of a twentieth of it for other programs.

    Args:
        device: the CPU or a GPU.
        cgroup: folder in which Linux reports a container's limit (cgroup 2).
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, int(free + unused - RESERVE_SHARE * total))
    memory = psutil.virtual_memory()
    return max(0, int(min(memory.available, _container_bytes(cgroup)) - RESERVE_SHARE * memory.total))


def host_bytes_left(budget: int | None) -> int:
    """Host memory that this process may still allocate, within ``budget`` if there is one."""
    free = free_bytes(torch.device("cpu"))
    return free if budget is None else max(0, min(free, budget - psutil.Process().memory_info().rss))


@dataclass(frozen=True)
class MemoryProbe:
    """Reports the free memory from which plans are made; tests pass fixed figures.

    Attributes:
        of_device: free bytes of a device.
        of_host: bytes of host memory that this process may still allocate, within a budget if there is one.
    """

    of_device: Callable[[torch.device], int] = free_bytes
    of_host: Callable[[int | None], int] = host_bytes_left


def release_memory(device: torch.device) -> None:
    """Release unused memory, including what the allocators of a GPU and of glibc keep for reuse."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        give_back_freed()


def give_back_freed() -> None:
    """Return the memory that glibc keeps for reuse to the system; without glibc this does nothing."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory of this process for reuse until :func:`release_memory`.

    Each training step frees and allocates gigabytes of activations. By default large blocks return to the system at
    once, which hands them out again page by page and clears each page. Without glibc this function does nothing.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(M_MMAP_THRESHOLD, MOST_BYTES)
        mallopt(M_TRIM_THRESHOLD, MOST_BYTES)


class PeakMemory:
    """Peak memory of a block of code, in bytes above the memory in use before it.

    On a GPU it is the allocator's own figure; on the host it is the resident memory, sampled every two milliseconds.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stop = device, threading.Event()
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._before, self._highest = 0, 0

    @property
    def bytes(self) -> int:
        """The peak so far."""
        return max(0, self._highest - self._before)

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = self._highest = self._process.memory_info().rss
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._highest = torch.cuda.max_memory_allocated(self._device)
            return
        self._highest = max(self._highest, self._process.memory_info().rss)
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            self._highest = max(self._highest, self._process.memory_info().rss)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc; None if another C library is in use."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _container_bytes(cgroup: Path) -> int:
    """Bytes that remain within a container's limit (cgroup 2); a very large number if there is no limit."""
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 2**62
    return 2**62 if limit == "max" else max(0, int(limit) - used)
