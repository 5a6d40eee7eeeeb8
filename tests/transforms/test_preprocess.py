"""What the network sees: the numbers of the intensities, the geometry, and that training sees the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lib.transforms.preprocess import IMAGE, LABEL, as_meta_tensor, build_preprocessing, preprocess_volume
from lib.transforms.volume import Volume
from tests.tiny import axis_affine, boxes, oblique_affine, tiny_preset

WIDE_WINDOW = {"kind": "window", "lower": -1000, "upper": 1000}


def _ramp(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """A volume whose intensity is a linear function of the position in millimetres."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return (indices @ affine[:3, :3].T + affine[:3, 3]) @ np.array([0.3, -0.5, 0.7])


@pytest.mark.parametrize(
    "affine",
    [axis_affine("PIR", (0.7, 1.3, 2.1), (3, 4, 5)), oblique_affine("PIR", (0.7, 1.3, 2.1)), oblique_affine("LSA")],
)
def test_geometry_of_a_resampled_image_is_right_to_a_fraction_of_a_voxel(affine: np.ndarray) -> None:
    preset = tiny_preset(spacing_mm=[1.1, 0.9, 1.6], axcodes="LPS", roi_size=[48, 48, 48], intensity=WIDE_WINDOW)
    shape = (24, 20, 14)
    seen = preprocess_volume(Volume(_ramp(shape, affine).astype(np.float32), affine), preset)
    seen_affine = seen.affine.numpy()
    found, expected = seen[0].numpy() * 2000 - 1000, _ramp(seen.shape[1:], seen_affine)
    indices = np.stack(np.meshgrid(*map(np.arange, found.shape), indexing="ij"), axis=-1)
    position = indices @ seen_affine[:3, :3].T + seen_affine[:3, 3] - affine[:3, 3]
    source = position @ np.linalg.inv(affine[:3, :3]).T
    inside = ((source >= 0) & (source <= np.array(shape) - 1)).all(-1)
    assert inside.sum() > 3000
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(seen_affine[:3, :3], axis=0), preset.spacing_mm)


def test_axes_of_the_network_point_where_the_preset_says() -> None:
    seen = preprocess_volume(Volume(boxes()[0], axis_affine("SAL")), tiny_preset(axcodes="LPI"))
    np.testing.assert_allclose(seen.affine.numpy()[:3, :3], np.diag([-1, -1, -1]), atol=1e-12)


def test_window_maps_its_bounds_to_0_and_1_and_clips() -> None:
    preset = tiny_preset(intensity={"kind": "window", "lower": -175, "upper": 250})
    voxels = np.full((16, 16, 16), -175, dtype=np.float32)
    voxels[0], voxels[1], voxels[2], voxels[3] = -1024, 37.5, 250, 3000
    seen = preprocess_volume(Volume(voxels, np.eye(4)), preset)[0]
    assert [round(float(seen[i, 8, 8]), 6) for i in range(5)] == [0, 0.5, 1, 1, 0]
    assert seen.dtype == torch.float32


def test_zscore_is_of_the_clipped_values_of_the_whole_case() -> None:
    voxels = np.random.default_rng(0).gamma(2.0, 100.0, (20, 20, 20)).astype(np.float32)
    voxels[0, 0, 0] = 1e7  # one bright artefact must not set the scale
    seen = preprocess_volume(Volume(voxels, np.eye(4)), tiny_preset())[0].numpy()
    low, high = np.percentile(voxels, [0.5, 99.5])
    clipped = voxels.clip(low, high).astype(np.float64)
    np.testing.assert_allclose(seen, (clipped - clipped.mean()) / clipped.std(), atol=2e-4)
    assert abs(seen.mean()) < 1e-4
    assert abs(seen.std() - 1) < 1e-4


def test_zscore_does_not_depend_on_the_scanners_scale() -> None:
    image = boxes()[0]
    first = preprocess_volume(Volume(image, np.eye(4)), tiny_preset())
    second = preprocess_volume(Volume(image * 1234 + 5678, np.eye(4)), tiny_preset())
    torch.testing.assert_close(first.as_tensor(), second.as_tensor(), atol=1e-3, rtol=0)


def test_zscore_of_a_case_that_clips_to_one_value_is_0() -> None:
    voxels = np.zeros((32, 32, 32), dtype=np.float32)
    voxels[0, 0, 0] = 1
    seen = preprocess_volume(Volume(voxels, np.eye(4)), tiny_preset())
    assert not seen.any()


@pytest.mark.parametrize(("padding", "beyond"), [("edge", 0.75), ("constant", 0.0)])
def test_small_image_is_padded_around_it(padding: str, beyond: float) -> None:
    preset = tiny_preset(padding=padding, intensity={"kind": "window", "lower": 0, "upper": 100})
    affine = oblique_affine("LPS")
    seen = preprocess_volume(Volume(np.full((8, 16, 20), 75, dtype=np.float32), affine), preset)
    assert seen.shape == (1, 16, 16, 20)
    assert float(seen[0, 4:12].min()) == float(seen[0, 4:12].max()) == 0.75
    assert float(seen[0, 0, 3, 3]) == float(seen[0, 15, 3, 3]) == beyond


