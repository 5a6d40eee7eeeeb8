"""Names decide what a mask's values mean, whatever their order."""

from __future__ import annotations

import itertools

import pytest

from lib.configs.catalogue import load_preset
from lib.datastore.label_names import Completeness, choose_reading, map_values, parse_entries, parse_label_info
from lib.errors import LabelError
from tests.tiny import tiny_preset

TINY = tiny_preset()  # Left Box (alias box_left) 1, core 2
ABDOMEN = load_preset("abdomen_ct")


def info(*names: str) -> list[dict[str, object]]:
    return [{"name": name, "idx": value} for value, name in enumerate(names, start=1)]


def test_order_of_segments_does_not_matter() -> None:
    for order in itertools.permutations(("Left Box", "core")):
        mapped = map_values({1, 2}, parse_label_info(info(*order)), TINY)
        assert {order[value - 1]: index for value, index in mapped.values.items()} == {"Left Box": 1, "core": 2}
        assert mapped.label_map == {"Left Box": 1, "core": 2}
        assert mapped.missing == ()


@pytest.mark.parametrize("name", ["left box", "LEFT_BOX", " Left  Box ", "box_left", "Box left"])
def test_case_spaces_underscores_and_aliases_do_not_matter(name: str) -> None:
    assert map_values({7}, {7: name}, TINY).values == {7: 1}


def test_values_without_names_are_the_presets_own() -> None:
    assert parse_label_info(None) is None and parse_label_info([]) is None
    mapped = map_values({2}, None, TINY)
    assert (mapped.values, mapped.label_map, mapped.missing) == ({2: 2}, {"core": 2}, ("Left Box",))
    with pytest.raises(LabelError, match=r"the values 3, and no label_info to explain them; valid: .*'core': 2"):
        map_values({1, 3}, None, TINY)


def test_value_that_label_info_does_not_name_is_refused() -> None:
    with pytest.raises(LabelError, match="the values 5, which nothing names; named are 1: core"):
        map_values({1, 5}, {1: "core"}, TINY)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(LabelError, match="'tumour' are no labels of 'tiny'; known: Left Box, core"):
        map_values({1, 2}, {1: "core", 2: "tumour"}, TINY)
    assert map_values({1}, {1: "core", 2: "tumour"}, TINY).missing == ("Left Box",), "nothing of it was drawn"


def test_unknown_names_are_kept_where_the_preset_allows_it() -> None:
    names = {1: "Liver", 2: "lung left", 3: "kidney_right", 4: "heart"}
    mapped = map_values({1, 2, 3, 4}, names, ABDOMEN)
    assert mapped.label_map == {"right_kidney": 2, "liver": 6, "heart": 14, "lung left": 15}
    assert mapped.values == {1: 6, 2: 15, 3: 2, 4: 14}
    assert any("left out of training" in note for note in mapped.notes)


def test_two_segments_of_one_organ_become_one() -> None:
    assert map_values({1, 2}, {1: "kidney_right", 2: "Right Kidney"}, ABDOMEN).values == {1: 2, 2: 2}


def test_organ_that_was_not_drawn_is_missing_unless_the_client_says_that_there_is_none() -> None:
    names = parse_label_info(info("Left Box", "core"))  # 3D Slicer names the segments that it made at the start too
    assert map_values({1}, names, TINY).missing == ("core",)
    assert map_values({1}, names, TINY, Completeness(complete=True)).missing == ()
    assert map_values({1, 2}, names, TINY, Completeness(missing=("CORE",))).missing == ("core",)
    assert map_values(set(), names, TINY).missing == ("Left Box", "core")


def test_background_may_have_a_segment() -> None:
    assert map_values({1, 2}, {1: "background", 2: "core"}, TINY).values == {1: 0, 2: 2}


