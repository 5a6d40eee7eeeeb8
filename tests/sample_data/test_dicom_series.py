"""DICOM series: read back with ITK and with pydicom, they are the volume, where it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk
from dicom_series import SeriesIdentity, is_complete_series, slice_volume, stored_values, write_series
from pydicom import dcmread
from synthetic_hippocampus import draw_case
from torso_phantom import grid_affine

from tests.itk import affine_ras

Array = npt.NDArray[np.generic]
SHAPE = (9, 12, 7)
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
MR = SeriesIdentity("SYNTH-0001", "MR", "T1")
CT = SeriesIdentity("SYNTH-0002", "CT", "torso", body_part="ABDOMEN")
AFFINES = {
    "upright": grid_affine(SHAPE, (1.0, 1.0, 1.0), "RAS", center_ras_mm=(-27, -23, -14)),
    "radiological": grid_affine(SHAPE, (0.8, 0.7, 2.5), "LPS"),
    "shuffled": grid_affine(SHAPE, (0.8, 0.7, 2.5), "SAL"),
    "oblique": grid_affine(SHAPE, (0.9, 1.1, 2.0), "RAS", (17, -9, 23), (3.5, -60.25, 110.125)),
}


def volume_of(modality: str) -> Array:
    random = np.random.default_rng(3)
    if modality == "CT":
        return random.integers(-1024, 3072, SHAPE).astype(np.int16)
    return random.integers(0, 4096, SHAPE).astype(np.uint16)


def read_with_itk(files: list[Path]) -> tuple[Array, npt.NDArray[np.float64]]:
    """Voxels (X, Y, Z) and their affine to RAS; ITK sorts the slices by itself."""
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(files[0].parent))
    image = sitk.ReadImage(names)
    return sitk.GetArrayFromImage(image).T, affine_ras(image)


def read_with_pydicom(files: list[Path]) -> tuple[Array, npt.NDArray[np.float64]]:
    """As the standard says it (PS3.3 C.7.6.2.1.1), with slices in the files' order."""
    slices = [dcmread(path) for path in files]
    first, last = slices[0], slices[-1]
    orientation = np.array(first.ImageOrientationPatient, dtype=float)
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * first.PixelSpacing[1]
    affine[:3, 1] = orientation[3:] * first.PixelSpacing[0]
    step = np.subtract(last.ImagePositionPatient, first.ImagePositionPatient) / (len(slices) - 1)
    affine[:3, 2] = step.astype(float)
    affine[:3, 3] = first.ImagePositionPatient
    voxels = np.stack([part.pixel_array.T for part in slices], axis=-1).astype(np.int32)
    rescaled = voxels * int(first.get("RescaleSlope", 1)) + int(first.get("RescaleIntercept", 0))
    return rescaled, RAS_TO_LPS @ affine