def test_label_is_padded_with_background_even_where_the_image_repeats_its_edge() -> None:
    chain = build_preprocessing(tiny_preset(padding="edge"), (IMAGE, LABEL))
    image, label = np.random.default_rng(0).normal(size=(8, 16, 16)), np.ones((8, 16, 16))
    seen = chain({IMAGE: as_meta_tensor(image, np.eye(4)), LABEL: as_meta_tensor(label, np.eye(4))})
    assert float(seen[LABEL].sum()) == 8 * 16 * 16


def test_label_of_a_resampled_case_keeps_its_values() -> None:
    preset = tiny_preset(spacing_mm=[0.7, 1.3, 0.9])
    image, label = boxes()
    affine = oblique_affine("PIR", (1.1, 0.8, 1.4))
    chain = build_preprocessing(preset, (IMAGE, LABEL))
    seen = chain({IMAGE: as_meta_tensor(image, affine), LABEL: as_meta_tensor(label, affine)})
    assert sorted(seen[LABEL].unique().tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    "changes",
    [{}, {"spacing_mm": [1.2, 0.7, 2.0]}, {"intensity": WIDE_WINDOW, "padding": "constant", "axcodes": "LPS"}],
)
def test_training_sees_the_image_that_inference_sees(changes: dict[str, Any]) -> None:
    preset, affine = tiny_preset(**changes), oblique_affine("PIR", (1.1, 0.8, 1.4))
    image, label = boxes((13, 18, 20))
    chain = build_preprocessing(preset, (IMAGE, LABEL))
    trained_on = chain({IMAGE: as_meta_tensor(image, affine), LABEL: as_meta_tensor(label, affine)})
    served = preprocess_volume(Volume(image, affine), preset)
    torch.testing.assert_close(trained_on[IMAGE].as_tensor(), served.as_tensor(), rtol=0, atol=0)
    np.testing.assert_array_equal(trained_on[IMAGE].affine.numpy(), served.affine.numpy())
    np.testing.assert_array_equal(trained_on[LABEL].affine.numpy(), served.affine.numpy())


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("spacing_mm", [[1.1, 0.9, 1.6], [0.7, 1.3, 2.1]], ids=["resampled", "as it is"])
def test_order_of_the_voxels_in_memory_changes_nothing(order: Any, spacing_mm: list[float]) -> None:
    preset = tiny_preset(spacing_mm=spacing_mm, axcodes="LPS", intensity=WIDE_WINDOW)
    image, label = boxes((40, 50, 30))
    affine, whole = oblique_affine("PIR", (0.7, 1.3, 2.1)), build_preprocessing(preset, (IMAGE, LABEL))
    every_other = np.repeat(image, 2, axis=1)[:, ::2]  # neither order
    expected = whole({IMAGE: as_meta_tensor(every_other, affine), LABEL: as_meta_tensor(label, affine)})
    given = {IMAGE: np.array(image, order=order), LABEL: np.array(label, order=order)}
    found = whole({key: as_meta_tensor(voxels, affine) for key, voxels in given.items()})
    for key in (IMAGE, LABEL):
        assert found[key].is_contiguous()
        torch.testing.assert_close(found[key].as_tensor(), expected[key].as_tensor(), rtol=0, atol=0)
    np.testing.assert_array_equal(given[IMAGE], image)


def test_given_volume_is_left_as_it_was() -> None:
    image = boxes()[0]
    before = image.copy()
    preprocess_volume(Volume(image, np.eye(4)), tiny_preset(intensity=WIDE_WINDOW))
    np.testing.assert_array_equal(image, before)


@pytest.mark.gpu
@pytest.mark.parametrize("intensity", [WIDE_WINDOW, {"kind": "zscore"}])
def test_gpu_sees_what_the_host_sees(intensity: dict[str, Any]) -> None:
    preset = tiny_preset(spacing_mm=[1.1, 0.9, 1.6], axcodes="LPS", roi_size=[48, 48, 48], intensity=intensity)
    volume = Volume(boxes((40, 50, 30))[0], oblique_affine("PIR", (0.7, 1.3, 2.1)))
    host, there = preprocess_volume(volume, preset), preprocess_volume(volume, preset, torch.device("cuda"))
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.as_subclass(torch.Tensor).cpu(), host.as_subclass(torch.Tensor), rtol=0, atol=1e-4)
    torch.testing.assert_close(there.affine.cpu(), host.affine)


def test_ct_that_was_stored_clipped_looks_to_the_network_like_the_whole_one() -> None:
    """Borders between air, tissue and bone, on a grid that is resampled."""
    preset = tiny_preset(intensity={"kind": "window", "lower": -125, "upper": 275}, spacing_mm=[1.7, 1.3, 2.2])
    whole = np.random.default_rng(0).choice([-1000.0, 40.0, 1200.0], (30, 28, 20)).astype(np.float32)
    seen = [preprocess_volume(Volume(v, oblique_affine("LPS")), preset) for v in (whole, whole.clip(-125, 275))]
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
