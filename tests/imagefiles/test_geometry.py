"""Images lie where ITK, and so 3D Slicer and OHIF, show them; SimpleITK itself is the reference."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from lib.cases.labelled import check_same_grid
from lib.datastore.validation import check_label, to_grid, write_label
from lib.errors import ImageError, LabelError
from lib.infers.writer import EXTENSIONS, write_mask
from lib.interaction.starting_mask import read_values
from lib.transforms.volume import check_segmentable, read_grid, read_volume, reading_warning
from tests.itk import affine_ras
from tests.tiny import oblique_affine, tiny_preset, write_nifti

SHAPE = (5, 6, 7)
QFORM = oblique_affine("LPS", (0.7, 1.3, 2.1))
SFORM = oblique_affine("RIA", (0.7, 1.3, 2.1))
SFORM[:3, 3] += [7.0, -5, 3]
SHEARED = QFORM.copy()
SHEARED[:3, 1] += 0.3 * SHEARED[:3, 0]


def make(
    path: Path,
    qform_code: int,
    sform_code: int,
    sform: np.ndarray = SFORM,
    pixdim: tuple[float, ...] = (),
    qfac: float | None = None,
    units: int = 2,
    fields: dict[str, float] | None = None,
    nifti: type[nib.Nifti1Header] = nib.Nifti1Header,
) -> Path:
    header = nifti()
    header.set_data_shape(SHAPE)
    header.set_data_dtype(np.uint8)
    header.set_qform(QFORM, 1)
    header.set_sform(sform, 1)
    header["qform_code"], header["sform_code"], header["xyzt_units"] = qform_code, sform_code, units
    header["vox_offset"] = header.single_vox_offset
    if pixdim:
        header["pixdim"][1:4] = pixdim
    if qfac is not None:
        header["pixdim"][0] = qfac
    for name, value in (fields or {}).items():
        header[name] = value
    path.write_bytes(header.binaryblock + b"\0" * 4 + bytes(np.prod(SHAPE)))
    return path


def itk_affine_ras(path: Path) -> np.ndarray:
    return affine_ras(sitk.ReadImage(str(path)))


CODES = [(q, s) for q in range(5) for s in range(5)]
CASES = {
    **{f"codes {q} {s}": {"qform_code": q, "sform_code": s} for q, s in CODES},
    **{f"pixdim 2, {q} {s}": {"qform_code": q, "sform_code": s, "pixdim": (2, 2, 2)} for q, s in CODES[:12]},
    **{f"negative, {q} {s}": {"qform_code": q, "sform_code": s, "pixdim": (-0.7, 1.3, 2.1)} for q, s in CODES[:12]},
    **{f"zero, {q} {s}": {"qform_code": q, "sform_code": s, "pixdim": (0, 1.3, 2.1)} for q, s in CODES[:4]},
    **{f"qfac {f}": {"qform_code": 1, "sform_code": 0, "qfac": f} for f in (-3, -1, 0, 1, 2)},
    **{f"units {u}": {"qform_code": 1, "sform_code": 1, "units": u} for u in range(8)},
    **{f"units {u} without codes": {"qform_code": 0, "sform_code": 0, "units": u} for u in range(4)},
    "sheared sform beside a qform": {"qform_code": 1, "sform_code": 1, "sform": SHEARED},
    "pixdim of no number": {"qform_code": 1, "sform_code": 2, "pixdim": (np.nan, np.inf, 2.1)},
    "quaternion of no number": {"qform_code": 1, "sform_code": 2, "fields": {"quatern_b": np.nan}},
    "quaternion too long": {"qform_code": 1, "sform_code": 2, "fields": {"quatern_b": 0.9, "quatern_c": 0.9}},
    "offset of no number": {"qform_code": 1, "sform_code": 2, "fields": {"qoffset_x": np.nan}},
    "sheared sform of code 2": {"qform_code": 1, "sform_code": 2, "sform": SHEARED},
}


@pytest.mark.parametrize("case", list(CASES))
def test_nifti_lies_where_itk_puts_it(tmp_path: Path, case: str) -> None:
    path = make(tmp_path / "x.nii", **CASES[case])
    expected = itk_affine_ras(path)
    np.testing.assert_allclose(read_grid(path).affine_ras, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("codes", CODES)
def test_both_versions_of_nifti_are_read_alike(tmp_path: Path, codes: tuple[int, int]) -> None:
    first = read_grid(make(tmp_path / "1.nii", *codes))
    second = read_grid(make(tmp_path / "2.nii", *codes, nifti=nib.Nifti2Header))
    np.testing.assert_allclose(second.affine_ras, first.affine_ras, rtol=1e-5, atol=1e-5)


def test_sheared_sform_alone_is_read_though_itk_does_not(tmp_path: Path) -> None:
    path = make(tmp_path / "x.nii", 0, 2, SHEARED)
    np.testing.assert_allclose(read_grid(path).affine_ras, SHEARED, atol=1e-5)


@pytest.mark.parametrize(("affine", "qform_code"), [(SHEARED, 0), (QFORM, 1)], ids=["sheared", "at right angles"])
def test_written_mask_has_a_qform_only_where_its_axes_are_at_right_angles(
    tmp_path: Path, affine: np.ndarray, qform_code: int
) -> None:
    mask = np.zeros(SHAPE, np.uint8)
    answered = write_mask(mask, affine, tiny_preset(), ".nii.gz", "uint8", compress=True)
    try:
        for path in (answered, write_label(mask, affine, tmp_path / "label.nii.gz")):
            header = nib.load(path).header
            assert (int(header["qform_code"]), int(header["sform_code"])) == (qform_code, 1)
            np.testing.assert_allclose(read_grid(path).affine_ras, affine, atol=1e-4)
    finally:
        answered.unlink()


@pytest.mark.parametrize("units", [(1, 1000.0), (3, 0.001)])
def test_units_of_length_count(tmp_path: Path, units: tuple[int, float]) -> None:
    path = make(tmp_path / "x.nii", 1, 1, QFORM, units=units[0])
    np.testing.assert_allclose(read_volume(path).spacing_mm, np.array([0.7, 1.3, 2.1]) * units[1], rtol=1e-5)


def test_voxels_of_10_micrometres_are_within_the_bounds_of_the_spacing(tmp_path: Path) -> None:
    volume = read_volume(make(tmp_path / "x.nii", 1, 1, QFORM, pixdim=(10, 10, 10), units=3))
    np.testing.assert_allclose(volume.spacing_mm, 0.01, rtol=1e-5)
    with pytest.raises(ImageError, match="too small"):
        check_segmentable(volume, tiny_preset(), "x")


def test_label_on_either_grid_lands_on_the_images(tmp_path: Path) -> None:
    image = read_grid(make(tmp_path / "x.nii", 1, 2))
    assert "nibabel" in reading_warning(image)
    assert image.other_affine_ras is not None
    mask = np.zeros(SHAPE, np.uint8)
    mask[1, 2, 3] = 1
    by_itk = read_volume(write_nifti(tmp_path / "itk.nii.gz", mask, image.affine_ras))
    by_nibabel = read_volume(write_nifti(tmp_path / "nibabel.nii.gz", mask, nib.load(tmp_path / "x.nii").affine))
    assert to_grid(by_itk, image)[1] == ""
    placed, note = to_grid(by_nibabel, image)
    assert "nibabel" in note
    np.testing.assert_array_equal(placed.voxels, mask)
    np.testing.assert_array_equal(placed.affine_ras, image.affine_ras)
    elsewhere = QFORM.copy()
    elsewhere[:3, 3] += 20
    with pytest.raises(LabelError, match="mm away from its image"):
        to_grid(read_volume(write_nifti(tmp_path / "off.nii.gz", mask, elsewhere)), image)


def test_image_on_which_all_agree_has_one_grid(tmp_path: Path) -> None:
    image = read_grid(make(tmp_path / "x.nii", 1, 1, QFORM))
    assert image.other_affine_ras is None
    assert reading_warning(image) == ""


def test_label_with_its_images_own_header_is_kept_as_it_came(tmp_path: Path) -> None:
    image = make(tmp_path / "x.nii", 0, 0)
    label = tmp_path / "label.nii.gz"
    label.write_bytes(gzip.compress(image.read_bytes()))
    checked = check_label(label, read_grid(image), tiny_preset(), {}, tmp_path)
    assert checked.file == label
    assert [note for note in checked.notes if "nibabel" in note] == [reading_warning(read_grid(image))]


def test_label_that_nibabel_made_is_kept_where_itk_has_the_image(tmp_path: Path) -> None:
    path = make(tmp_path / "x.nii", 1, 2)
    mask = np.zeros(SHAPE, np.uint8)
    mask[1, 2, 3] = 1
    label = write_nifti(tmp_path / "label.nii.gz", mask, nib.load(path).affine)
    checked = check_label(label, read_grid(path), tiny_preset(), {}, tmp_path)
    np.testing.assert_array_equal(checked.voxels, mask)
    np.testing.assert_allclose(itk_affine_ras(checked.file), itk_affine_ras(path), atol=1e-4)
    assert any("as nibabel reads its image" in note for note in checked.notes)


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize(
    "header",
    [
        {"qform_code": 1, "sform_code": 2},
        {"qform_code": 0, "sform_code": 0},
        {"qform_code": 1, "sform_code": 1, "pixdim": (-0.7, 1.3, 2.1)},
        {"qform_code": 0, "sform_code": 2, "pixdim": (2, 2, 2)},
        {"qform_code": 1, "sform_code": 1, "units": 3},
    ],
)
def test_mask_lies_over_its_image_in_itk(tmp_path: Path, header: dict, extension: str) -> None:
    path = make(tmp_path / "x.nii", **header)
    mask = write_mask(
        np.zeros(SHAPE, np.uint8), read_volume(path).affine_ras, tiny_preset(), extension, "uint8", compress=True
    )
    try:
        np.testing.assert_allclose(itk_affine_ras(mask), itk_affine_ras(path), rtol=1e-5, atol=1e-4)
    finally:
        mask.unlink()


def test_training_and_corrections_take_a_label_on_either_grid(tmp_path: Path) -> None:
    path = make(tmp_path / "x.nii", 1, 2)
    mask = np.zeros(SHAPE, np.uint8)
    mask[1, 2, 3] = 1
    for affine in (itk_affine_ras(path), nib.load(path).affine):
        label = write_nifti(tmp_path / "label.nii.gz", mask, affine)
        check_same_grid(read_volume(label), read_volume(path), "x")
        np.testing.assert_array_equal(read_values(label, read_grid(path), "label"), mask)
