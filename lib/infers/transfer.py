"""Copies between the host and a GPU that neither waits for; where windows are computed on a CPU, nothing is copied."""

from __future__ import annotations

import torch


def send(windows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Windows where they are computed; the copy to a GPU goes on while it computes what came before."""
    if device.type == "cuda" and windows.device.type == "cpu":
        return windows.pin_memory().to(device, non_blocking=True)
    return windows.to(device)


def batches_ahead(device: torch.device) -> int:
    """Batches that are computed before the first of them is fetched: a GPU computes while the host stitches."""
    return 1 if device.type == "cuda" else 0


class PendingTransfer:
    """Logits on their way to where they are added up.

    Args:
        logits: on the device that computes them.
        target: where they are wanted.
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
        """The logits, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._logits
