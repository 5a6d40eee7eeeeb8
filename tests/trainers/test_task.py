"""MONAI Label's training task: from a datastore's labels to weights that are served."""

from __future__ import annotations

import html
import json
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.cases.labelled import Case
from lib.cases.split import Split, read_split, write_split
from lib.configs.retraining import Retraining
from lib.errors import CheckpointError, ParameterError, TrainingError
from lib.infers.model_cache import ModelCache
from lib.models.versions import VersionStore
from lib.models.weights import WeightsLocator
from lib.networks.checkpoint import Checkpoint, check_finite, read_checkpoint, write_checkpoint
from lib.networks.layouts import StateDict
from lib.networks.unetr import build_unetr
from lib.storage.files import sha256_of
from lib.storage.json_files import write_json
from lib.trainers.judging.champion import read_served
from lib.trainers.launch import launch
from lib.trainers.material import EndedRun
from lib.trainers.pretraining.loop import ENCODER_FILE
from lib.trainers.run.job import TrainingJob, TrainingResult
from lib.trainers.task import UnetrTrainTask
from tests.tiny import QUIET_AUGMENTATION, boxes, tiny_preset, write_cases, write_nifti

MakeCases = Callable[..., tuple[Case, ...]]
CPU = torch.device("cpu")
RECIPE = {"batch_size": 2, "learning_rate": 8e-3, "warmup_fraction": 0.1, "augmentation": QUIET_AUGMENTATION}
RECIPE |= {"val_interval": 5}
QUICK = {"max_epochs": 1, "max_steps": 2, "multi_gpu": False, "precision": "fp32", "crops_per_case": 1}
THOROUGH = QUICK | {"max_epochs": 15, "max_steps": None, "val_split": 0.3, "dataset": "CacheDataset"}


class FakeDatastore:
    """What the task asks MONAI Label's datastore."""

    def __init__(self, cases: tuple[Case, ...], presets: dict[str, str] | None = None) -> None:
        self.cases = cases
        self.images: dict[str, dict[str, Any]] = {}
        versions = [
            SimpleNamespace(image_id=case.case_id, preset=presets[case.case_id], label_map={}, missing_labels=(),
                            file=case.label, voxels_changed=None, source="rest", info={})
            for case in cases if presets and case.case_id in presets
        ]  # fmt: skip
        self.history = SimpleNamespace(all_latest=lambda tag="final": versions, is_kept=lambda version: True)

    def datalist(self) -> list[dict[str, str]]:
        return [{"image": str(case.image), "label": str(case.label)} for case in self.cases]

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        return self.images.get(image_id, {})


@pytest.fixture
def locator(tmp_path: Path) -> WeightsLocator:
    return WeightsLocator(tmp_path / "model" / "tiny")


@pytest.fixture
def task(locator: WeightsLocator) -> UnetrTrainTask:
    return UnetrTrainTask(tiny_preset(training=RECIPE), locator, "cpu")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The model's folder, and the figures, after the thorough training on the first eight cases."""
    torch.set_num_threads(1)  # as every test does
    folder = tmp_path_factory.mktemp("trained")
    place = WeightsLocator(folder / "model" / "tiny")
    task = UnetrTrainTask(tiny_preset(training=RECIPE), place, "cpu")
    return place.folder, task(THOROUGH, FakeDatastore(write_cases(folder, 8)))


@pytest.fixture
def trained(training: tuple[Path, dict[str, Any]], task: UnetrTrainTask, locator: WeightsLocator) -> dict[str, Any]:
    """Figures of that training, after which the task of this test goes on."""
    folder, figures = training
    shutil.copytree(folder, locator.folder, dirs_exist_ok=True)
    return figures


def _publish_random(locator: WeightsLocator, **changes: Any) -> Path:
    preset = tiny_preset(**changes)
    torch.manual_seed(5)
    return VersionStore(locator.folder).publish(dict(build_unetr(preset).state_dict()), preset, {}).weights


def _damage(weights: Path) -> None:
    weights.chmod(0o644)
    weights.write_bytes(b"half of a file")


def _served(locator: WeightsLocator) -> Path:
    file = locator.find()
    assert file is not None
    return file.path


