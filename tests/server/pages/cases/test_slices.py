"""Slices as pictures."""

from __future__ import annotations

import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from lib.server.pages.cases.slices import OVERLAY_RGB, PLANES, Contour, Plane, Stack, draw_slice, middle_of, reorient
from lib.server.pages.cases.view import mask_of, stack_of
from lib.storage.bounded_cache import BoundedCache
from tests.tiny import axis_affine, write_nifti

RED = (255, 0, 0)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def corner_stack(axcodes: str, spacing: tuple[float, float, float] = (1, 1, 1)) -> tuple[Stack, np.ndarray]:
    """A volume whose right, anterior, superior corner is bright, stored along any axes."""
    affine = axis_affine(axcodes, spacing)
    voxels = np.zeros((8, 10, 12), dtype=np.float32)
    far = [slice(5, None) if letter in "RAS" else slice(0, 3) for letter in axcodes]
    voxels[tuple(far)] = 100
    return Stack.of(voxels, affine), affine


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("plane", PLANES)
def test_right_is_on_the_left_and_anterior_or_superior_on_top(axcodes: str, plane: Plane) -> None:
    stack, _ = corner_stack(axcodes)
    picture = pixels(draw_slice(stack, plane, stack.count(plane) - 1, height=120))[..., 0]
    assert picture[2, 2] > 200, "the patient's right (in sagittal slices the front) is on the left"
    assert picture[-3, -3] < 50


def test_a_millimetre_is_as_long_in_both_directions() -> None:
    stack = Stack.of(np.random.default_rng(0).random((20, 30, 5), dtype=np.float32), axis_affine("RAS", (1, 2, 6)))
    assert Image.open(io.BytesIO(draw_slice(stack, "axial", 0, height=300))).size == (100, 300)
    assert Image.open(io.BytesIO(draw_slice(stack, "sagittal", 0, height=300))).size == (600, 300)
    assert stack.spacing_mm == (1, 2, 6)


def test_contour_lies_on_the_border_of_its_mask() -> None:
    stack = Stack.of(np.random.default_rng(0).random((20, 20, 4), dtype=np.float32), np.eye(4))
    mask = np.zeros((20, 20, 4), dtype=np.uint8)
    mask[5:15, 5:15, 2] = 1
    picture = pixels(draw_slice(stack, "axial", 2, [Contour(mask, {1: RED})], height=200))
    red = (picture == RED).all(axis=-1)
    assert red[50:52, 55:145].all() and red[55:145, 148:150].all()
    assert not red[60:140, 60:140].any() and not red[:48].any()
    assert not (pixels(draw_slice(stack, "axial", 1, [Contour(mask, {1: RED})], height=200)) == RED).all(axis=-1).any()


def test_a_picture_without_layers_is_grey_and_looks_the_same() -> None:
    stack = Stack.of(np.random.default_rng(0).random((20, 20, 4), dtype=np.float32), np.eye(4))
    nothing = Contour(np.zeros((20, 20, 4), dtype=np.uint8), {1: RED})
    plain, coloured = (draw_slice(stack, "axial", 2, layers, height=200) for layers in ([], [nothing]))
    assert [Image.open(io.BytesIO(png)).mode for png in (plain, coloured)] == ["L", "RGB"]
    assert np.array_equal(pixels(plain), pixels(coloured))
    assert len(plain) < len(coloured)


def test_lines_can_be_told_apart_without_colour() -> None:
    stack = Stack.of(np.random.default_rng(0).random((20, 20, 4), dtype=np.float32), np.eye(4))
    mask = np.zeros((20, 20, 4), dtype=np.uint8)
    mask[5:15, 5:15] = 1
    drawn = {
        line: np.count_nonzero(
            (pixels(draw_slice(stack, "axial", 2, [Contour(mask, {1: RED}, line)], height=200)) == RED).all(axis=-1)
        )
        for line in ("solid", "dashed", "dotted")
    }
    assert drawn["dotted"] / drawn["solid"] == pytest.approx(0.5, abs=0.05)
    assert drawn["dashed"] / drawn["solid"] == pytest.approx(0.6, abs=0.05)


def test_uncertainty_is_laid_over_where_it_is() -> None:
    stack = Stack.of(np.zeros((10, 10, 3), dtype=np.float32) + np.arange(3, dtype=np.float32), np.eye(4))
    values = np.zeros((10, 10, 3), dtype=np.float32)
    values[5:, :, 0] = 1
    picture = pixels(draw_slice(stack, "axial", 0, uncertainty=values, height=100))
    np.testing.assert_allclose(picture[50, 10], 0.8 * np.array(OVERLAY_RGB), atol=2)
    assert picture[50, 90].max() == 0


def test_slice_beyond_the_ends_is_the_last_one() -> None:
    stack, _ = corner_stack("RAS")
    assert draw_slice(stack, "axial", 10_000) == draw_slice(stack, "axial", 11)
    assert draw_slice(stack, "axial", -5) == draw_slice(stack, "axial", 0)


def test_constant_volume_is_drawn() -> None:
    stack = Stack.of(np.full((4, 4, 4), 7, dtype=np.float32), np.eye(4))
    assert pixels(draw_slice(stack, "coronal", 1)).max() == 0


def test_middle_is_the_slice_on_which_most_is_seen() -> None:
    mask = np.zeros((5, 6, 7), dtype=np.uint8)
    mask[1, 2, 3] = mask[2, 2, 3] = mask[2, 4, 5] = 1
    assert (middle_of(mask, "sagittal"), middle_of(mask, "coronal"), middle_of(mask, "axial")) == (2, 2, 3)
    assert middle_of(np.zeros_like(mask), "axial") is None


def test_masks_are_turned_as_their_images_are() -> None:
    _, affine = corner_stack("PIR")
    mask = np.zeros((8, 10, 12), dtype=np.uint8)
    mask[0, 0, -1] = 1  # anterior, superior, right
    assert reorient(mask, affine)[-1, -1, -1] == 1


def test_mask_on_nibabels_grid_is_shown_over_its_image(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).random((8, 9, 10), dtype=np.float32)
    image = nib.Nifti1Image(voxels, np.eye(4))
    image.header["sform_code"] = image.header["qform_code"] = 0
    image.header["vox_offset"] = 352
    (tmp_path / "x.nii").write_bytes(image.header.binaryblock + bytes(4) + voxels.tobytes("F"))
    mask = write_nifti(tmp_path / "mask.nii.gz", (voxels > 0.5).astype(np.uint8), nib.load(tmp_path / "x.nii").affine)
    volumes = BoundedCache(2**20)
    stack = stack_of(volumes, tmp_path / "x.nii")
    shown = mask_of(volumes, mask, tmp_path / "x.nii", stack.voxels.shape)
    np.testing.assert_array_equal(shown, stack.voxels > 0.5)
