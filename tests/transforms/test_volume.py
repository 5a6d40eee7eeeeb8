"""Reading volumes: the numbers and the geometry of good ones, a sentence for bad ones."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk

from lib.errors import ImageError
from lib.transforms.volume import Volume, check_segmentable, read_volume
from tests.tiny import axis_affine, oblique_affine, tiny_preset, write_nifti

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)


def _write_itk(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    """Write through ITK, whose arrays are (Z, Y, X) and whose world is LPS."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((RAS_TO_LPS @ affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin((RAS_TO_LPS @ affine[:3, 3]).tolist())
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "X.NII.GZ"])
def test_nifti_is_read_with_its_voxels_and_affine(tmp_path: Path, name: str) -> None:
    voxels, affine = _noise(6, 7, 8), oblique_affine("LPS", (0.7, 1.3, 2.1))
    path = write_nifti(tmp_path / "x.nii", voxels, affine)
    target = tmp_path / "sub" / name
    target.parent.mkdir()
    target.write_bytes(gzip.compress(path.read_bytes()) if name.lower().endswith(".gz") else path.read_bytes())
    volume = read_volume(target)
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine_ras, affine, atol=1e-5)
    np.testing.assert_allclose(volume.spacing_mm, (0.7, 1.3, 2.1), rtol=1e-6)


def test_nifti_scale_and_intercept_are_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 4, 4), dtype=np.int16), np.eye(4))
    image.header.set_slope_inter(2.0, -1024.0)
    data = image.to_bytes()[:352] + np.full((4, 4, 4), 600, dtype="<i2").tobytes()
    (tmp_path / "ct.nii").write_bytes(data)
    assert np.unique(read_volume(tmp_path / "ct.nii").voxels).tolist() == [176.0]


def test_nifti_with_trailing_axes_of_one_is_3d(tmp_path: Path) -> None:
    volume = read_volume(write_nifti(tmp_path / "x.nii", _noise(5, 6, 7, 1, 1)))
    assert volume.voxels.shape == (5, 6, 7)


@pytest.mark.parametrize("suffix", [".nrrd", ".seg.nrrd"])
def test_itk_file_is_read_with_its_voxels_and_affine(tmp_path: Path, suffix: str) -> None:
    voxels, affine = _noise(6, 7, 8), oblique_affine("LIA", (0.7, 1.3, 2.1))
    volume = read_volume(_write_itk(tmp_path / f"x{suffix}", voxels, affine))
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine_ras, affine, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_nrrd_of_either_space_is_read_in_ras(tmp_path: Path, sign: int) -> None:
    """Slicer writes left-posterior-superior; other programs write right-anterior-superior."""
    space = "right-anterior-superior" if sign == 1 else "left-posterior-superior"
    directions = np.diag([sign * 1.0, sign * 2.0, 3.0])
    origin = np.array([sign * 10.0, sign * 20.0, 30.0])
    header = {"space": space, "space directions": directions, "space origin": origin}
    nrrd.write(str(tmp_path / "x.nrrd"), _noise(5, 6, 7), header)
    expected = axis_affine("RAS", (1, 2, 3), (10, 20, 30))
    np.testing.assert_allclose(read_volume(tmp_path / "x.nrrd").affine_ras, expected)


def test_dicom_folder_is_read_as_the_same_series_in_nifti(tmp_path: Path) -> None:
    voxels = np.round(_noise(12, 10, 6)).astype(np.int16)
    affine = oblique_affine("LPS", (0.8, 0.9, 2.5))
    _write_dicom(tmp_path / "series", voxels, affine)
    volume = read_volume(tmp_path / "series")
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine_ras, affine, atol=1e-3)


def test_dicom_series_with_a_missing_slice_is_refused(tmp_path: Path) -> None:
    _write_dicom(tmp_path / "series", np.round(_noise(12, 10, 6)).astype(np.int16), oblique_affine("LPS", (1, 1, 2.5)))
    (tmp_path / "series" / "003.dcm").unlink()
    with pytest.raises(
        ImageError, match=r"folder 'series' are 2\.5 to 5 mm apart.* instances \S+\.3 and \S+\.5, and instance"
    ):
        read_volume(tmp_path / "series")


