"""Series that are kept as NIfTI files, within a limit."""

from __future__ import annotations

import os
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_series import SeriesIdentity, write_series

from lib.dicom.volumes import VolumeCache

SHAPE = (16, 14, 5)


class Folders:
    """Series in folders of their own; how often each was read."""

    def __init__(self, folder: Path, names: str) -> None:
        self.read: list[str] = []
        self._files = {}
        for number, name in enumerate(names):
            voxels = np.full(SHAPE, number, np.int16)
            self._files[name] = write_series(
                folder / name, voxels, np.eye(4), SeriesIdentity(f"SYNTH-{name}", "MR", name)
            )

    def stamp(self, uid: str) -> str:
        return uid

    def fetch(self, uid: str, folder: Path) -> list[Path]:
        self.read.append(uid)
        return list(self._files[uid])


@pytest.mark.parametrize(("limit_mib", "left"), [(0, "234"), (1, "1234")])
def test_what_nobody_asked_for_lately_makes_room(tmp_path: Path, limit_mib: int, left: str) -> None:
    source, folder = Folders(tmp_path / "series", "1234"), tmp_path / "volumes"
    cache = VolumeCache(source, folder, kept=lambda: ["2"], limit_mib=1)  # type: ignore[arg-type]
    for uid in "123":
        cache.get(uid)
    long_ago = time.time() - 86_400
    for uid in "123":
        os.utime(folder / f"{uid}.stamp", (long_ago, long_ago))
    cache.get("3")
    cache.limit_mib = limit_mib
    cache.get("4")
    assert sorted(path.stem for path in folder.glob("*.nii")) == list(left), "2 is kept, 3 and 4 are in use"
    assert sorted(path.stem for path in folder.glob("*.stamp")) == list(left)
    assert np.asarray(nib.load(cache.get("1")).dataobj).max() == 0
    assert source.read == list("1234") + ["1"] * ("1" not in left), "what is gone is converted again"
