"""Masks as files, read back by the programs that people use: nibabel, pynrrd, ITK."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk

from lib.errors import ParameterError
from lib.infers.writer import DTYPES, EXTENSIONS, write_mask
from tests.tiny import axis_affine, oblique_affine, tiny_preset

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
AFFINES = {
    "axes": axis_affine("RAS", (1, 2, 3), (10, 20, 30)),
    "flipped": axis_affine("LPI", (0.7, 1.3, 2.1), (-5, 7, 9)),
    "permuted": axis_affine("SRA", (0.5, 0.6, 4)),
    "oblique": oblique_affine("LIA", (0.7, 1.3, 2.1)),
}


@pytest.fixture(params=list(AFFINES))
def affine(request: pytest.FixtureRequest) -> np.ndarray:
    return AFFINES[request.param]


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.uint8)


def _write(labels: np.ndarray, affine: np.ndarray, extension: str, dtype: str = "uint8", compress: bool = True) -> Path:
    return write_mask(labels, affine, tiny_preset(), extension, dtype, compress)


@pytest.fixture(autouse=True)
def _temporary_files_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.parametrize("extension", [".nii.gz", ".nii"])
def test_nifti_mask_is_read_back_by_nibabel(labels: np.ndarray, affine: np.ndarray, extension: str) -> None:
    path = _write(labels, affine, extension)
    assert path.name.endswith(extension)
    image = nib.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj), labels)
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    np.testing.assert_allclose(image.get_qform(), affine, atol=1e-4, err_msg="ITK reads the qform")
    assert image.get_data_dtype() == np.uint8
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
    assert image.header.get_xyzt_units()[0] == "mm"


def test_nifti_mask_is_the_same_file_each_time(labels: np.ndarray) -> None:
    first, second = (_write(labels, np.eye(4), ".nii.gz") for _ in range(2))
    assert first != second
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("extension", [".nrrd", ".seg.nrrd"])
def test_nrrd_mask_is_read_back_by_pynrrd(
    labels: np.ndarray, affine: np.ndarray, extension: str, compress: bool
) -> None:
    voxels, header = nrrd.read(str(_write(labels, affine, extension, compress=compress)))
    np.testing.assert_array_equal(voxels, labels)
    assert header["space"] == "left-posterior-superior"
    assert header["encoding"] == ("gzip" if compress else "raw")
    np.testing.assert_allclose(LPS_TO_RAS @ header["space directions"].T, affine[:3, :3], atol=1e-9)
    np.testing.assert_allclose(LPS_TO_RAS @ header["space origin"], affine[:3, 3], atol=1e-9)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_mask_of_every_kind_is_on_the_same_grid_for_itk(labels: np.ndarray, affine: np.ndarray, extension: str) -> None:
    image = sitk.ReadImage(str(_write(labels, affine, extension)))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, labels)
    for index in ((0, 0, 0), (4, 0, 0), (0, 5, 0), (0, 0, 6), (4, 5, 6)):
        found = LPS_TO_RAS @ image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(found, (affine @ [*index, 1])[:3], atol=1e-4)


def test_segmentation_file_names_and_colours_its_segments(labels: np.ndarray) -> None:
    header = nrrd.read_header(str(_write(labels, np.eye(4), ".seg.nrrd")))
    assert (header["Segment0_Name"], header["Segment0_LabelValue"]) == ("Left Box", "1")
    assert (header["Segment1_Name"], header["Segment1_LabelValue"]) == ("core", "2")
    assert [round(float(part) * 255) for part in header["Segment0_Color"].split()] == [255, 128, 0]
    assert header["Segment0_Layer"] == header["Segment1_Layer"] == "0"


def test_plain_nrrd_has_no_segments(labels: np.ndarray) -> None:
    assert not [k for k in nrrd.read_header(str(_write(labels, np.eye(4), ".nrrd"))) if k.startswith("Segment")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extension", [".nii.gz", ".nrrd"])
def test_mask_has_the_type_that_was_asked_for(labels: np.ndarray, dtype: str, extension: str) -> None:
    path = _write(labels, np.eye(4), extension, dtype)
    voxels = np.asarray(nib.load(path).dataobj) if extension == ".nii.gz" else nrrd.read(str(path))[0]
    assert voxels.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(voxels, labels)


@pytest.mark.parametrize(
    ("extension", "dtype", "message"),
    [
        (".dcm", "uint8", r"'result_extension' is '.dcm'; valid: .nrrd, .seg.nrrd, .nii.gz, .nii"),
        (".nii.gz", "uint64", r"'result_dtype' is 'uint64'; valid: uint8, int8"),
    ],
)
def test_mask_of_an_unknown_kind_is_refused_and_leaves_no_file(
    labels: np.ndarray, tmp_path: Path, extension: str, dtype: str, message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        _write(labels, np.eye(4), extension, dtype)
    assert not list(tmp_path.iterdir())


def test_type_too_small_for_the_labels_is_refused(labels: np.ndarray, tmp_path: Path) -> None:
    many = tiny_preset(labels=[{"index": i, "name": f"label {i}"} for i in range(1, 201)])
    with pytest.raises(ParameterError, match="'result_dtype' is 'int8'; valid: a type that holds 200"):
        write_mask(labels, np.eye(4), many, ".nii.gz", "int8", True)
    assert not list(tmp_path.iterdir())


def test_write_that_fails_leaves_no_file(labels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: object, **__: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left"):
        _write(labels, np.eye(4), ".nii.gz")
    assert not list(tmp_path.iterdir())
