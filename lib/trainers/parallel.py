"""Distributed training: which process reads which case, and a loss over the crops of all processes."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, DistributedSampler

# Other processes wait while rank 0 validates, which may take longer than NCCL's default timeout of ten minutes. If a
# process dies, the launcher, which watches all of them, ends the run at once in any case.
LONGEST_WAIT = timedelta(hours=24)
LONGEST_ANSWER = timedelta(seconds=1)
ATTEMPT = "unetr/attempt"
AGAIN = "-again"


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of training processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@dataclass(frozen=True)
class Joined:
    """A process of a distributed training: its device, and whether the run was restarted after a process died."""

    device: torch.device
    restarted: bool = False


@contextlib.contextmanager
def joined_processes(device: torch.device) -> Iterator[Joined]:
    """Join the processes that ``torchrun`` started, if it did.

    The backend is NCCL on GPUs (each process uses the GPU of its local rank), and Gloo on CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Joined(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=LONGEST_WAIT))
    attempt, restarted = _agree_on_attempt(store, rank, world_size)
    # The launcher's store survives a restart, and still contains the addresses of processes that have died.
    fresh = dist.PrefixStore(attempt, store)
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=world_size, timeout=LONGEST_WAIT)
    try:
        yield Joined(device, restarted)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _agree_on_attempt(store: dist.Store, rank: int, world_size: int) -> tuple[str, bool]:
    """A name for this start that all processes agree on, and whether there was a start before it.

    The launchers' own restart count is not sufficient: of several nodes, only the one whose process died counts a
    restart. The store may still contain entries of an earlier attempt, so rank 0 names the attempt and replies to the
    processes that take part in it.
    """
    if rank == 0:
        restarted = store.check([ATTEMPT])
        attempt = f"{uuid.uuid4().hex}{AGAIN if restarted else ''}"
        store.set(ATTEMPT, attempt)
        for other in range(1, world_size):
            store.set(f"{attempt}/welcome/{other}", store.get(f"{attempt}/here/{other}").decode())
        return attempt, restarted
    mine = uuid.uuid4().hex
    while True:
        attempt = store.get(ATTEMPT).decode()
        store.set(f"{attempt}/here/{rank}", mine)
        with contextlib.suppress(dist.DistStoreError):  # no reply means that the entry is of an earlier attempt
            store.wait([f"{attempt}/welcome/{rank}"], LONGEST_ANSWER)
            if store.get(f"{attempt}/welcome/{rank}").decode() == mine:
                return attempt, attempt.endswith(AGAIN)
            time.sleep(LONGEST_ANSWER.total_seconds())


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all processes along the first axis, in the order of ranks; only this one's carries a gradient.

    The Dice of a batch is not the mean of the Dices of its parts. Each process therefore computes the loss over all
    crops, so that two processes follow the learning curve of one process with the same crops. Averaging the gradients
    then divides them by the number of processes once too often, which :func:`loss_scale` compensates.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return tensor
    gathered = [torch.empty_like(tensor) for _ in range(world_size)]
    dist.all_gather(gathered, tensor.detach().contiguous())
    gathered[rank] = tensor
    return torch.cat(gathered)


def loss_scale() -> int:
    """Factor for a loss over the crops of all processes, applied before gradients are averaged."""
    return rank_and_world_size()[1]


class ResumableSampler(DistributedSampler[int]):
    """Shuffles by seed and epoch, independently of the number of processes; it can start inside of an epoch."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        rank, world_size = rank_and_world_size()
        super().__init__(dataset, world_size, rank, shuffle=True, seed=seed)
        self._skipped = 0

    def begin(self, epoch: int, skipped: int = 0) -> None:
        """Set the epoch, and the number of its cases that this process has already had."""
        self.set_epoch(epoch)
        self._skipped = skipped

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[self._skipped :])
