"""DICOM SEG: out and in again it is the mask, and it means what it says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from lib.configs.catalogue import load_preset
from lib.configs.preset import Preset
from lib.dicom.segmentation_reader import read_segmentation, referenced_instances, referenced_series
from lib.dicom.segmentation_writer import Origin, cielab, write_segmentation
from lib.dicom.series import Series, read_series
from lib.errors import ImageError, LabelError
from tests.dicom.conftest import AFFINES, draw_mask, edit
from tests.dicom.test_series import make_enhanced
from tests.itk import affine_lps

Make = Callable[..., list[Path]]


@pytest.fixture
def hippocampus() -> Preset:
    return load_preset("hippocampus_mr")


def saved(seg: Dataset, folder: Path) -> Dataset:
    """The same after a file."""
    seg.save_as(folder / "seg.dcm")
    return dcmread(folder / "seg.dcm")


def assert_valid(file: Path) -> None:
    """No error from dciodvfy (Debian's dicom3tools), where it is installed."""
    if shutil.which("dciodvfy"):
        said = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, timeout=60).stderr
        assert "Error" not in said, said


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("plane", list(AFFINES))
def test_mask_comes_back_voxel_for_voxel(
    make_series: Make, tmp_path: Path, hippocampus: Preset, plane: str, modality: str
) -> None:
    series = read_series(make_series(plane, modality))
    mask = draw_mask(series.shape)
    read = read_segmentation(saved(write_segmentation(mask, series, hippocampus, Origin()), tmp_path), series)
    np.testing.assert_array_equal(read.labels, mask)
    assert read.names == {1: "anterior", 2: "posterior"}
    assert_valid(tmp_path / "seg.dcm")


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_mask_of_a_multi_frame_image_comes_back_voxel_for_voxel(
    make_series: Make, tmp_path: Path, hippocampus: Preset, modality: str
) -> None:
    series = read_series([make_enhanced(make_series, tmp_path, modality)])
    mask = draw_mask(series.shape)
    seg = saved(write_segmentation(mask, series, hippocampus, Origin()), tmp_path)
    np.testing.assert_array_equal(read_segmentation(seg, series).labels, mask)


def test_mask_of_a_series_with_jitter_comes_back_voxel_for_voxel(
    make_series: Make, tmp_path: Path, hippocampus: Preset
) -> None:
    """Slices 0.09 mm off their grid are 0.11 voxels of 0.8 mm off, and so are the frames that lie where they do."""
    files = make_series()
    for number, file in enumerate(files):
        x, y, z = (float(value) for value in dcmread(file).ImagePositionPatient)
        edit(file, ImagePositionPatient=[x + 0.09 * (-1) ** number, y, z])
    series = read_series(files)
    mask = draw_mask(series.shape)
    seg = saved(write_segmentation(mask, series, hippocampus, Origin()), tmp_path)
    np.testing.assert_array_equal(read_segmentation(seg, series).labels, mask)


def test_segment_keeps_its_number_when_others_are_missing(
    make_series: Make, tmp_path: Path, hippocampus: Preset
) -> None:
    """The stock server renames a mask of label 2 alone to label 1."""
    series = read_series(make_series())
    mask = np.where(draw_mask(series.shape) == 2, 2, 0).astype(np.uint8)
    seg = saved(write_segmentation(mask, series, hippocampus, Origin()), tmp_path)
    assert [(item.SegmentNumber, item.SegmentLabel) for item in seg.SegmentSequence] == [
        (1, "anterior"),
        (2, "posterior"),
    ]
    np.testing.assert_array_equal(read_segmentation(seg, series).labels, mask)


def test_empty_mask_is_a_valid_segmentation_without_voxels(
    make_series: Make, tmp_path: Path, hippocampus: Preset
) -> None:
    series = read_series(make_series())
    seg = saved(write_segmentation(np.zeros(series.shape, np.uint8), series, hippocampus, Origin()), tmp_path)
    assert not read_segmentation(seg, series).labels.any()
    assert_valid(tmp_path / "seg.dcm")


