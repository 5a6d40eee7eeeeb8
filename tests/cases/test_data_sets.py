"""Published data sets: what they say of themselves becomes cases and a preset, and one command trains them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lib.cases.data_sets import read_task
from lib.cases.labelled import Case, read_case
from lib.cases.split import read_split
from lib.configs.catalogue import load_preset, read_preset
from lib.errors import ConfigError, TrainingError
from lib.networks.checkpoint import read_checkpoint
from lib.storage.files import sha256_of
from lib.trainers.cli import main
from tests.tiny import boxes, preset_data, tiny_preset, write_nifti

MakeCases = Callable[..., tuple[Case, ...]]


def _task(folder: Path, count: int = 5, **changes: Any) -> Path:
    """A task as the Decathlon publishes it, whose values have a gap: 1 is a core, 3 a box."""
    described = []
    for number in range(1, count + 1):
        image, label = boxes(seed=number)
        numbered = np.array([0, 3, 1], dtype=np.uint8)[label]
        write_nifti(folder / "imagesTr" / f"box_{number:02d}.nii.gz", image)
        write_nifti(folder / "labelsTr" / f"box_{number:02d}.nii.gz", numbered)
        name = f"box_{number:02d}.nii.gz"
        described.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    data = {
        "name": "Boxes of 2026",
        "licence": "CC0",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "core", "3": "box left"},
        "training": described,
        "test": ["./imagesTs/box_99.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(data | changes), encoding="utf-8")
    return folder


def test_task_becomes_a_preset_and_cases_in_its_values(tmp_path: Path) -> None:
    task = read_task(_task(tmp_path / "Task99_Boxes"))
    preset = task.preset(tiny_preset())
    assert preset.label_indices == {"core": 1, "Left Box": 2}, "known by an alias: its own name and colour"
    assert (preset.name, preset.spacing_mm) == ("Boxes_of_2026", (1.0, 1.0, 1.0))
    cases = task.cases(preset)
    assert [case.case_id for case in cases] == [f"box_{n:02d}" for n in range(1, 6)]
    _, label = read_case(cases[0], preset)
    _, original = boxes(seed=1)
    np.testing.assert_array_equal(label, np.array([0, 2, 1])[original])


def test_names_and_values_may_stand_the_other_way_round(tmp_path: Path) -> None:
    folder = _task(
        tmp_path, labels={"background": 0, "core": 1, "box left": 3}, modality=None, channel_names={"0": "T1"}
    )
    assert read_task(folder).labels == {"core": 1, "box left": 3}


def _with_channels(folder: Path) -> Path:
    """The same task with nnU-Net's names of images."""
    for image in (folder / "imagesTr").iterdir():
        image.rename(image.with_name(image.name.replace(".nii.gz", "_0000.nii.gz")))
    return folder


def _without_list(folder: Path, **changes: Any) -> Path:
    """The same task as the second version of nnU-Net describes it."""
    described = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "core": 1, "box left": 3},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(described | changes), encoding="utf-8")
    return folder


def test_folder_of_nnunets_first_version_is_read(tmp_path: Path) -> None:
    task = read_task(_with_channels(_task(tmp_path, count=3)))
    assert [image.name for image, _ in task.pairs] == [f"box_{n:02d}_0000.nii.gz" for n in (1, 2, 3)]
    assert [case.case_id for case in task.cases(tiny_preset())] == ["box_01", "box_02", "box_03"]


def test_folder_of_nnunets_second_version_is_read(tmp_path: Path) -> None:
    task = read_task(_without_list(_with_channels(_task(tmp_path / "Dataset099_Boxes", count=3))))
    assert (task.name, task.modality, task.labels) == ("Dataset099_Boxes", "MRI", {"core": 1, "box left": 3})
    cases = task.cases(task.preset(tiny_preset()))
    assert [(case.case_id, case.image.name) for case in cases] == [
        (f"box_{n:02d}", f"box_{n:02d}_0000.nii.gz") for n in (1, 2, 3)
    ]
    _, label = read_case(cases[0], task.preset(tiny_preset()))
    np.testing.assert_array_equal(label, np.array([0, 2, 1])[boxes(seed=1)[1]])