def test_limits_of_certainty_are_raised_for_weights_from_nothing_and_kept_for_those_of_sure_weights(
    locator: WeightsLocator, make_cases: MakeCases
) -> None:
    """Two steps teach nothing, so that limits stay only where the weights that were gone on from met them."""
    strict, datastore = 1e-6, FakeDatastore(make_cases(5))
    preset = tiny_preset(training=RECIPE, inference={"component_entropy": {"core": strict}})
    task, limits = UnetrTrainTask(preset, locator, "cpu"), []
    for start in (None, "young", "sure"):
        if start == "sure":
            _publish_random(locator, inference={"component_entropy": {"core": strict}})
        known = {version.name for version in task.versions.list()}
        task(QUICK | {"pretrained": start is not None, "val_split": 0}, datastore)
        (made,) = (version for version in task.versions.list() if version.name not in known)
        trained = read_checkpoint(made.weights).preset
        assert trained is not None
        limits.append(trained.component_entropies[2])
    assert limits[0] > strict and limits[1] > strict, "of weights that are not sure it is measured each time"
    assert limits[2] == strict


@pytest.mark.parametrize(
    ("request_fields", "name", "value"),
    [
        ({"max_epochs": 0}, "max_epochs", "0"),
        ({"max_epochs": "many"}, "max_epochs", "'many'"),
        ({"val_split": 1}, "val_split", "1"),
        ({"val_split": -0.1}, "val_split", "-0.1"),
        ({"train_batch_size": 0}, "train_batch_size", "0"),
        ({"dataset": "Zip"}, "dataset", "'Zip'"),
        ({"dataloader": ["Fast"]}, "dataloader", "'Fast'"),
        ({"device": "cuda:42"}, "device", "'cuda:42'"),
        ({"learning_rate": "nan"}, "learning_rate", "'nan'"),
        ({"precision": "fp8"}, "precision", "'fp8'"),
        ({"name": "../../evil"}, "name", "'../../evil'"),
        ({"seed": -1}, "seed", "-1"),
        ({"max_steps": 0}, "max_steps", "0"),
        ({"multi_gpu": "perhaps"}, "multi_gpu", "'perhaps'"),
    ],
)
def test_bad_field_is_refused_by_name_before_anything_starts(
    task: UnetrTrainTask, locator: WeightsLocator, request_fields: dict[str, Any], name: str, value: str
) -> None:
    with pytest.raises(ParameterError) as refused:
        task.validate_request(request_fields)
    assert str(refused.value).startswith(f"parameter {name!r} is {value}; valid: ")
    with pytest.raises(ParameterError):
        task(request_fields, FakeDatastore(()))
    assert not locator.folder.exists()


@pytest.mark.parametrize(
    "request_fields",
    [
        {"max_epochs": True},
        {"max_epochs": "10"},
        {"learning_rate": "0.1"},
        {"learning_rate": 1e308},
        {"pretrained": "true"},
        {"val_split": "0.2"},
        {"seed": 2**70},
        {"gpus": "0;1"},
    ],
)
def test_json_of_another_type_or_beyond_the_bounds_is_refused(
    task: UnetrTrainTask, request_fields: dict[str, Any]
) -> None:
    with pytest.raises(ParameterError, match=next(iter(request_fields))):
        task.validate_request(request_fields, strict=True)
    assert task.validate_request({"learning_rate": 0.5, "val_split": 0, "device": ["cpu"]}, strict=True).device == "cpu"


def test_request_as_slicer_sends_it_is_understood(task: UnetrTrainTask) -> None:
    request = task.config() | {"model": "tiny", "client_id": "user-xyz", "max_epochs": "3", "device": ["cpu"]}
    asked = task.validate_request(request)
    assert (asked.max_epochs, asked.device, asked.dataset) == (3, "cpu", "PersistentDataset")
    recipe = asked.recipe(task.preset)
    assert (recipe.max_epochs, recipe.batch_size, recipe.early_stop_patience) == (3, 2, 0)
    assert recipe.augmentation == task.preset.training.augmentation


def test_empty_request_means_the_presets_recipe(task: UnetrTrainTask) -> None:
    assert task.validate_request({}).recipe(task.preset) == task.preset.training


def test_info_offers_fields_and_labels(task: UnetrTrainTask) -> None:
    info = task.info()
    assert info["labels"] == {"Left Box": 1, "core": 2}
    fields = {"max_epochs", "val_split", "train_batch_size", "dataset", "device", "multi_gpu", "pretrained", "name"}
    assert fields <= info["config"].keys()
    assert task.stats() == {}
    json.dumps(info)


