"""From an image on any grid to a mask on the same grid."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lib.configs.preset import Preset
from lib.errors import CheckpointError, ImageError, MemoryBudgetError
from lib.infers.plan import Plan, Planner
from lib.infers.segmenter import Segmentation, Segmenter
from lib.networks.checkpoint import Checkpoint
from lib.networks.unetr import build_unetr
from lib.transforms.volume import Volume
from tests.tiny import boxes, oblique_affine, tiny_preset

CPU = torch.device("cpu")
HALVES = {"kind": "window", "lower": 0, "upper": 200}


class Threshold(nn.Module):
    """Intensities of the network's scale 0, 0.5 and 1 are background, label 1 and label 2."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return -(windows * 2 - torch.arange(3).reshape(1, 3, 1, 1, 1)).abs()


def _segmenter(**changes: object) -> Segmenter:
    return Segmenter(Threshold(), tiny_preset(intensity=HALVES, **changes), CPU, "fp32")


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SAR", "IPL"])
@pytest.mark.parametrize("shape", [(20, 18, 17), (8, 18, 30), (5, 16, 16)])
def test_mask_is_on_the_images_own_grid_to_the_voxel(shape: tuple[int, int, int], axcodes: str) -> None:
    label = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    volume = Volume(label.astype(np.float32) * 100, oblique_affine(axcodes))
    np.testing.assert_array_equal(_segmenter().segment(volume).labels, label)


def test_mask_of_an_anisotropic_oblique_image_overlaps_what_is_there() -> None:
    image = np.zeros((50, 40, 20), dtype=np.float32)
    image[10:40, 10:30, 5:15], image[20:30, 15:25, 8:12] = 100, 200
    volume = Volume(image, oblique_affine("PIL", (0.7, 0.9, 2.5)))
    found = _segmenter(spacing_mm=[1.0, 1.2, 1.1]).segment(volume).labels
    assert found.shape == image.shape
    for index in (1, 2):
        expected = image == index * 100
        overlap = 2 * ((found == index) & expected).sum() / ((found == index).sum() + expected.sum())
        assert overlap > 0.85


class Steep(Threshold):
    """Ten times as sure."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return 10 * super().forward(windows)


@pytest.mark.parametrize("level_mm", [26.0, 27.0, 28.0])
def test_border_lies_between_voxels_where_the_network_is_undecided(level_mm: float) -> None:
    """Intensities rise by 5 a millimetre, and label 1 begins at 50; the network's voxels are 3 mm wide."""
    ramp = np.clip(5 * (np.arange(64.0) - level_mm) + 50, 0, 80)
    volume = Volume(np.broadcast_to(ramp[:, None, None], (64, 48, 48)).astype(np.float32), np.eye(4))
    found = {}
    for restore in ("nearest", "linear"):
        preset = tiny_preset(intensity=HALVES, spacing_mm=[3.0, 3.0, 3.0], inference={"restore": restore})
        labels = Segmenter(Steep(), preset, CPU, "fp32").segment(volume).labels
        assert set(np.unique(labels)) == {0, 1}
        found[restore] = np.argmax(labels[:, 24, 24] == 1)
    assert found["linear"] in (level_mm, level_mm + 1)
    # the middle between two voxels of the network, wherever the border is
    assert found["nearest"] % 3 == 2


def test_removed_component_lends_no_weight_to_its_second_label() -> None:
    image = np.zeros((60, 48, 48), dtype=np.float32)
    image[6:30, 12:36, 12:36], image[42:48, 24:30, 24:30] = 100, 104
    volume = Volume(image, np.eye(4))
    preset = tiny_preset(
        intensity=HALVES, spacing_mm=[3.0] * 3, inference={"restore": "linear", "largest_component": True}
    )
    labels = Segmenter(Steep(), preset, CPU, "fp32").segment(volume).labels
    assert labels[18, 24, 24] == 1 and not labels[36:].any()


