"""The experiment runner: same cases, same budget, no run twice, and a killed one goes on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock

from lib.cases.labelled import Case
from lib.cases.split import Split, write_split
from lib.errors import CheckpointError, ConfigError
from lib.experiments.experiment import TRIAL_STEPS, Bench, Experiment, draw_cases, main, read_experiment, run_experiment
from lib.networks.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from lib.trainers.loop import run_training
from lib.trainers.run.job import TrainingJob, TrainingResult
from tests.tiny import preset_data, tiny_preset

MakeCases = Callable[..., tuple[Case, ...]]


def _data(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump(preset_data()), encoding="utf-8")
    return {
        "name": "small",
        "question": "Does a CNN do better?",
        "preset": str(preset),
        "baseline": "unetr",
        "arms": {"unetr": {}, "cnn": {"dynunet": [4, 8, 8], "preset": {"training": {"batch_size": 2}}}},
        "labels": [2],
        "seeds": [0],
        "budget": {"steps": 2},
    } | changes


def _encoder(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    state = {key: value for key, value in build_unetr(tiny_preset()).state_dict().items() if key.startswith("vit.")}
    write_checkpoint(tmp_path / "encoder.pt", Checkpoint(state, tiny_preset()))
    return tmp_path / "encoder.pt"


@pytest.fixture
def bench(make_cases: MakeCases, tmp_path: Path) -> Bench:
    cases = make_cases(5, (16, 16, 16))
    return Bench(cases[:4], cases[4:], tmp_path / "runs", torch.device("cpu"), lambda case: case)


def _spied(bench: Bench) -> tuple[Bench, list[TrainingJob]]:
    """A bench like this one, and the jobs that it has trained."""
    plans: list[TrainingJob] = []

    def train(plan: TrainingJob, on_step: Callable[[int], None] | None) -> TrainingResult:
        plans.append(plan)
        return run_training(plan, on_step)

    return replace(bench, run=train), plans


def test_arms_train_on_the_same_cases_and_are_judged_on_the_same(bench: Bench, tmp_path: Path) -> None:
    bench, plans = _spied(bench)
    outcomes = run_experiment(Experiment.model_validate(_data(tmp_path)), bench)
    assert [(o.arm, o.labels, o.seed, o.steps) for o in outcomes] == [("unetr", 2, 0, 2), ("cnn", 2, 0, 2)]
    assert plans[0].train_cases == plans[1].train_cases and len(plans[0].train_cases) == 2
    assert plans[1].preset.training.batch_size == 2 and plans[0].preset.training.batch_size == 1
    assert [list(o.dice) for o in outcomes] == [[bench.judged[0].case_id]] * 2
    assert 100 < outcomes[1].parameters < outcomes[0].parameters / 5
    assert all(o.cpu_seconds > 0 for o in outcomes)


def test_networks_of_any_kind_are_judged_with_limits_of_certainty_that_they_can_meet(
    bench: Bench, tmp_path: Path
) -> None:
    recipe = {"batch_size": 2, "learning_rate": 8e-3, "warmup_fraction": 0.1}
    strict = {"component_entropy": {"Left Box": 1e-6, "core": 1e-6}}
    arms = {
        name: {"dynunet": [4, 8, 8], "preset": {"training": recipe, "inference": inference}}
        for name, inference in (("free", {}), ("strict", strict))
    }
    data = _data(tmp_path, arms=arms, baseline="free", labels=[4], budget={"steps": 60})
    free, limited = run_experiment(Experiment.model_validate(data), bench)
    assert free.dice_by_label["Left Box"] > 0.3
    assert limited.dice_by_label["Left Box"] > 0.3, "with the limits as they are its mask is empty"


def test_case_without_one_of_the_structures_is_judged_by_the_others(bench: Bench, tmp_path: Path) -> None:
    """As a CT of someone whose gallbladder was taken out, in which none is found."""
    judged = bench.judged[0]
    label = nib.load(judged.label)
    box_alone = (np.asarray(label.dataobj) == 1).astype(np.uint8)
    nib.save(nib.Nifti1Image(box_alone, label.affine), judged.label)

    def find_nothing(plan: TrainingJob, on_step: Callable[[int], None] | None) -> TrainingResult:
        result = run_training(plan, on_step)
        return replace(result, weights={name: torch.zeros_like(tensor) for name, tensor in result.weights.items()})

    data = _data(tmp_path, arms={"cnn": {"dynunet": [4, 8, 8]}}, baseline="cnn")
    outcome = run_experiment(Experiment.model_validate(data), replace(bench, run=find_nothing))[0]
    assert (outcome.dice_by_label["Left Box"], outcome.dice[judged.case_id]) == (0, 0)
    assert math.isnan(outcome.dice_by_label["core"]) and math.isnan(outcome.hd95_mm["core"])


def test_run_that_has_ended_is_not_repeated_and_a_changed_arm_is(bench: Bench, tmp_path: Path) -> None:
    first = run_experiment(Experiment.model_validate(_data(tmp_path)), bench)
    bench, plans = _spied(bench)
    again = run_experiment(Experiment.model_validate(_data(tmp_path)), bench)
    assert plans == [] and again == first
    changed = _data(tmp_path, arms={"unetr": {}, "cnn": {"dynunet": [4, 6, 6]}})
    run_experiment(Experiment.model_validate(changed), bench)
    assert len(plans) == 1


def test_run_that_was_killed_goes_on(bench: Bench, tmp_path: Path) -> None:
    data = _data(tmp_path, arms={"unetr": {}}, budget={"steps": 4})
    whole = run_experiment(Experiment.model_validate(data), bench)
    for file in bench.folder.glob("*.json"):
        file.unlink()

    def killed(plan: TrainingJob, on_step: Callable[[int], None] | None) -> TrainingResult:
        def stop(step: int) -> None:
            if step == 3:
                raise KeyboardInterrupt

        return run_training(TrainingJob(**(plan.__dict__ | {"state_seconds": 0.0})), stop)

    with pytest.raises(KeyboardInterrupt):
        run_experiment(Experiment.model_validate(data), replace(bench, run=killed))
    losses: list[TrainingResult] = []

    def keep(plan: TrainingJob, on_step: Callable[[int], None] | None) -> TrainingResult:
        losses.append(run_training(plan, on_step))
        return losses[-1]

    resumed = run_experiment(Experiment.model_validate(data), replace(bench, run=keep))
    assert resumed[0].dice == whole[0].dice
    assert len(losses[0].losses) == 4


def test_run_that_another_process_is_at_comes_last_and_is_waited_for(bench: Bench, tmp_path: Path) -> None:
    experiment = Experiment.model_validate(_data(tmp_path))
    whole = run_experiment(experiment, bench)
    kept = {name: next(bench.folder.glob(f"{name}-2-0-*.json")) for name in ("unetr", "cnn")}
    for file in kept.values():
        file.unlink()
    bench, plans = _spied(bench)
    with ThreadPoolExecutor() as pool:
        lock = FileLock(kept["unetr"].with_suffix(".lock"))
        lock.acquire()
        outcomes = pool.submit(run_experiment, experiment, bench)
        while not (kept["cnn"].is_file() or outcomes.done()):
            time.sleep(0.01)
        with pytest.raises(TimeoutError):
            outcomes.result(timeout=0.3)
        kept["unetr"].write_text(json.dumps(whole[0].__dict__), encoding="utf-8")  # the other one ends
        lock.release()
        again = outcomes.result(timeout=60)
    assert len(plans) == 1 and again[0] == whole[0] and again[1].dice == whole[1].dice


def test_fewer_labels_are_part_of_more_and_seeds_differ(make_cases: MakeCases) -> None:
    cases = make_cases(6)
    few, more = draw_cases(cases, 2, seed=1), draw_cases(cases, 4, seed=1)
    assert set(few) < set(more)
    assert len({draw_cases(cases, 3, seed) for seed in range(6)}) > 1


def test_budget_of_cpu_minutes_is_measured_once_a_network(bench: Bench, tmp_path: Path) -> None:
    arms = {"unetr": {}, "pretrained": {"encoder": str(_encoder(tmp_path))}}
    data = _data(tmp_path, labels=[1, 2], arms=arms, budget={"cpu_minutes": 0.01})
    bench, plans = _spied(bench)
    outcomes = run_experiment(Experiment.model_validate(data), bench)
    assert [plan.max_steps for plan in plans].count(TRIAL_STEPS) >= 1
    assert len(plans) == 5
    assert len({outcome.steps for outcome in outcomes}) == 1 and outcomes[0].steps >= 1


def test_arm_starts_from_a_pretrained_encoder(bench: Bench, tmp_path: Path) -> None:
    file = _encoder(tmp_path)
    bench, plans = _spied(bench)
    run_experiment(Experiment.model_validate(_data(tmp_path, arms={"unetr": {"encoder": str(file)}})), bench)
    assert plans[0].encoder is not None
    torch.testing.assert_close(
        plans[0].encoder["vit.norm.weight"], read_checkpoint(file).model["vit.norm.weight"], rtol=0, atol=0
    )
    network = {"feature_size": 4, "hidden_size": 96, "mlp_dim": 64, "num_heads": 4}
    other = _data(tmp_path, arms={"unetr": {"encoder": str(file), "preset": {"network": network}}})
    with pytest.raises(CheckpointError, match="of another shape: vit"):
        run_experiment(Experiment.model_validate(other), bench)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "swin"}, "baseline 'swin' is no arm; valid: cnn, unetr"),
        ({"arms": {"unetr": {"dynunet": [4, 8]}}}, "arms.unetr.dynunet"),
        ({"budget": {}}, "either steps or cpu_minutes"),
        ({"budget": {"steps": 1, "cpu_minutes": 1}}, "either steps or cpu_minutes"),
        ({"arm": {}}, "unknown key 'arm'"),
        ({"labels": ["some"]}, "labels"),
        ({"seeds": []}, "'seeds'"),
    ],
)
def test_experiment_with_a_bad_value_is_refused_in_words(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(_data(tmp_path) | changes), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_experiment(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [9]}, "'labels' asks for 9 cases; valid: up to 4, or all"),
        ({"arms": {"unetr": {"preset": {"network": {"hidden_size": 50}}}}}, "arm 'unetr': .*hidden_size 50"),
    ],
)
def test_experiment_that_does_not_fit_is_refused_before_it_runs(
    bench: Bench, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_experiment(Experiment.model_validate(_data(tmp_path, **changes)), bench)
    assert not bench.folder.exists()


def test_command_line_writes_table_plot_and_json(
    make_cases: MakeCases, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [case.case_id for case in make_cases(6)]
    write_split(tmp_path / "split.json", Split(tuple(ids[:5]), tuple(ids[5:])), "test")
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(_data(tmp_path, judged_on="part_of_training", labels=["all"])), encoding="utf-8")
    folders = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "docs"), "--device", "cpu"]
    assert main([str(file), *folders, "--split", str(tmp_path / "split.json"), *where]) == 0
    assert "nothing claimed of 1 seed" in capsys.readouterr().out
    kept = json.loads((tmp_path / "docs" / "small.json").read_text(encoding="utf-8"))
    judged = set(kept["runs"][0]["dice"])
    assert judged and judged < set(ids[:5]), "held-out cases are not looked at"
    assert main([str(tmp_path / "none.yaml"), *folders, "--split", str(tmp_path / "split.json"), *where]) == 2
    assert "cannot be read" in capsys.readouterr().err
