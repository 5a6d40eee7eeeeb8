"""Drawn crops of body parts without any organ: what they look like, and what they say about themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lib.configs.preset import Preset
from lib.errors import ConfigError
from lib.transforms.augment import build_cropping
from lib.transforms.phantom import draw_phantom
from lib.transforms.preprocess import IMAGE, LABEL
from tests.tiny import QUIET_AUGMENTATION, tiny_preset

SHAPE = (32, 32, 32)
UNKNOWN = "unknown"


def _preset(probability: float, kind: str = "phantom_probability", **changes: Any) -> Preset:
    augmentation = QUIET_AUGMENTATION | {kind: probability}
    window = {"kind": "window", "lower": -125, "upper": 275}
    return tiny_preset(**({"modality": "CT", "intensity": window} | changes), training={"augmentation": augmentation})


def _crops(probability: float, count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Crops of a case that is 0.5 everywhere, and half of it labelled."""
    label = torch.zeros((1, *SHAPE), dtype=torch.uint8)
    label[:, :16] = 1
    item = {"case": "x", IMAGE: torch.full((1, *SHAPE), 0.5), LABEL: label, UNKNOWN: torch.tensor([False, True])}
    chain = build_cropping(_preset(probability), count, (UNKNOWN,)).set_random_state(seed)
    crops: list[dict[str, torch.Tensor]] = chain(item)
    return crops


def _is_drawn(crop: dict[str, torch.Tensor]) -> bool:
    return not bool((crop[IMAGE] == 0.5).all())


def test_share_of_the_crops_is_drawn_and_the_others_stay_as_they_are() -> None:
    crops = _crops(0.25, 400)
    drawn = [crop for crop in crops if _is_drawn(crop)]
    assert 75 <= len(drawn) <= 125
    assert any(crop[LABEL].any() for crop in crops)
    assert not any(crop[LABEL].any() for crop in drawn)
    for crop in crops:
        assert crop[UNKNOWN].tolist() == [False, not _is_drawn(crop)], "all is known of a drawn crop"
    assert not any(map(_is_drawn, _crops(0, 20)))


def test_drawn_crop_has_the_intensities_and_the_types_of_a_real_one() -> None:
    for crop in _crops(1, 20):
        image, label = crop[IMAGE], crop[LABEL]
        assert image.shape == label.shape == (1, *tiny_preset().roi_size)
        assert (image.dtype, label.dtype) == (torch.float32, torch.uint8)
        assert float(image.min()) >= 0 and float(image.max()) <= 1


def test_same_seed_draws_the_same_crops_and_another_seed_others() -> None:
    first, again, other = (torch.stack([c[IMAGE] for c in _crops(1, 3, seed)]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_phantoms_hold_air_fat_flesh_and_bone_in_varied_shares() -> None:
    random = np.random.RandomState(0)
    drawn = [draw_phantom((40, 40, 40), (3.0, 3.0, 3.0), random) for _ in range(60)]
    flesh = np.array([np.mean((hu > 0) & (hu < 120)) for hu in drawn])
    assert all(hu.shape == (40, 40, 40) and hu.dtype == np.float32 and np.isfinite(hu).all() for hu in drawn)
    assert np.mean([(hu < -500).any() for hu in drawn]) > 0.9
    assert np.mean([((hu > -140) & (hu < -60)).any() for hu in drawn]) > 0.5
    assert np.mean([(hu > 250).any() for hu in drawn]) > 0.5
    assert flesh.min() < 0.1 and flesh.max() > 0.4
    assert min(float(hu.min()) for hu in drawn) > -1200 and max(float(hu.max()) for hu in drawn) < 1400


def test_phantom_is_as_large_in_mm_on_a_finer_grid() -> None:
    """A body of one size fills about as large a share of 120 mm, whatever the voxels."""
    shares = []
    for length, spacing in ((40, 3.0), (60, 2.0)):
        random = np.random.RandomState(5)
        drawn = [draw_phantom((length,) * 3, (spacing,) * 3, random) for _ in range(100)]
        shares.append(np.mean([np.mean(hu > -300) for hu in drawn]))
    assert shares[1] == pytest.approx(shares[0], abs=0.1)


def _crops_with_arms(probability: float, body: slice, count: int) -> list[dict[str, torch.Tensor]]:
    """Crops of a body in air, all of which is labelled."""
    image, label = torch.zeros((1, 16, 16, 16)), torch.zeros((1, 16, 16, 16), dtype=torch.uint8)
    image[:, body], label[:, body] = 0.5, 1
    preset = _preset(probability, "arm_probability", spacing_mm=[9, 9, 9])
    item = {"case": "x", IMAGE: image, LABEL: label}
    crops: list[dict[str, torch.Tensor]] = build_cropping(preset, count).set_random_state(0)(item)
    return crops


def test_arms_lie_in_the_air_and_leave_body_and_label_as_they_are() -> None:
    body = slice(0, 8)
    crops = _crops_with_arms(1, body, 20)
    for crop in crops:
        assert bool((crop[IMAGE][:, body] == 0.5).all())
        assert bool((crop[LABEL][:, body] == 1).all()) and not crop[LABEL][:, 8:].any()
        assert crop[IMAGE].dtype == torch.float32
    flesh = [float((crop[IMAGE][:, 8:] > 0.3).float().mean()) for crop in crops]
    assert sum(share > 0.02 for share in flesh) >= 15
    assert max(flesh) < 0.6


def test_no_arm_is_drawn_where_there_is_no_room_or_no_probability() -> None:
    for crop in [*_crops_with_arms(1, slice(0, 16), 3), *_crops_with_arms(0, slice(0, 8), 3)]:
        assert set(crop[IMAGE].unique().tolist()) <= {0.0, 0.5}


@pytest.mark.parametrize("kind", ["phantom_probability", "arm_probability"])
@pytest.mark.parametrize(
    "changes",
    [
        {"modality": "MR"},
        {"intensity": {"kind": "zscore"}},
        {"channels": [{"name": "native"}, {"name": "late"}]},
    ],
)
def test_drawing_for_a_preset_without_hu_is_refused(changes: dict[str, Any], kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"{kind} above 0 draw in HU; valid: 0, or modality CT"):
        _preset(0.1, kind, **changes)