def test_run_publishes_weights_that_are_served(
    task: UnetrTrainTask, locator: WeightsLocator, make_cases: MakeCases
) -> None:
    cases = make_cases(6)
    request = QUICK | {"max_epochs": 15, "max_steps": None, "val_split": 0.3, "name": "first"}
    stats = task(request, FakeDatastore(cases))

    assert (stats["version"], stats["status"]) == ("v0001", "published")
    served = ModelCache(task.preset, locator, "fp32").get(CPU)
    assert served.describe() == {"preset": "tiny", "version": "v0001", "origin": "published"}
    details = task.versions.get("v0001").details
    assert details["sha256"] == sha256_of(_served(locator))
    assert (details["parent"], details["reason"]) == ("", stats["decision"])
    assert details["recipe"]["max_epochs"] == 15
    assert details["memory_plan"]["at_once"] == details["memory_plan"]["crops"] and details["memory_plan"]["text"]
    assert len(details["code"]["source_sha256"]) == 64
    labels = {case.case_id: sha256_of(case.label) for case in cases}
    assert {row["image"]: row["label_sha256"] for row in details["trained_on"]} == {
        name: labels[name] for name in stats["split"]["train"]
    }
    assert sorted(stats["split"]["train"] + stats["split"]["validation"]) == [case.case_id for case in cases]
    split = read_split(locator.folder / "runs" / "split.json")
    assert list(split.validation) == stats["split"]["validation"]
    assert stats["held_out"]["mean_dice"] > 0.5
    assert stats["best_metric"] == pytest.approx(stats["held_out"]["mean_dice"], abs=1e-4)
    assert stats["eval"]["metrics"]["core"] > 0.3
    assert stats["train"]["metrics"]["loss"] < stats["train"]["metrics"]["first_loss"]
    assert stats["decision"].startswith("published, never compared: mean Dice")
    assert task.stats() == stats
    assert (locator.folder / "runs" / "first" / "best.pt").is_file()


def test_cache_serves_the_new_version_after_a_run(
    task: UnetrTrainTask, locator: WeightsLocator, make_cases: MakeCases
) -> None:
    cache = ModelCache(task.preset, locator, "fp32")
    datastore = FakeDatastore(make_cases(2))
    task(QUICK, datastore)
    assert cache.get(CPU).version == "v0001"
    task(QUICK | {"seed": 2}, datastore)
    assert cache.get(CPU).version == "v0001", "nothing judges the second one"
    task.versions.rollback("v0002")
    assert cache.get(CPU).version == "v0002"


@pytest.mark.parametrize("count", [1, 4])
def test_weights_that_nothing_judges_wait_for_a_person(
    task: UnetrTrainTask, locator: WeightsLocator, make_cases: MakeCases, count: int
) -> None:
    served = _publish_random(locator)
    datastore = FakeDatastore(make_cases(count))
    said = task.forecast({}, datastore)
    count_in_words = "1 label" if count == 1 else f"{count} labels"
    assert said == (
        f"{count_in_words}, fewer than five: all are trained on, and nothing judges the result; what is served stays "
        "until a reviewer serves the new version"
    )
    assert not (locator.folder / "runs" / "split.json").exists(), "asking assigns nobody"
    stats = task(QUICK, datastore)
    assert (stats["status"], stats["version"], stats["compared"]) == ("unproven", "v0002", False)
    assert len(stats["split"]["train"]) == count and not stats["split"]["validation"]
    assert _served(locator) == served
    assert task.forecast({}, FakeDatastore(make_cases(5))) == ""


def test_first_batch_that_is_wrong_is_never_published_whatever_its_ids_hash_to(
    task: UnetrTrainTask, locator: WeightsLocator, make_cases: MakeCases
) -> None:
    """Five labels that all hash to training, beside shipped weights that were trained on 208 other cases."""
    task(THOROUGH, FakeDatastore(make_cases(8, first=101)))
    shutil.rmtree(locator.folder / "runs")
    shutil.copy(_served(locator), locator.shipped)
    write_json(locator.shipped.with_suffix(".json"), {"held_out": {"mean_dice": 0.85}})
    (locator.folder / "live.json").unlink()
    write_split(locator.folder / "split.json", Split(tuple(f"t{n}" for n in range(163)), ("h1", "h2")), "shipped")
    cases = make_cases(5)
    for number, case in enumerate(cases, start=1):
        write_nifti(case.label, _shift(boxes(seed=number)[1]))
    stats = task(THOROUGH | {"val_split": 1e-6, "name": "shifted"}, FakeDatastore(cases))
    assert (stats["status"], stats["parent"], len(stats["split"]["validation"])) == ("rejected", "shipped", 1)
    assert len(stats["comparison"]["agreement"]["contradicted"]) == 5
    assert _served(locator) == locator.shipped


