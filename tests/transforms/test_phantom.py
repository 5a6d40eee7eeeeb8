"""Drawn crops of body parts without any organ: what they look like, and what they say about themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lib.configs.preset import Preset
from lib.errors import ConfigError
from lib.transforms.augment import build_cropping
from lib.transforms.phantom import RandArmsd, draw_phantom
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


BODY = slice(4, 28)


def _case() -> dict[str, torch.Tensor]:
    """A body of 240 mm that fills the case but for 40 mm of air on both sides, all of it labelled."""
    image, label = torch.zeros((1, 32, 24, 16)), torch.zeros((1, 32, 24, 16), dtype=torch.uint8)
    image[:, BODY], label[:, BODY] = 0.5, 1
    return {IMAGE: image, LABEL: label}


def _with_arms(probability: float, count: int) -> list[dict[str, torch.Tensor]]:
    lay = RandArmsd(IMAGE, LABEL, probability, (10.0, 10.0, 10.0), (-125, 275), 16).set_random_state(0)
    return [lay(_case()) for _ in range(count)]


def test_arms_lie_on_both_sides_of_a_body_that_stays_as_it_is() -> None:
    whole = [case for case in _with_arms(1, 40) if case[IMAGE].shape[1] > 16]
    assert 10 <= len(whole) <= 30, "the others are cut to one side"
    body, shares = slice(BODY.start + 10, BODY.stop + 10), list[float]()
    for case in whole:
        image, label = case[IMAGE], case[LABEL]
        assert image.shape == label.shape == (1, 52, 24, 16), "100 mm more on each side"
        assert (image.dtype, label.dtype) == (torch.float32, torch.uint8)
        assert bool((image[:, body] == 0.5).all()) and bool((label[:, body] == 1).all())
        assert not label[:, : body.start].any() and not label[:, body.stop :].any()
        shares += [float((side > 0.2).float().mean()) for side in (image[:, : body.start], image[:, body.stop :])]
    assert max(shares) < 0.7, "there is air too"
    assert np.mean(np.array(shares) > 0.02) > 0.7, "few arms are hidden by the body"


def test_half_of_the_cases_show_one_side_alone() -> None:
    cut = [case for case in _with_arms(1, 60) if case[IMAGE].shape[1] == 16]
    assert 15 <= len(cut) <= 45
    places = [case[LABEL][0, :, 0, 0].nonzero().ravel() for case in cut]
    assert all(case[IMAGE].shape == case[LABEL].shape == (1, 16, 24, 16) for case in cut)
    at_the_end, at_the_start = ([p for p in places if len(p) and 15 in p], [p for p in places if len(p) and 0 in p])
    assert len(at_the_end) > 3 and len(at_the_start) > 3, "both sides come"


def test_no_arms_without_probability() -> None:
    for case in _with_arms(0, 5):
        assert torch.equal(case[IMAGE], _case()[IMAGE]) and torch.equal(case[LABEL], _case()[LABEL])


def test_crops_of_a_case_with_arms_have_the_size_of_the_window() -> None:
    preset = _preset(1, "arm_probability", spacing_mm=[10, 10, 10])
    crops = build_cropping(preset, 30).set_random_state(0)({"case": "x", **_case()})
    assert {crop[IMAGE].shape for crop in crops} == {crop[LABEL].shape for crop in crops} == {(1, 16, 16, 16)}
    assert any(((crop[IMAGE] > 0) & (crop[IMAGE] != 0.5)).any() for crop in crops), "an arm is in one of them"


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
    with pytest.raises(ConfigError, match=rf"{kind} above 0 need HU; valid: 0, or modality CT"):
        _preset(0.1, kind, **changes)
