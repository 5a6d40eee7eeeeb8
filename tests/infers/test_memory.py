"""What there is, what something took, and what an error says."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from lib.infers import memory
from lib.infers.memory import MIB, PeakMemory, free_bytes, host_bytes_left, is_out_of_memory

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_errors_of_memory_are_known(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory")])
def test_other_errors_are_not_taken_for_them(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_an_allocation_that_cannot_be_is_an_error_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert is_out_of_memory(raised.value)


def test_peak_is_what_was_taken_at_most() -> None:
    with PeakMemory(CPU) as peak:
        for size in (20, 60, 10):  # fresh pages of the system: the allocator may hold freed ones of earlier tests
            with mmap.mmap(-1, size * MIB) as pages:
                taken = np.frombuffer(pages, dtype=np.uint8)
                taken[:] = 1
                assert taken.all()
                del taken
    assert 55 * MIB < peak.bytes < 140 * MIB


def test_budget_counts_what_the_process_has_taken_already() -> None:
    used = psutil.Process().memory_info().rss
    assert host_bytes_left(used + 100 * MIB) <= 101 * MIB
    assert host_bytes_left(MIB) == 0
    assert host_bytes_left(None) == pytest.approx(free_bytes(CPU), rel=0.2)


def test_limit_of_a_container_counts(tmp_path: Path) -> None:
    reserve = int(memory.RESERVE_SHARE * psutil.virtual_memory().total)
    (tmp_path / "memory.max").write_text(f"{reserve + 500}\n")
    (tmp_path / "memory.current").write_text("200\n")
    assert free_bytes(CPU, tmp_path) == pytest.approx(300, abs=1)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU, tmp_path) > 1000


@pytest.mark.gpu
def test_peak_on_a_gpu_is_what_was_taken_at_most() -> None:
    device = torch.device("cuda")
    with PeakMemory(device) as peak:
        torch.ones(60 * MIB, dtype=torch.uint8, device=device)
    assert 60 * MIB <= peak.bytes < 64 * MIB
    assert free_bytes(device) > 0


PAGES_TAKEN = """
import resource, sys
import numpy as np, torch
from lib.infers.memory import keep_freed_memory, release_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(256 * 2**20, dtype=np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

sys.argv[1] == "keep" and keep_freed_memory()
found = [faults(), faults()]
release_memory(torch.device("cpu"))
print(*found, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_what_is_freed_is_taken_again_without_the_system_until_it_is_released() -> None:
    def pages(mode: str) -> list[int]:
        command = [sys.executable, "-c", PAGES_TAKEN, mode]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        return [int(n) for n in subprocess.check_output(command, env=environment, text=True).split()]

    first, second, third = pages("keep")
    assert second < 100 < first
    assert third > 100, "it was given back"
    assert min(pages("usual")) > 100, "256 MiB by huge pages"
