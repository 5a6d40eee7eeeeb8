"""What viewers send is read as prompts, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from lib.errors import ParameterError
from lib.interaction.dialects import parse_clicks
from lib.interaction.prompts import Box, make_prompts, parse_box
from tests.tiny import tiny_preset

PRESET = tiny_preset()


def test_clicks_of_slicer_are_read() -> None:
    sent = {
        "Left Box": [[1, 2, 3], [4, 5, 6]],
        "core": [],
        "background": [[7, 8, 9]],
        "label": "core",
        "roi": [5, 1, 0, 9, 2, 8],
    }
    prompts = parse_clicks(sent, PRESET)
    assert prompts.positive == ((1, ((1, 2, 3), (4, 5, 6))),)
    assert prompts.negative == ((7, 8, 9),) and prompts.of_label is None
    assert prompts.box == Box((1, 0, 2), (6, 10, 9))


def test_clicks_of_ohif_are_read_and_its_key_null_is_left_out() -> None:
    prompts = parse_clicks(
        {"background": [], "null": [[1, 1, 1]], "core": [[2, 2, 2]], "result_dtype": "uint8"}, PRESET
    )
    assert prompts.positive == ((2, ((2, 2, 2),)),) and not prompts.negative


def test_clicks_of_deepgrow_are_of_the_label_that_is_named() -> None:
    prompts = parse_clicks({"label": "box_left", "foreground": [[1, 1, 1]], "background": [[2, 2, 2]]}, PRESET)
    assert prompts.positive == ((1, ((1, 1, 1),)),) and prompts.of_label == 1


def test_labels_of_other_tasks_say_nothing() -> None:
    assert parse_clicks({"spleen": [[1, 1, 1]]}, PRESET, {"Spleen"}).is_empty


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"core": [[1, 2]]}, r"'core' is \[1, 2\]"),
        ({"core": [[1, 2, 3, 4]]}, "'core' is"),
        ({"core": [[1.5, 2, 3]]}, r"'core' is \[1.5, 2, 3\]"),
        ({"core": [["1", 2, 3]]}, "'core' is"),
        ({"core": [None]}, "'core' is None"),
        ({"core": [[True, 0, 0]]}, "'core' is"),
        ({"core": [[1e300, 0, 0]]}, "'core' is"),
        ({"core": "1,2,3"}, "'core' is '1,2,3'"),
        ({"core": {"a": 1}}, "'core' is"),
        ({"background": 5}, "'background' is 5"),
        ({"core": [[i, 0, 0] for i in range(10_000)]}, "'core' is '10000 points'"),
        ({"spleen": [[1, 1, 1]]}, "'spleen' is '1 points'; valid: points of Left Box, core, background"),
        ({"core": [[1, 1, 1]], "Left Box": [[1, 1, 1]]}, r"'points' is \[1, 1, 1\]"),
        ({"core": [[1, 1, 1]], "background": [[1, 1, 1]]}, r"'points' is \[1, 1, 1\]"),
        ({"foreground": [[1, 1, 1]], "label": None}, "'label' is None"),
        ({"roi": [1, 2, 3]}, "'roi' is"),
        ({"roi": ["a"] * 6}, "'roi' is"),
    ],
)  # fmt: skip
def test_bad_prompt_is_refused_by_name(sent: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        parse_clicks(sent, PRESET)


def test_null_and_whole_floats_are_taken() -> None:
    prompts = parse_clicks({"core": None, "Left Box": [[1.0, 2.0, 3.0]]}, PRESET)
    assert prompts.positive == ((1, ((1, 2, 3),)),)


def test_order_of_clicks_does_not_matter() -> None:
    one, other = make_prompts({2: [(1, 1, 1), (2, 2, 2)]}), make_prompts({2: [(2, 2, 2), (1, 1, 1), (1, 1, 1)]})
    assert one == other and one.key() == other.key()


def test_points_outside_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"'points' is \[10, 0, 0\]; valid: a voxel of the image: 0 to 9"):
        make_prompts({1: [(10, 0, 0)]}).check_inside((10, 10, 10))
    with pytest.raises(ParameterError, match="inside of roi"):
        make_prompts({1: [(5, 5, 5)]}, box=Box((0, 0, 0), (3, 3, 3))).check_inside((10, 10, 10))


def test_box_is_cut_to_the_image() -> None:
    box = parse_box([-5, 3, 9, 2, 0, 100])
    assert box is not None and box.clipped((8, 8, 8)) == Box((0, 2, 0), (4, 8, 8))
    assert parse_box([]) is None


def test_box_beside_the_image_is_refused() -> None:
    with pytest.raises(ParameterError, match="inside of the image"):
        parse_box([-5, -3, 0, 7, 0, 7])
    box = parse_box([8, 9, 0, 7, 0, 7])
    assert box is not None
    with pytest.raises(
        ParameterError,
        match=r"'roi' is 'voxels \[8, 0, 0\] to \[9, 7, 7\]'; valid: some of the voxels 0 to 7, 0 to 6, 0 to 8",
    ):
        box.clipped((8, 7, 9))
