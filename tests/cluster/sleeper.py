"""A worker for the nodes of a cluster, whose processes import this module and little else."""

from __future__ import annotations

import os
import time
from typing import Any

from lib.errors import ImageError


class Sleeper:
    """Sleeps as long as an item says, and does worse for some."""

    def __init__(self, version: str = "v0001") -> None:
        self._version = version

    def read(self, item: Any) -> Any:
        if item == "unreadable":
            raise ImageError("it cannot be read")
        return item

    def compute(self, ready: Any) -> str:
        if ready == "deadly":
            os._exit(1)
        if isinstance(ready, float):
            time.sleep(ready)
        return self._version
