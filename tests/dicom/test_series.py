"""Series: the voxels and the place of good ones, and what is told of odd ones."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gdcm
import highdicom as hd
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian, generate_uid

from lib.configs.catalogue import load_preset
from lib.dicom.files import find_dicom
from lib.dicom.segmentation_reader import read_segmentation
from lib.dicom.segmentation_writer import Origin, write_segmentation
from lib.dicom.series import Series, read_series, tolerance_mm
from lib.errors import ImageError, LabelError, MemoryBudgetError
from tests.dicom.conftest import AFFINES, SHAPE, draw_mask, draw_volume, edit, strip_preamble, transcode
from tests.itk import affine_lps

Make = Callable[..., list[Path]]
LOSSLESS = {
    "jpeg 2000": gdcm.TransferSyntax.JPEG2000Lossless,
    "jpeg-ls": gdcm.TransferSyntax.JPEGLSLossless,
    "jpeg lossless": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "rle": gdcm.TransferSyntax.RLELossless,
}


def assert_is_volume(series: Series, volume: np.ndarray, affine_ras: np.ndarray) -> None:
    """Every voxel has its value at its place, whatever the order of the axes."""
    indices = np.argwhere(np.ones(volume.shape, dtype=bool))
    millimetres = indices @ affine_ras[:3, :3].T + affine_ras[:3, 3]
    found = (millimetres - series.affine_ras[:3, 3]) @ np.linalg.inv(series.affine_ras[:3, :3]).T
    nearest = np.rint(found).astype(int)
    assert np.abs(found - nearest).max() < 1e-3
    np.testing.assert_array_equal(series.read_voxels()[tuple(nearest.T)], volume[tuple(indices.T)])


@pytest.mark.parametrize("plane", list(AFFINES))
def test_series_is_the_volume_where_it_was_in_any_order_of_files(make_series: Make, plane: str) -> None:
    files = make_series(plane)
    order = np.random.default_rng(0).permutation(len(files))
    series = read_series([files[index] for index in order])
    assert series.notes == ()
    assert_is_volume(series, draw_volume(), AFFINES[plane])


@pytest.mark.parametrize("plane", list(AFFINES))
def test_series_has_the_grid_that_itk_reads(make_series: Make, plane: str) -> None:
    files = make_series(plane)
    series = read_series(files)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(files[0].parent)))
    np.testing.assert_array_equal(series.read_voxels(), sitk.GetArrayFromImage(image).T)
    np.testing.assert_allclose(series.affine_lps[:3], affine_lps(image)[:3], atol=1e-4)


@pytest.mark.parametrize("syntax", list(LOSSLESS))
def test_compressed_series_is_the_same_volume(make_series: Make, syntax: str) -> None:
    files = make_series()
    for file in files:
        transcode(file, LOSSLESS[syntax])
    assert dcmread(files[0]).file_meta.TransferSyntaxUID.is_compressed
    assert_is_volume(read_series(files), draw_volume(), AFFINES["axial"])


def test_deflated_series_is_the_same_volume(make_series: Make) -> None:
    files = make_series()
    for file in files:
        dataset = dcmread(file)
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(file)
    assert_is_volume(read_series(files), draw_volume(), AFFINES["axial"])


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_enhanced_multi_frame_image_is_the_same_volume(make_series: Make, tmp_path: Path, modality: str) -> None:
    assert_is_volume(
        read_series([make_enhanced(make_series, tmp_path, modality)]), draw_volume(modality), AFFINES["oblique"]
    )


def make_enhanced(make_series: Make, folder: Path, modality: str) -> Path:
    """One multi-frame file, its frames in reverse."""
    kind = {"CT": hd.legacy.LegacyConvertedEnhancedCTImage, "MR": hd.legacy.LegacyConvertedEnhancedMRImage}[modality]
    instances = [dcmread(file) for file in make_series("oblique", modality)][::-1]
    image = kind(instances, str(generate_uid()), 2, str(generate_uid()), 1)
    image.save_as(folder / "enhanced.dcm")
    return folder / "enhanced.dcm"


def test_rescale_is_applied_slice_by_slice(make_series: Make) -> None:
    files = make_series()
    edit(files[2], RescaleSlope=0.5, RescaleIntercept=-7)
    stored = dcmread(files[2]).pixel_array
    series = read_series(files)
    index = [frame.file for frame in series.frames].index(files[2])
    np.testing.assert_array_equal(series.read_voxels()[:, :, index], stored.T * 0.5 - 7)


def test_missing_slice_is_told_with_its_neighbours(make_series: Make) -> None:
    files = make_series()
    before, after = (dcmread(files[index]).SOPInstanceUID for index in (3, 5))
    with pytest.raises(ImageError, match=rf"2\.5 to 5 mm apart.*{before} and {after}.*1\.18 mm.*valid: evenly spaced"):
        read_series(files[:4] + files[5:])


def test_instance_that_is_there_twice_counts_once(make_series: Make) -> None:
    files = make_series()
    copy = shutil.copy(files[1], files[1].with_name("copy.dcm"))
    series = read_series([*files, Path(copy)])
    assert len(series.frames) == len(files)
    assert "is there twice" in series.notes[0]
    assert str(dcmread(files[1]).SOPInstanceUID) in series.notes[0]


def test_second_slice_at_a_place_is_left_out_and_told(make_series: Make) -> None:
    files = make_series()
    again = Path(shutil.copy(files[1], files[1].with_name("again.dcm")))
    edit(again, SOPInstanceUID="1.2.3.4", InstanceNumber=99)
    series = read_series([again, *files])
    assert series.notes == ("instance 1.2.3.4 left out, which lies where another slice does",)
    assert_is_volume(series, draw_volume(), AFFINES["axial"])


def test_several_volumes_in_one_series_are_refused(make_series: Make) -> None:
    files = make_series()
    for file in list(files):
        again = Path(shutil.copy(file, file.with_name(f"later-{file.name}")))
        edit(again, SOPInstanceUID=str(generate_uid()))
        files.append(again)
    with pytest.raises(ImageError, match="22 slices at 11 places, about 2 volumes"):
        read_series(files)


def test_localizers_and_other_orientations_are_left_out_and_told(make_series: Make) -> None:
    files = make_series()
    for name, changed in {
        "scout": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        "turned": {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
        "coarse": {"PixelSpacing": [2, 2]},
    }.items():
        other = Path(shutil.copy(files[0], files[0].with_name(f"{name}.dcm")))
        edit(other, SOPInstanceUID=f"1.2.{len(files)}", **changed)
        files.append(other)
    series = read_series(files)
    assert [note.split(", ")[1] for note in series.notes] == [
        "which is a localizer",
        "of another size or orientation",
        "of another size or orientation",
    ]
    assert_is_volume(series, draw_volume(), AFFINES["axial"])


def test_two_stacks_of_one_size_are_refused(make_series: Make) -> None:
    files = make_series()
    for file in files[:5]:
        edit(file, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    for file in files[5:10]:
        edit(file, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    with pytest.raises(ImageError, match="3 stacks of different size or orientation"):
        read_series(files)


def test_broken_pixels_are_told_by_their_instance(make_series: Make) -> None:
    files = make_series()
    uid = dcmread(files[4]).SOPInstanceUID
    files[4].write_bytes(files[4].read_bytes()[:-100])
    with pytest.raises(ImageError, match=f"instance {uid} cannot be decoded"):
        read_series(files).read_voxels()


def test_broken_header_is_told_and_what_is_no_image_is_left_out(make_series: Make, tmp_path: Path) -> None:
    files = make_series()
    (tmp_path / "notes.txt").write_text("no DICOM")
    assert "notes.txt" in read_series([*files, tmp_path / "notes.txt"]).notes[0]
    edit(files[0], ImagePositionPatient=None)
    with pytest.raises(ImageError, match=f"instance {dcmread(files[0]).SOPInstanceUID} does not say where it lies"):
        read_series(files)


def test_colours_and_single_slices_are_refused(make_series: Make) -> None:
    files = make_series()
    with pytest.raises(ImageError, match="at least 2 slices"):
        read_series(files[:1])
    for file in files:
        edit(file, SamplesPerPixel=3)
    with pytest.raises(ImageError, match="3 values a pixel"):
        read_series(files)
    with pytest.raises(ImageError, match="the selection holds no DICOM series"):
        read_series([])


def move(file: Path, by_mm: tuple[float, float, float]) -> None:
    """Shift a slice."""
    edit(
        file,
        ImagePositionPatient=[float(a) + b for a, b in zip(dcmread(file).ImagePositionPatient, by_mm, strict=True)],
    )


def test_slices_that_wander_sideways_are_refused_with_the_distance_from_the_grid(make_series: Make) -> None:
    """The steps' lengths hardly differ (2.5 to 2.51 mm); their places do, by up to 2.9 mm."""
    files = make_series()
    for number, file in enumerate(files):
        move(file, (2.9 * np.sin(number * np.pi / 10), 0, 0))
    with pytest.raises(
        ImageError, match=r"lies 1\.\d+ mm from an even grid; valid: .* at most 0\.1 mm from their grid"
    ):
        read_series(files)


