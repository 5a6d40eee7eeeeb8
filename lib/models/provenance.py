"""Provenance of a version: the labels on which it was trained, and the code that trained it."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import monai
import torch

from lib.cases.labelled import Case
from lib.storage.bounded_cache import ByStamp
from lib.storage.files import sha256_of

LIBRARY = Path(__file__).resolve().parents[1]
_DIGESTS = ByStamp(100_000)
"""SHA-256 of label files."""


def trained_on(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For each case its id, its frequency in an epoch, and the SHA-256 of its label."""
    times = Counter(case.case_id for case in cases)
    digests = label_digests(cases)
    return [{"image": name, "times": times[name], "label_sha256": digests[name]} for name in sorted(times)]


def label_digests(cases: Iterable[Case]) -> dict[str, str]:
    """SHA-256 of each case's label file, which identifies the version of a label; empty for a file that does not exist.

    Unchanged files are read only once.
    """
    digests = {}
    for case in cases:
        try:
            status = case.label.stat()
            stamp = status.st_mtime_ns, status.st_size
            digests[case.case_id] = _DIGESTS.get(case.label, stamp, functools.partial(sha256_of, case.label))
        except OSError:
            digests[case.case_id] = ""
    return digests


@functools.cache
def code_version() -> dict[str, str]:
    """A digest of this library's source code, and the versions of its main dependencies."""
    digest = hashlib.sha256()
    for path in sorted(LIBRARY.rglob("*.py")):
        digest.update(path.relative_to(LIBRARY).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {"source_sha256": digest.hexdigest(), "torch": str(torch.__version__), "monai": str(monai.__version__)}
