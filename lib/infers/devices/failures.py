"""Distinguishes errors of a device from errors of the work that it computed."""

from __future__ import annotations

import re

import torch

from lib.errors import MemoryBudgetError
from lib.infers.memory import is_out_of_memory

# Error messages of CUDA and its libraries, of which only some have an exception type.
DEVICE_ERROR = re.compile(
    r"CUDA error|CUDA driver|device-side assert|cuDNN error|CUDNN_STATUS|CUBLAS_STATUS|CUFFT|NVML|no CUDA GPUs", re.I
)


def is_device_error(error: BaseException) -> bool:
    """Whether an error means that the device does not work, and not that the work was faulty."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and DEVICE_ERROR.search(str(error)) is not None


def lacks_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out after every fallback had been tried."""
    return isinstance(error, MemoryBudgetError) or is_out_of_memory(error)


def try_device(device: torch.device) -> None:
    """Test a device by a small computation.

    Raises:
        RuntimeError: if the device does not work.
    """
    product = float(torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device)).sum().item())
    if product != 64**3:
        raise RuntimeError(f"{device} computes wrongly: {product:g} instead of {64**3}")


def first_line(error: BaseException) -> str:
    """The first line of an error message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
