#!/usr/bin/env python3
"""Install and start everything with one command: ``python3 run.py``.

    run.py [serve]   make .venv, install, make sample studies, start the server and say what to do next
    run.py segment   segment many images, without or beside a server
    run.py setup     make .venv and install, no more
    run.py test      install the test tools too, then run ruff, mypy and pytest
    run.py doctor    say what works on this machine and what to do about the rest

Standard library only, because it runs before anything is installed; what it does is in ``launcher``.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from launcher.command_line import interrupt, main
from launcher.project import Project

PROJECT = Project(Path(__file__).resolve().parent)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main(PROJECT))