def test_largest_component_is_the_presets_choice_unless_asked() -> None:
    image = np.zeros((30, 20, 20), dtype=np.float32)
    image[2:10, 5:15, 5:15], image[25, 5, 5] = 100, 100
    volume = Volume(image, np.eye(4))
    keeping = _segmenter(inference={"largest_component": False})
    cleaning = _segmenter(inference={"largest_component": True})
    assert [int((s.segment(volume).labels == 1).sum()) for s in (keeping, cleaning)] == [801, 800]
    assert int((keeping.segment(volume, largest_component=True).labels == 1).sum()) == 800
    assert int((cleaning.segment(volume, largest_component=False).labels == 1).sum()) == 801


def test_largest_component_may_be_chosen_label_by_label() -> None:
    image = np.zeros((30, 20, 20), dtype=np.float32)
    image[2:10, 5:15, 5:15], image[25, 5, 5] = 100, 100
    image[12:20, 5:15, 5:15], image[25, 15, 15] = 200, 200
    found = _segmenter(inference={"largest_component": ["Left Box"]}).segment(Volume(image, np.eye(4))).labels
    assert [int((found == index).sum()) for index in (1, 2)] == [800, 801]


def test_structure_of_which_the_network_is_nowhere_certain_is_left_out() -> None:
    image = np.zeros((30, 20, 20), dtype=np.float32)
    image[2:10, 5:15, 5:15], image[20:28, 5:15, 5:15] = 200, 155  # both nearest to label 2; the second nearly half-way
    volume = Volume(image, np.eye(4))
    everything = _segmenter()
    entropy = everything.segment(volume, entropy=True).entropy
    assert entropy is not None
    certain, uncertain = float(entropy[5, 10, 10]), float(entropy[24, 10, 10])
    assert certain < uncertain
    careful = _segmenter(inference={"component_entropy": {"core": (certain + uncertain) / 2}})
    counts = [int((s.segment(volume).labels == 2).sum()) for s in (everything, careful)]
    assert counts == [1600, 800]
    assert careful.segment(volume).entropy is None, "on the image's grid it is told where it was asked for only"
    assert int((careful.segment(volume, largest_component=False).labels == 2).sum()) == 1600


@pytest.mark.parametrize("restore", ["nearest", "linear"])
def test_boxes_hold_each_label_after_components_were_removed(restore: str) -> None:
    image = np.zeros((45, 30, 30), dtype=np.float32)
    image[3:15, 6:18, 9:21], image[39:42, 24:27, 3:6] = 100, 100
    preset = tiny_preset(
        intensity=HALVES, spacing_mm=[1.5] * 3, inference={"largest_component": True, "restore": restore}
    )
    found = Segmenter(Steep(), preset, CPU, "fp32").segment(Volume(image, np.eye(4)))
    assert found.boxes is not None
    one, two = found.boxes
    assert one is not None and two is None
    assert (found.labels == 1).sum() == (found.labels[one] == 1).sum() > 1000
    assert all(part.stop <= edge for part, edge in zip(one, (18, 21, 24), strict=True)), "the small part is not in it"


def test_latencies_are_told_for_each_stage() -> None:
    found = _segmenter().segment(Volume(boxes()[0], np.eye(4)))
    assert list(found.latencies_ms) == ["plan", "preprocess", "network", "postprocess", "restore"]
    assert all(value >= 0 for value in found.latencies_ms.values())


def test_answer_tells_the_windows_that_there_were_and_not_those_that_there_could_have_been() -> None:
    image = np.zeros((60, 60, 60), dtype=np.float32)
    image[22:38, 22:38, 22:38] = 100
    segmenter, volume = _segmenter(), Volume(image, np.eye(4))
    before, after = segmenter.plan(volume), segmenter.segment(volume).plan
    assert before.windows == 5**3
    assert after.windows == 2**3, "windows of 16 with 2 voxels around a box of 16"
    assert after.seconds == pytest.approx(before.seconds * after.windows / before.windows)


def test_image_that_cannot_be_segmented_is_refused_before_anything_is_computed() -> None:
    class Never(nn.Module):
        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    segmenter = Segmenter(Never(), tiny_preset(), CPU)
    with pytest.raises(ImageError, match="'scan' is constant"):
        segmenter.segment(Volume(np.zeros((20, 20, 20), dtype=np.float32), np.eye(4)), name="scan")


