"""The process of one job, started by ``lib.server.work.jobs``.

``python -m lib.server.work.job_process train RESULT_FILE``

The request is in a file beside the file of the result. Standard input stays open as long as the server runs; its end
means that the server has ended, for any reason, and this process ends too. Until then, the server may pause ("-") and
resume ("+") the work while inference requests wait; scoring checks this before each window.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Any

os.environ["MONAI_LABEL_RELOAD_APP_LIB"] = (
    "false"  # lib must be loaded only once, or its exception classes would differ
)

import psutil
import torch
from monailabel.interfaces.utils.app import app_instance

from lib.activelearning.pool_scoring import MAY_COMPUTE
from lib.errors import UnetrError
from lib.server.work.jobs import EXIT_NO_ROOM, KINDS, REQUEST_FILE, Kind, sentence_of
from lib.storage.full_disk import storage_problem

STANDARD_INPUT = 0
EXIT_SERVER_GONE = 3
LOWEST_PRIORITY = 19
NICER_THAN_THE_SERVER = 5


def main(kind: Kind, result_file: Path) -> int:
    """Run one job; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    request = json.loads(result_file.with_name(REQUEST_FILE).read_bytes())
    threading.Thread(target=_end_with_server, daemon=True).start()
    try:
        result = run(kind, request)
        result_file.write_text(json.dumps(result, default=str), encoding="utf-8")
    except (UnetrError, OSError, RuntimeError, sqlite3.OperationalError) as error:
        problem = storage_problem(error)
        if not problem and not isinstance(error, UnetrError | OSError):
            raise
        print(f"{type(error).__name__}: {error}", flush=True)
        if problem:
            print(sentence_of(kind, problem), flush=True)
        return EXIT_NO_ROOM if problem else 1
    return 0


def run(kind: str, request: dict[str, Any]) -> Any:
    """Run the job in the app of MONAI Label's settings (environment variables)."""
    instance = app_instance()
    if kind == "train":
        yield_to_inference()
        return instance.train(request | {"local_rank": 0})
    if kind == "batch_infer":
        return instance.batch_infer(request)
    _step_back()
    return instance.scoring(request)


def yield_to_inference() -> None:
    """Lower this process's priority: a third of the server's weight, and on a CPU half of the threads."""
    own = psutil.Process()
    nicer = min(LOWEST_PRIORITY, own.nice() + NICER_THAN_THE_SERVER)
    own.nice(psutil.BELOW_NORMAL_PRIORITY_CLASS if sys.platform == "win32" else nicer)
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))


def _step_back() -> None:
    """Use only CPU time that no other process needs."""
    own = psutil.Process()
    own.nice(psutil.IDLE_PRIORITY_CLASS if sys.platform == "win32" else LOWEST_PRIORITY)
    torch.set_num_threads(1)


def _end_with_server() -> None:
    # unbuffered: the lock of a buffered reader in a thread would block forked children
    while words := os.read(STANDARD_INPUT, 4096):
        if words.rstrip().endswith(b"+"):
            MAY_COMPUTE.set()
        elif words.rstrip().endswith(b"-"):
            MAY_COMPUTE.clear()
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(EXIT_SERVER_GONE)


if __name__ == "__main__":
    code = main(next(kind for kind in KINDS if kind == sys.argv[1]), Path(sys.argv[2]))
    if code == EXIT_NO_ROOM:
        os._exit(code)  # TensorBoard's final write would fail too, and its stack trace would hide the reason
    sys.exit(code)
