"""The mask that clicks start from: read with care, kept in bounded memory, and measured in boxes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.errors import LabelError, ParameterError
from lib.interaction.answers import only_labels
from lib.interaction.editing import Scene, edit_clicks
from lib.interaction.prompts import make_prompts
from lib.interaction.starting_mask import StartingMask, StartingMasks, names_of, read_mask, read_values
from lib.transforms.postprocess import measure_labels
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import Grid, Volume
from tests.tiny import axis_affine, boxes, tiny_preset, write_nifti

AFFINE = axis_affine("LPS", (0.9, 1.1, 1.0))
GRID = Grid((20, 18, 16), AFFINE)


def test_mask_is_made_once_and_the_one_used_longest_ago_leaves() -> None:
    made = []

    def make(name: str) -> StartingMask:
        made.append(name)
        return StartingMask.of(np.zeros((100, 100, 40), np.uint8), np.eye(4), name, 2)

    masks = StartingMasks(limit_mib=1)
    for name in ("a", "b", "a", "c", "a", "b"):
        assert masks.get(name, lambda name=name: make(name)).origin == name
    assert made == ["a", "b", "c", "b"] and masks.size_bytes == 800_000
    assert StartingMasks(limit_mib=0).get("a", lambda: make("a")).origin == "a", "also where nothing is kept"


def test_boxes_after_a_click_hold_every_voxel_and_the_answer_is_measured_in_them() -> None:
    image, truth = boxes()
    start = StartingMask.of(np.asfortranarray(truth), AFFINE, "label", 2)
    scene = Scene(preprocess_volume(Volume(image, AFFINE), tiny_preset()), start.labels, AFFINE)
    random = np.random.default_rng(2)
    for _ in range(10):
        points = [tuple(int(random.integers(0, s)) for s in truth.shape) for _ in range(4)]
        edited = edit_clicks(scene, make_prompts({1: points[:1], 2: points[1:2]}, points[2:]))
        after = start.boxes_with(edited.part, edited.values)
        shown = only_labels(edited.labels, edited.values, after)
        np.testing.assert_array_equal(shown, np.where(np.isin(edited.labels, edited.values), edited.labels, 0))
        assert measure_labels(shown, AFFINE, tiny_preset(), after) == measure_labels(shown, AFFINE, tiny_preset())
        assert edited.part is not None
        outside = edited.labels != truth
        outside[edited.part] = False
        assert not outside.any()
    np.testing.assert_array_equal(start.labels, truth)


@pytest.mark.parametrize("wrong", [0.5, -1, np.nan, np.inf, 65536])
def test_mask_of_other_than_whole_numbers_is_refused(tmp_path: Path, wrong: float) -> None:
    voxels = np.zeros(GRID.shape, np.float32)
    voxels[3, 4, 5] = wrong
    with pytest.raises(LabelError, match="no whole numbers from 0 to 65535"):
        read_values(write_nifti(tmp_path / "mask.nii.gz", voxels, AFFINE), GRID, "label")


def test_values_are_read_by_name_and_unknown_names_are_left_out(tmp_path: Path) -> None:
    drawing = np.zeros(GRID.shape, np.uint16)
    drawing[2:4, 2:4, 2:4], drawing[6:8, 6:8, 6:8], drawing[10, 10, 10] = 300, 7, 9
    file = write_nifti(tmp_path / "mask.nii.gz", drawing, AFFINE)
    found = read_mask(file, GRID, tiny_preset(), {300: "core", 7: "box_left", 9: "tumour"}, "label")
    np.testing.assert_array_equal(found, 2 * (drawing == 300) + (drawing == 7))


@pytest.mark.parametrize(
    "rows",
    ["x", [5], [{"name": "a"}], [{"name": "a", "id": -1}], [{"name": "a", "id": 65536}], [{"name": "a", "id": True}],
     [{"name": "a", "id": 1}, {"name": "b", "id": 1}]],
)  # fmt: skip
def test_label_info_that_names_no_values_is_refused(rows: Any) -> None:
    with pytest.raises(ParameterError, match="each with an id of its own"):
        names_of(rows)
