"""Random changes: only those that the preset allows, in step for image and label, repeatable by seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Compose

from lib.configs.preset import Preset
from lib.errors import ConfigError
from lib.transforms.augment import build_changes, build_cropping
from lib.transforms.preprocess import IMAGE, LABEL
from tests.tiny import QUIET_AUGMENTATION, boxes, tiny_preset

FULL_AUGMENTATION = {
    "rotation_degrees": 20,
    "zoom": 0.2,
    "translation_voxels": 3,
    "spatial_probability": 1,
    "elastic_probability": 1,
    "noise_std": 0.1,
    "noise_probability": 1,
    "blur_probability": 1,
    "gamma_probability": 1,
    "intensity_scale": 0.2,
    "intensity_shift": 0.2,
    "intensity_probability": 1,
}


def _item(shape: tuple[int, int, int] = (16, 16, 16)) -> dict[str, Any]:
    image, label = boxes(shape, seed=3)
    return {"case": "x", IMAGE: torch.from_numpy(image / 300)[None], LABEL: torch.from_numpy(label)[None]}


def _build_chain(preset: Preset, count: int) -> Compose:
    return Compose([*build_cropping(preset, count).transforms, *build_changes(preset).transforms])


def _draw(
    count: int, seed: int = 0, shape: tuple[int, int, int] = (16, 16, 16), ratio: float = 1.0, **changes: Any
) -> list[dict[str, torch.Tensor]]:
    """``count`` crops of one case; augmentation is off but for ``changes``; ``mirror_axes`` go to the preset."""
    mirror_axes = changes.pop("mirror_axes", ())
    recipe = {"augmentation": QUIET_AUGMENTATION | changes, "foreground_ratio": ratio}
    chain = _build_chain(tiny_preset(mirror_axes=mirror_axes, training=recipe), count)
    chain.set_random_state(seed)
    crops: list[dict[str, torch.Tensor]] = chain(_item(shape))
    return crops


def test_augmentation_that_is_off_gives_the_crop_as_it_is() -> None:
    item = _item()
    crops = _draw(4)
    assert len(crops) == 4
    for crop in crops:
        torch.testing.assert_close(crop[IMAGE], item[IMAGE], rtol=0, atol=0)
        torch.testing.assert_close(crop[LABEL], item[LABEL], rtol=0, atol=0)
        assert "case" not in crop


@pytest.mark.parametrize("allowed", [(0,), (1,), (2,), (0, 2)])
def test_mirroring_happens_along_the_allowed_axes_and_no_other(allowed: tuple[int, ...]) -> None:
    item = _item()
    ways = [axes for axes in ([], [0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2])]
    seen = set()
    for crop in _draw(40, mirror_axes=allowed):
        found = [w for w in ways if torch.equal(crop[IMAGE], item[IMAGE].flip([axis + 1 for axis in w]))]
        assert len(found) == 1, "the crop is the case, or the case mirrored"
        assert torch.equal(crop[LABEL], item[LABEL].flip([axis + 1 for axis in found[0]])), "the label goes with it"
        seen.add(tuple(found[0]))
    assert seen == {tuple(w) for w in ways if set(w) <= set(allowed)}


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 0.5), (3.0, 0.75)])
def test_crops_are_centred_on_foreground_as_often_as_the_recipe_says(ratio: float, expected: float) -> None:
    crops = _draw(400, shape=(60, 60, 60), ratio=ratio)
    centred = np.mean([int(crop[LABEL][0, 8, 8, 8]) > 0 for crop in crops])
    # 400 draws: the standard deviation is 0.025. Background crops are centred on foreground by no chance.
    assert abs(centred - expected) < 0.075


def test_rare_foreground_is_found_though_few_voxels_are_looked_at() -> None:
    """Of 216,000 voxels one is foreground: all are listed, and crops are centred on it as often as otherwise."""
    item = _item((60, 60, 60)) | {LABEL: torch.zeros((1, 60, 60, 60), dtype=torch.uint8)}
    item[LABEL][0, 30, 31, 32] = 1
    recipe = {"augmentation": QUIET_AUGMENTATION, "foreground_ratio": 3.0}
    crops = _build_chain(tiny_preset(training=recipe), 200).set_random_state(0)(item)
    # 200 draws of 0.75: the standard deviation is 0.031.
    assert abs(np.mean([int(crop[LABEL][0, 8, 8, 8]) for crop in crops]) - 0.75) < 0.1


def test_crops_come_from_all_over_the_foreground() -> None:
    """One of two equal boxes is not preferred, and a crop's middle can be any of a box's voxels."""
    item = _item((60, 60, 60)) | {LABEL: torch.zeros((1, 60, 60, 60), dtype=torch.uint8)}
    item[LABEL][0, 20:30, 20:30, 20:30] = 1
    item[LABEL][0, 34:44, 34:44, 34:44] = 2
    recipe = {"augmentation": QUIET_AUGMENTATION, "foreground_ratio": 1e6}
    chain = _build_chain(tiny_preset(training=recipe), 4).set_random_state(0)
    middles = [int(crop[LABEL][0, 8, 8, 8]) for _ in range(100) for crop in chain(item)]
    assert set(middles) == {1, 2}
    assert abs(np.mean(middles) - 1.5) < 0.1, "400 draws: the standard deviation is 0.025"


def test_crops_of_a_case_without_foreground_are_drawn_from_background() -> None:
    chain = _build_chain(tiny_preset(), 3)
    item = _item((20, 20, 20)) | {LABEL: torch.zeros((1, 20, 20, 20), dtype=torch.uint8)}
    with pytest.warns(UserWarning, match="unable to generate class balanced samples"):
        crops = chain(item)
    assert [tuple(crop[IMAGE].shape) for crop in crops] == [(1, 16, 16, 16)] * 3


def test_everything_at_once_keeps_label_values_and_types() -> None:
    for crop in _draw(6, shape=(30, 30, 30), mirror_axes=(0, 1, 2), **FULL_AUGMENTATION):
        assert crop[LABEL].dtype == torch.uint8
        assert set(crop[LABEL].unique().tolist()) <= {0, 1, 2}
        assert crop[IMAGE].dtype == torch.float32
        assert torch.isfinite(crop[IMAGE]).all()
        assert tuple(crop[IMAGE].shape) == tuple(crop[LABEL].shape) == (1, 16, 16, 16)


def test_spatial_changes_move_image_and_label_together() -> None:
    """Noise-free boxes: after any warp, the core is still where the image is brightest."""
    label = _item()[LABEL]
    image = torch.tensor([0.0, 1.0, 2.0])[label.long()]
    recipe = {"augmentation": QUIET_AUGMENTATION | {"spatial_probability": 1, "rotation_degrees": 25, "zoom": 0.1}}
    chain = _build_chain(tiny_preset(training=recipe), 8)
    chain.set_random_state(0)
    for crop in chain({"case": "x", IMAGE: image, LABEL: label}):
        agree = (crop[IMAGE].round() == crop[LABEL]).float().mean()
        assert agree > 0.97
        assert not torch.equal(crop[LABEL], label)


def test_shift_adds_one_number_within_its_bound() -> None:
    item = _item()
    changes = {"intensity_probability": 1, "intensity_scale": 0, "intensity_shift": 0.3}
    shifts = [float((crop[IMAGE] - item[IMAGE]).mean()) for crop in _draw(30, **changes)]
    spread = [float((crop[IMAGE] - item[IMAGE]).std()) for crop in _draw(30, **changes)]
    assert max(spread) < 1e-6
    assert max(np.abs(shifts)) <= 0.3
    assert min(shifts) < -0.1 < 0.1 < max(shifts)


def test_scale_multiplies_by_one_number_within_its_bound() -> None:
    item = _item()
    changes = {"intensity_probability": 1, "intensity_scale": 0.3, "intensity_shift": 0}
    for crop in _draw(10, **changes):
        factor = float(crop[IMAGE].mean() / item[IMAGE].mean())
        assert 0.7 <= factor <= 1.3
        torch.testing.assert_close(crop[IMAGE], item[IMAGE] * factor, rtol=1e-4, atol=1e-5)


def test_noise_has_at_most_the_deviation_that_the_recipe_says() -> None:
    item = _item()
    deviations = [float((crop[IMAGE] - item[IMAGE]).std()) for crop in _draw(20, noise_probability=1, noise_std=0.2)]
    assert max(deviations) < 0.21
    assert max(deviations) > 0.1


def test_same_seed_gives_the_same_crops_and_another_seed_others() -> None:
    def draw(seed: int) -> torch.Tensor:
        crops = _draw(3, seed=seed, shape=(30, 30, 30), mirror_axes=(0,), **FULL_AUGMENTATION)
        return torch.cat([crop[IMAGE] for crop in crops])

    torch.testing.assert_close(draw(1), draw(1), rtol=0, atol=0)
    assert not torch.equal(draw(1), draw(2))


def test_balanced_crops_are_centred_on_every_label_equally_often() -> None:
    """Label 2 has 8 voxels, label 1 has 8,000: at random voxels, the small one would be drawn once in a thousand."""
    label = torch.zeros((1, 40, 40, 40), dtype=torch.uint8)
    label[0, :20, :20, :20] = 1
    label[0, 34:36, 34:36, 34:36] = 2
    share = {}
    for balance in ("voxels", "labels"):
        recipe = {"augmentation": QUIET_AUGMENTATION, "foreground_ratio": 1e6, "crop_balance": balance}
        chain = build_cropping(tiny_preset(training=recipe), 200).set_random_state(0)
        crops = chain({"case": "x", IMAGE: label.float(), LABEL: label})
        share[balance] = sum(bool((crop[LABEL] == 2).any()) for crop in crops) / len(crops)
    assert share["voxels"] < 0.03
    assert 0.4 < share["labels"] < 0.6


def test_balanced_crops_of_a_case_without_labels_are_background() -> None:
    label = torch.zeros((1, 20, 20, 20), dtype=torch.uint8)
    recipe = {"augmentation": QUIET_AUGMENTATION, "crop_balance": "labels"}
    chain = build_cropping(tiny_preset(training=recipe), 3).set_random_state(0)
    with pytest.warns(UserWarning, match="unable to generate class balanced samples"):
        crops = chain({"case": "x", IMAGE: label.float(), LABEL: label})
    assert [int(crop[LABEL].sum()) for crop in crops] == [0, 0, 0]


def test_slab_keeps_planes_of_the_third_axis_and_sets_the_rest_to_zero() -> None:
    kept = []
    for crop in _draw(40, slab_probability=1, slab_planes=[3, 6]):
        planes = crop[IMAGE].abs().amax(dim=(0, 1, 2)) > 0
        assert int(planes.sum()) in range(3, 7)
        assert torch.equal(planes.nonzero().ravel().diff(), torch.ones(int(planes.sum()) - 1, dtype=torch.int64))
        assert not crop[LABEL][..., ~planes].any()
        kept.append(int(planes.sum()))
    assert {3, 6} <= set(kept)


def test_slab_with_more_planes_than_the_least_allows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"slab_planes is \[6, 3\]; valid: the least number first"):
        tiny_preset(training={"augmentation": {"slab_planes": [6, 3]}})
