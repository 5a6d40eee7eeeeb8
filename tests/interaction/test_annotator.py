"""The simulated annotator clicks where the mask is wrong, and always in the same way for a seed."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lib.interaction.annotator import next_click, next_scribble, prompts_of


def masks() -> tuple[np.ndarray, np.ndarray]:
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[2:11, 2:11, 2:11], truth[14:17, 14:17, 14:17] = 1, 2
    labels = np.zeros_like(truth)
    labels[2:11, 2:11, 2:5], labels[0, 19, 19] = 1, 1
    return labels, truth


def test_click_is_in_the_middle_of_the_largest_part() -> None:
    labels, truth = masks()
    click = next_click(labels, truth, (1, 1, 1))
    assert click is not None and click.value == 1
    assert all(4 <= v <= 8 for v in click.point)


def test_click_is_always_on_a_wrong_voxel_and_repeats_for_a_seed() -> None:
    labels, truth = masks()
    clicks = [next_click(labels, truth, (1, 1, 2), np.random.default_rng(seed)) for seed in range(50)]
    assert clicks == [next_click(labels, truth, (1, 1, 2), np.random.default_rng(seed)) for seed in range(50)]
    assert {c.value for c in clicks if c} == {1, 2} or {c.value for c in clicks if c} == {0, 1, 2}
    assert all(c is not None and labels[c.point] != c.value == truth[c.point] for c in clicks)


def test_no_click_where_nothing_is_wrong() -> None:
    _, truth = masks()
    assert next_click(truth, truth, (1, 1, 1)) is None


def test_scribble_follows_a_bent_bar_in_its_plane() -> None:
    truth = np.zeros((40, 40, 9), np.uint8)
    truth[4:16, 4:9, 2:7], truth[11:16, 4:30, 2:7] = 1, 1
    scribble = next_scribble(np.zeros_like(truth), truth, (1, 1, 1))
    points = np.array([voxel.point for voxel in scribble])
    assert {voxel.value for voxel in scribble} == {1} and len({voxel.point for voxel in scribble}) == len(points)
    assert len(set(points[:, 2])) == 1
    # along both arms of the bar
    assert np.ptp(points[:, 0]) >= 5 and np.ptp(points[:, 1]) >= 10
    depth = ndimage.distance_transform_edt(truth)
    assert (depth[tuple(points.T)] >= 0.5 * depth.max()).all()
    # one line: every voxel touches another one
    gaps = abs(points[:, None] - points[None]).max(axis=2) + 9 * np.eye(len(points), dtype=int)
    assert (gaps.min(axis=1) == 1).all()


def test_scribbles_are_on_wrong_voxels_in_one_plane_and_repeat_for_a_seed() -> None:
    labels, truth = masks()
    drawn = [next_scribble(labels, truth, (1, 1, 2), np.random.default_rng(seed)) for seed in range(40)]
    assert drawn == [next_scribble(labels, truth, (1, 1, 2), np.random.default_rng(seed)) for seed in range(40)]
    planes = set[int]()
    for scribble in drawn:
        assert scribble and len({voxel.value for voxel in scribble}) == 1
        assert all(labels[v.point] != v.value == truth[v.point] for v in scribble)
        points = np.array([v.point for v in scribble])
        flat = [axis for axis in range(3) if len(set(points[:, axis])) == 1]
        assert flat
        planes |= set(flat) if len(flat) == 1 else set()
    assert planes == {0, 1, 2}


def test_no_scribble_where_nothing_is_wrong_or_all_of_it_is_taken() -> None:
    labels, truth = masks()
    assert next_scribble(truth, truth, (1, 1, 1)) == ()
    labels = truth.copy()
    labels[5, 5, 5] = 0
    assert [v.point for v in next_scribble(labels, truth, (1, 1, 1))] == [(5, 5, 5)]
    assert next_scribble(labels, truth, (1, 1, 1), taken=[(5, 5, 5)]) == ()


def test_clicks_become_prompts() -> None:
    labels, truth = masks()
    labels[5, 18, 18] = 2
    first = next_click(labels, truth, (1, 1, 1))
    assert first is not None
    assert prompts_of([first]).positive == ((1, (first.point,)),)
