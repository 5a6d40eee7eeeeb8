"""A submitted mask belongs to its image and means what its names say, or is refused with the reason."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest

from lib.configs.preset import Preset
from lib.datastore.validation import CheckedLabel, check_label
from lib.errors import LabelError
from lib.transforms.volume import Grid
from tests.tiny import axis_affine, boxes, oblique_affine, tiny_preset, write_nifti

PRESET = tiny_preset()
VOXELS = boxes()[1]
AFFINE = oblique_affine()
IMAGE = Grid((20, 18, 16), AFFINE)
SLICER = {"label_info": [{"name": "core", "idx": 1}, {"name": "left box", "idx": 2}]}


def check(path: Path, info: dict[str, Any] | None = None, preset: Preset = PRESET, image: Grid = IMAGE) -> CheckedLabel:
    return check_label(path, image, preset, info or {}, path.parent)


def test_label_that_fits_is_kept_byte_for_byte(tmp_path: Path) -> None:
    sent = write_nifti(tmp_path / "sent.nii.gz", VOXELS, AFFINE)
    checked = check(sent)
    assert checked.file == sent and checked.notes == ()
    np.testing.assert_array_equal(checked.voxels, VOXELS)
    assert checked.mapped.label_map == {"Left Box": 1, "core": 2}


def test_swapped_values_become_the_presets(tmp_path: Path) -> None:
    swapped = np.array([0, 2, 1], dtype=np.uint8)[VOXELS]
    checked = check(write_nifti(tmp_path / "sent.nii.gz", swapped, AFFINE), SLICER)
    kept = nib.load(checked.file)
    np.testing.assert_array_equal(np.asarray(kept.dataobj), VOXELS)
    np.testing.assert_allclose(kept.affine, AFFINE, atol=1e-5)
    assert checked.notes == ("the values were mapped to those of 'tiny' by name",)


@pytest.mark.parametrize("axcodes", ["LPS", "SAR", "PIL", "AIR", "RAS"])
def test_other_orientation_of_the_same_grid_is_turned_without_loss(tmp_path: Path, axcodes: str) -> None:
    original = nib.Nifti1Image(VOXELS, AFFINE)
    now = nib.io_orientation(AFFINE)
    wanted = nib.orientations.axcodes2ornt(tuple(axcodes))
    turned = original.as_reoriented(nib.orientations.ornt_transform(now, wanted))
    nib.save(turned, tmp_path / "sent.nii.gz")
    checked = check(tmp_path / "sent.nii.gz")
    np.testing.assert_array_equal(checked.voxels, VOXELS)
    kept = nib.load(checked.file)
    np.testing.assert_array_equal(np.asarray(kept.dataobj), VOXELS)
    np.testing.assert_allclose(kept.affine, AFFINE, atol=1e-4)
    assert bool(checked.notes) == (axcodes != "RAS")
    if checked.notes:
        assert f"came in the orientation {axcodes} and was turned to its image's, RAS" in checked.notes[0]


@pytest.mark.parametrize("suffix", [".nii", ".nrrd"])
def test_other_kinds_of_file_become_nifti(tmp_path: Path, suffix: str) -> None:
    sent = tmp_path / f"sent{suffix}"
    if suffix == ".nrrd":
        lps = np.diag([-1.0, -1, 1])
        header = {"space": "left-posterior-superior", "kinds": ["domain"] * 3}
        header |= {"space directions": (lps @ AFFINE[:3, :3]).T, "space origin": lps @ AFFINE[:3, 3]}
        nrrd.write(str(sent), VOXELS, header)
    else:
        nib.save(nib.Nifti1Image(VOXELS, AFFINE), sent)
    checked = check(sent)
    assert checked.file.name.endswith(".nii.gz")
    np.testing.assert_array_equal(np.asarray(nib.load(checked.file).dataobj), VOXELS)


def test_affine_within_the_tolerance_is_the_same_grid(tmp_path: Path) -> None:
    near = AFFINE.copy()
    near[0, 3] += 0.05
    assert check(write_nifti(tmp_path / "near.nii.gz", VOXELS, near)).notes == ()
    far = AFFINE.copy()
    far[0, 3] += 0.5
    with pytest.raises(LabelError, match=r"lies up to 0\.5 mm away from its image"):
        check(write_nifti(tmp_path / "far.nii.gz", VOXELS, far))


def numbers(value: float, dtype: type = np.float32) -> np.ndarray:
    voxels = VOXELS.astype(dtype)
    voxels[3, 4, 5] = value
    return voxels


REFUSED: dict[str, tuple[np.ndarray, str]] = {
    "another shape": (VOXELS[:-1], r"shape \(19, 18, 16\); valid: its image's \(20, 18, 16\)"),
    "2D": (VOXELS[:, :, 0], "valid: 3D"),
    "4D": (np.stack([VOXELS] * 2, axis=-1), "valid: 3D"),
    "fractions": (numbers(1.5), r"no whole numbers, such as 1\.5"),
    "NaN": (numbers(np.nan), "not finite"),
    "infinity": (numbers(np.inf), "not finite"),
    "negative": (numbers(-1), "has the value -1"),
    "huge": (numbers(1e9), r"has the value 1e\+09"),
    "unexplained": (numbers(7), "the values 7, and no label_info to explain them"),
    "10,000 labels": (np.arange(5760).reshape(20, 18, 16).astype(np.int32), "5759 different values"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_label_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    voxels, sentence = REFUSED[kind]
    with pytest.raises(LabelError, match=sentence):
        check(write_nifti(tmp_path / "sent.nii.gz", voxels, AFFINE))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x1f\x8bgarbage", gzip.compress(b"no nifti" * 100, mtime=0)])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    sent = tmp_path / "sent.nii.gz"
    sent.write_bytes(content)
    with pytest.raises(LabelError, match=r"the label cannot be read: 'sent\.nii\.gz' is"):
        check(sent)


def test_equal_shape_but_mirrored_is_turned_and_not_taken_as_it_is(tmp_path: Path) -> None:
    """The classic: a mask from a tool that writes LPS on an image in RAS, of the very same shape."""
    image = Grid((16, 16, 16), axis_affine("RAS"))
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[2:5, 3:7, 4:12] = 1
    flipped = axis_affine("LPS", origin=(15, 15, 0))
    checked = check(write_nifti(tmp_path / "sent.nii.gz", mask[::-1, ::-1], flipped), image=image)
    np.testing.assert_array_equal(checked.voxels, mask)


def test_unknown_names_keep_values_of_their_own(tmp_path: Path) -> None:
    preset = tiny_preset(ignore_unknown_labels=True)
    info = {"label_info": [{"name": "tumour", "idx": 1}, {"name": "core", "idx": 2}]}
    checked = check(write_nifti(tmp_path / "sent.nii.gz", VOXELS, AFFINE), info, preset)
    assert checked.mapped.label_map == {"core": 2, "tumour": 3}
    assert checked.mapped.missing == ("Left Box",)
    np.testing.assert_array_equal(checked.voxels, np.array([0, 3, 2])[VOXELS])
