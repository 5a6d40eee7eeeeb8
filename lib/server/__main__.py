"""MONAI Label's command line, with a one-sentence error if the start fails: ``python -m lib.server start_server``."""

from __future__ import annotations

import sys

from monailabel.main import Main

from lib.server.starting import tell_failure


def main() -> int:
    """Run MONAI Label's command line; returns the exit code."""
    try:
        Main().run()
    except Exception as error:  # noqa: BLE001 - reported in a sentence, its stack trace in the log
        tell_failure(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