def test_weights_that_saw_all_cases_are_known_by_what_their_recipe_reached(
    task: UnetrTrainTask, locator: WeightsLocator
) -> None:
    locator.folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(locator.shipped, Checkpoint(dict(build_unetr(task.preset).state_dict()), task.preset))
    nothing: dict[str, Any] = {"mean_dice": None, "dice": {}}
    recipe = {"cases": 5, "mean_dice": 0.7, "dice": {"core": 0.6}}
    own = {"mean_dice": 0.8, "dice": {"core": 0.75}}
    for held_out, mean, core in ((nothing, 0.7, 0.6), (own, 0.8, 0.75)):
        details = {"held_out": held_out, "cross_validated": recipe}
        write_json(locator.shipped.with_suffix(".json"), details)
        served, _ = read_served(locator, task.preset)
        assert served is not None
        assert (served.reported_dice, served.reported_by_label) == (mean, {"core": core})


def test_weights_that_are_not_finite_are_no_version(task: UnetrTrainTask, locator: WeightsLocator) -> None:
    state = dict(build_unetr(task.preset).state_dict())
    check_finite(state)
    key = next(name for name, value in state.items() if value.is_floating_point())
    for bad in (math.nan, math.inf):
        broken = state | {key: torch.full_like(state[key], bad)}
        with pytest.raises(CheckpointError, match=rf"not finite \(NaN or infinity\): {re.escape(key)}"):
            check_finite(broken)


def test_gate_keeps_weights_that_are_worse_from_being_served(
    trained: dict[str, Any], task: UnetrTrainTask, locator: WeightsLocator, make_cases: MakeCases
) -> None:
    datastore = FakeDatastore(make_cases(8))
    before = _served(locator)
    stats = task(QUICK | {"pretrained": False, "learning_rate": 1e-9, "name": "second"}, datastore)
    assert stats["decision"].startswith("rejected: ")
    assert (stats["version"], stats["status"], stats["parent"]) == ("v0002", "rejected", "v0001")
    assert stats["comparison"]["mean_dice"]["difference"] < 0
    assert task.versions.get("v0002").details["comparison"] == stats["comparison"]
    assert stats["held_out_before"]["mean_dice"] > stats["held_out"]["mean_dice"]
    assert _served(locator) == before


def test_run_starts_from_the_served_weights_unless_told_otherwise(
    task: UnetrTrainTask, locator: WeightsLocator, make_cases: MakeCases
) -> None:
    served = read_checkpoint(_publish_random(locator)).model
    datastore = FakeDatastore(make_cases(2))
    still = QUICK | {"learning_rate": 1e-12}
    kept = read_checkpoint(task.versions.get(task(still, datastore)["version"]).weights)
    assert kept.info["version"] == "v0002"
    torch.testing.assert_close(kept.model, served, rtol=0, atol=1e-6)
    version = task(still | {"pretrained": False}, datastore)["version"]
    fresh = read_checkpoint(task.versions.get(version).weights).model["vit.blocks.0.attn.qkv.weight"]
    assert not torch.allclose(fresh, served["vit.blocks.0.attn.qkv.weight"], atol=1e-3)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda locator: _publish_random(locator, labels=[{"index": 1, "name": "other"}]),
        lambda locator: _damage(_publish_random(locator)),
        lambda locator: VersionStore(locator.folder).publish({"a": torch.ones(1)}, tiny_preset(), {}),
    ],
    ids=["other labels", "damaged", "other network"],
)
def test_served_weights_that_cannot_be_compared_do_not_end_a_run(
    task: UnetrTrainTask, locator: WeightsLocator, make_cases: MakeCases, break_it: Callable[[WeightsLocator], object]
) -> None:
    break_it(locator)
    stats = task(QUICK | {"pretrained": False}, FakeDatastore(make_cases(6)))
    assert "what was served cannot be used: " in stats["decision"]
    assert ModelCache(task.preset, locator, "fp32").get(CPU).version == stats["version"]


