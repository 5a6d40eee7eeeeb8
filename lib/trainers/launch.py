"""Runs a training in this process, or in one process for each GPU under PyTorch's elastic launcher."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lib.errors import ParameterError, TrainingError, UnetrError
from lib.infers.memory import is_out_of_memory, release_memory
from lib.storage.json_files import read_json
from lib.trainers.loop import run_training
from lib.trainers.parallel import joined_processes
from lib.trainers.run.job import TrainingJob, TrainingResult

logger = logging.getLogger("unetr.train")

RESTARTS = 3


Train = Callable[[TrainingJob], TrainingResult]
TrainTogether = Callable[[TrainingJob, list[torch.device]], TrainingResult]


def launch(
    plan: TrainingJob,
    multi_gpu: bool = False,
    gpus: str = "all",
    train: Train = run_training,
    train_together: TrainTogether | None = None,
) -> TrainingResult:
    """Train on one device, or on several GPUs with DistributedDataParallel if this is requested and possible.

    If memory runs out even with the smallest step, the run is resumed on the CPU.

    Args:
        plan: the training job.
        multi_gpu: whether several GPUs may be used.
        gpus: ``all``, or comma-separated indices.
        train: function that trains on one device.
        train_together: function that trains in one process for each of several devices; by default
            :func:`launch_processes`.

    Raises:
        ParameterError: for a GPU that does not exist.
        TrainingError: if there is not enough memory either way.
    """
    devices = _gpu_indices(gpus) if multi_gpu and plan.device.type == "cuda" else []
    if len(devices) > 1:
        together, places = train_together or launch_processes, [torch.device("cuda", index) for index in devices]
        return _within_memory(plan, lambda job: together(job, places), train)
    chosen = torch.device("cuda", devices[0]) if devices else plan.device
    return _within_memory(replace(plan, device=chosen), train, train)


def launch_processes(plan: TrainingJob, devices: list[torch.device], start_method: str = "spawn") -> TrainingResult:
    """Train in one process for each device; rank 0 validates, and stores the weights and the state.

    If a process dies, all of them are restarted and resume from the stored state, up to three times.

    Args:
        plan: the training job; its batch size is that of each process.
        devices: all CUDA (NCCL), or all CPU (Gloo).
        start_method: start method of Python's multiprocessing; a process that uses CUDA must not be forked from one
            that does.

    Raises:
        TrainingError: if a process reports an error, or if processes have died too often.
    """
    logger.info("training in %d processes on %s", len(devices), [str(device) for device in devices])
    with tempfile.TemporaryDirectory(prefix="unetr-train-") as folder:
        for restart in range(RESTARTS + 1):
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=len(devices),
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,  # the launcher cannot distinguish a crash from a reported error
                monitor_interval=0.5,
                start_method=start_method,
            )
            try:
                with _own_signals():
                    elastic_launch(config, _work)(plan, [str(device) for device in devices], folder)
                # The file was written by rank 0 of this run, in a folder that only this user can read.
                result: TrainingResult = torch.load(Path(folder) / "result.pt", weights_only=False)
                return result
            except ChildFailedError as error:
                reason = _reason_of(error)
                _raise_reported_error(folder, len(devices))
            logger.warning("a process has died (%s); restart %d of %d", reason, restart + 1, RESTARTS)
            plan = replace(plan, resume=True)
    raise TrainingError(f"training in {len(devices)} processes failed: {reason}")


def _work(plan: TrainingJob, devices: list[str], folder: str) -> None:
    """One of the processes; an expected error is written to a file, so that it is not mistaken for a crash."""
    with joined_processes(torch.device(devices[0])) as joined:
        rank = dist.get_rank()
        logging.basicConfig(level=logging.INFO, format=f"%(asctime)s [rank {rank}] %(message)s", force=True)
        try:
            chosen = torch.device(devices[rank]) if joined.device.type == "cuda" else joined.device
            result = run_training(replace(plan, device=chosen))
        except (UnetrError, torch.OutOfMemoryError) as error:
            report = {"kind": type(error).__name__, "text": str(error)}
            (Path(folder) / f"error-{rank}.json").write_text(json.dumps(report), encoding="utf-8")
            raise
        if rank == 0:
            torch.save(result, Path(folder) / "result.pt")


def _within_memory(plan: TrainingJob, train: Train, train_alone: Train) -> TrainingResult:
    """Train; if memory does not suffice even with the smallest step, resume with lower memory needs.

    Several processes resume together with activation checkpointing; otherwise training resumes on the CPU in one
    process.

    Raises:
        TrainingError: if memory does not suffice then either.
    """
    try:
        return train(plan)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    release_memory(plan.device)
    recipe = plan.preset.training
    if train is not train_alone and not recipe.activation_checkpointing:
        logger.warning("out of memory (%s): going on with activation_checkpointing", reason)
        thrifty = recipe.model_copy(update={"activation_checkpointing": True})
        return _within_memory(
            replace(plan, preset=plan.preset.model_copy(update={"training": thrifty}), resume=True), train, train_alone
        )
    if plan.device.type == "cuda":
        logger.warning("out of memory (%s): going on on the CPU", reason)
        return _within_memory(replace(plan, device=torch.device("cpu"), resume=True), train_alone, train_alone)
    raise TrainingError(
        f"out of memory on {plan.device} ({reason}); lower train_batch_size ({recipe.batch_size}) or "
        f"crops_per_case ({recipe.crops_per_case})"
    )


def _raise_reported_error(folder: str, count: int) -> None:
    """Raise the error that one of the processes reported, if there is one."""
    for path in sorted(Path(folder).glob("error-*.json")):
        report = read_json(path)
        path.unlink()
        if report["kind"] == "OutOfMemoryError":
            raise torch.OutOfMemoryError(report["text"])
        raise TrainingError(f"training in {count} processes failed: {report['text']}")


def _reason_of(error: ChildFailedError) -> str:
    failures = [f"rank {rank} ended with exit code {failure.exitcode}" for rank, failure in error.failures.items()]
    return "; ".join(failures) or str(error).splitlines()[0]


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Restore the signal handlers, which the launcher replaces and does not restore."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _gpu_indices(gpus: str) -> list[int]:
    count = torch.cuda.device_count()
    if gpus == "all":
        return list(range(count))
    wanted = [part.strip() for part in gpus.split(",") if part.strip()]
    if not wanted or any(not part.isdigit() or int(part) >= count for part in wanted):
        raise ParameterError("gpus", gpus, f"all, or indices from 0 to {count - 1}, separated by commas")
    return [int(part) for part in wanted]