def space(files: list[Path], steps_mm: np.ndarray, sideways: float = 0.0) -> np.ndarray:
    """Put slices at other distances along the normal, and sideways by a part of them; returns where they lie then."""
    files.sort(key=lambda file: float(dcmread(file).ImagePositionPatient[2]))
    places = np.r_[0, np.cumsum(steps_mm)]
    for file, place, even in zip(files, places, np.arange(len(files)) * 2.5, strict=True):
        move(file, (0, sideways * place, place - even))
    return places


@pytest.mark.parametrize("sideways", [0.0, 0.3])
def test_spacing_that_grows_is_resampled_along_the_slices_line_and_told(make_series: Make, sideways: float) -> None:
    """Values that grow evenly along the normal are the same at each place before and after."""
    files = make_series()
    places = space(files, np.linspace(2.3, 2.7, len(files) - 1), sideways)
    for file, place in zip(files, places, strict=True):
        edit(file, RescaleSlope=0, RescaleIntercept=f"{10 * place:.6f}")
    start = dcmread(files[0]).ImagePositionPatient
    series = read_series(files)
    step = places[-1] / 10
    assert series.shape == draw_volume().shape
    np.testing.assert_allclose(series.affine_lps[:3, 2], [0, sideways * step, step], atol=1e-6)
    np.testing.assert_allclose(series.affine_lps[:3, 3], [float(value) for value in start], atol=1e-6)
    expected = np.broadcast_to(10 * step * np.arange(11), series.shape)
    np.testing.assert_allclose(series.read_voxels(), expected, atol=1e-3)
    (note,) = series.notes
    assert re.match(r"its 11 slices, 2\.\d+ to 2\.\d+ mm apart, were resampled to 11 slices that are 2\.\d+ mm", note)
    farthest = np.abs(step * np.arange(11)[:, None] - places).min(axis=1).max() * np.hypot(1, sideways)
    assert f"lie up to {farthest:.2g} mm from the nearest of them" in note


