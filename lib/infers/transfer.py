"""Asynchronous copies between the host and a GPU; where windows are computed on a CPU, nothing is copied."""

from __future__ import annotations

import torch


def send(windows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Windows on the computing device; the copy to a GPU overlaps with the computation of the previous batch."""
    if device.type == "cuda" and windows.device.type == "cpu":
        return windows.pin_memory().to(device, non_blocking=True)
    return windows.to(device)


def batches_ahead(device: torch.device) -> int:
    """Batches that are computed before the first of them is fetched: a GPU computes while the host stitches."""
    return 1 if device.type == "cuda" else 0


class PendingTransfer:
    """Logits that are being copied to the device of the sums.

    Args:
        logits: on the device that computed them.
        target: the device of the sums.
    """

    def __init__(self, logits: torch.Tensor, target: torch.device) -> None:
        self._arrived: torch.cuda.Event | None = None
        if logits.device.type == "cuda" and target.type == "cpu":
            self._logits = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
            self._logits.copy_(logits, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._logits = logits.to(target)

    def wait(self) -> torch.Tensor:
        """The logits, after the copy has finished."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._logits
