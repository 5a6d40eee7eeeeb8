"""The command line: split, train, evaluate; 0 or a sentence and 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from lib.cases.labelled import Case
from lib.cases.split import read_split
from lib.networks.checkpoint import read_checkpoint
from lib.storage.files import sha256_of
from lib.trainers.cli import build_parser, main
from tests.tiny import QUIET_AUGMENTATION, preset_data

MakeCases = Callable[..., tuple[Case, ...]]


@pytest.fixture
def data(make_cases: MakeCases, tmp_path: Path) -> list[str]:
    """``--images`` and ``--labels`` of six cases."""
    make_cases(6)
    return ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]


@pytest.fixture
def preset_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    recipe = {"max_epochs": 15, "batch_size": 2, "learning_rate": 8e-3, "augmentation": QUIET_AUGMENTATION}
    path.write_text(yaml.safe_dump(preset_data(training=recipe | {"warmup_fraction": 0.1})), encoding="utf-8")
    return path


def test_split_train_evaluate_end_to_end(
    data: list[str], preset_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split_file, weights = tmp_path / "split.json", tmp_path / "out" / "tiny.pt"
    common = [*data, "--split", str(split_file), "--device", "cpu"]
    assert main(["split", *data, "--out", str(split_file), "--validation-share", "0.3"]) == 0
    split = read_split(split_file)
    assert len(split.train) + len(split.validation) == 6
    assert f"{len(split.train)} training and {len(split.validation)} validation cases" in capsys.readouterr().out

    arguments = ["--preset", str(preset_file), "--out", str(weights), "--run-dir", str(tmp_path / "run")]
    options = ["--set", "precision", "fp32", "--data-name", "boxes", "--data-licence", "CC0"]
    assert main(["train", *common, *arguments, *options]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["mean_dice"] > 0.5
    side_car = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    assert side_car["sha256"] == sha256_of(weights)
    assert side_car["held_out"] == trained
    assert side_car["labels"] == {"Left Box": 1, "core": 2}
    assert (side_car["data"]["name"], side_car["data"]["licence"]) == ("boxes", "CC0")
    assert side_car["data"]["training_cases"] == len(split.train)
    assert side_car["training"]["steps"] == 15 * -(-len(split.train) // 2)
    assert side_car["preset"]["training"]["precision"] == "fp32"
    checkpoint = read_checkpoint(weights)
    assert checkpoint.preset is not None and checkpoint.preset.name == "tiny"

    scores = tmp_path / "scores.json"
    assert main(["evaluate", *common, "--weights", str(weights), "--json", str(scores)]) == 0
    assert json.loads(capsys.readouterr().out) == trained, "what is promised is what is scored again"
    assert len(json.loads(scores.read_text(encoding="utf-8"))["per_case"]) == len(split.validation)

    assert main(["evaluate", *data, "--device", "cpu", "--weights", str(weights)]) == 0
    assert json.loads(capsys.readouterr().out)["cases"] == 6, "without a split, all cases"


def test_weights_from_nothing_are_scored_and_written_with_limits_that_they_can_meet(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset_file, weights = tmp_path / "strict.yaml", tmp_path / "strict.pt"
    recipe = {"max_epochs": 40, "batch_size": 2, "learning_rate": 8e-3, "augmentation": QUIET_AUGMENTATION}
    limits = {"component_entropy": {"core": 1e-6, "Left Box": 1e-6}}
    text = yaml.safe_dump(preset_data(training=recipe | {"warmup_fraction": 0.1}, inference=limits))
    preset_file.write_text(text, encoding="utf-8")
    split = tmp_path / "split.json"
    assert main(["split", *data, "--out", str(split), "--validation-share", "0.3"]) == 0
    capsys.readouterr()
    common = [*data, "--split", str(split), "--device", "cpu", "--preset", str(preset_file)]
    assert main(["train", *common, "--out", str(weights), "--run-dir", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["mean_dice"] > 0.5, "with the limits as they are all masks are empty"
    preset = read_checkpoint(weights).preset
    assert preset is not None and min(preset.component_entropies.values()) > 1e-6

    on = ["--start", str(weights), "--max-steps", "1", "--out", str(tmp_path / "on.pt")]
    assert main(["train", *common, *on, "--run-dir", str(tmp_path / "second")]) == 0
    assert json.loads(capsys.readouterr().out)["mean_dice"] > 0.5
    preset = read_checkpoint(tmp_path / "on.pt").preset
    assert preset is not None and min(preset.component_entropies.values()) > 1e-6


def test_train_on_label_files_of_other_numbers(
    data: list[str], preset_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tmp_path / "values.json"
    values.write_text(json.dumps({"CORE": 1, "box left": 2, "spleen": 3}), encoding="utf-8")
    arguments = ["--preset", str(preset_file), "--out", str(tmp_path / "x.pt"), "--run-dir", str(tmp_path / "run")]
    code = main(["train", *data, *arguments, "--label-values", str(values), "--max-steps", "1", "--device", "cpu"])
    assert code == 0
    assert json.loads(capsys.readouterr().out)["cases"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "brain"], "there is no preset 'brain'; valid: abdomen_ct"),
        (["--preset", "none.yaml"], "preset file 'none.yaml' cannot be read"),
        (["--set", "learning_rate", "fast"], "'training.learning_rate' is 'fast'"),
        (["--set", "learnin_rate", "1"], "unknown key 'training.learnin_rate'; valid: activation_checkpointing"),
        (["--set", "augment.zoom", "1"], "--set augment.zoom: there is no group 'augment'"),
        (["--set", "seed.x", "1"], "--set seed.x: there is no group 'seed' in the recipe; valid: augmentation"),
        (["--start", "none.pt"], "checkpoint 'none.pt' cannot be read"),
        (["--split", "none.json"], "split file 'none.json' cannot be used"),
        (["--device", "cuda:42"], "parameter 'device' is 'cuda:42'"),
        (["--dataset", "Zip"], "parameter 'dataset' is 'Zip'"),
        (["--label-values", "none.json"], "--label-values 'none.json' is no JSON file of names and values"),
        (["--images", "nowhere"], "there is no folder 'nowhere'"),
    ],
)
def test_train_with_wrong_input_ends_with_a_sentence_and_2(
    data: list[str],
    preset_file: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = ["--preset", str(preset_file), "--out", str(tmp_path / "x.pt"), "--run-dir", str(tmp_path / "run")]
    assert main(["train", *data, *usual, *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "x.pt").exists()


def test_evaluate_of_foreign_weights_says_what_is_missing(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    torch.save({"a": torch.ones(1)}, tmp_path / "foreign.pt")
    assert main(["evaluate", *data, "--weights", str(tmp_path / "foreign.pt")]) == 2
    assert "'foreign.pt' does not say its preset" in capsys.readouterr().err


def test_split_by_consecutive_pairs(data: list[str], tmp_path: Path) -> None:
    out = tmp_path / "split.json"
    assert main(["split", *data, "--out", str(out), "--subjects", "consecutive-pairs"]) == 0
    split = read_split(out)
    assert len(split.validation) == 2
    assert "consecutive-pairs" in json.loads(out.read_text(encoding="utf-8"))["how"]


def test_split_by_what_stands_before_a_separator(data: list[str], tmp_path: Path) -> None:
    out = tmp_path / "split.json"
    assert main(["split", *data, "--out", str(out), "--subject-separator", "_", "--validation-share", "0.9"]) == 0
    split = read_split(out)
    assert (len(split.train), len(split.validation)) == (6, 0), "case_001 to case_006 are one subject"


def test_torchrun_takes_no_option_of_a_training_for_its_own() -> None:
    """It looks for abbreviations of its options in those of the program that it starts, too."""
    training = ["train", "--images", "a", "--labels", "b", "--preset", "c", "--out", "d", "--start-weights", "e"]
    training += ["--split", "f", "--device", "cpu", "--threads", "1", "--label-values", "g", "--encoder", "h"]
    training += ["--set", "max_epochs", "2", "--run-dir", "i", "--dataset", "Dataset", "--max-steps", "3", "--resume"]
    training += ["--state-seconds", "30", "--data-name", "j", "--data-licence", "k"]
    started = get_args_parser().parse_args(["--nproc-per-node", "2", "-m", "lib.trainers.cli", *training])
    assert started.training_script_args == training
    own = {option for option in training if option.startswith("--")}
    offered = build_parser().parse_args(training)
    assert len(own) == len(vars(offered)) - 1, "every option is tried; run is not one"


def test_unknown_command_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fly"])
    assert ended.value.code == 2
    assert "split" in capsys.readouterr().err
