"""Interpolation along an axis, against the formula and against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, Spacingd, ThresholdIntensityd
from scipy import ndimage

from lib.transforms.resample import Resampled, interpolate_axis
from tests.tiny import axis_affine, oblique_affine


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("chunk_numbers", [1, 100, 8_000_000])
def test_interpolation_along_an_axis_is_scipys(axis: int, chunk_numbers: int) -> None:
    volume = np.random.default_rng(0).normal(size=(7, 9, 11)).astype(np.float32)
    position = np.array([-3.0, 0.0, 0.25, 5.5, 5.999, 2.0, 30.0])
    coordinates = list(np.indices(volume.shape).astype(float))
    coordinates = [np.take(c, np.zeros(len(position), int), axis=axis) for c in coordinates]
    coordinates[axis] += position.reshape([-1 if i == axis else 1 for i in range(3)])
    expected = ndimage.map_coordinates(volume, coordinates, order=1, mode="nearest")
    found = interpolate_axis(torch.from_numpy(volume), axis, torch.from_numpy(position), chunk_numbers)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_interpolation_at_the_voxels_themselves_copies_nothing() -> None:
    volume = torch.rand(3, 4)
    assert interpolate_axis(volume, 1, torch.arange(4)) is volume


def test_interpolation_of_a_single_plane_repeats_it() -> None:
    assert interpolate_axis(torch.tensor([[5.0]]), 1, torch.tensor([-1.0, 0.0, 0.7])).tolist() == [[5.0, 5.0, 5.0]]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("positions", [[-3.0, 0.0, 0.25, 5.5, 5.999, 2.0, 30.0], None], ids=["between", "the voxels"])
def test_axis_read_from_its_end_and_clipped_is_that_of_the_turned_and_clipped_volume(
    axis: int, positions: list[float] | None
) -> None:
    volume = torch.from_numpy(np.random.default_rng(0).normal(size=(7, 9, 11)).astype(np.float32))
    kept = volume.clone()
    position = torch.arange(volume.shape[axis]) if positions is None else torch.tensor(positions, dtype=torch.float64)
    expected = interpolate_axis(volume.flip(axis).clamp(-0.5, 0.3), axis, position)
    found = interpolate_axis(volume, axis, position, from_end=True, bounds=(-0.5, 0.3))
    assert torch.equal(found, expected)
    assert torch.equal(volume, kept), "the given volume is not changed"


@pytest.mark.parametrize(
    ("axcodes", "affine"),
    [
        ("RAS", axis_affine("RAS", (0.7, 1.3, 2.1), (3, 4, 5))),
        ("RAS", axis_affine("RAS", (1.0, 0.5, 1.0))),
        ("RAS", oblique_affine("RAS", (0.93, 0.83, 1.57), degrees=(20, 10, -14))),
        ("RAS", axis_affine("LPS", (0.7, 1.3, 2.1), (3, 4, 5))),
        ("LIP", axis_affine("ASR", (1.0, 0.9, 1.1))),
        ("PIR", oblique_affine("SAL", (0.93, 0.83, 1.57), degrees=(20, 10, -14))),
        ("LPS", axis_affine("RAS", (1.1, 1.0, 0.9))),
    ],
    ids=["axes", "one axis", "oblique", "turned round", "permuted", "permuted and oblique", "no interpolation"],
)
def test_resampling_gives_monais_voxels_and_affine(axcodes: str, affine: np.ndarray) -> None:
    random = np.random.default_rng(0)
    data = {
        "image": MetaTensor(torch.from_numpy(random.random((1, 23, 18, 21), dtype=np.float32)), affine=affine),
        "label": MetaTensor(torch.from_numpy(random.integers(0, 9, (1, 23, 18, 21), dtype=np.uint8)), affine=affine),
    }
    keys, spacing, modes = ("image", "label"), (1.1, 1.0, 0.9), ("bilinear", "nearest")
    chain = Compose(
        [
            Orientationd(keys, axcodes, labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            ThresholdIntensityd("image", threshold=0.2, above=True, cval=0.2),
            ThresholdIntensityd("image", threshold=0.7, above=False, cval=0.7),
            Spacingd(keys, spacing, mode=modes, padding_mode="border"),
        ]
    )
    expected = chain(data)
    found = Resampled(keys, axcodes, spacing, modes, bounds=(0.2, 0.7))(data)
    for key in keys:
        assert found[key].shape == expected[key].shape
        np.testing.assert_allclose(found[key].affine.numpy(), expected[key].affine.numpy(), atol=1e-6)
    np.testing.assert_allclose(found["image"].numpy(), expected["image"].numpy(), atol=2e-5)
    assert found["label"].dtype is torch.uint8
    assert (found["label"].numpy() == expected["label"].numpy()).mean() > 0.999
