"""Sliding windows: the labels of a direct forward pass, and of MONAI's way over the whole volume."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference
from torch import nn

from lib.infers.logit_margins import MOST_STEPS, STEP
from lib.infers.predictor import Stitching, body_box, choose_overlap, occupied_sides, predict, window_starts
from lib.networks.placement import Placement
from lib.networks.unetr import build_unetr
from tests.tiny import tiny_preset

CPU, FP32 = torch.device("cpu"), torch.float32


class Constant(nn.Module):
    """The same class everywhere, whatever it is shown."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        logits = torch.tensor([0.1, 0.2, 0.9]).reshape(1, 3, 1, 1, 1)
        return logits.expand(len(windows), 3, *windows.shape[2:])


class Rounded(nn.Module):
    """Each voxel's class is its intensity: any window in the wrong place shows."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return -(windows - torch.arange(3, device=windows.device).reshape(1, 3, 1, 1, 1)).abs()


def _random_unetr(roi_size: list[int]) -> nn.Module:
    torch.manual_seed(0)
    return build_unetr(tiny_preset(roi_size=roi_size)).eval()


@pytest.mark.parametrize(
    ("size", "edge", "overlap", "expected"),
    [
        (16, 16, 0.25, [0]),
        (17, 16, 0.25, [0, 1]),
        (32, 16, 0.0, [0, 16]),
        (33, 16, 0.0, [0, 8, 17]),
        (40, 16, 0.25, [0, 12, 24]),
        (100, 48, 0.25, [0, 26, 52]),
        (18, 16, 0.99, [0, 1, 2]),
    ],
)
def test_windows_cover_an_axis_and_end_with_it(size: int, edge: int, overlap: float, expected: list[int]) -> None:
    assert window_starts(size, edge, overlap) == expected


def test_prediction_of_one_window_is_the_direct_forward_pass() -> None:
    network = _random_unetr([16, 32, 16])
    image = torch.randn(1, 16, 32, 16)
    with torch.inference_mode():
        direct = network(image[None])[0].argmax(0).numpy()
    found = predict(network, image, Placement(tiny_preset(roi_size=[16, 32, 16]), CPU, FP32)).labels
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, direct)


def _blend_whole_volume(network: nn.Module, image: torch.Tensor, overlap: float) -> torch.Tensor:
    """Gaussian blending of all windows in one tensor of (classes, X, Y, Z)."""
    weights = compute_importance_map((16, 16, 16), mode="gaussian")
    starts = itertools.product(*(window_starts(size, 16, overlap) for size in image.shape[1:]))
    sums: torch.Tensor | None = None
    with torch.inference_mode():
        for x, y, z in starts:
            box = (slice(None), slice(x, x + 16), slice(y, y + 16), slice(z, z + 16))
            logits = network(image[box][None])[0]
            sums = torch.zeros(len(logits), *image.shape[1:]) if sums is None else sums
            sums[box] += weights * logits
    assert sums is not None
    return sums


@pytest.mark.parametrize(("shape", "overlap"), [((40, 17, 24), 0.25), ((16, 40, 24), 0.5), ((18, 22, 32), 0.0)])
def test_prediction_is_monais_where_its_windows_lie_evenly(shape: tuple[int, int, int], overlap: float) -> None:
    network, image = _random_unetr([16, 16, 16]), torch.randn(1, *shape)
    with torch.inference_mode():
        logits = sliding_window_inference(image[None], (16, 16, 16), 1, network, overlap=overlap, mode="gaussian")
    preset = tiny_preset(inference={"overlap": overlap, "window_batch_size": 1})
    found = predict(network, image, Placement(preset, CPU, FP32)).labels
    # Sums in another order may decide a tie of random logits otherwise.
    assert (found == logits[0].argmax(0).numpy()).mean() > 0.9999


@pytest.mark.parametrize(("shape", "overlap"), [((40, 17, 24), 0.25), ((16, 41, 20), 0.5), ((18, 22, 39), 0.0)])
def test_prediction_slab_by_slab_is_that_of_the_whole_volume(shape: tuple[int, int, int], overlap: float) -> None:
    network, image = _random_unetr([16, 16, 16]), torch.randn(1, *shape)
    expected = _blend_whole_volume(network, image, overlap).argmax(0).numpy()
    preset = tiny_preset(inference={"overlap": overlap, "window_batch_size": 1})
    found = predict(network, image, Placement(preset, CPU, FP32)).labels
    # Sums in another order may decide a tie of random logits otherwise.
    assert (found == expected).mean() > 0.9999


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("shape", [(16, 16, 16), (45, 16, 23), (19, 50, 16), (16, 20, 37)])
def test_prediction_puts_every_window_in_its_place(shape: tuple[int, int, int], batch: int) -> None:
    classes = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (1, *shape))).float()
    preset = tiny_preset(inference={"overlap": 0.4, "window_batch_size": batch})
    found = predict(Rounded(), classes, Placement(preset, CPU, FP32)).labels
    np.testing.assert_array_equal(found, classes[0].numpy())


def test_prediction_with_batches_ahead_puts_every_window_in_its_place() -> None:
    """As a GPU does it: the next batch is computed before the one before it is fetched."""
    classes = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (1, 45, 16, 23))).float()
    where = Placement(tiny_preset(inference={"overlap": 0.4}), CPU, FP32)
    found = predict(Rounded(), classes, where, Stitching(2), ahead=1)
    np.testing.assert_array_equal(found.labels, classes[0].numpy())


@pytest.mark.gpu
@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("image_on", ["cpu", "cuda"])
def test_prediction_on_a_gpu_puts_every_window_in_its_place(image_on: str, on_device: bool) -> None:
    classes = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (1, 45, 50, 23))).float()
    stitching, preset = Stitching(3, on_device, 2), tiny_preset(inference={"overlap": 0.4})
    found = predict(Rounded(), classes.to(image_on), Placement(preset, torch.device("cuda"), FP32), stitching)
    np.testing.assert_array_equal(found.labels, classes[0].numpy())


def test_prediction_of_a_constant_network_is_constant() -> None:
    found = predict(Constant(), torch.randn(1, 33, 20, 47), Placement(tiny_preset(), CPU, FP32)).labels
    assert np.unique(found).tolist() == [2]


def test_prediction_overlap_of_a_call_goes_before_the_presets() -> None:
    class Counting(Constant):
        calls = 0

        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            self.calls += len(windows)
            return super().forward(windows)

    image = torch.randn(1, 64, 16, 16)
    counting = Counting()
    predict(counting, image, Placement(tiny_preset(), CPU, FP32), overlap=0.0)
    assert counting.calls == 4
    predict(counting, image, Placement(tiny_preset(), CPU, FP32))
    assert counting.calls == 4 + len(window_starts(64, 16, 0.25))


def test_prediction_in_bf16_agrees_with_fp32() -> None:
    network, image = _random_unetr([16, 16, 16]), torch.randn(1, 16, 16, 30)
    whole = predict(network, image, Placement(tiny_preset(), CPU, FP32)).labels
    half = predict(network, image, Placement(tiny_preset(), CPU, torch.bfloat16)).labels
    assert (whole == half).mean() > 0.95


@pytest.mark.parametrize("bands", [1, 2, 5])
@pytest.mark.parametrize("shape", [(45, 40, 23), (19, 50, 16), (16, 20, 37)])
def test_prediction_in_bands_is_that_of_the_whole(shape: tuple[int, int, int], bands: int) -> None:
    network, image = _random_unetr([16, 16, 16]), torch.randn(1, *shape)
    whole = predict(network, image, Placement(tiny_preset(), CPU, FP32), entropy=True)
    found = predict(
        network, image, Placement(tiny_preset(), CPU, FP32), Stitching(window_batch=3, bands=bands), entropy=True
    )
    assert (found.labels == whole.labels).mean() > 0.9999
    assert found.entropy is not None
    np.testing.assert_allclose(found.entropy, whole.entropy, atol=2e-3)


def test_entropy_of_a_constant_network_is_that_of_its_probabilities() -> None:
    image = torch.randn(1, 33, 20, 47)
    found = predict(Constant(), image, Placement(tiny_preset(), CPU, FP32), entropy=True)
    probabilities = np.exp([0.1, 0.2, 0.9]) / np.exp([0.1, 0.2, 0.9]).sum()
    expected = -(probabilities * np.log(probabilities)).sum() / np.log(3)
    assert found.entropy is not None
    assert found.entropy.shape == (33, 20, 47)
    np.testing.assert_allclose(found.entropy, expected, atol=1e-3)
    assert predict(Constant(), image, Placement(tiny_preset(), CPU, FP32)).entropy is None


def test_entropy_is_that_of_the_whole_volumes_blended_logits() -> None:
    network, image = _random_unetr([16, 16, 16]), torch.randn(1, 40, 17, 24)
    with torch.inference_mode():
        logits = sliding_window_inference(image[None], (16, 16, 16), 1, network, overlap=0.25, mode="gaussian")[0]
    probabilities = logits.softmax(0)
    expected = -(probabilities * probabilities.log()).sum(0) / np.log(3)
    found = predict(network, image, Placement(tiny_preset(), CPU, FP32), entropy=True)
    np.testing.assert_allclose(found.entropy, expected.numpy(), atol=2e-3)


@pytest.mark.parametrize("bands", [1, 3])
def test_margins_are_those_of_the_whole_volumes_blended_logits(bands: int) -> None:
    network, image = _random_unetr([16, 16, 16]), torch.randn(1, 40, 17, 24)
    with torch.inference_mode():
        logits = sliding_window_inference(image[None], (16, 16, 16), 1, network, overlap=0.25, mode="gaussian")[0]
    (first, then), order = (found.numpy() for found in logits.topk(2, dim=0)[0]), logits.topk(2, dim=0)[1].numpy()
    where = Placement(tiny_preset(), CPU, FP32)
    found = predict(network, image, where, Stitching(bands=bands), margins=True)
    assert found.margins is not None and found.entropy is None
    np.testing.assert_array_equal(found.labels, predict(network, image, where).labels)
    np.testing.assert_array_equal(found.margins.labels, found.labels)
    assert (found.margins.second == order[1]).mean() > 0.999
    assert abs(found.margins.margin * STEP - (first - then)).max() <= STEP


def _phantom() -> torch.Tensor:
    """A small body of noise in a lot of air."""
    image = torch.zeros(1, 80, 60, 70)
    image[:, 30:50, 22:40, 40:60] = torch.rand(1, 20, 18, 20) + 0.1
    return image


def test_air_is_background_and_no_window_looks_at_it() -> None:
    image = _phantom()
    found = predict(Constant(), image, Placement(tiny_preset(), CPU, FP32), entropy=True, margins=True)
    everything = tiny_preset(inference={"skip_air": False})
    looked = predict(Constant(), image, Placement(everything, CPU, FP32))
    assert np.unique(looked.labels).tolist() == [2]
    assert looked.windows == np.prod([len(window_starts(size, 16, 0.25)) for size in image.shape[1:]])
    assert found.windows < looked.windows / 5
    assert (found.labels[30:50, 22:40, 40:60] == 2).all()
    assert found.labels[:20].max() == found.labels[60:].max() == 0
    assert found.margins is not None and (found.margins.margin[60:] == MOST_STEPS).all()
    assert (found.margins.margin[30:50, 22:40, 40:60] == 7).all() and found.margins.second[40, 30, 50] == 1
    assert found.entropy is not None
    assert found.entropy[:20].max() == 0


def test_window_of_air_within_the_body_box_is_not_computed() -> None:
    image = torch.zeros(1, 64, 64, 16)
    image[:, :8, :8], image[:, 56:, 56:] = 1.0, 1.0
    found = predict(Constant(), image, Placement(tiny_preset(), CPU, FP32), overlap=0.0)
    assert (found.windows, found.skipped) == (2, 14)


@pytest.mark.parametrize("corner", [(0, 0, 0), (70, 50, 60), (35, 20, 30)])
def test_body_box_holds_the_body_with_its_margin_and_at_least_a_window(corner: tuple[int, int, int]) -> None:
    image = torch.zeros(80, 60, 70)
    x, y, z = corner
    image[x : x + 10, y : y + 3, z : z + 10] = 1
    box = body_box(occupied_sides(image, air=0.0), roi=(16, 32, 16), overlap=0.25)
    for axis, (start, size) in enumerate(zip(corner, (10, 3, 10), strict=True)):
        assert 0 <= box[axis].start <= max(0, start - 2)
        assert image.shape[axis] >= box[axis].stop >= min(image.shape[axis], start + size + 2)
        assert box[axis].stop - box[axis].start >= (16, 32, 16)[axis]


@pytest.mark.parametrize(
    ("body", "margin", "windows"),
    [(40, 8, 2), (50, 3, 2), (52, 2, 2), (53, 8, 3), (60, 8, 3), (70, 5, 3)],
)
def test_margin_is_smaller_where_that_saves_a_row_of_windows(body: int, margin: int, windows: int) -> None:
    """Windows of 32 begin every 24 voxels: 1, 2, 3 of them see 32, 56, 80."""
    image = torch.zeros(120, 16, 16)
    image[30 : 30 + body] = 1
    reach = body_box(occupied_sides(image, air=0.0), roi=(32, 16, 16), overlap=0.25)[0]
    assert (reach.start, reach.stop) == (30 - margin, 30 + body + margin)
    assert len(window_starts(reach.stop - reach.start, 32, 0.25)) == windows


def test_image_of_nothing_but_air_is_background() -> None:
    found = predict(Constant(), torch.zeros(1, 30, 30, 30), Placement(tiny_preset(), CPU, FP32))
    assert (found.windows, int(found.labels.max())) == (0, 0)


def test_windows_overlap_less_where_they_would_be_too_many() -> None:
    preset = tiny_preset(inference={"overlap": 0.5, "min_overlap": 0.25, "max_windows": 4})
    few, many = torch.rand(1, 32, 16, 16) + 0.1, torch.rand(1, 64, 16, 16) + 0.1
    assert choose_overlap((32, 16, 16), preset) == 0.5
    assert predict(Constant(), few, Placement(preset, CPU, FP32)).windows == 3
    assert choose_overlap((52, 16, 16), preset) == 0.25
    # Five windows are more than allowed, and still so few only with the least overlap.
    assert choose_overlap((64, 16, 16), preset) == 0.25
    assert predict(Constant(), many, Placement(preset, CPU, FP32)).windows == 5


def test_overlap_is_chosen_for_the_body_alone() -> None:
    preset = tiny_preset(inference={"overlap": 0.5, "min_overlap": 0.0, "max_windows": 8})
    image = torch.zeros(1, 64, 64, 64)
    image[:, 30:46, 30:46, 30:46] = 1.0
    # With 2 voxels of air around it, 20 voxels: two windows along each axis.
    assert predict(Constant(), image, Placement(preset, CPU, FP32)).windows == 8