def test_bad_label_is_left_out_with_its_reason(
    task: UnetrTrainTask, make_cases: MakeCases, caplog: pytest.LogCaptureFixture
) -> None:
    cases = make_cases(3)
    write_nifti(cases[0].label, boxes()[1][:-1])
    cases[1].label.write_bytes(b"garbage")
    stats = task(QUICK, FakeDatastore(cases))
    assert stats["split"]["train"] == ["case_003"]
    assert set(stats["left_out"]) == {"case_001", "case_002"}
    assert stats["left_out"]["case_001"].startswith("label of 'case_001' has shape (19, 18, 16); valid: its image's")
    assert "is damaged" in stats["left_out"]["case_002"]
    assert "left out case_001" in caplog.text


def test_run_without_labels_says_what_is_missing(task: UnetrTrainTask, locator: WeightsLocator) -> None:
    with pytest.raises(TrainingError, match=r"there is no usable labelled case for 'tiny'$"):
        task(QUICK, FakeDatastore(()))
    assert locator.find() is None


def test_run_with_bad_labels_only_quotes_the_first_reason(task: UnetrTrainTask, make_cases: MakeCases) -> None:
    cases = make_cases(1)
    cases[0].label.write_bytes(b"garbage")
    with pytest.raises(TrainingError, match="1 labels cannot be used: label of 'case_001'"):
        task(QUICK, FakeDatastore(cases))


def test_labels_saved_for_another_preset_are_not_trained_on(task: UnetrTrainTask, make_cases: MakeCases) -> None:
    presets = {"case_001": "tiny", "case_002": "abdomen_ct"}
    stats = task(QUICK, FakeDatastore(make_cases(3), presets))
    assert stats["split"]["train"] == ["case_001", "case_003"]


def test_run_never_judges_on_what_the_shipped_weights_were_trained_on(
    task: UnetrTrainTask, locator: WeightsLocator, make_cases: MakeCases
) -> None:
    cases = make_cases(8)
    ids = [case.case_id for case in cases]
    shipped = Split(tuple(ids[:6]), tuple(ids[6:]))
    write_split(locator.folder / "split.json", shipped, "shipped")
    stats = task(QUICK, FakeDatastore(cases))
    assert (stats["split"]["train"], stats["split"]["validation"]) == (ids[:6], ids[6:])
    assert read_split(locator.folder / "split.json") == shipped, "the shipped file is left as it is"
    alone = task(QUICK, FakeDatastore(cases[:6]))
    assert (alone["status"], alone["split"]["validation"]) == ("unproven", []), "there is nobody to judge on"


def test_few_cases_that_the_shipped_weights_were_judged_on_are_trained_on(
    task: UnetrTrainTask, locator: WeightsLocator, make_cases: MakeCases
) -> None:
    write_split(locator.folder / "split.json", Split(("a",), ("case_001", "case_002")), "shipped")
    assert task(QUICK, FakeDatastore(make_cases(2)))["split"]["train"] == ["case_001", "case_002"]


def test_runs_grow_the_split_without_moving_anybody(
    task: UnetrTrainTask, locator: WeightsLocator, make_cases: MakeCases
) -> None:
    cases = make_cases(9)
    task(QUICK, FakeDatastore(cases[:6]))
    first = read_split(locator.folder / "runs" / "split.json")
    task(QUICK, FakeDatastore(cases))
    second = read_split(locator.folder / "runs" / "split.json")
    assert set(first.train) <= set(second.train)
    assert set(first.validation) <= set(second.validation)
    assert len(second.train) + len(second.validation) == 9


def _shift(label: np.ndarray) -> np.ndarray:
    return np.roll(label, 6, axis=0)


def _swap(label: np.ndarray) -> np.ndarray:
    return np.array([0, 2, 1], dtype=np.uint8)[label]