def assert_same_in_space(voxels: Array, affine: Array, expected: Array, expected_affine: Array) -> None:
    """Each voxel has its value at its place, whatever the order of the axes."""
    indices = np.argwhere(np.ones(expected.shape, dtype=bool))
    millimetres = indices @ expected_affine[:3, :3].T + expected_affine[:3, 3]
    found = (millimetres - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    nearest = np.rint(found).astype(int)
    assert np.abs((found - nearest) @ affine[:3, :3].T).max() < 1e-4
    np.testing.assert_array_equal(voxels[tuple(nearest.T)], expected[tuple(indices.T)])
    assert voxels.size == expected.size


@pytest.mark.parametrize("plane", ["axial", "sagittal", "coronal"])
@pytest.mark.parametrize("grid", AFFINES)
@pytest.mark.parametrize("identity", [MR, CT], ids=["MR", "CT"])
def test_series_read_back_is_the_volume_where_it_was(
    identity: SeriesIdentity, grid: str, plane: str, tmp_path: Path
) -> None:
    volume = volume_of(identity.modality)
    files = write_series(tmp_path / "series", volume, AFFINES[grid], identity, plane)
    assert_same_in_space(*read_with_itk(files), volume, AFFINES[grid])
    assert_same_in_space(*read_with_pydicom(files), volume, AFFINES[grid])


@pytest.mark.parametrize(("plane", "normal"), [("axial", 2), ("sagittal", 0), ("coronal", 1)])
def test_slices_lie_in_their_plane_and_follow_the_normal(plane: str, normal: int, tmp_path: Path) -> None:
    files = write_series(tmp_path / "series", volume_of("MR"), AFFINES["radiological"], MR, plane)
    slices = [dcmread(path) for path in files]
    row, column = np.reshape(slices[0].ImageOrientationPatient, (2, 3)).astype(float)
    crossed = np.cross(row, column)
    assert np.abs(crossed).argmax() == normal
    heights = [np.dot(crossed, part.ImagePositionPatient) for part in slices]
    spacing = float(slices[0].SpacingBetweenSlices)
    np.testing.assert_allclose(np.diff(heights), spacing, atol=1e-9)
    assert spacing == pytest.approx((0.8, 0.7, 2.5)[normal])
    # Rows of pixels run to the patient's left or back, columns to the back or feet, as radiologists look at them
    assert row.argmax() == np.abs(row).argmax()
    assert (column[1] if plane == "axial" else -column[2]) > 0.99


def test_attributes_are_those_of_nobody(tmp_path: Path) -> None:
    files = write_series(tmp_path / "series", volume_of("CT"), AFFINES["radiological"], CT)
    slices = [dcmread(path) for path in files]
    first = slices[0]
    assert [path.name for path in files] == [f"{number:04d}.dcm" for number in range(1, 8)]
    assert first.PatientID == "SYNTH-0002" and str(first.PatientName).startswith("SYNTH-0002")
    assert "does not exist" in first.PatientComments and first.StudyDate == "20000101"
    assert (first.Modality, first.SOPClassUID.name) == ("CT", "CT Image Storage")
    assert (first.RescaleIntercept, first.RescaleSlope, first.RescaleType) == (-1024, 1, "HU")
    assert len({part.SOPInstanceUID for part in slices}) == 7
    assert len({(part.StudyInstanceUID, part.SeriesInstanceUID, part.FrameOfReferenceUID) for part in slices}) == 1
    assert all(part.SOPInstanceUID.is_valid for part in slices)


def test_same_series_is_written_byte_for_byte_again(tmp_path: Path) -> None:
    first, again = (write_series(tmp_path / name, volume_of("MR"), AFFINES["oblique"], MR) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_uids_follow_patient_seed_and_content(tmp_path: Path) -> None:
    def uids(name: str, volume: Array, identity: SeriesIdentity, plane: str = "axial") -> tuple[str, str, str]:
        first = dcmread(write_series(tmp_path / name, volume, AFFINES["upright"], identity, plane)[0])
        return first.StudyInstanceUID, first.FrameOfReferenceUID, first.SeriesInstanceUID

    volume = volume_of("MR")
    base = uids("base", volume, MR)
    other_voxels, other_plane = uids("voxels", volume + np.uint16(1), MR), uids("plane", volume, MR, "coronal")
    other_seed = uids("seed", volume, SeriesIdentity("SYNTH-0001", "MR", "T1", seed=1))
    assert other_voxels[:2] == other_plane[:2] == base[:2]
    assert len({base[2], other_voxels[2], other_plane[2], other_seed[2]}) == 4
    assert other_seed[0] != base[0] and other_seed[1] != base[1]


def test_synthetic_hippocampus_keeps_its_intensities_up_to_a_scale(tmp_path: Path) -> None:
    case = draw_case(0)
    voxels, affine = read_with_itk(write_series(tmp_path / "series", case.image, case.affine_ras, MR))
    assert_same_in_space(voxels, affine, stored_values(case.image, "MR"), case.affine_ras)
    assert voxels.max() == 4095
    assert np.corrcoef(stored_values(case.image, "MR").ravel(), case.image.ravel())[0, 1] > 0.99999


def test_incomplete_or_other_series_is_not_complete(tmp_path: Path) -> None:
    files = write_series(tmp_path / "series", volume_of("MR"), AFFINES["upright"], MR)
    assert is_complete_series(tmp_path / "series", MR)
    assert not is_complete_series(tmp_path / "series", SeriesIdentity("SYNTH-0001", "MR", "T1", seed=1))
    assert not is_complete_series(tmp_path / "nothing", MR)
    files[3].unlink()
    assert not is_complete_series(tmp_path / "series", MR)
    files[0].write_bytes(b"no DICOM")
    assert not is_complete_series(tmp_path / "series", MR)


def test_existing_folder_is_not_written_into(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="is there already"):
        write_series(tmp_path, volume_of("MR"), AFFINES["upright"], MR)


def test_failed_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pydicom.dataset.Dataset.save_as", fill_up)
    with pytest.raises(OSError, match="no space left"):
        write_series(tmp_path / "series", volume_of("MR"), AFFINES["upright"], MR)
    assert list(tmp_path.iterdir()) == []


def test_sheared_affine_is_refused() -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    with pytest.raises(ValueError, match="orthogonal axes"):
        slice_volume(np.zeros(SHAPE, dtype=np.uint16), sheared, "axial")


@pytest.mark.parametrize(
    ("volume", "modality", "message"),
    [
        (np.full(SHAPE, -1025.0), "CT", "CT values must lie from -1024 to 64511 HU"),
        (np.full(SHAPE, np.nan), "MR", "finite"),
    ],
)
def test_values_that_do_not_fit_are_refused(volume: Array, modality: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stored_values(volume, modality)


@pytest.mark.parametrize(
    ("patient_id", "modality", "description", "message"),
    [
        ("DOE-1", "MR", "T1", "must begin with 'SYNTH-'"),
        ("SYNTH-\\1", "MR", "T1", "no backslash"),
        ("SYNTH-1", "US", "T1", r"modality 'US' must be one of \['CT', 'MR'\]"),
        ("SYNTH-1", "MR", "x" * 65, "at most 64 characters"),
    ],
)
def test_identity_that_could_be_taken_for_a_patient_or_is_invalid_is_refused(
    patient_id: str, modality: str, description: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SeriesIdentity(patient_id, modality, description)


def test_unknown_plane_and_flat_volume_are_refused() -> None:
    with pytest.raises(ValueError, match="plane 'oblique' must be one of"):
        slice_volume(np.zeros(SHAPE, dtype=np.uint16), np.eye(4), "oblique")
    with pytest.raises(ValueError, match=r"must be 3D, and has shape \(4, 4\)"):
        slice_volume(np.zeros((4, 4), dtype=np.uint16), np.eye(4), "axial")