@pytest.mark.parametrize(
    "broken",
    [
        {"Left Box": 1}, "core", [1], [{"name": "core"}],
        [{"idx": 1}], [{"name": "", "idx": 1}], [{"name": 5, "idx": 1}],
        [{"name": "core", "idx": "1"}], [{"name": "core", "idx": -1}], [{"name": "core", "idx": True}],
        [{"name": "core", "idx": 1.5}], [{"name": "core", "idx": 10**9}], [{"name": "x" * 300, "idx": 1}],
        [{"name": f"organ {n}", "idx": n} for n in range(10_000)],
        [{"name": "core", "idx": 1}, {"name": "Left Box", "idx": 1}],
    ],
)  # fmt: skip
def test_broken_label_info_is_refused(broken: object) -> None:
    with pytest.raises(LabelError, match="label_info"):
        parse_label_info(broken)


@pytest.mark.parametrize("said", [{"complete": "yes"}, {"missing_labels": "core"}, {"missing_labels": [1]}])
def test_broken_completeness_is_refused(said: dict[str, object]) -> None:
    with pytest.raises(LabelError, match="valid"):
        Completeness.parse(said)


def test_unknown_missing_label_is_refused() -> None:
    with pytest.raises(LabelError, match="missing_labels names 'tumour'; known: Left Box, core"):
        map_values({1}, None, TINY, Completeness(missing=("tumour",)))


def slicer_list(*segments: str) -> list[dict[str, object]]:
    """``label_info`` as 3D Slicer's module makes it of its list: three names are left out, and counted."""
    left_out = ("background", "foreground_scribbles", "background_scribbles")
    return [{"name": name, "idx": n} for n, name in enumerate(segments, start=1) if name not in left_out]


FIRST = ("background", "Left Box", "core")
BETWEEN = ("Left Box", "foreground_scribbles", "background_scribbles", "core")


@pytest.mark.parametrize("segments", [FIRST, BETWEEN, ("background_scribbles", "core", "background", "Left Box")])
def test_positions_in_slicers_list_are_told_from_values_by_the_values(segments: tuple[str, ...]) -> None:
    entries = parse_entries(slicer_list(*segments))
    sent = {entry.name: value for value, entry in enumerate(entries, start=1)}  # as Slicer exports the mask
    names, note = choose_reading(set(sent.values()), entries)
    assert {names[value]: value for value in sent.values()} == sent
    assert "positions in 3D Slicer's list" in note
    as_values = {entry.value for entry in entries}  # as another client means the same label_info
    names, note = choose_reading(as_values, entries)
    assert {names[value]: value for value in as_values} == {entry.name: entry.value for entry in entries}
    assert note == ""


def test_mask_that_both_readings_explain_differently_is_refused() -> None:
    entries = parse_entries(slicer_list(*FIRST))  # Left Box 2, core 3, and values from 1
    with pytest.raises(LabelError, match=r"value 2 of the mask is 'Left Box' if .* and 'core' if they are positions"):
        choose_reading({2}, entries)
    assert choose_reading({1}, entries)[0][1] == "Left Box"
    assert choose_reading({3}, entries)[0][3] == "core"
    said = parse_entries([{"name": "background", "idx": 0}, *slicer_list(*FIRST)])
    assert choose_reading({2}, said) == ({2: "Left Box", 3: "core"}, "")


def test_reserved_segments_at_the_end_of_slicers_list_change_nothing() -> None:
    entries = parse_entries(slicer_list("core", "Left Box", "background", "foreground_scribbles"))
    assert choose_reading({2}, entries) == ({1: "core", 2: "Left Box"}, "")


def test_sparse_values_of_other_clients_are_values() -> None:
    entries = parse_entries([{"name": "spleen", "idx": 1}, {"name": "liver", "idx": 6}])
    assert choose_reading({1}, entries)[0][1] == choose_reading({1, 6}, entries)[0][1] == "spleen"
    assert choose_reading({6}, entries) == ({1: "spleen", 6: "liver"}, "")


def test_scribbles_are_no_labels() -> None:
    mapped = map_values({1, 2}, {1: "foreground_scribbles", 2: "core"}, TINY)
    assert mapped.values == {1: 0, 2: 2}
    assert any("'foreground_scribbles' are no labels" in note for note in mapped.notes)