@pytest.mark.parametrize("poison", [_shift, _swap])
def test_poisoned_batch_is_not_published_and_the_report_says_why(
    trained: dict[str, Any],
    task: UnetrTrainTask,
    locator: WeightsLocator,
    make_cases: MakeCases,
    poison: Callable[[np.ndarray], np.ndarray],
) -> None:
    cases, first = make_cases(14), trained
    assert first["held_out"]["mean_dice"] > 0.6
    for number, case in enumerate(cases[8:], start=9):
        write_nifti(case.label, poison(boxes(seed=number)[1]))
    stats = task(THOROUGH | {"name": "poisoned"}, FakeDatastore(cases))
    assert (stats["status"], stats["version"], stats["parent"]) == ("rejected", "v0002", "v0001")
    assert _served(locator).parent.name == "v0001"
    report = (task.versions.get("v0002").folder / "report.html").read_text(encoding="utf-8")
    assert "rejected: " in report
    assert html.escape(stats["decision"]) in report


@pytest.mark.parametrize("poison", [_shift, _swap])
def test_poisoned_first_batch_is_not_published_over_weights_that_came_with_their_figures(
    tmp_path: Path,
    trained: dict[str, Any],
    locator: WeightsLocator,
    make_cases: MakeCases,
    poison: Callable[[np.ndarray], np.ndarray],
) -> None:
    """No validation case is familiar then, and the new ones are all wrong; what was measured before tells."""
    cases, first = make_cases(14), trained
    delivered = WeightsLocator(tmp_path / "delivered" / "tiny")
    delivered.folder.mkdir(parents=True)
    shutil.copy(_served(locator), delivered.shipped)
    write_json(delivered.shipped.with_suffix(".json"), {"held_out": first["held_out"]})
    for number, case in enumerate(cases[8:], start=9):
        write_nifti(case.label, poison(boxes(seed=number)[1]))
    again = UnetrTrainTask(tiny_preset(training=RECIPE), delivered, "cpu")
    stats = again(THOROUGH, FakeDatastore(cases[8:]))
    assert (stats["status"], stats["parent"]) == ("rejected", "shipped")
    assert stats["comparison"]["mean_dice"]["difference"] > 0, "it has learned the wrong labels"
    assert "it gains only on labels that the served weights contradict" in stats["decision"]
    assert _served(delivered) == delivered.shipped


def _biased(weights: StateDict, index: int, by: float) -> StateDict:
    """The weights, with a class drawn less or more."""
    bias = next(name for name in weights if name.startswith("out.") and name.endswith(".bias"))
    changed = weights[bias].clone().float()
    changed[index] += by
    return dict(weights) | {bias: changed}


def test_label_that_no_held_out_case_speaks_of_is_not_given_up(
    tmp_path: Path,
    trained: dict[str, Any],
    task: UnetrTrainTask,
    locator: WeightsLocator,
    make_cases: MakeCases,
) -> None:
    """New weights that draw no core any more, where the held-out cases speak of the box alone, which they do better."""
    cases, first = make_cases(8), trained
    good = read_checkpoint(_served(locator)).model
    delivered = WeightsLocator(tmp_path / "delivered" / "tiny")
    delivered.folder.mkdir(parents=True)
    write_checkpoint(delivered.shipped, Checkpoint(_biased(good, 1, -4.0), task.preset))
    write_json(delivered.shipped.with_suffix(".json"), {"held_out": {"mean_dice": 0.001}})
    for number, case in enumerate(cases, start=1):
        if case.case_id in first["split"]["validation"]:
            label = boxes(seed=number)[1]
            write_nifti(case.label, np.where(label == 1, label, 0))

    def after(weights: StateDict) -> dict[str, Any]:
        result = TrainingResult(weights, 1, {}, (1.0,))
        again = UnetrTrainTask(task.preset, delivered, "cpu", launcher=lambda *_: result)
        return again(THOROUGH, FakeDatastore(cases))

    lost = after(_biased(good, 2, -1000.0))
    assert lost["split"]["validation"] == first["split"]["validation"]
    assert (lost["status"], lost["parent"]) == ("unproven", "shipped"), lost["decision"]
    assert lost["comparison"]["mean_dice"]["difference"] > 0.01
    assert (
        "no held-out case speaks of core, whose masks are not those of before (mean Dice 0.000 on 8" in lost["decision"]
    )
    assert _served(delivered) == delivered.shipped
    kept = after(_biased(good, 1, -3.5))
    assert kept["status"] == "published", kept["decision"]
    assert kept["comparison"]["unjudged"]["core"] > 0.8