def test_segmentation_says_what_it_is_and_of_what(make_series: Make, tmp_path: Path) -> None:
    preset = load_preset("abdomen_ct")
    series = read_series(make_series())
    origin = Origin("SEMIAUTOMATIC", "0007", "Anna O=\\'Brien^")
    seg = saved(write_segmentation(draw_mask(series.shape, 13), series, preset, origin), tmp_path)
    kidney, own = seg.SegmentSequence[1], preset.labels[1]
    assert own.code is not None
    assert own.modifier is not None
    kind = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("64033007", "SCT")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Right"
    assert kidney.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "123037004"
    assert kidney.SegmentAlgorithmType == "SEMIAUTOMATIC"
    assert kidney.SegmentAlgorithmName == "UNETR abdomen_ct"
    assert kidney.RecommendedDisplayCIELabValue == cielab(own.color)
    assert kidney.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "0007"
    assert len({item.TrackingUID for item in seg.SegmentSequence}) == 13
    assert str(seg.ContentCreatorName) == "Anna O'Brien^"
    assert seg.SoftwareVersions == "0007"
    assert referenced_series(seg) == series.uid
    assert referenced_instances(seg) == {frame.uid for frame in series.frames}
    assert_valid(tmp_path / "seg.dcm")


def test_label_without_a_code_gets_one_of_our_own(make_series: Make, tmp_path: Path, hippocampus: Preset) -> None:
    preset = hippocampus.with_labels(["lesion", "a structure with a very long name 影"])
    series = read_series(make_series())
    seg = saved(write_segmentation(draw_mask(series.shape), series, preset, Origin("MANUAL")), tmp_path)
    kinds = [item.SegmentedPropertyTypeCodeSequence[0] for item in seg.SegmentSequence]
    assert [kind.CodingSchemeDesignator for kind in kinds] == ["99UNETR"] * 2
    assert kinds[0].CodeValue == "LESION"
    assert len(kinds[1].CodeValue) == 16
    assert "SegmentAlgorithmName" not in seg.SegmentSequence[0]


def test_tracking_is_kept_from_one_version_to_the_next(make_series: Make, hippocampus: Preset) -> None:
    series = read_series(make_series())
    first, second = (write_segmentation(draw_mask(series.shape, seed=s), series, hippocampus, Origin()) for s in (1, 2))
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert [s.TrackingUID for s in first.SegmentSequence] == [s.TrackingUID for s in second.SegmentSequence]


# Values of CSS Color 4's reference conversion, rounded to what 16 bits hold
@pytest.mark.parametrize(
    ("rgb", "lab"),
    [((255, 0, 0), (53.24, 80.09, 67.20)), ((0, 0, 255), (32.30, 79.19, -107.86)), ((119, 119, 119), (50.03, 0, 0))],
)
def test_colour_is_cielab(rgb: tuple[int, int, int], lab: tuple[float, float, float]) -> None:
    stored = np.array(cielab(rgb)) / 65535 * [100, 255, 255] - [0, 128, 128]
    np.testing.assert_allclose(stored, lab, atol=0.02)


def test_wrong_shape_and_unknown_values_are_refused(make_series: Make, hippocampus: Preset) -> None:
    series = read_series(make_series())
    with pytest.raises(LabelError, match=r"shape \(3, 3, 3\) is not on its series' grid; valid: \(24, 19, 11\)"):
        write_segmentation(np.zeros((3, 3, 3), np.uint8), series, hippocampus, Origin())
    with pytest.raises(LabelError, match=r"values \[7\]"):
        write_segmentation(np.full(series.shape, 7, np.uint8), series, hippocampus, Origin())


def test_series_without_a_frame_of_reference_is_refused_in_words(make_series: Make, hippocampus: Preset) -> None:
    files = make_series()
    for file in files:
        edit(file, FrameOfReferenceUID=None)
    series = read_series(files)
    with pytest.raises(ImageError, match=r"cannot be referred to by a DICOM SEG.*Frame Of Reference UID"):
        write_segmentation(np.zeros(series.shape, np.uint8), series, hippocampus, Origin())


def test_frames_in_any_order_are_placed_by_their_position(
    make_series: Make, tmp_path: Path, hippocampus: Preset
) -> None:
    series = read_series(make_series("oblique"))
    mask = draw_mask(series.shape)
    seg = saved(write_segmentation(mask, series, hippocampus, Origin()), tmp_path)
    order = np.random.default_rng(2).permutation(int(seg.NumberOfFrames))
    planes = seg.pixel_array[order]
    seg.PerFrameFunctionalGroupsSequence = [seg.PerFrameFunctionalGroupsSequence[i] for i in order]
    seg.PixelData = np.packbits(planes.ravel(), bitorder="little").tobytes()
    for item in seg.SegmentSequence:  # numbered otherwise
        item.SegmentNumber = 9 - item.SegmentNumber
    for groups in seg.PerFrameFunctionalGroupsSequence:
        which = groups.SegmentIdentificationSequence[0]
        which.ReferencedSegmentNumber = 9 - which.ReferencedSegmentNumber
    read = read_segmentation(saved(seg, tmp_path), series)
    assert read.names == {8: "anterior", 7: "posterior"}
    np.testing.assert_array_equal(read.labels, np.select([mask == 1, mask == 2], [8, 7], 0))


