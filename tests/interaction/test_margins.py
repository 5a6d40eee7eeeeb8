"""Clicks on an automatic mask: they follow the network's logit margins, and keep what holds of every click."""

from __future__ import annotations

import numpy as np
import pytest
from monai.data import MetaTensor
from scipy import ndimage

from lib.infers.logit_margins import MOST_STEPS, LogitMargins
from lib.interaction.editing import Scene, edit_clicks
from lib.interaction.margins.correction import (
    LONGEST_VOXELS,
    MARGIN,
    NUGGET,
    REACH_LENGTHS,
    WEIGHT_PER_LENGTH,
    Evidence,
    evidence_of,
    solve,
)
from lib.interaction.prompts import Voxel, make_prompts
from lib.transforms.postprocess import restore_to_grid
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import Volume
from tests.tiny import axis_affine, boxes, oblique_affine, tiny_preset

SHAPE = (40, 30, 26)
BLOCK = (slice(10, 24), slice(8, 20), slice(8, 18))


def flat(value: float) -> np.ndarray:
    return np.full(SHAPE, value, dtype=np.float64)


def noise_image(shape: tuple[int, ...], affine: np.ndarray) -> MetaTensor:
    """An image that says nothing, as the network sees it."""
    voxels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return preprocess_volume(Volume(voxels, affine), tiny_preset())


def margins_of(labels: np.ndarray, second: np.ndarray, margin: np.ndarray) -> LogitMargins:
    return LogitMargins(labels, second, (margin * 10).round().clip(0, MOST_STEPS).astype(np.uint8))


