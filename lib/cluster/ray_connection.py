"""Ray itself, which is optional, and the connection to a cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.errors import ConfigError

LIBRARY = Path(__file__).resolve().parents[1]


def import_ray() -> Any:
    """Ray, which is optional.

    Raises:
        ConfigError: when it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before it is imported: it would report to its makers
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed; python3 run.py setup --cluster installs it") from error
    return ray


@contextmanager
def connected(ray: Any, address: str) -> Iterator[None]:
    """With a connection to the cluster, which is ended unless there was one."""
    if ray.is_initialized():
        yield
        return
    environment = {
        "py_modules": [str(LIBRARY)],  # so that all nodes compute with this very code
        "excludes": ["**/__pycache__/**"],
        "env_vars": {"OMP_WAIT_POLICY": "passive"},
    }
    try:
        ray.init(address=address, runtime_env=environment, logging_level=logging.WARNING, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"there is no Ray cluster to be reached at {address!r}: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()
