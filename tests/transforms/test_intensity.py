"""Intensity windows and percentiles, against MONAI's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import ClipIntensityPercentilesd, ScaleIntensityRanged

from lib.transforms.intensity import ClippedToPercentiles, Windowed
from lib.transforms.preprocess import as_meta_tensor
from tests.tiny import axis_affine


def test_window_is_monais_and_leaves_its_input_alone() -> None:
    image = MetaTensor(torch.linspace(-500, 500, 60).reshape(1, 3, 4, 5), affine=torch.eye(4))
    before = image.clone()
    expected = ScaleIntensityRanged("image", -175, 250, b_min=0.0, b_max=1.0, clip=True)({"image": image})["image"]
    found = Windowed(("image",), -175, 250)({"image": image})["image"]
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-7)
    np.testing.assert_array_equal(image.numpy(), before.numpy())


@pytest.mark.parametrize("shape", [(20, 21, 22), (110, 100, 95)], ids=["small", "large"])
@pytest.mark.parametrize("lies", ["C", "F"])
def test_percentiles_are_those_of_monai(shape: tuple[int, int, int], lies: str) -> None:
    voxels = np.random.default_rng(0).normal(300, 100, shape).astype(np.float32)
    voxels[0, 0, :5] = 1e6, -1e6, 2e5, 1e4, -5e4
    image = as_meta_tensor(np.asarray(voxels, order=lies), axis_affine("RAS", (1, 2, 3)))
    expected = ClipIntensityPercentilesd("image", 0.5, 99.5)({"image": image.clone()})["image"]
    found = ClippedToPercentiles(("image",), 0.5, 99.5)({"image": image})["image"]
    torch.testing.assert_close(found.as_tensor(), expected.as_tensor(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(found.affine, image.affine)
    assert found.stride() == image.stride(), "it is not turned in memory"
    assert float(image.max()) == 1e6, "the image itself stays as it is"
