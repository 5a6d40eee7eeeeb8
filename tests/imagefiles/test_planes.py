"""Voxels plane by plane are those of the whole file, and damage is found."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest

from lib.errors import ImageError
from lib.imagefiles.payload import BLOCK_BYTES
from lib.imagefiles.reading import read_planes, read_voxels


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd"])
def test_planes_are_those_of_the_whole_file(tmp_path: Path, name: str) -> None:
    voxels = np.random.default_rng(0).integers(-1000, 1000, (7, 5, 9), dtype=np.int16)
    if name.endswith(".nrrd"):
        nrrd.write(str(tmp_path / name), voxels)
    else:
        image = nib.Nifti1Image(voxels, np.eye(4))
        image.header.set_slope_inter(0.5, -3)
        nib.save(image, tmp_path / name)
    whole = np.asarray(read_voxels(tmp_path / name)[1], dtype=np.float32)
    np.testing.assert_array_equal(np.stack(list(read_planes(tmp_path / name)), axis=2), whole)


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii"])
@pytest.mark.parametrize("layers", ["none", "first", "last"])
def test_planes_of_a_nrrd_file_are_those_of_the_whole_however_it_is_stored(
    tmp_path: Path, encoding: str, layers: str
) -> None:
    shape = {"none": (7, 5, 9), "first": (2, 7, 5, 9), "last": (7, 5, 9, 2)}[layers]
    voxels = np.random.default_rng(0).integers(-1000, 1000, shape, dtype=np.int16)
    kinds = ["domain"] * 3
    if layers != "none":
        kinds.insert(0 if layers == "first" else 3, "list")
    nrrd.write(str(tmp_path / "a.nrrd"), voxels, {"kinds": kinds, "encoding": encoding})
    whole = np.asarray(read_voxels(tmp_path / "a.nrrd")[1], dtype=np.float32)
    planes = np.stack(list(read_planes(tmp_path / "a.nrrd")), axis=2)
    np.testing.assert_array_equal(planes, whole.reshape(7, 5, -1, order="F"))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_planes_of_a_file_that_was_cut_off_are_refused(tmp_path: Path, name: str) -> None:
    voxels = np.random.default_rng(0).integers(-1000, 1000, (7, 5, 9), dtype=np.int16)
    if name == "a.nrrd":
        nrrd.write(str(tmp_path / name), voxels)
    else:
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / name)
    (tmp_path / f"cut-{name}").write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(ImageError, match="damaged"):
        list(read_planes(tmp_path / f"cut-{name}"))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
@pytest.mark.parametrize("slope", [1.0, 0.25])
def test_whole_file_is_read_without_a_second_copy_of_its_voxels(tmp_path: Path, name: str, slope: float) -> None:
    stored = np.random.default_rng(0).integers(-1000, 1000, (160, 160, 401), dtype=np.int16)
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(slope, -3)
    nib.save(image, tmp_path / name)
    assert stored.nbytes > 16 * BLOCK_BYTES and stored.nbytes % BLOCK_BYTES, "many blocks, the last of them smaller"
    tracemalloc.start()
    try:
        voxels = read_voxels(tmp_path / name)[1]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(voxels, stored.astype(np.float32) * np.float32(slope) - 3)
    assert peak < voxels.nbytes + stored.nbytes / 2, "as stored, the voxels would take half as much again"