def test_frames_that_are_cut_in_another_plane_are_placed_too(
    make_series: Make, tmp_path: Path, hippocampus: Preset
) -> None:
    """Some programs write the planes that they show: here the same volume as a sagittal and as an axial series."""
    axial, sagittal = read_series(make_series("axial", name="a")), read_series(make_series("sagittal", name="s"))
    mask = draw_mask(sagittal.shape)
    seg = saved(write_segmentation(mask, sagittal, hippocampus, Origin()), tmp_path)
    read = read_segmentation(seg, axial)
    to_axial = np.rint(np.linalg.inv(axial.affine_lps) @ sagittal.affine_lps).astype(int)
    expected = np.zeros(axial.shape, np.uint8)
    places = np.argwhere(mask) @ to_axial[:3, :3].T + to_axial[:3, 3]
    expected[tuple(places.T)] = mask[mask > 0]
    np.testing.assert_array_equal(read.labels, expected)


def test_overlapping_segments_are_refused_by_name(make_series: Make, tmp_path: Path, hippocampus: Preset) -> None:
    series = read_series(make_series())
    mask = np.zeros(series.shape, np.uint8)
    mask[3:9, 3:9, 5], mask[12, 12, 5] = 1, 2
    seg = write_segmentation(mask, series, hippocampus, Origin())
    seg.PixelData = np.packbits(seg.pixel_array[[0, 0]].ravel(), bitorder="little").tobytes()
    with pytest.raises(LabelError, match="'anterior' and 'posterior' overlap, in one slice by 36 voxels"):
        read_segmentation(saved(seg, tmp_path), series)


def test_segmentation_of_something_else_is_refused(make_series: Make, tmp_path: Path, hippocampus: Preset) -> None:
    series = read_series(make_series())
    mask = draw_mask(series.shape)
    seg = saved(write_segmentation(mask, series, hippocampus, Origin()), tmp_path)
    for groups in seg.PerFrameFunctionalGroupsSequence:
        place = groups.PlanePositionSequence[0]
        place.ImagePositionPatient = [place.ImagePositionPatient[0] + 0.3, *place.ImagePositionPatient[1:]]
    with pytest.raises(LabelError, match="is not on the voxel grid"):
        read_segmentation(seg, series)
    seg.FrameOfReferenceUID = "1.2.3"
    with pytest.raises(LabelError, match="frame of reference"):
        read_segmentation(seg, series)
    with pytest.raises(LabelError, match="no DICOM Segmentation"):
        read_segmentation(dcmread(series.frames[0].file), series)


def test_damaged_segmentation_is_refused_in_words(make_series: Make, tmp_path: Path, hippocampus: Preset) -> None:
    series = read_series(make_series())
    seg = saved(write_segmentation(draw_mask(series.shape), series, hippocampus, Origin()), tmp_path)
    seg.PixelData = seg.PixelData[:50]
    with pytest.raises(LabelError, match=f"DICOM SEG {seg.SOPInstanceUID} cannot be read"):
        read_segmentation(seg, series)


