"""Settings from --conf: cast once, refused in words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from lib.configs.catalogue import shipped_preset_names
from lib.configs.settings import Settings
from lib.errors import ConfigError

MY_TASK = """
modality: MR
labels: [{index: 1, name: a}]
spacing_mm: [1, 1, 1]
roi_size: [16, 16, 16]
intensity: {kind: zscore}
"""


@pytest.fixture
def my_task(tmp_path: Path) -> Path:
    path = tmp_path / "my_task.yaml"
    path.write_text(MY_TASK, encoding="utf-8")
    return path


def test_from_conf_casts_strings() -> None:
    conf = {"models": "hippocampus_mr, abdomen_ct,", "queue_size": "3", "upload_limit_mib": "10", "model_dir": "w"}
    settings = Settings.from_conf(conf)
    assert settings.models == ("hippocampus_mr", "abdomen_ct")
    assert (settings.queue_size, settings.upload_limit_mib) == (3, 10)
    assert settings.model_dir == Path("w")


def test_from_conf_of_nothing_serves_the_hippocampus() -> None:
    settings = Settings.from_conf({})
    assert list(settings.load_presets()) == ["hippocampus_mr"]
    assert settings.model_dir.name == "model"
    assert settings.model_dir.is_absolute()


def test_from_conf_takes_what_monai_label_adds_itself() -> None:
    assert Settings.from_conf({"server_mode": "true"}) == Settings.from_conf({})


@pytest.mark.parametrize(
    ("conf", "parts"),
    [
        ({"model": "a"}, ["unknown key 'model'", "models", "preset", "pretrained", "upload_limit_mib"]),
        ({"precision": "fp8"}, ["'precision'", "'fp8'", "'auto', 'fp32', 'bf16' or 'fp16'"]),
        ({"queue_size": "-1"}, ["'queue_size'", "-1", "greater than or equal to 0"]),
        ({"upload_limit_mib": "lots"}, ["'upload_limit_mib'", "'lots'", "valid integer"]),
        ({"pretrained": "hippocampus_mr="}, ["pretrained.hippocampus_mr", "at least 1 character"]),
    ],
)
def test_from_conf_with_a_bad_value_is_refused_in_words(conf: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        Settings.from_conf(conf)
    assert str(refused.value).startswith("--conf: ")
    assert [part for part in parts if part not in str(refused.value)] == [], str(refused.value)


ODD_VALUES = (
    "", " ", "nan", "inf", "-inf", "1e400", "-1", "0", "9" * 400, "9" * 5000, "9" * 400 + "GiB", "[", "http://[",
    "http://x:y", "http://x:999999", "http://[v1.x]", "a=b", "=", ",", "a==", "../..", "None", "{}", "true",
    "10.0.0.1/8", "::ffff:1/999", "01:02", "24:00", "ray://:1", "host:99999", "\0",
)  # fmt: skip


@pytest.mark.parametrize("key", Settings.model_fields)
def test_any_value_of_any_key_is_taken_as_a_finite_one_or_refused_in_words(key: str) -> None:
    for value in ODD_VALUES:
        try:
            taken = getattr(Settings.from_conf({key: value}), key)
        except ConfigError as refused:
            assert str(refused).startswith(f"--conf: '{key}") and "\n" not in str(refused), str(refused)
        else:
            assert not isinstance(taken, float) or math.isfinite(taken), (key, value)


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "http://x:y", "https://x:999999"])
def test_origin_that_is_no_address_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="cors_origins"):
        Settings.from_conf({"cors_origins": f"https://viewer.example,{origin}"})


def test_device_and_devices_are_not_both_given() -> None:
    assert Settings.from_conf({"devices": "cpu,cpu"}).devices == "cpu,cpu"
    with pytest.raises(ConfigError, match="device is 'cuda' and devices 'all'; valid: one of the two"):
        Settings.from_conf({"device": "cuda", "devices": "all"})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings.from_conf({}).device = "cpu"  # type: ignore[misc]


def test_load_presets_all_means_every_shipped_one() -> None:
    assert list(Settings.from_conf({"models": "all"}).load_presets()) == shipped_preset_names()


def test_load_presets_of_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="no preset 'brain'; valid: abdomen_ct"):
        Settings.from_conf({"models": "brain"}).load_presets()


def test_load_presets_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="names a preset twice"):
        Settings.from_conf({"models": "abdomen_ct,abdomen_ct"}).load_presets()


def test_load_presets_serves_a_users_file_alone_or_with_others(my_task: Path) -> None:
    assert list(Settings.from_conf({"preset": str(my_task)}).load_presets()) == ["my_task"]
    both = Settings.from_conf({"preset": str(my_task), "models": "hippocampus_mr"}).load_presets()
    assert sorted(both) == ["hippocampus_mr", "my_task"]


def test_load_presets_prefers_a_users_file_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "hippocampus_mr.yaml"
    path.write_text(MY_TASK, encoding="utf-8")
    served = Settings.from_conf({"preset": str(path), "models": "hippocampus_mr"}).load_presets()
    assert served["hippocampus_mr"].label_indices == {"a": 1}


def test_load_presets_with_labels_trains_other_structures() -> None:
    served = Settings.from_conf({"models": "abdomen_ct", "labels": "liver, kidney right"}).load_presets()
    assert served["abdomen_ct"].label_indices == {"liver": 1, "right_kidney": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"C:\weights\x.pt", {"": r"C:\weights\x.pt"}),
        (r"abdomen_ct=C:\weights\x.pt", {"abdomen_ct": r"C:\weights\x.pt"}),
        ("/weights/a,b.pt", {"": "/weights/a,b.pt"}),
        ("./run=3/x.pt", {"": "./run=3/x.pt"}),
        ("https://host/x.pt?token=abc&id=1", {"": "https://host/x.pt?token=abc&id=1"}),
        ("abdomen_ct=https://host/x.pt?a=b", {"abdomen_ct": "https://host/x.pt?a=b"}),
        ("abdomen_ct=a.pt, hippocampus_mr = b.pt", {"abdomen_ct": "a.pt", "hippocampus_mr": "b.pt"}),
        ("", {}),
    ],
)
def test_pretrained_is_a_path_or_address_or_one_by_name(text: str, expected: dict[str, str]) -> None:
    assert Settings.from_conf({"pretrained": text}).pretrained == expected


def test_pretrained_for_each_of_several_presets() -> None:
    settings = Settings.from_conf({"models": "all", "pretrained": "abdomen_ct=a.pt"})
    assert settings.pretrained_for("abdomen_ct", served=2) == "a.pt"
    assert settings.pretrained_for("hippocampus_mr", served=2) is None


def test_pretrained_without_a_name_belongs_to_the_only_preset() -> None:
    settings = Settings.from_conf({"pretrained": "a.pt"})
    assert settings.pretrained_for("hippocampus_mr", served=1) == "a.pt"
    with pytest.raises(ConfigError, match="which preset it is for: name=path"):
        settings.pretrained_for("hippocampus_mr", served=2)


def test_pretrained_for_a_preset_that_is_not_served_is_refused() -> None:
    with pytest.raises(ConfigError, match="pretrained is for abdomen_ct; served: hippocampus_mr"):
        Settings.from_conf({"pretrained": "abdomen_ct=a.pt"}).load_presets()


def test_weights_folder_of_other_labels_is_another_one(tmp_path: Path) -> None:
    def folder(labels: str) -> Path:
        settings = Settings.from_conf({"models": "abdomen_ct", "model_dir": str(tmp_path), "labels": labels})
        return settings.weights_folder(settings.load_presets()["abdomen_ct"])

    assert folder("") == tmp_path / "abdomen_ct"
    assert folder("liver,My Organ") == tmp_path / "abdomen_ct-liver-my_organ"
    assert folder("../../x") == tmp_path / "abdomen_ct-x"


def test_weights_folders_of_long_label_lists_differ_where_the_lists_do(tmp_path: Path) -> None:
    def folder(last: str) -> Path:
        labels = ",".join([*(f"structure_{i}" for i in range(20)), last])
        settings = Settings.from_conf({"models": "abdomen_ct", "model_dir": str(tmp_path), "labels": labels})
        return settings.weights_folder(settings.load_presets()["abdomen_ct"])

    assert folder("a") != folder("b")
    assert len(folder("a").name) <= len("abdomen_ct-") + 60
