"""Contrast medium that is taken out of crops: which densities come of it, and which stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lib.configs.preset import Preset
from lib.errors import ConfigError
from lib.transforms.augment import build_changes
from lib.transforms.enhancement import RandUnenhancedd
from lib.transforms.preprocess import IMAGE, LABEL
from tests.tiny import QUIET_AUGMENTATION, tiny_preset

WINDOW = (-125.0, 275.0)
KIDNEY, AORTA, STONE = 1, 2, 3
KIDNEY_HU, MUSCLE_HU, FAT_HU, AIR_HU, BONE_HU = 180.0, 60.0, -100.0, -125.0, 275.0
USUAL_HU = {KIDNEY: 30.0, AORTA: 40.0}


def _scaled(hu: float) -> float:
    return (hu - WINDOW[0]) / (WINDOW[1] - WINDOW[0])


def _crop() -> dict[str, torch.Tensor]:
    """A kidney in fat, with a border of half of each, muscle at a distance, air, and bone with another label."""
    image, label = torch.full((1, 24, 24, 24), _scaled(FAT_HU)), torch.zeros((1, 24, 24, 24), dtype=torch.uint8)
    image[:, 3:11, 3:11, 3:11], label[:, 4:10, 4:10, 4:10] = _scaled((KIDNEY_HU + FAT_HU) / 2), KIDNEY
    image[:, 4:10, 4:10, 4:10] = _scaled(KIDNEY_HU)
    image[:, 16:] = _scaled(MUSCLE_HU)
    image[:, :, 20:] = _scaled(AIR_HU)
    image[:, :, :, 20:], label[:, :, :, 20:] = _scaled(BONE_HU), STONE
    return {IMAGE: image, LABEL: label}


def _changed(count: int, probability: float = 1, **crop: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    change = RandUnenhancedd(IMAGE, LABEL, probability, USUAL_HU, WINDOW).set_random_state(0)
    return [change(_crop() | crop) for _ in range(count)]


def _hu(image: torch.Tensor) -> torch.Tensor:
    return image * (WINDOW[1] - WINDOW[0]) + WINDOW[0]


def test_kidney_is_as_dense_as_without_contrast_medium_in_half_of_the_crops_and_in_between_in_the_others() -> None:
    inside = np.array([float(_hu(crop[IMAGE])[0, 6:8, 6:8, 6:8].mean()) for crop in _changed(300)])
    assert inside.max() < KIDNEY_HU
    bare = inside[inside < 30 + 3 * 8]
    assert 0.4 < len(bare) / len(inside) < 0.7
    assert np.median(inside[np.argsort(inside)[: len(inside) // 2]]) == pytest.approx(30, abs=6)
    assert np.mean(inside > 100) > 0.15, "a part of the medium stays in others"


def test_what_is_no_organ_of_the_list_keeps_its_density() -> None:
    before = _crop()
    for crop in _changed(20):
        assert torch.equal(crop[LABEL], before[LABEL])
        for region in (np.s_[0, 16:], np.s_[0, :, 20:], np.s_[0, :, :, 20:], np.s_[0, 14:16]):
            assert torch.equal(crop[IMAGE][region], before[IMAGE][region])
        assert (crop[IMAGE].shape, crop[IMAGE].dtype) == (before[IMAGE].shape, torch.float32)


def test_border_voxel_of_half_an_organ_and_half_fat_changes_by_about_half() -> None:
    for crop in _changed(20):
        hu = _hu(crop[IMAGE])[0]
        inside, border = KIDNEY_HU - float(hu[6, 6, 6]), (KIDNEY_HU + FAT_HU) / 2 - float(hu[3, 6, 6])
        assert border == pytest.approx(inside / 2, rel=0.35)
        assert float(hu[3, 6, 6]) > FAT_HU and float(hu[1, 6, 6]) == pytest.approx(FAT_HU, abs=1e-3)


def test_organ_that_is_less_dense_already_stays_as_it_is() -> None:
    image = _crop()[IMAGE]
    image[:, 4:10, 4:10, 4:10] = _scaled(-10)
    assert all(torch.equal(crop[IMAGE], image) for crop in _changed(20, image=image))


def test_few_voxels_of_an_organ_say_nothing_about_its_density() -> None:
    label = torch.zeros_like(_crop()[LABEL])
    label[:, 5, 5, 5:8] = KIDNEY
    assert all(torch.equal(crop[IMAGE], _crop()[IMAGE]) for crop in _changed(20, label=label))


def test_share_of_the_crops_is_changed_and_the_given_crop_never() -> None:
    given = _crop()
    change = RandUnenhancedd(IMAGE, LABEL, 0.3, USUAL_HU, WINDOW).set_random_state(0)
    changed = [not torch.equal(change(given)[IMAGE], given[IMAGE]) for _ in range(300)]
    assert 0.2 < np.mean(changed) < 0.4
    assert torch.equal(given[IMAGE], _crop()[IMAGE])
    assert not any(not torch.equal(crop[IMAGE], given[IMAGE]) for crop in _changed(20, probability=0))


def _preset(probability: float = 1.0, hu: dict[str, float] | None = None, **changes: Any) -> Preset:
    names = tiny_preset().label_indices
    own = {name: 30.0 for name in names} if hu is None else hu
    augmentation = QUIET_AUGMENTATION | {"unenhanced_probability": probability, "unenhanced_hu": own}
    window = {"kind": "window", "lower": WINDOW[0], "upper": WINDOW[1]}
    return tiny_preset(**({"modality": "CT", "intensity": window} | changes), training={"augmentation": augmentation})


def test_training_takes_contrast_medium_out_of_the_labels_that_the_preset_names() -> None:
    name, value = next(iter(tiny_preset().label_indices.items()))
    label = torch.zeros((1, 16, 16, 16), dtype=torch.uint8)
    label[:, :6], label[:, 10:] = value, 0
    image = torch.full((1, 16, 16, 16), _scaled(KIDNEY_HU))
    for hu, is_changed in (({name: 30.0}, True), ({}, False)):
        changed = build_changes(_preset(hu=hu)).set_random_state(0)({IMAGE: image, LABEL: label})[IMAGE]
        assert (float(_hu(changed)[0, :4].mean()) < KIDNEY_HU - 5) is is_changed
        assert torch.equal(changed[0, 10:], image[0, 10:])


@pytest.mark.parametrize(
    "changes",
    [
        {"modality": "MR"},
        {"intensity": {"kind": "zscore"}},
        {"channels": [{"name": "native"}, {"name": "late"}]},
    ],
)
def test_preset_without_hu_has_no_contrast_medium_to_take_out(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"unenhanced_probability above 0 need HU; valid: 0, or modality CT"):
        _preset(0.1, **changes)


def test_density_of_a_label_that_the_preset_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"augmentation\.unenhanced_hu' names 'femur'; valid: some of"):
        _preset(hu={"femur": 40.0})
