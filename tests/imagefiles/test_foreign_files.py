"""No file leads to another one, and the content decides what a file is."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk

from lib.datastore.label_files.label_file import read_label
from lib.errors import FileKindError, ImageError, LabelError
from lib.imagefiles.kinds import HEAD_BYTES, name_foreign
from lib.transforms.volume import read_grid, read_volume
from tests.itk import affine_ras

SECRET = bytes(range(256)) * 4
FIELDS = "type: uchar\ndimension: 3\nsizes: 8 8 8\nencoding: raw\n"
PLACES = {
    "plain": "NRRD0004\n{fields}data file: {path}\n\n",
    "after a comment that says LOCAL": "NRRD0004\n# ElementDataFile = LOCAL\n{fields}data file: {path}\n\n",
    "without a blank": "NRRD0004\n{fields}datafile: {path}\n\n",
    "blanks around": "NRRD0004\n{fields} data file : {path}\n\n",
    "capitals": "NRRD0004\n{fields}Data File: {path}\n\n",
    "as a key": "NRRD0004\n{fields}data file:={path}\n\n",
    "CR and LF": "NRRD0004\r\n{fields}data file: {path}\r\n\r\n",
    "CR alone": "NRRD0004\n{fields}content: x\rdata file: {path}\n\n",
    "a list": "NRRD0004\n{fields}data file: LIST\n{path}\n\n",
    "a pattern": "NRRD0004\n{fields}data file: {path}%d 1 1 1\n\n",
    "no empty line": "NRRD0004\n{fields}data file: {path}\n",
    "twice": "NRRD0004\n{fields}data file: x\ndata file: {path}\n\n",
    "a bare header": "NRRD0004\n{fields}",
}
META = "NDims = 3\nDimSize = 8 8 8\nElementType = MET_UCHAR\n"
META_PLACES = {
    "plain": META + "ElementDataFile = {path}\n",
    "a blank first line": "\n" + META + "ElementDataFile = {path}\n",
    "CR": META.replace("\n", "\r") + "ElementDataFile = {path}\r",
    "a comment that says LOCAL": "Comment = ElementDataFile = LOCAL\n" + META + "ElementDataFile = {path}\n",
    "a list": META + "ElementDataFile = LIST\n{path}\n",
    "its own voxels": META + "ElementDataFile = LOCAL\n",
}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "secret.raw"
    path.parent.mkdir()
    path.write_bytes(SECRET[:512])
    return path


@pytest.mark.parametrize("place", list(PLACES))
def test_nrrd_that_names_another_file_is_refused(tmp_path: Path, secret: Path, place: str) -> None:
    path = tmp_path / "scan.nrrd"
    path.write_bytes(PLACES[place].format(fields=FIELDS, path=secret).encode() + SECRET[:100])
    for read in (read_grid, read_volume):
        with pytest.raises(ImageError, match=r"another file|damaged"):
            read(path)
    with pytest.raises(LabelError, match="the label cannot be read"):
        read_label(path)


def test_comments_and_keys_about_files_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "scan.nrrd"
    path.write_bytes(
        f"NRRD0004\n# data file: /etc/passwd\n{FIELDS}source:=data file: /etc/passwd\n\n".encode() + SECRET[:512]
    )
    assert read_volume(path).voxels[:4, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["scan.mha", "scan.nrrd", "scan.nii.gz", "scan"])
@pytest.mark.parametrize("place", list(META_PLACES))
def test_meta_image_is_off_whatever_its_name(tmp_path: Path, secret: Path, place: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(META_PLACES[place].format(path=secret).encode() + SECRET)
    with pytest.raises(FileKindError, match="MetaImage"):
        read_volume(path)
    with pytest.raises(FileKindError, match="MetaImage"):
        read_label(path)


@pytest.mark.parametrize("kind", ["tiff", "mrc", "png", "jpg", "bmp", "vtk", "mha", "gipl"])
def test_format_that_itk_knows_is_refused_under_another_name(tmp_path: Path, kind: str) -> None:
    image = sitk.GetImageFromArray(np.arange(8 * 9 * 10, dtype=np.uint8).reshape(8, 9, 10))
    if kind in ("png", "jpg", "bmp"):
        image = image[:, :, 0]
    sitk.WriteImage(image, str(tmp_path / f"x.{kind}"))
    path = Path(shutil.copy(tmp_path / f"x.{kind}", tmp_path / "x.nrrd"))
    with pytest.raises(FileKindError, match=r"is of another kind \(.*\); valid: NIfTI, NRRD, DICOM"):
        read_volume(path)


@pytest.mark.parametrize("name", ["scan.nrrd", "scan.nii", "scan.nii.gz", "scan.img"])
@pytest.mark.parametrize("packed", [False, True])
def test_content_decides_and_not_the_name(tmp_path: Path, name: str, packed: bool) -> None:
    voxels = np.arange(8 * 9 * 10, dtype=np.int16).reshape(8, 9, 10)
    content = nib.Nifti1Image(voxels, np.diag([1.0, 2, 3, 1])).to_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    volume = read_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_array_equal(volume.affine_ras, np.diag([1.0, 2, 3, 1]))


def test_nifti_header_of_a_pair_is_refused(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(np.zeros((8, 8, 8), np.uint8), np.eye(4)), tmp_path / "x.img")
    path = Path(shutil.copy(tmp_path / "x.hdr", tmp_path / "x.nii"))
    with pytest.raises(FileKindError, match="NIfTI without its voxels"):
        read_volume(path)


ENCODINGS = ["raw", "gzip", "bzip2", "ascii"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", ["uint8", "<i2", ">i2", "<f4", "<f8", "<u4"])
def test_nrrd_is_read_as_itk_reads_it(tmp_path: Path, encoding: str, dtype: str) -> None:
    voxels = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(dtype)
    path = tmp_path / "x.nrrd"
    nrrd.write(str(path), voxels, {"encoding": encoding, "spacings": [1.0, 2.0, 3.0]})
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, voxels)
    if encoding != "bzip2":
        image = sitk.ReadImage(str(path))
        np.testing.assert_array_equal(volume.voxels, sitk.GetArrayFromImage(image).T)
    np.testing.assert_allclose(volume.spacing_mm, (1, 2, 3))


GEOMETRY = {
    "LPS": "space: left-posterior-superior\nspace directions: (0,2,0) (1,0,0) (0,0,3)\nspace origin: (4,5,6)\n",
    "RAS": "space: right-anterior-superior\nspace directions: (0,2,0) (1,0,0) (0,0,3)\nspace origin: (4,5,6)\n",
    "LAS": "space: left-anterior-superior\nspace directions: (1,0,0) (0,2,0) (0,0,-3)\nspace origin: (4,5,6)\n",
    "LAS short": "space: LAS\nspace directions: (1,0,0) (0,2,0) (0,0,-3)\nspace origin: (4,5,6)\n",
    "scanner": "space: scanner-xyz\nspace directions: (1,0,0) (0,2,0) (0,0,3)\nspace origin: (4,5,6)\n",
    "no origin": "space: left-posterior-superior\nspace directions: (1,0,0) (0,2,0) (0,0,3)\n",
    "unnamed space": "space dimension: 3\nspace directions: (1,0,0) (0,2,0) (0,0,3)\nspace origin: (4,5,6)\n",
    "spacings": "spacings: 1 2 3\n",
    "spacing and mins": "spacings: 1 2 3\naxis mins: 4 5 6\n",
    "mins of nodes": "spacings: 1 2 3\naxis mins: 4 5 6\ncenterings: node node node\n",
    "nothing": "",
}


@pytest.mark.parametrize("place", list(GEOMETRY))
def test_nrrd_lies_where_itk_puts_it(tmp_path: Path, place: str) -> None:
    path = tmp_path / "x.nrrd"
    path.write_bytes(f"NRRD0005\n{FIELDS}{GEOMETRY[place]}\n".encode() + SECRET[:512])
    np.testing.assert_allclose(read_volume(path).affine_ras, affine_ras(sitk.ReadImage(str(path))), atol=1e-6)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("blanks", [b"\n", b"\r", b" \n", b" "])
def test_file_of_blanks_is_named_at_once(blanks: bytes) -> None:
    """From each line all that follow were looked at: a minute for 64 KiB, in which nobody else was answered."""
    content = blanks * (HEAD_BYTES // len(blanks))
    assert name_foreign(content) is None
    assert name_foreign(content[:-20] + b"\n\tNDims\t= 3\n") == "MetaImage"
