"""Presets that come with the project, and those of a user."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.configs.catalogue import load_preset, read_preset, shipped_preset_names
from lib.configs.preset import Window, ZScore, parse_preset
from lib.errors import ConfigError

MY_TASK = """
modality: CT
labels:
  - {index: 1, name: left ventricle, color: [10, 20, 30]}
  - {index: 2, name: myocardium, aliases: [wall]}
spacing_mm: [1.25, 1.25, 2.5]
roi_size: [64, 64, 32]
intensity: {kind: window, lower: -100, upper: 400}
network: {feature_size: 8, hidden_size: 96, mlp_dim: 192, num_heads: 6, proj_type: conv}
training: {learning_rate: 1e-3}
"""


def test_shipped_presets_are_valid_and_named_as_their_files() -> None:
    names = shipped_preset_names()
    assert {"abdomen_ct", "abdomen_ct_base", "hippocampus_mr"} <= set(names)
    assert [load_preset(name).name for name in names] == names


def test_abdomen_preset_is_the_published_btcv_task() -> None:
    preset = load_preset("abdomen_ct")
    assert [label.name for label in preset.labels] == [
        "spleen",
        "right_kidney",
        "left_kidney",
        "gallbladder",
        "esophagus",
        "liver",
        "stomach",
        "aorta",
        "inferior_vena_cava",
        "portal_and_splenic_veins",
        "pancreas",
        "right_adrenal_gland",
        "left_adrenal_gland",
    ]
    assert preset.axcodes == "RAS"
    assert isinstance(preset.intensity, Window)
    assert preset.intensity.lower >= -125
    assert preset.intensity.upper <= 275, "the training images are clipped to that"
    assert preset.out_channels == 14
    assert preset.mirror_axes == (), "a mirrored right kidney is a left one"


def test_base_preset_has_the_labels_of_the_compact_one_and_the_network_of_the_paper() -> None:
    preset, compact = load_preset("abdomen_ct_base"), load_preset("abdomen_ct")
    assert preset.labels == compact.labels
    assert preset.spacing_mm == (1.5, 1.5, 2.0)
    assert preset.roi_size == (96, 96, 96)
    assert preset.axcodes == "RAS"
    size = preset.network
    assert (size.feature_size, size.hidden_size, size.mlp_dim, size.num_heads) == (16, 768, 3072, 12)
    assert preset.mirror_axes == ()


def test_preset_file_that_extends_a_shipped_preset_takes_what_it_does_not_give(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: hippocampus_mr\nroi_size: [48, 48, 48]\n", encoding="utf-8")
    preset, base = read_preset(path), load_preset("hippocampus_mr")
    assert (preset.name, preset.roi_size) == ("mine", (48, 48, 48))
    assert (preset.labels, preset.spacing_mm) == (base.labels, base.spacing_mm)


@pytest.mark.parametrize(
    ("own", "drawn"),
    [
        ("roi_size: [48, 48, 48]", True),
        ("labels: [{index: 1, name: femur, color: [1, 2, 3]}]\ninference: {}", False),
        ("modality: MR\nintensity: {kind: zscore}", False),
        ("channels: [{name: native}, {name: late, optional: true}]", False),
    ],
)
def test_preset_about_something_else_draws_no_body_parts_and_changes_no_organ(
    tmp_path: Path, own: str, drawn: bool
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: abdomen_ct\n{own}\n", encoding="utf-8")
    change, shipped = read_preset(path).training.augmentation, load_preset("abdomen_ct").training.augmentation
    assert (change.phantom_probability, change.arm_probability) == ((0.1, 0.2) if drawn else (0, 0))
    assert (change.unenhanced_probability > 0, bool(change.unenhanced_hu)) == (drawn, drawn)
    assert change.slab_probability == shipped.slab_probability


@pytest.mark.parametrize(("labels", "drawn"), [(["spleen", "liver"], True), (["spleen", "femur"], False)])
def test_preset_with_labels_that_it_did_not_know_draws_no_body_parts(labels: list[str], drawn: bool) -> None:
    change = load_preset("abdomen_ct").with_labels(labels).training.augmentation
    assert (change.phantom_probability > 0, change.arm_probability > 0) == (drawn, drawn)
    assert [name for name, _ in change.unenhanced_hu] == [name for name in labels if name != "femur"]
    assert change.unenhanced_probability > 0


def test_preset_file_that_extends_nothing_known_says_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: brain\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no preset 'brain'; valid: abdomen_ct, abdomen_ct_base, hippocampus_mr"):
        read_preset(path)


@pytest.mark.parametrize("chosen", [["spleen", "tail"], ["tail"]])
def test_largest_component_of_an_unknown_label_is_refused(chosen: list[str]) -> None:
    data = load_preset("abdomen_ct").model_dump()
    data["inference"]["largest_component"] = chosen
    with pytest.raises(ConfigError, match=r"largest_component' names 'tail'; valid: true, false, or some of spleen"):
        parse_preset(data, "test")


def test_entropy_of_components_is_limited_for_labels_of_the_preset_only() -> None:
    data = load_preset("abdomen_ct").model_dump()
    data["inference"]["component_entropy"] = {"spleen": 0.03, "tail": 0.1}
    with pytest.raises(ConfigError, match=r"component_entropy' names 'tail'; valid: some of spleen, right_kidney"):
        parse_preset(data, "test")
    data["inference"]["component_entropy"] = {"spleen": 1.0}
    with pytest.raises(ConfigError, match=r"inference\.component_entropy\.0\.1"):
        parse_preset(data, "test")
    data["inference"]["component_entropy"] = {"spleen": 0.03, "liver": 0.04}
    preset = parse_preset(data, "test").with_labels(["pancreas", "spleen", "tumour"])
    assert preset.component_entropies == {2: 0.03}


def test_largest_component_of_fewer_labels_names_only_those_that_are_left() -> None:
    data = load_preset("abdomen_ct").model_dump()
    data["inference"]["largest_component"] = ["spleen", "liver"]
    preset = parse_preset(data, "test").with_labels(["pancreas", "spleen", "tumour"])
    assert preset.inference.largest_component == ("spleen",)
    assert preset.largest_component_indices == {2}


def test_hippocampus_preset_normalises_each_case() -> None:
    preset = load_preset("hippocampus_mr")
    assert preset.label_indices == {"anterior": 1, "posterior": 2}
    assert isinstance(preset.intensity, ZScore)


def test_load_preset_of_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        ConfigError, match=r"no preset 'brain'; valid: abdomen_ct, abdomen_ct_base, hippocampus_mr, or all"
    ):
        load_preset("brain")


@pytest.mark.parametrize("name", ["../presets/abdomen_ct", "", "abdomen_ct.yaml"])
def test_load_preset_takes_names_and_no_paths(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no preset"):
        load_preset(name)


def test_read_preset_of_a_user_takes_everything_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my_task.yaml"
    path.write_text(MY_TASK, encoding="utf-8")
    preset = read_preset(path)
    assert preset.name == "my_task"
    assert preset.label_indices == {"left ventricle": 1, "myocardium": 2}
    assert preset.labels[0].color == (10, 20, 30)
    assert preset.spacing_mm == (1.25, 1.25, 2.5)
    assert preset.roi_size == (64, 64, 32)
    assert preset.network.proj_type == "conv"
    assert preset.training.learning_rate == 1e-3, "YAML reads 1e-3 as text"
    assert isinstance(preset.intensity, Window)
    assert (preset.intensity.lower, preset.intensity.upper) == (-100, 400)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"labels: [1, 2", "is not YAML"),
        (b"\xff\xfe\x00bad", "is not YAML"),
        (b"- a\n- b\n", "holds list; valid: a mapping of preset keys"),
        (b"", "holds NoneType; valid: a mapping"),
        (b"!!python/object/apply:os.system ['true']", "is not YAML"),
        (MY_TASK.replace("[64, 64, 32]", "[64, 64, 30]").encode(), "'roi_size' is"),
    ],
)
def test_read_preset_of_a_bad_file_says_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "my_task.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"my_task\.yaml") as refused:
        read_preset(path)
    assert message in str(refused.value)


def test_read_preset_of_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml' cannot be read: No such file"):
        read_preset(tmp_path / "none.yaml")