def block_scene(margin: np.ndarray, second: np.ndarray | None = None) -> Scene:
    """A block of label 1 in a plain image, which the network was as sure of as ``margin`` says."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[BLOCK] = 1
    image = noise_image(SHAPE, np.eye(4))
    assert image.shape[1:] == SHAPE
    other = np.where(labels == 1, 0, 1).astype(np.uint8) if second is None else second
    return Scene(image, labels, np.eye(4), margins=margins_of(labels.copy(), other, margin))


def changed(scene: Scene, positive: list[Voxel], negative: list[Voxel] | None = None) -> np.ndarray:
    labels = edit_clicks(scene, make_prompts({1: positive} if positive else {}, negative or [])).labels
    return labels != scene.labels


def test_click_takes_the_uncertain_strip_it_lies_in_and_nothing_certain() -> None:
    margin = flat(12)
    strip = (slice(24, 27), slice(8, 20), slice(8, 18))
    margin[strip] = 0.5
    wrong = np.zeros(SHAPE, bool)
    wrong[strip] = True
    found = changed(block_scene(margin), [(25, 14, 13)])
    assert found[wrong].mean() > 0.9 and not found[~wrong].any()
    unsure = changed(block_scene(flat(12)), [(25, 14, 13)])
    assert 1 <= unsure.sum() < 30, "where the network was certain, a click corrects the voxels beside it alone"


def test_click_that_takes_away_follows_margins_too() -> None:
    margin = flat(12)
    strip = (slice(21, 24), slice(8, 20), slice(8, 18))
    margin[strip] = 0.5
    found = changed(block_scene(margin), [], [(22, 14, 13)])
    assert found[strip].mean() > 0.9 and found.sum() == found[strip].sum()


def test_change_is_connected_with_its_click_and_ends_at_its_reach() -> None:
    margin = flat(0.1)
    margin[25:27] = 12
    found = changed(block_scene(margin), [(24, 14, 13)])
    assert ndimage.label(found)[1] == 1 and found[24, 14, 13]
    assert not found[27:].any(), "what lies behind a certain layer is another matter"
    everywhere = np.argwhere(changed(block_scene(flat(0)), [(24, 14, 13)]))
    assert np.sqrt(((everywhere - (24, 14, 13)) ** 2).sum(axis=1)).max() <= REACH_LENGTHS * 4


def test_what_a_click_changed_stays_when_others_of_its_kind_come() -> None:
    """Clicks share what has to be moved, so that the part on the far side of the first would come back."""
    scene = block_scene(ndimage.gaussian_filter(np.random.default_rng(1).normal(size=SHAPE), 1.5) * 6 + 3)
    points: list[Voxel] = [(25, 14, 13), (26, 17, 13), (26, 11, 12), (25, 14, 15)]
    alone = [changed(scene, [point]) for point in points]
    assert min(int(one.sum()) for one in alone) > 5
    for count in range(2, 5):
        assert not (np.any(alone[:count], axis=0) & ~changed(scene, points[:count])).any()


def test_contrary_click_beside_takes_back_what_the_first_took_too_much() -> None:
    scene = block_scene(flat(1.0))
    first = changed(scene, [(25, 14, 13)])
    point = (27, 14, 13)
    assert first[point]
    both = changed(scene, [(25, 14, 13)], [point])
    assert both[25, 14, 13] and not both[point]
    assert both.sum() < 0.6 * first.sum() and not (both & ~first).any()


def test_clicks_that_contradict_each_other_on_neighbouring_voxels_are_both_obeyed() -> None:
    scene = block_scene(flat(2.0))
    points = [(25, y, z) for y in range(10, 18) for z in range(10, 16)]
    positive, negative = [p for p in points if sum(p) % 2], [p for p in points if not sum(p) % 2]
    labels = edit_clicks(scene, make_prompts({1: positive}, negative)).labels
    assert all(labels[p] == 1 for p in positive) and all(labels[p] == 0 for p in negative)


def test_small_margin_between_two_labels_moves_the_border_between_them() -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[10:20, 8:20, 8:18], labels[20:30, 8:20, 8:18] = 1, 2
    second = np.select([labels == 1, labels == 2], [2, 1], 1).astype(np.uint8)
    margin = flat(12)
    margin[20:23, 8:20, 8:18] = 0.5
    scene = Scene(noise_image(SHAPE, np.eye(4)), labels, np.eye(4), margins=margins_of(labels, second, margin))
    edited = edit_clicks(scene, make_prompts({1: [(21, 14, 13)]}))
    now = edited.labels
    assert (now[20:23, 8:20, 8:18] == 1).mean() > 0.9
    np.testing.assert_array_equal(now[labels != 2], labels[labels != 2])
    assert edited.values == (1,) and set(np.unique(now[now != labels])) == {1}


@pytest.mark.parametrize("affine", [np.eye(4), axis_affine("LPS", (0.6, 0.6, 1.7)), oblique_affine("LPS")], ids=str)
def test_every_click_is_obeyed_whatever_the_margins_and_nothing_else_is_touched(affine: np.ndarray) -> None:
    random = np.random.default_rng(3)
    for seed in range(6):
        image, truth = boxes((30, 28, 26), seed)
        seen = preprocess_volume(Volume(image, affine), tiny_preset())
        shape = tuple(seen.shape[1:])
        coarse = restore_to_grid(truth, affine, shape, np.asarray(seen.affine.numpy()))
        noise = ndimage.gaussian_filter(random.normal(size=shape), 2) * 60
        margins = margins_of(coarse, random.integers(0, 3, shape).astype(np.uint8), abs(noise))
        points = [tuple(int(random.integers(0, s)) for s in truth.shape) for _ in range(8)]
        scene = Scene(seen, truth.copy(), affine, margins=margins)
        edited = edit_clicks(scene, make_prompts({2: points[:4]}, points[4:]))
        other = edit_clicks(scene, make_prompts({2: points[3::-1]}, points[:3:-1]))
        np.testing.assert_array_equal(edited.labels, other.labels)
        assert all(edited.labels[p] == 2 for p in points[:4])
        assert all(edited.labels[p] == 0 for p in points[4:])
        difference = edited.labels != truth
        assert set(np.unique(edited.labels[difference])) <= {0, 2}
        assert set(np.unique(truth[difference & (edited.labels == 0)])) <= {*edited.values}
        assert edited.part is not None
        outside = difference.copy()
        outside[edited.part] = False
        assert not outside.any()


def test_what_is_added_on_a_finer_grid_leaves_no_gap_to_the_mask() -> None:
    affine = np.diag([0.5, 0.5, 0.5, 1.0])
    labels = np.zeros((80, 60, 52), np.uint8)
    labels[20:48, 16:40, 16:36] = 1
    image = noise_image(labels.shape, affine)
    coarse = restore_to_grid(labels, affine, tuple(image.shape[1:]), np.asarray(image.affine.numpy()))
    margin = np.full(coarse.shape, 12.0)
    margin[24:28, 9:19, 9:17] = 0.5
    margins = margins_of(coarse, np.where(coarse == 1, 0, 1).astype(np.uint8), margin)
    now = edit_clicks(Scene(image, labels, affine, margins=margins), make_prompts({1: [(51, 28, 26)]})).labels
    assert (now[48:54, 20:36, 20:32] == 1).all()
    assert ndimage.label(now == 1)[1] == 1


def test_clicks_share_what_they_say_as_a_gaussian_process_does() -> None:
    """One click moves the field by what is missing; two of the same kind need less of each."""
    margins = block_scene(flat(2.0)).margins
    assert margins is not None
    one = Evidence((25, 14, 13), 1, 0, 4.0)
    (alone,) = solve(margins, (1, 1, 1), [one])
    assert alone == pytest.approx((MARGIN + 2) / (1 + NUGGET))
    both = solve(margins, (1, 1, 1), [one, Evidence((26, 14, 13), 1, 0, 4.0)])
    assert (both < alone).all() and both.sum() > alone
    (kept,) = solve(margins, (1, 1, 1), [Evidence((25, 14, 13), 0, 1, 4.0)])
    assert kept == pytest.approx((MARGIN - 2) / (1 + NUGGET))
    strengths = solve(margins, (1, 1, 1), [one, Evidence((25, 14, 13), 2, 0, 4.0)])
    np.testing.assert_allclose(strengths[0] * (1 + NUGGET) + strengths[1] / 2, MARGIN + 2, atol=0.01)


def test_click_restores_a_part_that_the_network_found_and_cleaning_dropped() -> None:
    scene = block_scene(flat(12))
    assert scene.margins is not None
    dropped = (slice(30, 34), slice(10, 15), slice(10, 15))
    scene.margins.labels[dropped], scene.margins.second[dropped] = 1, 0
    found = changed(scene, [(31, 12, 12)])
    assert found[dropped].all() and found.sum() == found[dropped].sum()


def test_click_where_the_network_was_certain_of_something_else_is_an_exception() -> None:
    """Once it moved its neighbours as far as itself, and a thin structure beside a certain error was lost."""
    margin = flat(3.0)
    margin[25, 14, 13] = 22
    found = np.argwhere(changed(block_scene(margin), [(25, 14, 13)]))
    assert len(found) > 1
    assert np.sqrt(((found - (25, 14, 13)) ** 2).sum(axis=1)).max() <= 4 * np.log(12 / 3)
    margins = block_scene(flat(20.0)).margins
    assert margins is not None
    for spacing_mm, most in ((1.0, 4 * WEIGHT_PER_LENGTH), (3.0, (2 + 2 / 3) * WEIGHT_PER_LENGTH)):
        (moved,) = solve(margins, (spacing_mm,) * 3, [Evidence((25, 14, 13), 1, 0, 4.0)])
        assert moved == pytest.approx(most)


def test_click_reaches_further_the_deeper_it_lies_in_what_is_wrong() -> None:
    scene = block_scene(flat(2.0))

    def length(x: int, value: int, over: int) -> float:
        return evidence_of(scene.coarse, scene.spacing_mm, (x, 14, 13), value, over).length

    assert [length(x, 1, 0) for x in (24, 25, 26, 30)] == [4, 4, 6, LONGEST_VOXELS]
    assert [length(x, 0, 1) for x in (23, 22, 21, 18)] == [4, 4, 6, LONGEST_VOXELS]
    shallow, deep = changed(scene, [(25, 14, 13)]), changed(scene, [(26, 14, 13)])
    assert deep.sum() > 1.5 * shallow.sum()
    coarse = block_scene(flat(2.0)).coarse
    assert evidence_of(coarse, (3.0, 3.0, 3.0), (24, 14, 13), 1, 0).length == pytest.approx(2 + 2 / 3)


def test_first_click_far_from_what_the_network_drew_of_a_structure_draws_no_region() -> None:
    """A region of like intensities ran from a part that was missing into all that looks the same."""
    labels = np.zeros((70, 30, 26), np.uint8)
    labels[2:12, 8:20, 8:18] = 1
    voxels = np.random.default_rng(0).normal(scale=0.05, size=labels.shape).astype(np.float32)
    voxels[30:65, 4:26, 4:22] += 1
    image = preprocess_volume(Volume(voxels, np.eye(4)), tiny_preset())
    margin = np.full(labels.shape, 12.0)
    margin[44:47, 13:16, 12:15] = 1
    margins = margins_of(labels.copy(), np.where(labels == 1, 0, 1).astype(np.uint8), margin)
    scene = Scene(image, labels, np.eye(4), margins=margins)
    found = changed(scene, [(45, 14, 13)])
    assert found[44:47, 13:16, 12:15].all() and found.sum() < 60
    assert changed(Scene(image, labels, np.eye(4)), [(45, 14, 13)]).sum() > 1000, "of nothing known, the region"
