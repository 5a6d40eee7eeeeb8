"""Processes that save labels and skip cases until they are killed: ``python saver.py FOLDER``.

For each line of standard input, a JSON list of files, it forks one process a file, prints their numbers, waits for
their ends, and prints their exit codes. A fork has everything imported, so that a kill costs no start of Python.

A process writes one line into its file for each thing that was acknowledged: of a save the version's id, the image and
the SHA-256 of what was sent; of a skip the case.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from pathlib import Path

from lib.datastore.history import LabelHistory
from lib.datastore.leases import Leases
from lib.datastore.records import Submission

IMAGES = 6
LARGEST = 20_000
SAVES_A_SKIP = 5


def save_until_killed(folder: Path, name: str, told: Path) -> None:
    """Save labels of random sizes for a few images.

    Args:
        folder: of the store.
        name: of this process.
        told: where its lines go.
    """
    random_source = random.Random(os.getpid())
    with told.open("ab", buffering=0) as lines:
        history = LabelHistory(folder / "history", folder / "labels")
        leases = Leases(folder / "history" / "leases.sqlite")
        sent = folder / f"sent-{name}.nii.gz"
        lines.write(b"ready\n")
        count = 0
        while True:
            content = random_source.randbytes(random_source.randint(1, LARGEST))
            sent.write_bytes(content)
            image = f"case_{random_source.randrange(IMAGES)}"
            version = history.append(sent, Submission(image_id=image, user=name))
            lines.write(f"saved {version.version_id} {image} {hashlib.sha256(content).hexdigest()}\n".encode())
            count += 1
            if count % SAVES_A_SKIP == 0:
                case = f"skipped-{os.getpid()}-{count}"
                leases.skip(case, name, "blurred")
                lines.write(f"skipped {case}\n".encode())


def main(folder: Path) -> None:
    """Fork savers for each line that comes."""
    for line in sys.stdin:
        numbers = [fork_saver(folder, Path(told)) for told in json.loads(line)]
        print(json.dumps(numbers), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers]), flush=True)


def fork_saver(folder: Path, told: Path) -> int:
    """Start a saver; returns its process's number."""
    number = os.fork()
    if number:
        return number
    try:
        save_until_killed(folder, told.name, told)
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
