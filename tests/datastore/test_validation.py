"""A submitted mask belongs to its image and means what its names say, or is refused with the reason."""

from __future__ import annotations

import gzip
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest

from lib.configs.preset import Preset
from lib.datastore.validation import CheckedLabel, as_kept, check_label
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


def test_label_is_opened_for_its_header_and_for_its_voxels(tmp_path: Path) -> None:
    sent, opened, watching = write_nifti(tmp_path / "sent.nii.gz", VOXELS, AFFINE), [], True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(arguments[0]) == str(sent):
            opened.append(arguments)

    sys.addaudithook(watch)  # it cannot be taken away again
    checked = check(sent)
    watching = False
    assert checked.file == sent and len(opened) == 2


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


@pytest.mark.parametrize("dtype", [np.int64, np.int16, np.uint16, np.float32, np.float64])
def test_what_is_kept_is_of_the_smallest_type_on_the_images_grid(tmp_path: Path, dtype: type) -> None:
    voxels = VOXELS.astype(dtype)[..., None]
    if dtype is np.float64:
        voxels = voxels * 0.99999999
    sent = tmp_path / "sent.nii.gz"
    nib.save(nib.Nifti1Image(voxels, AFFINE, dtype=dtype), sent)
    checked = check(sent)
    kept = nib.load(checked.file)
    assert kept.get_data_dtype() == np.uint8 and kept.shape == VOXELS.shape
    assert (kept.dataobj.slope, kept.dataobj.inter) == (1.0, 0.0)
    np.testing.assert_array_equal(np.asarray(kept.dataobj), VOXELS)
    np.testing.assert_allclose(kept.affine, AFFINE, atol=1e-5)


def test_scaled_values_are_kept_without_their_scale(tmp_path: Path) -> None:
    content = bytearray(nib.Nifti1Image(VOXELS * 2, AFFINE).to_bytes())
    content[112:116] = np.float32(0.5).tobytes()  # scl_slope
    sent = tmp_path / "sent.nii.gz"
    sent.write_bytes(gzip.compress(bytes(content), mtime=0))
    kept = nib.load(check(sent).file)
    assert (kept.dataobj.slope, kept.dataobj.inter) == (1.0, 0.0)
    np.testing.assert_array_equal(np.asarray(kept.dataobj), VOXELS)


@pytest.mark.parametrize("damage", ["checksum", "trailer", "cut", "more"])
def test_bytes_that_fail_their_checksum_are_refused(tmp_path: Path, damage: str) -> None:
    sent = write_nifti(tmp_path / "sent.nii.gz", VOXELS, AFFINE)
    content = sent.read_bytes()
    broken = {
        "checksum": content[:-8] + bytes(4) + content[-4:],
        "trailer": content[:-5],
        "cut": content[: len(content) // 2],
        "more": content + gzip.compress(bytes(3 * 2**20), mtime=0),
    }
    sent.write_bytes(broken[damage])
    with pytest.raises(LabelError, match=r"the label cannot be read: 'sent\.nii\.gz' (is damaged|holds more than)"):
        check(sent)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_label_that_unpacks_to_gigabytes_is_refused_by_its_header(tmp_path: Path, suffix: str) -> None:
    """Whose voxels would take 729 MB, and whose header says so in the first bytes."""
    sent = tmp_path / f"sent{suffix}"
    if suffix == ".nii.gz":
        header = nib.Nifti1Header()
        header.set_data_shape((900, 900, 900))
        header.set_data_dtype(np.uint8)
        header["vox_offset"] = 352
        sent.write_bytes(gzip.compress(header.binaryblock + bytes(4) + bytes(2**20), mtime=0))
    else:
        sent.write_bytes(
            b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 900 900 900\nencoding: gzip\n\n" + gzip.compress(b"")
        )
    tracemalloc.start()
    try:
        with pytest.raises(LabelError, match=r"shape \(900, 900, 900\); valid: its image's \(20, 18, 16\)"):
            check(sent)
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    finally:
        tracemalloc.stop()


def test_masks_of_the_servers_own_are_kept_in_the_same_form(tmp_path: Path) -> None:
    plain = write_nifti(tmp_path / "plain.nii.gz", VOXELS, AFFINE)
    assert as_kept(plain, tmp_path) == plain
    other = as_kept(write_nifti(tmp_path / "floats.nii.gz", VOXELS.astype(np.float32), AFFINE), tmp_path)
    assert nib.load(other).get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(nib.load(other).dataobj), VOXELS)


REFUSED: dict[str, tuple[np.ndarray, str]] = {
    "another shape": (VOXELS[:-1], r"shape \(19, 18, 16\); valid: its image's \(20, 18, 16\)"),
    "2D": (VOXELS[:, :, 0], "valid: 3D"),
    "4D": (np.stack([VOXELS] * 2, axis=-1), "valid: 3D"),
    "reversed axes": (VOXELS.T, r"shape \(16, 18, 20\); valid: its image's \(20, 18, 16\)"),
    "fractions": (numbers(1.5), r"no whole numbers, such as 1\.5"),
    "just below 1": (numbers(0.99999), r"no whole numbers, such as 0\.99999$"),
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