def test_denser_slices_are_resampled_and_a_gap_among_them_is_refused(make_series: Make) -> None:
    steps = np.array([1.0, 1, 1, 1, 1.2, 1.4, 1.4, 0.9, 1, 1])
    files = make_series()
    space(files, steps)
    assert read_series(files).shape[2] == 12
    with pytest.raises(ImageError, match="none missing"):
        read_series(files[:6] + files[7:])


def test_uneven_series_has_no_segmentation_on_its_own_slices(make_series: Make) -> None:
    files = make_series()
    seg = write_segmentation(draw_mask(SHAPE), read_series(files), load_preset("hippocampus_mr"), Origin())
    space(files, np.linspace(2.3, 2.7, len(files) - 1))
    series = read_series(files)
    with pytest.raises(ImageError, match=r"unevenly spaced slices.*valid: a DICOM SEG of the regular series"):
        write_segmentation(draw_mask(SHAPE), series, load_preset("hippocampus_mr"), Origin())
    with pytest.raises(LabelError, match="unevenly spaced slices"):
        read_segmentation(seg, series)


def test_jitter_within_the_tolerance_is_taken_and_told(make_series: Make) -> None:
    files = make_series()
    for number, file in enumerate(files):
        move(file, (0, 0, 0.04 * (-1) ** number))
    series = read_series(files)
    np.testing.assert_allclose(series.affine_ras, read_series(files).affine_ras)
    np.testing.assert_allclose(series.affine_ras[:3, :3], AFFINES["axial"][:3, :3] * [1, 1, 1], atol=0.01)
    assert series.distances_mm.max() < 0.05
    assert series.notes == ("slices lie up to 0.044 mm from an even grid (tolerance 0.1 mm)",)


