"""Digests of labels: right after every change, and none is kept of what a label was before."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from pathlib import Path

from lib.cases.labelled import Case
from lib.models.provenance import label_digests

VERSIONS = 2_000
KIB = 2**10


def test_digests_follow_labels_and_nothing_is_kept_of_earlier_versions(tmp_path: Path) -> None:
    def digest_of(content: bytes) -> str:
        label = tmp_path / "case.nii.gz"
        label.write_bytes(content)
        os.utime(label, ns=(0, int(content)))
        # a path of its own, as each look at the studies makes
        return label_digests([Case("case", tmp_path / "image.nii.gz", Path(str(label)))])["case"]

    digest_of(b"0")
    tracemalloc.start()
    try:
        for number in range(1, VERSIONS):
            content = b"%d" % number
            assert digest_of(content) == hashlib.sha256(content).hexdigest()
        assert tracemalloc.get_traced_memory()[0] < 100 * KIB
    finally:
        tracemalloc.stop()
    assert label_digests([Case("gone", tmp_path / "image.nii.gz", tmp_path / "gone.nii.gz")]) == {"gone": ""}