def run_dcmqi(program: str, *arguments: object) -> None:
    """Run one of dcmqi's programs, which its Python package installs beside Python."""
    path = Path(sys.executable).with_name(program)
    if not path.is_file():
        pytest.skip("needs dcmqi's programs: pip install dcmqi")
    ended = subprocess.run([str(path), *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("plane", list(AFFINES))
def test_dcmqi_reads_our_segmentation(make_series: Make, tmp_path: Path, hippocampus: Preset, plane: str) -> None:
    """As 3D Slicer does."""
    series = read_series(make_series(plane))
    mask = draw_mask(series.shape)
    saved(write_segmentation(mask, series, hippocampus, Origin()), tmp_path)
    run_dcmqi(
        "segimage2itkimage", "--inputDICOM", tmp_path / "seg.dcm", "--outputDirectory", tmp_path, "--mergeSegments"
    )
    image = sitk.ReadImage(str(tmp_path / "1.nrrd"))
    found = sitk.GetArrayFromImage(image).T
    to_series = np.linalg.inv(series.affine_lps) @ affine_lps(image)
    places = np.rint(np.argwhere(found) @ to_series[:3, :3].T + to_series[:3, 3]).astype(int)
    assert len(places) == (mask > 0).sum()
    np.testing.assert_array_equal(mask[tuple(places.T)], found[found > 0])
    told = json.loads((tmp_path / "meta.json").read_text())["segmentAttributes"]
    segments = {item["labelID"]: item for part in told for item in part}
    assert segments[2]["SegmentLabel"] == "posterior"
    assert np.abs(np.subtract(segments[2]["recommendedDisplayRGBValue"], (60, 140, 220))).max() <= 1


@pytest.mark.parametrize("plane", list(AFFINES))
def test_segmentation_of_dcmqi_is_read_by_its_labels(make_series: Make, tmp_path: Path, plane: str) -> None:
    """dcmqi numbers segments from 1 in its own order: only their labels say which is which."""
    files = make_series(plane)
    series = read_series(files)
    mask = draw_mask(series.shape)
    write_itk(tmp_path / "mask.nrrd", np.select([mask == 1, mask == 2], [40, 7], 0).astype(np.uint8), series)
    code = {"CodeValue": "85756007", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Tissue"}
    segments = [
        {
            "labelID": value,
            "SegmentLabel": name,
            "SegmentDescription": name,
            "SegmentAlgorithmType": "MANUAL",
            "SegmentedPropertyCategoryCodeSequence": code,
            "SegmentedPropertyTypeCodeSequence": code,
            "recommendedDisplayRGBValue": [255, 0, 0],
        }
        for value, name in ((40, "anterior"), (7, "posterior"))
    ]
    about = {"ContentCreatorName": "R", "SeriesNumber": "9", "InstanceNumber": "1", "segmentAttributes": [segments]}
    about |= {"SeriesDescription": "S", "ContentLabel": "SEG", "ContentDescription": "D", "BodyPartExamined": ""}
    about |= {"ClinicalTrialSeriesID": "1", "ClinicalTrialTimePointID": "1", "ClinicalTrialCoordinatingCenterName": "C"}
    (tmp_path / "meta.json").write_text(json.dumps(about))
    run_dcmqi(
        "itkimage2segimage",
        *("--inputImageList", tmp_path / "mask.nrrd", "--inputDICOMDirectory", files[0].parent),
        *("--outputDICOM", tmp_path / "seg.dcm", "--inputMetadata", tmp_path / "meta.json"),
    )
    seg = dcmread(tmp_path / "seg.dcm")
    read = read_segmentation(seg, series)
    by_name = {name: number for number, name in read.names.items()}
    assert referenced_series(seg) == series.uid
    np.testing.assert_array_equal(read.labels == by_name["anterior"], mask == 1)
    np.testing.assert_array_equal(read.labels == by_name["posterior"], mask == 2)


def write_itk(path: Path, mask: np.ndarray, series: Series) -> None:
    """A mask on its series' grid."""
    spacing = np.linalg.norm(series.affine_lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(mask.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((series.affine_lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(series.affine_lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path))


@pytest.mark.parametrize("folder", ["abdomen_ct", "hippocampus_mr/study1", "hippocampus_mr/study2"])
def test_mask_of_a_real_series_comes_back_voxel_for_voxel(
    shared_data: Path, tmp_path: Path, hippocampus: Preset, folder: str
) -> None:
    source = shared_data / "dicom" / folder
    if not source.is_dir():
        pytest.skip(f"needs dicom/{folder} in the folder of real data")
    series = read_series(fill_uids(source, tmp_path / "series"))
    mask = draw_mask(series.shape)
    seg = saved(write_segmentation(mask, series, hippocampus, Origin()), tmp_path)
    np.testing.assert_array_equal(read_segmentation(seg, series).labels, mask)
    assert_valid(tmp_path / "seg.dcm")


def fill_uids(source: Path, target: Path) -> list[Path]:
    """A copy of a series whose empty UIDs are filled, as a modality would."""
    target.mkdir()
    study, series = generate_uid(), generate_uid()
    for path in sorted(source.iterdir()):
        instance = dcmread(path)
        instance.SOPClassUID = instance.SOPClassUID or instance.file_meta.MediaStorageSOPClassUID
        instance.SOPInstanceUID = instance.SOPInstanceUID or instance.file_meta.MediaStorageSOPInstanceUID
        instance.StudyInstanceUID = instance.get("StudyInstanceUID") or study
        instance.SeriesInstanceUID = instance.get("SeriesInstanceUID") or series
        instance.save_as(target / path.name)
    return sorted(target.iterdir())
