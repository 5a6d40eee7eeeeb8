"""What a click may do, whatever the image says."""

from __future__ import annotations

import numpy as np
import pytest

from lib.interaction.editing import Scene, connected_changes, edit_clicks, edit_scribbles
from lib.interaction.prompts import Box, Prompts, make_prompts
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import Volume
from tests.tiny import axis_affine, boxes, oblique_affine, tiny_preset

AFFINES = {
    "RAS": np.eye(4),
    "LPS at 0.6 mm": axis_affine("LPS", (0.6, 0.6, 1.7)),
    "turned axes": axis_affine("SLA", (0.8, 1.2, 1.0)),
    "oblique": oblique_affine("LPS"),
}


def scene_of(affine: np.ndarray, labels: np.ndarray | None = None, seed: int = 0) -> tuple[Scene, np.ndarray]:
    image, truth = boxes((30, 28, 26), seed)
    start = np.zeros_like(truth) if labels is None else labels
    return Scene(preprocess_volume(Volume(image, affine), tiny_preset()), start, affine), truth


def dice_of(found: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


@pytest.mark.parametrize("name", list(AFFINES))
def test_every_click_is_obeyed_and_nothing_else_is_touched(name: str) -> None:
    random = np.random.default_rng(5)
    for seed in range(8):
        _, truth = scene_of(AFFINES[name], seed=seed)
        scene, _ = scene_of(AFFINES[name], truth.copy(), seed)
        points = [tuple(int(random.integers(0, s)) for s in truth.shape) for _ in range(6)]
        prompts = make_prompts({2: points[:3]}, points[3:])
        edited = edit_clicks(scene, prompts)
        assert all(edited.labels[p] == 2 for p in points[:3])
        assert all(edited.labels[p] == 0 for p in points[3:])
        changed = edited.labels != truth
        assert set(np.unique(edited.labels[changed])) <= {0, 2}
        lost = truth[changed & (edited.labels == 0)]
        assert set(np.unique(lost)) <= {*edited.values}, "only labels that were prompted lose voxels to background"
        np.testing.assert_array_equal(scene.labels, truth)


def test_same_prompts_in_another_order_give_the_same_mask() -> None:
    scene, truth = scene_of(np.eye(4))
    points = [tuple(int(v) for v in p) for p in np.argwhere(truth)[::97]]
    one = edit_clicks(scene, make_prompts({1: points})).labels
    other = edit_clicks(scene, make_prompts({1: points[::-1]})).labels
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "least"), [("RAS", 0.97), ("oblique", 0.97), ("LPS at 0.6 mm", 0.7), ("turned axes", 0.95)]
)
def test_click_from_nothing_finds_what_looks_alike(name: str, least: float) -> None:
    """Guards that a front stops where intensities change: a ball that reaches as far has a Dice of 0.1.

    On the grids that are resampled, the border lies between the network's voxels.
    """
    for seed in range(4):
        scene, truth = scene_of(AFFINES[name], seed=seed)
        middle = tuple(int(v) for v in np.argwhere(truth == 2).mean(axis=0).round())
        found = edit_clicks(scene, make_prompts({2: [middle]})).labels == 2
        assert dice_of(found, truth == 2) > least


def test_negative_click_takes_a_false_part_away() -> None:
    """Guards that one click takes away a third of a part at least, and nothing else.

    Growth does not reach the corners of a cube: its reach is the distance to the nearest border.
    """
    for seed in range(4):
        _, truth = scene_of(np.eye(4), seed=seed)
        starts = np.argwhere(np.ones((22, 20, 18), bool)) + 1
        free = [s for s in starts if not truth[tuple(slice(v - 1, v + 6) for v in s)].any()]
        x, y, z = (int(v) for v in free[len(free) // 2])
        wrong = truth.copy()
        wrong[x : x + 5, y : y + 5, z : z + 5] = 1
        scene, _ = scene_of(np.eye(4), wrong, seed)
        edited = edit_clicks(scene, make_prompts({}, [(x + 2, y + 2, z + 2)]))
        assert edited.values == (1,)
        assert (edited.labels != truth).sum() < 0.7 * (wrong != truth).sum()
        assert not ((edited.labels != truth) & (wrong == truth)).any()


def test_nothing_changes_outside_of_the_box() -> None:
    scene, truth = scene_of(np.eye(4))
    middle = tuple(int(v) for v in np.argwhere(truth == 2).mean(axis=0).round())
    box = Box((middle[0] - 1, 0, 0), (middle[0] + 2, 28, 26))
    changed = np.argwhere(edit_clicks(scene, make_prompts({2: [middle]}, box=box)).labels)
    assert len(changed) > 1
    assert changed[:, 0].min() >= box.start[0] and changed[:, 0].max() < box.stop[0]


def test_scribbles_are_obeyed() -> None:
    """Guards that drawing does not run into what is far off in intensity: all that may be reached has a Dice of 0.1.

    The box around the core carries no scribble, so that growth takes it too: it is more like the core than the rest is.
    """
    for seed in range(3):
        scene, truth = scene_of(np.eye(4), seed=seed)
        drawn = np.argwhere(truth == 2)[::7]
        erased = np.argwhere(truth == 0)[::211]
        labels = edit_scribbles(scene, drawn, erased, Prompts())
        assert (labels[tuple(drawn.T)] == 1).all() and (labels[tuple(erased.T)] == 0).all()
        assert dice_of(labels == 1, truth == 2) > 0.4


def test_changes_that_are_not_connected_with_a_click_of_their_kind_are_left_out() -> None:
    mask, found = np.zeros((12, 12, 12), bool), np.zeros((12, 12, 12), bool)
    mask[1:4, 1:4, 1:4], mask[8:11, 1:4, 1:4] = True, True  # the network would take both away
    found[1:4, 8:11, 8:11], found[8:11, 8:11, 8:11] = True, True  # and add two others
    changed = connected_changes(found, mask, np.array([[2, 9, 9]]), np.array([[9, 2, 2]]))
    right = np.zeros_like(mask)
    right[1:4, 8:11, 8:11], right[8:11, 1:4, 1:4] = True, True
    np.testing.assert_array_equal(changed, right)