def test_segmenter_from_a_checkpoint_is_deterministic_and_in_evaluation_mode(preset: Preset) -> None:
    dropping = preset.model_copy(update={"network": preset.network.model_copy(update={"dropout_rate": 0.5})})
    torch.manual_seed(0)
    checkpoint = Checkpoint(dict(build_unetr(dropping).state_dict()), dropping)
    volume = Volume(boxes()[0], oblique_affine())
    first, second = (Segmenter.from_checkpoint(checkpoint, dropping, CPU, "fp32") for _ in range(2))
    assert not first.network.training
    np.testing.assert_array_equal(first.segment(volume).labels, second.segment(volume).labels)
    np.testing.assert_array_equal(first.segment(volume).labels, first.segment(volume).labels)


def test_segmenter_from_weights_of_another_size_names_the_keys(preset: Preset) -> None:
    other = tiny_preset(roi_size=[32, 16, 16])
    checkpoint = Checkpoint(dict(build_unetr(other).state_dict()), other)
    with pytest.raises(CheckpointError, match=r"position_embeddings \(1, 2, 48\) instead of \(1, 1, 48\)"):
        Segmenter.from_checkpoint(checkpoint, preset, CPU)


def test_entropy_is_on_the_images_own_grid_where_asked() -> None:
    class Unsure(nn.Module):
        """The more intensity, the less certain."""

        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            sure = 20 * (1 - windows)
            return torch.cat([sure, torch.zeros_like(sure), torch.zeros_like(sure)], dim=1)

    image = np.zeros((40, 24, 20), dtype=np.float32)
    image[10:30, 6:18, 5:15] = 200
    segmenter = Segmenter(Unsure(), tiny_preset(intensity=HALVES, spacing_mm=[1.0, 1.0, 1.0]), CPU, "fp32")
    found = segmenter.segment(Volume(image, oblique_affine("PIL", (0.5, 1.0, 1.0))), entropy=True)
    assert found.entropy is not None
    assert (found.entropy.shape, found.entropy.dtype) == (image.shape, np.float32)
    assert found.entropy[14:26, 8:16, 7:13].min() > 0.99
    assert found.entropy[:8].max() < 0.01
    assert segmenter.segment(Volume(image, np.eye(4))).entropy is None


def test_memory_is_kept_until_a_mask_is_restored_or_dropped() -> None:
    volume = Volume(np.pad(np.full((10, 8, 7), 100, np.float32), 5), np.eye(4))
    segmenter = _segmenter()
    computed = segmenter.compute(volume)
    kept = segmenter.planner.reserved_bytes
    assert 0 < kept == computed.plan.restoring_bytes <= computed.plan.host_bytes, "what the network took is free again"
    assert segmenter.restore(computed).labels.shape == (20, 18, 17)
    assert segmenter.planner.reserved_bytes == 0
    computed = segmenter.compute(volume)
    assert segmenter.planner.reserved_bytes == kept
    del computed
    assert segmenter.planner.reserved_bytes == 0, "what nobody finishes holds up nobody"


def test_plan_that_does_not_fit_beside_what_is_restored_waits_for_its_end() -> None:
    class Tight(Planner):
        """Has memory for one image at a time."""

        def plan(self, *of: Any, **options: Any) -> Plan:
            if self.reserved_bytes:
                raise MemoryBudgetError("it does not fit beside the other")
            return super().plan(*of, **options)

    segmenter = Segmenter(Threshold(), tiny_preset(intensity=HALVES), CPU, "fp32", Tight())
    volume = Volume(np.pad(np.full((10, 8, 7), 100, np.float32), 5), np.eye(4))
    first = segmenter.compute(volume)
    second: list[Segmentation] = []
    waiting = threading.Thread(target=lambda: second.append(segmenter.segment(volume)))
    waiting.start()
    waiting.join(0.3)
    assert not second and waiting.is_alive(), "it must not take the memory that the first one needs"
    segmenter.restore(first)
    waiting.join(20)
    assert len(second) == 1