def test_folder_with_two_series_is_refused(tmp_path: Path) -> None:
    voxels = np.round(_noise(12, 10, 3)).astype(np.int16)
    _write_dicom(tmp_path / "a", voxels, oblique_affine("LPS"))
    _write_dicom(tmp_path / "b", voxels, oblique_affine("LPS"), series="1.2.826.0.1.3680043.8.498.1.2")
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / "a" / f"b{path.name}")
    with pytest.raises(ImageError, match="folder 'a' holds 2 DICOM series; valid: one"):
        read_volume(tmp_path / "a")


def test_real_dicom_series_lies_where_its_reference_label_does(shared_data: Path) -> None:
    series, label = shared_data / "dicom" / "abdomen_ct", shared_data / "dicom" / "abdomen_ct_labels.nii.gz"
    if not series.is_dir() or not label.is_file():
        pytest.skip("needs dicom/abdomen_ct and its labels in the folder of real data")
    image, reference = read_volume(series), read_volume(label)
    assert sorted(image.voxels.shape) == [20, 512, 512]
    liver = reference.voxels == 5  # TotalSegmentator's number
    assert liver.any(), "the reference has a liver"
    to_image = np.linalg.inv(image.affine_ras) @ reference.affine_ras
    indices = np.rint((np.argwhere(liver) @ to_image[:3, :3].T) + to_image[:3, 3]).astype(int)
    hounsfield = image.voxels[tuple(indices.T)]
    assert 20 < np.median(hounsfield) < 160, "liver tissue where the label says liver"


def _corrupt(path: Path) -> None:
    path.write_bytes(b"this is no image at all, whatever its name says" * 20)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    whole = write_nifti(path.parent / "whole.nii.gz", _noise(20, 20, 20)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def _truncated_header(path: Path) -> None:
    path.write_bytes(gzip.compress(write_nifti(path.parent / "w.nii", _noise(9, 9, 9)).read_bytes()[:300]))


def _complex(path: Path) -> None:
    write_nifti(path, _noise(8, 8, 8).astype(np.complex64))


def _colour(path: Path) -> None:
    voxels = np.zeros((8, 8, 8), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    write_nifti(path, voxels)


def _singular(path: Path) -> None:
    image = nib.Nifti1Image(_noise(8, 8, 8), None)
    image.header["sform_code"] = 1
    image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]
    nib.save(image, path)


def _nan_affine(path: Path) -> None:
    image = nib.Nifti1Image(_noise(8, 8, 8), None)
    image.header["sform_code"] = 1
    image.header["srow_x"] = [np.nan, 0, 0, 0]
    nib.save(image, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_corrupt, "is damaged or not NIfTI"),
        (_empty, "is an empty file"),
        (_truncated, "is damaged or not NIfTI"),
        (_truncated_header, "is damaged or not NIfTI"),
        (lambda path: write_nifti(path, _noise(20, 20)), r"has shape \(20, 20\); valid: 3D"),
        (lambda path: write_nifti(path, _noise(20, 20, 1)), r"has shape \(20, 20, 1\); valid: 3D, with at least 2"),
        (lambda path: write_nifti(path, _noise(8, 8, 8, 3)), r"has shape \(8, 8, 8, 3\); valid: 3D"),
        (_colour, r"has voxels of type .*'R', .*valid: one real number each"),
        (_complex, "has voxels of type complex64; valid: one real number each"),
        (_singular, "has an affine without volume"),
        (_nan_affine, "has no usable affine|damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_nifti_is_refused_in_words(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "scan.nii.gz"
    make(path)
    with pytest.raises(ImageError, match=message) as refused:
        read_volume(path)
    assert "'scan.nii.gz'" in str(refused.value), "the file is named"
    assert str(tmp_path) not in str(refused.value), "its folder is nobody's business"


def test_missing_file_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"image 'none.nii' does not exist"):
        read_volume(tmp_path / "none.nii")


def test_unknown_suffix_is_refused_with_the_known(tmp_path: Path) -> None:
    (tmp_path / "scan.jpg").write_bytes(b"x")
    with pytest.raises(ImageError, match=r"'scan.jpg' is of an unknown kind; valid: .nii.gz, .nii, .nrrd"):
        read_volume(tmp_path / "scan.jpg")


def test_corrupt_nrrd_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "scan.nrrd").write_bytes(b"NRRD0005\nnonsense")
    with pytest.raises(ImageError, match=r"'scan.nrrd' is damaged or no image"):
        read_volume(tmp_path / "scan.nrrd")


