"""A cache of series converted to NIfTI on demand, valid until the series changes or space is needed."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from lib.dicom.series import Series, read_series
from lib.dicom.sources import SeriesSource
from lib.storage.disk import MIB, make_room
from lib.storage.files import replacing

DEFAULT_LIMIT_MIB = 20_480
SECONDS_IN_USE = 600.0
"""A volume that was requested within this time may still be about to be read."""


class VolumeCache:
    """The folder of converted series.

    Args:
        source: source of the series.
        folder: folder of the files, ``<Series Instance UID>.nii``.
        kept: series that are never evicted, since a training may read them.
        limit_mib: size limit; beyond it, the least recently requested volumes are removed.
    """

    def __init__(
        self,
        source: SeriesSource,
        folder: Path,
        kept: Callable[[], Collection[str]] = tuple,
        limit_mib: int = DEFAULT_LIMIT_MIB,
    ) -> None:
        self.limit_mib = limit_mib
        self._source = source
        self.folder = folder
        self._kept = kept
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def file(self, uid: str) -> Path:
        """Path of a series' volume, whether it exists or not."""
        return self.folder / f"{uid}.nii"

    def get(self, uid: str) -> Path:
        """The volume of a series, converted if necessary; ``notes`` states what was left out of it.

        Raises:
            NotFoundError, UpstreamError: if the series is unavailable.
            ImageError: if it is not a volume.
        """
        with self._locks[uid]:
            stamp = self._source.stamp(uid)
            stamped, file = self.folder / f"{uid}.stamp", self.file(uid)
            if not file.is_file() or not stamped.is_file() or stamped.read_text().split("\n")[0] != stamp:
                self.folder.mkdir(parents=True, exist_ok=True)
                stamped.unlink(missing_ok=True)
                with tempfile.TemporaryDirectory(dir=self.folder, prefix=".fetch-") as fetched:
                    series = read_series(self._source.fetch(uid, Path(fetched)), f"series {uid}", uid)
                    write_volume(series, file)
                stamped.write_text("\n".join([stamp, *series.notes]))
                self._make_room()
            else:
                os.utime(stamped)
            return file

    def _make_room(self) -> None:
        """Remove volumes beyond the limit, except those that are protected or were requested recently."""
        kept, lately = set(self._kept()), time.time() - SECONDS_IN_USE
        used = {path: path.stat().st_mtime for path in self.folder.glob("*.stamp") if path.stem not in kept}
        now = lately + SECONDS_IN_USE  # a later time was written before the clock was set back
        old = [path for path in sorted(used, key=used.__getitem__) if not lately <= used[path] <= now + 1]
        leaving = {path.stem for path in old}
        staying = sum(file.stat().st_size for file in self.folder.glob("*.nii") if file.stem not in leaving)
        make_room([(path, self.file(path.stem)) for path in old], self.limit_mib * MIB - staying)

    def notes(self, uid: str) -> list[str]:
        """What was left out of a converted series, one sentence each."""
        stamped = self.folder / f"{uid}.stamp"
        return stamped.read_text().split("\n")[1:] if stamped.is_file() else []

    def read_series(self, uid: str, folder: Path) -> Series:
        """A series with its headers.

        Args:
            uid: UID of the series.
            folder: folder for downloaded files; the series can no longer be read after they are removed.

        Raises:
            NotFoundError, UpstreamError, ImageError: see ``get``.
        """
        return read_series(self._source.fetch(uid, folder), f"series {uid}", uid)


def write_volume(series: Series, file: Path) -> None:
    """Write a series as NIfTI atomically; as 16-bit integers if these represent every value exactly.

    Raises:
        ImageError: if an instance cannot be decoded.
    """
    image = nib.Nifti1Image(_smallest(series.read_voxels()), series.affine_ras)
    image.header.set_xyzt_units("mm")
    image.set_sform(series.affine_ras, code="scanner")
    with replacing(file) as out:
        out.write(image.to_bytes())


def _smallest(voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
    short = np.iinfo(np.int16)
    if short.min <= voxels.min() and voxels.max() <= short.max and np.array_equal(voxels, np.rint(voxels)):
        return voxels.astype(np.int16)
    return voxels
