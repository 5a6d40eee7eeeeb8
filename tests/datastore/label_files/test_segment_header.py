"""The names in the header of a .seg.nrrd decide what its values mean, as 3D Slicer writes and submits such files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib.configs.preset import Preset
from lib.datastore.label_files.label_file import read_segments
from lib.datastore.label_files.segment_header import Segment, parse_segments
from lib.datastore.validation import CheckedLabel, check_label
from lib.errors import LabelError
from lib.transforms.volume import Grid
from tests.segment_files import AFFINE, LEFT_OUT, as_slicer_submits, write_segments
from tests.tiny import boxes, tiny_preset

PRESET = tiny_preset()  # Left Box (alias box_left) 1, core 2
VOXELS = boxes()[1]
IMAGE = Grid((20, 18, 16), AFFINE)


def check(path: Path, info: object = None, preset: Preset = PRESET) -> CheckedLabel:
    return check_label(path, IMAGE, preset, {"label_info": info} if info else {}, path.parent)


SWAPPED = (Segment("core", 1), Segment("Left Box", 2))
SWAPPED_VOXELS = np.array([0, 2, 1], np.uint8)[VOXELS]


@pytest.mark.parametrize("order", [SWAPPED, SWAPPED[::-1]])
def test_names_of_the_header_decide(tmp_path: Path, order: tuple[Segment, ...]) -> None:
    checked = check(write_segments(tmp_path / "sent.seg.nrrd", [SWAPPED_VOXELS], order))
    np.testing.assert_array_equal(checked.voxels, VOXELS)
    assert checked.mapped.label_map == {"Left Box": 1, "core": 2}
    assert "the names were taken from the segments in the header of the file" in checked.notes


def test_label_info_that_counts_positions_is_no_contradiction(tmp_path: Path) -> None:
    """Slicer's list was put in another order after the segments had got their values."""
    segments = (Segment("Left Box", 2), Segment("core", 1))
    sent = write_segments(tmp_path / "sent.seg.nrrd", [SWAPPED_VOXELS], segments)
    np.testing.assert_array_equal(check(sent, as_slicer_submits(segments)).voxels, VOXELS)


def test_label_info_of_the_same_values_is_no_contradiction(tmp_path: Path) -> None:
    sent = write_segments(tmp_path / "sent.seg.nrrd", [SWAPPED_VOXELS], SWAPPED[::-1])
    info = [{"name": "core", "idx": 1}, {"name": "box_left", "idx": 2}]
    np.testing.assert_array_equal(check(sent, info).voxels, VOXELS)


@pytest.mark.parametrize(
    "info",
    [
        [{"name": "Left Box", "idx": 1}, {"name": "core", "idx": 2}],
        [{"name": "Left Box", "idx": 1}],
        [{"name": "Left Box", "idx": 3}, {"name": "core", "idx": 4}],
    ],
)
def test_label_info_that_contradicts_the_header_is_refused(tmp_path: Path, info: object) -> None:
    sent = write_segments(tmp_path / "sent.seg.nrrd", [SWAPPED_VOXELS], SWAPPED)
    with pytest.raises(LabelError, match=r"label_info gives 'Left Box' the idx \d, .* 1: 'core', 2: 'Left Box'"):
        check(sent, info)


def test_names_that_slicer_gives_by_itself_are_unknown(tmp_path: Path) -> None:
    sent = write_segments(tmp_path / "sent.nrrd", [VOXELS], [Segment("Segment_1", 1), Segment("Segment_2", 2)])
    with pytest.raises(LabelError, match="'Segment_1', 'Segment_2' are no labels of 'tiny'; known: Left Box, core"):
        check(sent)
    with pytest.raises(LabelError, match="label_info gives 'Left Box' the idx 1"):
        check(sent, [{"name": "Left Box", "idx": 1}, {"name": "core", "idx": 2}])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_segments_of_clicks_and_scribbles_anywhere_in_the_list_shift_nothing(tmp_path: Path, place: int) -> None:
    names = ["core", "Left Box"]
    names[place:place] = LEFT_OUT
    segments = [Segment(name, value) for value, name in enumerate(names, start=1)]
    values = {segment.name: segment.value for segment in segments}
    voxels = np.array([0, values["Left Box"], values["core"]], np.uint8)[VOXELS]
    voxels[0, 0, :4] = values["foreground_scribbles"]
    checked = check(write_segments(tmp_path / "sent.seg.nrrd", [voxels], segments), as_slicer_submits(segments))
    np.testing.assert_array_equal(checked.voxels, VOXELS)
    assert any("'foreground_scribbles' are no labels" in note for note in checked.notes)


def test_layers_become_one_mask_where_no_labels_overlap(tmp_path: Path) -> None:
    segments = [Segment("core", 1, 0), Segment("background_scribbles", 1, 1), Segment("Left Box", 2, 1)]
    scribbled = np.where(VOXELS == 1, 2, 0)
    scribbled[VOXELS == 2] = 1  # a scribble over a label takes nothing from it
    sent = write_segments(tmp_path / "sent.seg.nrrd", [VOXELS == 2, scribbled], segments)
    checked = check(sent, as_slicer_submits(segments))
    np.testing.assert_array_equal(checked.voxels, VOXELS)
    overlapping = write_segments(tmp_path / "two.seg.nrrd", [VOXELS == 2, np.where(VOXELS > 0, 2, 0)], segments)
    with pytest.raises(LabelError, match=f"'core' and 'Left Box' overlap in {np.count_nonzero(VOXELS == 2)} voxels"):
        check(overlapping)


def test_layer_with_a_value_of_no_segment_is_refused(tmp_path: Path) -> None:
    segments = [Segment("core", 1, 0), Segment("Left Box", 2, 1)]
    sent = write_segments(tmp_path / "sent.seg.nrrd", [VOXELS == 2, VOXELS], segments)
    with pytest.raises(LabelError, match="layer 1 of the file has the value 1, which no segment in its header has"):
        check(sent)


def test_header_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    sent = write_segments(tmp_path / "sent.seg.nrrd", [VOXELS], [Segment("core", 1), Segment("Left Box", 1)])
    with pytest.raises(LabelError, match="header of the file calls the value 1 both 'core' and 'Left Box'"):
        check(sent)


def test_old_files_have_a_layer_for_each_segment() -> None:
    header = {"Segment0_Name": "core", "Segment1_Name": "Left Box", "Segment1_Color": "1 0 0", "other": "x"}
    assert parse_segments(header) == (Segment("core", 1, 0), Segment("Left Box", 1, 1))
    for broken in ("0", "-1", "1.5", "99999999", "x", "\u00b2"):
        with pytest.raises(LabelError, match="valid: a whole number from 1"):
            parse_segments({"Segment0_Name": "core", "Segment0_LabelValue": broken})
    with pytest.raises(LabelError, match="has the name ''; valid: a label's name"):
        parse_segments({"Segment0_LabelValue": "1"})


def test_nrrd_without_segments_is_explained_by_label_info_alone(tmp_path: Path) -> None:
    sent = write_segments(tmp_path / "sent.seg.nrrd", [SWAPPED_VOXELS], [])
    assert read_segments(sent) == ()
    info = [{"name": "core", "idx": 1}, {"name": "Left Box", "idx": 2}]
    np.testing.assert_array_equal(check(sent, info).voxels, VOXELS)
