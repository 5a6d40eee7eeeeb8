"""The simulated annotator clicks where the mask is wrong, and always in the same way for a seed."""

from __future__ import annotations

import numpy as np

from lib.interaction.annotator import next_click, prompts_of


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


def test_clicks_become_prompts() -> None:
    labels, truth = masks()
    labels[5, 18, 18] = 2
    first = next_click(labels, truth, (1, 1, 1))
    assert first is not None
    assert prompts_of([first]).positive == ((1, (first.point,)),)