def test_nnunet_may_say_where_each_file_lies(tmp_path: Path) -> None:
    folder = _task(tmp_path, count=2)
    listed = {
        f"box_{n:02d}": {"images": [f"imagesTr/box_{n:02d}.nii.gz"], "label": f"labelsTr/box_{n:02d}.nii.gz"}
        for n in (1, 2)
    }
    task = read_task(_without_list(folder, dataset=listed))
    assert [image.name for image, _ in task.pairs] == ["box_01.nii.gz", "box_02.nii.gz"]


def test_nnunet_folder_of_two_channels_says_so(tmp_path: Path) -> None:
    folder = _without_list(_with_channels(_task(tmp_path, count=1)), channel_names={"0": "T1", "1": "T2"})
    with pytest.raises(TrainingError, match=r"images of 2 channels \(T1, T2\)"):
        read_task(folder)


def test_task_of_the_presets_own_labels_keeps_the_preset(tmp_path: Path) -> None:
    preset = load_preset("abdomen_ct")
    labels = {"0": "background"} | {str(label.index): label.name for label in preset.labels}
    task = read_task(_task(tmp_path, modality={"0": "CT"}, labels=labels))
    assert task.preset(preset) == preset


def test_btcv_is_paired_by_number_and_has_the_presets_values(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        image, label = boxes(seed=number)
        write_nifti(tmp_path / "Training" / "img" / f"img{number:04d}.nii.gz", image)
        if number != 2:
            write_nifti(tmp_path / "Training" / "label" / f"label{number:04d}.nii.gz", label)
    task, preset = read_task(tmp_path), load_preset("abdomen_ct")
    assert task.preset(preset) == preset
    assert [(case.case_id, case.label.name, case.values) for case in task.cases(preset)] == [
        ("img0001", "label0001.nii.gz", None),
        ("img0010", "label0010.nii.gz", None),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": []}, "has 0 training cases"),
        ({"labels": {"0": "background"}}, "0 labels"),
        ({"labels": None}, "does not describe a data set"),
        ({"training": [{"image": "x.nii.gz", "label": "y.nii.gz"}]}, "names 2 files that are not there, such as"),
        ({"modality": {"0": "FLAIR", "1": "T1"}}, r"images of 2 channels \(FLAIR, T1\); valid: one"),
    ],
)
def test_task_that_cannot_be_used_says_why(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        read_task(_task(tmp_path, count=1, **changes))


def test_folder_that_is_no_data_set_says_what_would_be(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"with dataset\.json .*or with img and label"):
        read_task(tmp_path)


def test_images_of_another_modality_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is MRI, but preset 'abdomen_ct' is for CT"):
        read_task(_task(tmp_path, count=1)).preset(load_preset("abdomen_ct"))


def test_one_command_from_the_folder_to_scored_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, preset, out = _task(tmp_path / "task", count=6), tmp_path / "tiny.yaml", tmp_path / "out"
    preset.write_text(yaml.safe_dump(preset_data()), encoding="utf-8")
    command = ["task", "--folder", str(folder), "--preset", str(preset), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--set", "max_epochs", "2"]) == 0
    said = json.loads(capsys.readouterr().out)
    split = read_split(out / "split.json")
    assert said["cases"] == len(split.validation) >= 1
    side_car = json.loads((out / "weights.json").read_text(encoding="utf-8"))
    assert side_car["sha256"] == sha256_of(out / "weights.pt")
    assert side_car["data"] == {
        "name": "Boxes of 2026",
        "licence": "CC0",
        "training_cases": len(split.train),
        "validation_cases": len(split.validation),
        "split": "split.json",
    }
    assert side_car["training"]["steps"] == 2 * len(split.train)
    assert read_preset(out / "preset.yaml") == read_checkpoint(out / "weights.pt").preset
    shutil.rmtree(folder / "labelsTr")
    assert main(command) == 2
    assert "names 6 files that are not there" in capsys.readouterr().err