def test_weights_of_another_network_go_on_in_their_own(make_cases: MakeCases, locator: WeightsLocator) -> None:
    """A version published before the preset got another network is retrained, and compared, as what it is."""
    _publish_random(locator)
    fine = {"patch_size": 8, "feature_size": 4, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
    task = UnetrTrainTask(tiny_preset(training=RECIPE, network=fine), locator, "cpu")
    datastore = FakeDatastore(make_cases(6))
    task(QUICK, datastore)
    kept = [read_checkpoint(version.weights).preset for version in VersionStore(locator.folder).list()]
    assert [preset.network.patch_size for preset in kept if preset] == [16, 16]
    task(QUICK | {"pretrained": False}, datastore)
    new = read_checkpoint(VersionStore(locator.folder).list()[-1].weights).preset
    assert new is not None and new.network.patch_size == 8


@pytest.mark.parametrize("fits", [True, False])
def test_training_from_nothing_starts_from_a_pretrained_encoder_that_fits(
    make_cases: MakeCases, locator: WeightsLocator, fits: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    changes = {} if fits else {"network": {"feature_size": 4, "hidden_size": 96, "mlp_dim": 64, "num_heads": 4}}
    preset = tiny_preset(**changes)
    torch.manual_seed(3)
    encoder = {key: value for key, value in build_unetr(preset).state_dict().items() if key.startswith("vit.")}
    write_checkpoint(locator.folder / ENCODER_FILE, Checkpoint(encoder, preset))
    plans = list[TrainingJob]()

    def launcher(job: TrainingJob, multi_gpu: bool, gpus: str) -> TrainingResult:
        plans.append(job)
        return launch(job, multi_gpu, gpus)

    task = UnetrTrainTask(tiny_preset(training=RECIPE), locator, "cpu", launcher=launcher)
    datastore = FakeDatastore(make_cases(6))
    task(QUICK, datastore)
    assert (plans[0].encoder is not None) == fits
    assert fits or "does not start from encoder.pt: the weights do not fit" in caplog.text
    task(QUICK, datastore)
    assert plans[1].encoder is None and plans[1].start is not None, "what is served knows more"


def test_learning_rate_is_lower_where_training_goes_on_from_weights(locator: WeightsLocator) -> None:
    recipe = RECIPE | {"learning_rate": 1e-3, "fine_tuning_learning_rate": 2e-4}
    task = UnetrTrainTask(tiny_preset(training=recipe), locator, "cpu")
    assert task.validate_request({}).learning_rate == 1e-3
    _publish_random(locator)
    assert task.config()["learning_rate"] == 2e-4
    assert task.validate_request({}).learning_rate == 2e-4
    assert task.validate_request({"pretrained": False}).learning_rate == 1e-3
    assert task.validate_request({"learning_rate": 5e-4}).learning_rate == 5e-4


def test_training_that_goes_on_from_weights_has_epochs_of_its_own(locator: WeightsLocator) -> None:
    task = UnetrTrainTask(tiny_preset(training=RECIPE | {"max_epochs": 40, "fine_tuning_epochs": 20}), locator, "cpu")
    assert task.validate_request({}).max_epochs == 40
    _publish_random(locator)
    assert task.config()["max_epochs"] == 20
    assert task.validate_request({}).max_epochs == 20
    assert task.validate_request({"pretrained": False}).max_epochs == 40
    assert task.validate_request({"max_epochs": 7}).max_epochs == 7
    same = UnetrTrainTask(tiny_preset(training=RECIPE | {"max_epochs": 40}), locator, "cpu")
    assert same.validate_request({}).max_epochs == 40


def _without_core(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The cases as drawn by somebody who says nothing of the core."""
    for case in cases:
        label = np.asarray(nib.load(case.label).dataobj)
        write_nifti(case.label, np.where(label == 2, 0, label).astype(np.uint8))
    return cases


def recorded(jobs: list[TrainingJob]) -> Callable[[TrainingJob, bool, str], TrainingResult]:
    """Trains a job, and appends it to a list."""

    def launcher(job: TrainingJob, multi_gpu: bool, gpus: str) -> TrainingResult:
        jobs.append(job)
        return launch(job, multi_gpu, gpus)

    return launcher


def test_what_labels_lack_is_taken_from_the_served_weights(
    trained: dict[str, Any], locator: WeightsLocator, make_cases: MakeCases
) -> None:
    corrected, served = FakeDatastore(_without_core(make_cases(6, first=301))), read_checkpoint(_served(locator)).model
    jobs = list[TrainingJob]()

    for name in ("on", "off"):
        settings = Retraining.model_validate({"pseudo_labels": name})
        task = UnetrTrainTask(tiny_preset(training=RECIPE), locator, "cpu", settings, launcher=recorded(jobs))
        partial = task(QUICK | {"name": name, "val_split": 0.3}, corrected)["split"]["train"]
        assert all(task.versions.list()[-1].details["missing_labels"][case] == ["core"] for case in partial)
        task.versions.rollback("v0001")
    taught, alone = jobs
    assert taught.teacher is not None and alone.teacher is None
    torch.testing.assert_close(dict(taught.teacher), served, rtol=0, atol=0)
    assert {(case.missing, case.predicted) for case in taught.train_cases} == {((), (2,))}
    assert {(case.missing, case.predicted) for case in alone.train_cases} == {((2,), ())}


def test_run_whose_labels_lack_nothing_is_the_same_with_and_without_pseudo_labels(
    trained: dict[str, Any], locator: WeightsLocator, make_cases: MakeCases, tmp_path: Path
) -> None:
    cases, jobs, weights = make_cases(6, first=301), list[TrainingJob](), []

    for name in ("on", "off"):
        place = WeightsLocator(tmp_path / name / "tiny")
        shutil.copytree(locator.folder, place.folder)
        settings = Retraining.model_validate({"pseudo_labels": name})
        task = UnetrTrainTask(tiny_preset(training=RECIPE), place, "cpu", settings, launcher=recorded(jobs))
        stats = task(QUICK | {"max_steps": 4, "max_epochs": 4}, FakeDatastore(cases))
        weights.append(read_checkpoint(task.versions.get(stats["version"]).weights).model)
    assert jobs[0].train_cases == jobs[1].train_cases
    assert [job.cache_dir for job in jobs] == [tmp_path / name / "tiny" / "runs" / "cache" for name in ("on", "off")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_gate_segments_each_case_once_with_each_model_and_the_next_one_remembers(
    trained: dict[str, Any], task: UnetrTrainTask, make_cases: MakeCases, caplog: pytest.LogCaptureFixture
) -> None:
    corrected = FakeDatastore(_without_core(make_cases(6, first=301)))
    slow = QUICK | {"learning_rate": 1e-9, "val_split": 0.3}

    def segmented(name: str, seed: int) -> Counter[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "unetr.plan"):
            assert task(slow | {"name": name, "seed": seed}, corrected)["status"] != "published"
        lines = [record for record in caplog.records if record.name == "unetr.plan" and record.msg == "%s: %s"]
        return Counter(str(record.args[0]) for record in lines if isinstance(record.args, tuple))

    assert segmented("first", 1) == {f"case_{number}": 2 for number in range(301, 307)}
    assert set(segmented("second", 2).values()) == {1}, "the served weights have segmented them in the run before"
    assert len(list((task.runs / "cache" / "masks").iterdir())) == 2, "of the new and the served weights alone"
    for run in ("first", "second"):
        left = {path.name for path in (task.runs / run).iterdir()}
        assert not left & {"completed", "cache"}, "what can be made again goes with the run"


def test_what_follows_a_training_gets_its_cases_and_cannot_spoil_it(
    locator: WeightsLocator, make_cases: MakeCases
) -> None:
    seen: list[EndedRun] = []

    def follow_up(run: EndedRun) -> dict[str, Any]:
        seen.append(run)
        if len(seen) == 2:
            raise MemoryError("no room")
        return {"status": "rejected", "reason": "not better"}

    task = UnetrTrainTask(tiny_preset(training=RECIPE), locator, "cpu", follow_up=follow_up)
    datastore = FakeDatastore(make_cases(6))
    stats = task({"name": "first"} | QUICK, datastore)
    assert stats["editor"] == {"status": "rejected", "reason": "not better"}
    assert seen[0].run == "first" and seen[0].run_dir == task.runs / "first"
    assert {c.case_id for c in (*seen[0].material.train, *seen[0].material.validation, *seen[0].material.test)} == {
        f"case_{n:03d}" for n in range(1, 7)
    }
    stats = task({"name": "second"} | QUICK, datastore)
    assert stats["editor"] == {"status": "failed", "reason": "no room"}
    assert [version.name for version in task.versions.list()] == ["v0001", "v0002"]
    task({"name": "second", "resume": True} | QUICK, datastore)
    assert len(seen) == 3 and seen[2].material == seen[1].material, "a run that had ended is followed up again"