def test_colour_nrrd_is_refused_in_words(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((6, 6, 6, 3), dtype=np.uint8), isVector=True)
    sitk.WriteImage(image, str(tmp_path / "scan.nrrd"))
    with pytest.raises(ImageError, match=r"'scan.nrrd' has shape \(6, 6, 6, 3\); valid: 3D"):
        read_volume(tmp_path / "scan.nrrd")


@pytest.mark.parametrize("content", [None, b"no dicom here"])
def test_folder_without_a_series_is_refused_in_words(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    if content:
        (folder / "readme.txt").write_bytes(content)
    with pytest.raises(ImageError, match="folder 'study' holds no DICOM series; valid: one"):
        read_volume(folder)


def _volume(voxels: np.ndarray, spacing_mm: tuple[float, float, float] = (1, 1, 1)) -> Volume:
    return Volume(voxels.astype(np.float32), axis_affine("RAS", spacing_mm))


def _with(value: float) -> np.ndarray:
    voxels = _noise(20, 20, 20)
    voxels[3, 4, 5:7] = value
    return voxels


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (_volume(_with(np.nan)), "has 2 voxels that are not finite"),
        (_volume(_with(np.inf)), "has 2 voxels that are not finite"),
        (_volume(_with(-np.inf)), "has 2 voxels that are not finite"),
        (_volume(np.full((20, 20, 20), 7)), r"is constant \(7 everywhere\)"),
        (_volume(_noise(3, 40, 40)), r"is too small: \(3, 40, 40\) voxels .* at least 4 voxels an axis"),
        (_volume(_noise(8, 8, 40)), r"is too small.*two axes of 16 voxels at the spacing of 'tiny'"),
        (_volume(_noise(40, 40, 40), (0.2, 0.2, 0.2)), "is too small"),
        (_volume(_noise(20, 20, 20), (26, 1, 1)), r"has a spacing of 26, 1, 1 mm; valid: 0.01 to 25.0 mm"),
        (_volume(_noise(20, 20, 20), (0.001, 1, 1)), r"has a spacing of 0.001, 1, 1 mm"),
        (_volume(_noise(100, 100, 100), (20, 20, 20)), "would have 8e[+]09 voxels"),
    ],
)
def test_volume_that_cannot_be_segmented_is_refused_in_words(volume: Volume, message: str) -> None:
    with pytest.raises(ImageError, match=message) as refused:
        check_segmentable(volume, tiny_preset(), "scan")
    assert "'scan'" in str(refused.value)


def test_volume_of_few_thick_slices_is_fine() -> None:
    check_segmentable(_volume(_noise(60, 60, 4), (0.5, 0.5, 6)), tiny_preset(), "scan")


def test_extent_is_counted_along_the_patients_axes() -> None:
    """40 slices of 0.2 mm are 8 mm, along whichever array axis they are stored."""
    preset = tiny_preset(spacing_mm=[0.2, 2.0, 2.0])
    check_segmentable(Volume(_noise(20, 8, 40), axis_affine("SAR", (2, 2, 0.2))), preset, "scan")
    with pytest.raises(ImageError, match="too small"):
        check_segmentable(Volume(_noise(20, 8, 40), axis_affine("RAS", (0.2, 2, 0.2))), preset, "scan")


def _write_dicom(
    folder: Path, voxels: np.ndarray, affine: np.ndarray, series: str = "1.2.826.0.1.3680043.8.498.1.1"
) -> None:
    """A DICOM series, slice by slice through ITK."""
    folder.mkdir()
    whole = sitk.ReadImage(str(_write_itk(folder.parent / "whole.mha", voxels, affine)))
    direction = np.array(whole.GetDirection()).reshape(3, 3)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    tags = {
        "0008|0060": "CT",
        "0020|000d": "1.2.826.0.1.3680043.8.498.1",
        "0020|000e": series,
        "0020|0037": "\\".join(f"{v:.9f}" for v in direction[:, :2].T.ravel()),
    }
    for k in range(whole.GetDepth()):
        image = whole[:, :, k]
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        image.SetMetaData("0008|0018", f"{series}.{k + 1}")
        image.SetMetaData("0020|0032", "\\".join(f"{v:.6f}" for v in whole.TransformIndexToPhysicalPoint((0, 0, k))))
        image.SetMetaData("0020|0013", str(k + 1))
        writer.SetFileName(str(folder / f"{voxels.shape[2] - k:03d}.dcm"))
        writer.Execute(image)