def test_thin_slices_have_a_tolerance_of_a_tenth_of_their_distance() -> None:
    assert (tolerance_mm(5), tolerance_mm(1), tolerance_mm(0.2)) == (0.1, 0.1, 0.2 * 0.1)


@pytest.mark.parametrize("change", [1e-7, 5e-6])
def test_directions_that_differ_by_rounding_are_one_stack(make_series: Make, change: float) -> None:
    files = make_series("oblique")
    for number, file in enumerate(files):
        directions = [float(value) for value in dcmread(file).ImageOrientationPatient]
        directions[number % 6] += change * (-1) ** number
        edit(file, ImageOrientationPatient=[f"{value:.9f}" for value in directions])
    series = read_series(files)
    assert len(series.frames) == len(files)
    assert not [note for note in series.notes if "left out" in note]


@pytest.mark.parametrize(
    "changed", [{"Rows": [19, 19]}, {"Columns": [24, 24]}, {"SamplesPerPixel": [1, 1]}, {"RescaleSlope": ["1", "2"]}]
)
def test_header_with_several_values_for_one_is_refused(make_series: Make, changed: dict[str, object]) -> None:
    files = make_series()
    for file in files:
        edit(file, **changed)
    with pytest.raises(ImageError, match=r"the selection cannot be put in order|does not say where it lies"):
        read_series(files)


def test_directions_that_are_none_are_refused(make_series: Make) -> None:
    files = make_series()
    for file in files:
        edit(file, ImageOrientationPatient=[1, 0, 0, 1, 0, 0])
    with pytest.raises(ImageError, match=r"does not say where it lies: .*right angle"):
        read_series(files)


def test_screenshot_in_a_series_is_left_out_and_told(make_series: Make) -> None:
    files = make_series()
    for name, changed in {
        "colour": {"SamplesPerPixel": 3, "ImagePositionPatient": None},
        "grey": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "ImagePositionPatient": None},
    }.items():
        other = Path(shutil.copy(files[0], files[0].with_name(f"{name}.dcm")))
        edit(other, SOPInstanceUID=f"1.2.{len(files)}", **changed)
        files.append(other)
    series = read_series(files)
    assert series.notes == (
        "instance 1.2.11 left out, which is in colours",
        "instance 1.2.12 left out, which is a screenshot without a place",
    )
    assert_is_volume(series, draw_volume(), AFFINES["axial"])


def test_series_without_preambles_is_the_same_volume(make_series: Make) -> None:
    files = make_series()
    for file in files:
        strip_preamble(file)
    assert len(find_dicom(files[0].parent)) == len(files)
    assert_is_volume(read_series(files), draw_volume(), AFFINES["axial"])


def test_series_larger_than_memory_is_refused_by_its_headers(make_series: Make) -> None:
    files = make_series()
    for file in files:
        edit(file, Rows=65535, Columns=65535)
    series = read_series(files)
    with pytest.raises(MemoryBudgetError, match=r"of \(65535, 65535, 11\) voxels needs 176 GiB to be read"):
        series.read_voxels()
