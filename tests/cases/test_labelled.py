"""Labelled cases: pairs by name, and labels that do not belong refused in words."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lib.cases.labelled import Case, ReadCased, case_id, find_cases, read_case, to_preset_values
from lib.errors import ImageError, LabelError, TrainingError
from lib.transforms.preprocess import IMAGE, LABEL
from tests.tiny import boxes, oblique_affine, tiny_preset, write_nifti

MakeCases = Callable[..., tuple[Case, ...]]


def _case(folder: Path, label: np.ndarray, affine: np.ndarray | None = None) -> Case:
    image = write_nifti(folder / "image.nii.gz", boxes()[0], oblique_affine())
    path = write_nifti(folder / "label.nii.gz", label, oblique_affine() if affine is None else affine)
    return Case("scan", image, path)


def test_find_cases_pairs_by_name_and_leaves_the_unlabelled_out(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a.nii", "unlabelled.nii.gz"):
        write_nifti(tmp_path / "images" / name, boxes()[0])
    for name in ("a.nii.gz", "b.nii.gz", "without_image.nii.gz"):
        write_nifti(tmp_path / "labels" / name, boxes()[1])
    (tmp_path / "images" / "notes.txt").write_text("x")
    found = find_cases(tmp_path / "images", tmp_path / "labels", {1: 2})
    assert [(c.case_id, c.image.name, c.label.name, c.values) for c in found] == [
        ("a", "a.nii", "a.nii.gz", {1: 2}),
        ("b", "b.nii.gz", "b.nii.gz", {1: 2}),
    ]


def test_find_cases_without_a_pair_or_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match=r"no image in .* has a label of the same name"):
        find_cases(tmp_path / "empty", tmp_path / "empty")
    with pytest.raises(TrainingError, match=r"there is no folder .*none"):
        find_cases(tmp_path / "none", tmp_path / "empty")


@pytest.mark.parametrize("name", ["a.b.nii.gz", "a.b.nii", "a.b.nrrd", "a.b"])
def test_case_id_is_the_datastores(name: str) -> None:
    assert case_id(Path("x") / name) == "a.b"


def test_case_with_its_label_is_read(tmp_path: Path) -> None:
    image, label = boxes()
    volume, found = read_case(_case(tmp_path, label), tiny_preset())
    np.testing.assert_array_equal(volume.voxels, image)
    np.testing.assert_array_equal(found, label)
    assert found.dtype == np.uint8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda label: label[:-1], r"has shape \(19, 18, 16\); valid: its image's \(20, 18, 16\)"),
        (lambda label: label + 4, r"has the values \[4, 5, 6\]; valid: \{'Left Box': 1, 'core': 2\} and 0"),
        (lambda label: label * 0.5, "no whole numbers from 0, such as 0.5"),
        (lambda label: np.where(label == 2, -1.0, label), "no whole numbers from 0, such as -1"),
        (lambda label: np.where(label == 2, np.nan, label), "no whole numbers from 0, such as nan"),
    ],
)
def test_label_that_does_not_belong_is_refused_in_words(
    tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    with pytest.raises(LabelError, match=message) as refused:
        read_case(_case(tmp_path, change(boxes()[1]).astype(np.float32)), tiny_preset())
    assert str(refused.value).startswith("label of 'scan'")


@pytest.mark.parametrize(("shift_mm", "accepted"), [(0.05, True), (0.5, False)])
def test_label_must_lie_on_its_image(tmp_path: Path, shift_mm: float, accepted: bool) -> None:
    affine = oblique_affine()
    affine[1, 3] += shift_mm
    case = _case(tmp_path, boxes()[1], affine)
    if accepted:
        read_case(case, tiny_preset())
        return
    with pytest.raises(LabelError, match=r"lies up to 0\.5 mm away from its image: their affines differ"):
        read_case(case, tiny_preset())


def test_label_that_is_turned_about_its_first_voxel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="mm away from its image"):
        read_case(_case(tmp_path, boxes()[1], oblique_affine(degrees=(12, -9, 19))), tiny_preset())


def test_damaged_label_is_the_labels_error_and_damaged_image_the_images(tmp_path: Path) -> None:
    case = _case(tmp_path, boxes()[1])
    case.label.write_bytes(b"nothing")
    with pytest.raises(LabelError, match=r"label of 'scan': image 'label\.nii\.gz' is damaged"):
        read_case(case, tiny_preset())
    case.image.write_bytes(b"nothing")
    with pytest.raises(ImageError):
        read_case(case, tiny_preset())


def test_values_of_another_label_set_are_mapped_and_the_rest_is_background() -> None:
    voxels = np.array([0, 1, 5, 7, 41, 60_000], dtype=np.float32).reshape(6, 1, 1)
    found = to_preset_values(voxels, tiny_preset(), {5: 1, 7: 2, 41: 0}, "scan")
    assert found.ravel().tolist() == [0, 0, 1, 2, 0, 0]


def test_values_that_are_huge_take_no_memory_in_proportion() -> None:
    voxels = np.array([0, 2, 4e9], dtype=np.float32).reshape(3, 1, 1)
    assert to_preset_values(voxels, tiny_preset(), {2: 1}, "scan").ravel().tolist() == [0, 1, 0]


def test_item_changes_when_the_label_does(make_cases: MakeCases) -> None:
    (case,) = make_cases(1)
    before = case.as_item()
    assert case.as_item() == before
    stamp = case.label.stat().st_mtime_ns + 1
    os.utime(case.label, ns=(stamp, stamp))
    assert case.as_item() != before


def test_item_is_read_into_tensors_on_the_images_grid(make_cases: MakeCases) -> None:
    (case,) = make_cases(1)
    read = ReadCased(tiny_preset())(case.as_item())
    image, label = boxes(seed=1)
    np.testing.assert_array_equal(read[IMAGE][0].numpy(), image)
    np.testing.assert_array_equal(read[LABEL][0].numpy(), label)
    np.testing.assert_array_equal(read[LABEL].affine.numpy(), np.eye(4))
    assert read["case"] == "case_001"
