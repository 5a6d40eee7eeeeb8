"""A process that saves labels until it is killed: ``python saver.py FOLDER NAME``.

It prints one line for each save that was acknowledged: the version's id and the SHA-256 of what was sent.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from pathlib import Path

from lib.datastore.history import LabelHistory
from lib.datastore.records import Submission

IMAGES = 6
LARGEST = 20_000


def main(folder: Path, name: str) -> None:
    """Save labels of random sizes for a few images."""
    random_source = random.Random(os.getpid())
    history = LabelHistory(folder / "history", folder / "labels")
    for sentence in history.repairs:
        print(f"repaired {sentence}", flush=True)
    sent = folder / f"sent-{name}.nii.gz"
    print("ready", flush=True)
    while True:
        content = random_source.randbytes(random_source.randint(1, LARGEST))
        sent.write_bytes(content)
        image = f"case_{random_source.randrange(IMAGES)}"
        version = history.append(sent, Submission(image_id=image, user=name))
        print(f"saved {version.version_id} {image} {hashlib.sha256(content).hexdigest()}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
