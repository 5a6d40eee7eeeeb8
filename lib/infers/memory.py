"""How much memory there is, how much something took, and whether an error says that there was not enough."""

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
# Parameters of glibc's mallopt, and the most that they take.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST_BYTES = 2**31 - 1
CGROUP = Path("/sys/fs/cgroup")

# What PyTorch, oneDNN and the C++ library say; only CUDA has an exception of its own.
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc|could not allocate", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def free_bytes(device: torch.device, cgroup: Path = CGROUP) -> int:
    """Memory that may still be taken on a device, less a reserve of a twentieth of it for other programs.

    Args:
        device: the CPU or a GPU.
        cgroup: where Linux states a container's limit (cgroup 2).
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, int(free + unused - RESERVE_SHARE * total))
    memory = psutil.virtual_memory()
    return max(0, int(min(memory.available, _container_bytes(cgroup)) - RESERVE_SHARE * memory.total))


def host_bytes_left(budget: int | None) -> int:
    """What this process may still take of the host's memory, of ``budget`` where there is one."""
    free = free_bytes(torch.device("cpu"))
    return free if budget is None else max(0, min(free, budget - psutil.Process().memory_info().rss))


@dataclass(frozen=True)
class MemoryProbe:
    """How much memory is free; plans are made from it, and a test hands in figures of its own.

    Attributes:
        of_device: free bytes of a device.
        of_host: bytes of the host's memory that this process may still take, of a budget where there is one.
    """

    of_device: Callable[[torch.device], int] = free_bytes
    of_host: Callable[[int | None], int] = host_bytes_left


def release_memory(device: torch.device) -> None:
    """Give back what nobody holds any more, also what the allocators of a GPU and of glibc keep for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        give_back_freed()


def give_back_freed() -> None:
    """Give back to the system what glibc keeps of freed memory for later; elsewhere than on glibc nothing changes."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def keep_freed_memory() -> None:
    """From now on glibc keeps what this process frees for what it asks for next, until :func:`release_memory`.

    Each step of a training frees and takes gigabytes of activations again. By default large ones go back to the system
    at once, which hands them out again page by page, each filled with zeros. Elsewhere than on glibc nothing changes.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(M_MMAP_THRESHOLD, MOST_BYTES)
        mallopt(M_TRIM_THRESHOLD, MOST_BYTES)


class PeakMemory:
    """Bytes that a block of code took at most, beyond what was taken before it.

    On a GPU it is the allocator's own count; on the host the resident memory, looked at every two milliseconds.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stop = device, threading.Event()
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._look, daemon=True)
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

    def _look(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            self._highest = max(self._highest, self._process.memory_info().rss)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """One of its own functions; None where the C library is another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _container_bytes(cgroup: Path) -> int:
    """What a container's limit (cgroup 2) leaves; a very large number without one."""
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 2**62
    return 2**62 if limit == "max" else max(0, int(limit) - used)
