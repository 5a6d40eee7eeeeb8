"""Presets refuse what is wrong, and say which key, which value, and what would be valid."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lib.configs.preset import canonical_name, parse_preset
from lib.errors import ConfigError
from tests.tiny import preset_data, tiny_preset

TWO_LABELS = [{"index": 1, "name": "a"}, {"index": 2, "name": "b"}]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"roi_size": [96, 90, 96]}, ["'roi_size'", "90", "multiple of 16", "[96, 96, 96]"]),
        ({"roi_size": [8, 16, 16]}, ["'roi_size'", "8", "[16, 16, 16]"]),
        ({"roi_size": [24, 16, 16]}, ["'roi_size' is [24, 16, 16]", "multiple of 16"]),
        ({"roi_size": [20, 16, 16], "network": {"patch_size": 8}}, ["multiple of 8", "[16, 16, 16]"]),
        ({"roi_size": [8, 16, 16], "network": {"patch_size": 8}}, ["at least 16", "[16, 16, 16]"]),
        ({"network": {"patch_size": 4}}, ["'network.patch_size'", "4", "8 or 16"]),
        ({"roi_size": [16, 16]}, ["roi_size.2", "missing"]),
        ({"roi_size": [-16, 16, 16]}, ["'roi_size.0'", "-16", "greater than 0"]),
        ({"spacing_mm": [1, 0, 1]}, ["'spacing_mm.1'", "0", "greater than 0"]),
        ({"spacing_mm": [1, float("inf"), 1]}, ["'spacing_mm.1'", "inf", "finite"]),
        ({"colour": "red"}, ["unknown key 'colour'", "axcodes", "roi_size", "training"]),
        ({"network": {"hiden_size": 48}}, ["'network.hiden_size'", "hidden_size", "num_heads"]),
        ({"training": {"augmentation": {"flip": 1}}}, ["'training.augmentation.flip'", "rotation_degrees"]),
        ({"intensity": {"kind": "zscore", "lower": 1}}, ["intensity.zscore.lower", "lower_percentile"]),
        ({"intensity": {"kind": "window", "percentile": 1}}, ["intensity.window.percentile", "lower, upper"]),
        ({"intensity": {"kind": "minmax"}}, ["'intensity'", "'minmax'", "'window', 'zscore'"]),
        ({"intensity": {"kind": "window", "lower": 250, "upper": -175}}, ["lower (250.0)", "below upper (-175.0)"]),
        ({"intensity": {"kind": "window", "lower": 1, "upper": 1}}, ["lower (1.0) must be below upper (1.0)"]),
        ({"network": {"hidden_size": 50, "num_heads": 4}}, ["hidden_size 50", "num_heads 4", "such as 48"]),
        ({"network": {"proj_type": "mlp"}}, ["'network.proj_type'", "'mlp'", "'perceptron' or 'conv'"]),
        ({"axcodes": "RRS"}, ["'axcodes'", "'RRS'", "for example RAS"]),
        ({"axcodes": "RAX"}, ["'axcodes'", "'RAX'", "RLAPSI"]),
        ({"modality": "MRI"}, ["'modality'", "'MRI'", "'MR', 'CT'"]),
        ({"mirror_axes": [3]}, ["'mirror_axes.0'", "3", "0, 1 or 2"]),
        ({"name": "../x"}, ["'name'", "'../x'", "pattern"]),
        ({"labels": []}, ["'labels'", "at least 1"]),
        ({"labels": [TWO_LABELS[0], {"index": 3, "name": "b"}]}, ["[1, 3]", "1 to 2, each once"]),
        ({"labels": [TWO_LABELS[0], {"index": 1, "name": "b"}]}, ["[1, 1]", "1 to 2, each once"]),
        ({"labels": [TWO_LABELS[0], {"index": 2, "name": "A "}]}, ["'a' and 'A '", "share the name 'a'"]),
        ({"labels": [TWO_LABELS[0], {"index": 2, "name": "b", "aliases": ["A"]}]}, ["'a' and 'b'", "share the name"]),
        ({"labels": [{"index": 0, "name": "a"}]}, ["'labels.0.index'", "0", "greater than or equal to 1"]),
        ({"labels": [{"index": 1, "name": "--"}]}, ["'labels.0.name'", "'--'", "a letter or a digit"]),
        ({"labels": [{"index": 1, "name": "a", "color": [0, 0, 256]}]}, ["'labels.0.color.2'", "256", "255"]),
        ({"training": {"dice_weight": 0, "cross_entropy_weight": 0}}, ["both 0", "at least one above 0"]),
        ({"training": {"learning_rate": "fast"}}, ["'training.learning_rate'", "'fast'", "valid number"]),
    ],
)
def test_preset_with_a_bad_value_is_refused_in_words(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_preset(preset_data(**changes), source="my_task.yaml")
    message = str(refused.value)
    assert message.startswith("my_task.yaml: ")
    assert [part for part in parts if part not in message] == [], message


def test_window_of_8_voxel_patches_may_be_no_multiple_of_16() -> None:
    assert tiny_preset(roi_size=[24, 40, 16], network={"patch_size": 8}).roi_size == (24, 40, 16)


def test_preset_without_a_key_names_it() -> None:
    data = preset_data()
    del data["spacing_mm"]
    with pytest.raises(ConfigError, match="key 'spacing_mm' is missing"):
        parse_preset(data, source="x")


def test_preset_with_two_errors_names_both_and_no_consequences() -> None:
    changes = {"labels": [{"index": 1, "name": "a", "colour": "red"}], "modality": "MRI"}
    with pytest.raises(ConfigError) as refused:
        parse_preset(preset_data(**changes), source="x")
    assert "labels.0.colour" in str(refused.value)
    assert "modality" in str(refused.value)
    assert "Tuple" not in str(refused.value)


def test_preset_is_frozen_to_its_depth() -> None:
    preset = tiny_preset()
    with pytest.raises(ValidationError, match="frozen"):
        preset.name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        preset.network.hidden_size = 96  # type: ignore[misc]
    assert isinstance(preset.labels, tuple)
    assert hash(preset) == hash(tiny_preset())


def test_preset_sorts_labels_and_counts_background() -> None:
    preset = tiny_preset(labels=[{"index": 2, "name": "b"}, {"index": 1, "name": "a"}])
    assert preset.label_indices == {"a": 1, "b": 2}
    assert preset.out_channels == 3


def test_preset_survives_plain_data() -> None:
    preset = tiny_preset(intensity={"kind": "window", "lower": -175, "upper": 250}, mirror_axes=[1])
    assert parse_preset(preset.model_dump(mode="json"), source="x") == preset


@pytest.mark.parametrize("name", ["Left Box", "left_box", "LEFT-BOX ", "box left", "Box_Left"])
def test_find_label_by_name_or_alias_ignores_case_and_separators(name: str) -> None:
    label = tiny_preset().find_label(name)
    assert label is not None and label.index == 1


def test_find_label_of_another_name_is_none() -> None:
    assert tiny_preset().find_label("box") is None


def test_canonical_name_keeps_letters_of_any_script() -> None:
    assert canonical_name("  Linke Niere (groß) ") == "linke_niere_gross"
    assert canonical_name("左腎") != canonical_name("右腎") != ""
    tiny_preset(labels=[{"index": 1, "name": "左腎"}, {"index": 2, "name": "右腎"}])


def test_with_labels_renumbers_and_keeps_what_is_known() -> None:
    preset = tiny_preset(mirror_axes=[0]).with_labels(["tumour", "Box Left"])
    assert preset.label_indices == {"tumour": 1, "Left Box": 2}
    assert preset.labels[1].color == (255, 128, 0)
    assert preset.labels[1].aliases == ("box_left",)
    assert preset.mirror_axes == ()
    assert preset.out_channels == 3


def test_with_labels_that_repeat_is_refused() -> None:
    with pytest.raises(ConfigError, match="share the name 'a'"):
        tiny_preset().with_labels(["a", "A"])


def test_overlaps_go_down_by_twentieths_to_the_least() -> None:
    assert tiny_preset(inference={"overlap": 0.25}).inference.overlaps == (0.25,)
    assert tiny_preset(inference={"overlap": 0.5, "min_overlap": 0.38}).inference.overlaps == (0.5, 0.45, 0.4, 0.38)


def test_min_overlap_above_the_overlap_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_overlap 0\.5 is above overlap 0\.25"):
        parse_preset(preset_data(inference={"overlap": 0.25, "min_overlap": 0.5}), source="x")
