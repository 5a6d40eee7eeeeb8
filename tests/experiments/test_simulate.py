"""Playing the labelling of a labelled set: complete, resumable, repeatable, and its figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lib.cases.labelled import Case
from lib.cases.split import Split, write_split
from lib.experiments.simulate import main
from lib.experiments.simulation import Plan, Round, Simulation, labels_needed, summarise
from lib.trainers.loop import run_training
from lib.trainers.run.job import TrainingJob, TrainingResult
from tests.tiny import QUIET_AUGMENTATION, preset_data, tiny_preset

MakeCases = Callable[..., tuple[Case, ...]]
RECIPE = {"batch_size": 2, "learning_rate": 8e-3, "precision": "fp32", "augmentation": QUIET_AUGMENTATION}


@pytest.fixture
def studies(make_cases: MakeCases, tmp_path: Path) -> list[str]:
    """Arguments for eight cases of one window each, two of them held out."""
    cases = make_cases(8, (16, 16, 16))
    ids = tuple(case.case_id for case in cases)
    write_split(tmp_path / "split.json", Split(ids[:6], ids[6:]), "by hand")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(preset_data(training=RECIPE)), encoding="utf-8")
    where = ["--studies", str(tmp_path), "--split", str(tmp_path / "split.json"), "--out", str(tmp_path / "out")]
    steps = ["--first-steps", "3", "--steps", "2", "--device", "cpu", "--budget", "2,4"]
    return [*where, *steps, "--preset", str(tmp_path / "tiny.yaml")]


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))


def test_all_strategies_play_to_the_end(studies: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strategies = "random,random_foreground,entropy,bald,core_set,typical,hybrid"
    assert main([*studies, "--strategies", strategies, "--seeds", "1"]) == 0
    rounds = results(tmp_path)["rounds"]
    assert [(r["strategy"], r["budget"]) for r in rounds] == [(s, b) for s in strategies.split(",") for b in (2, 4)]
    for early, late in zip(rounds[::2], rounds[1::2], strict=True):
        assert len(set(late["labelled"])) == 4 and late["labelled"][:2] == early["labelled"]
        assert 0 <= late["mean_dice"] <= 1
    first = {r["strategy"]: r["labelled"] for r in rounds[::2]}
    assert first["entropy"] == first["bald"] == first["random"], "without a model, they begin as random does"
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000
    text = capsys.readouterr().out.removesuffix("\n")
    assert text == (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert text.startswith("| strategy | 2 labels | 4 labels | area | against random | labels needed | seeds |")


def test_interrupted_simulation_goes_on_where_it_was(studies: list[str], tmp_path: Path) -> None:
    arguments = [*studies, "--strategies", "random,typical", "--seeds", "1"]
    assert main(arguments) == 0
    whole = results(tmp_path)
    trained: list[int] = []

    def train(job: TrainingJob) -> TrainingResult:
        trained.append(job.max_steps or 0)
        return run_training(job)

    assert main(arguments, train) == 0
    assert trained == [] and results(tmp_path) == whole
    kept = next((tmp_path / "out").glob("typical-0-*.json"))
    kept.write_text(json.dumps(json.loads(kept.read_text(encoding="utf-8"))[:1]), encoding="utf-8")
    for file in (tmp_path / "out" / "rounds").iterdir():
        if file.stat().st_mtime_ns == max(f.stat().st_mtime_ns for f in (tmp_path / "out" / "rounds").glob("*.pt")):
            last = file
    last.unlink()
    last.with_suffix(".json").unlink()
    assert main(arguments, train) == 0
    assert trained == [2], "only the round that was missing is trained again"
    assert results(tmp_path) == whole


def test_same_rounds_are_trained_once(make_cases: MakeCases, tmp_path: Path) -> None:
    cases = make_cases(6, (16, 16, 16))
    preset = tiny_preset(training=RECIPE)
    plan = Plan(preset, cases[:5], cases[5:], (2, 3), 2, 1, tmp_path / "out", torch.device("cpu"))
    trained: list[int] = []

    def train(job: TrainingJob) -> TrainingResult:
        trained.append(job.max_steps or 0)
        return run_training(job)

    game = Simulation(plan, train)
    game.play("random", 0)
    assert trained == [2, 1]
    game.play("entropy", 0)
    assert trained in ([2, 1, 1], [2, 1])


@pytest.mark.slow
def test_several_processes_find_the_same(studies: list[str], tmp_path: Path) -> None:
    arguments = [*studies, "--strategies", "random,core_set", "--seeds", "1"]
    assert main(arguments) == 0
    alone = results(tmp_path)
    other = [str(tmp_path / "other") if a == str(tmp_path / "out") else a for a in arguments]
    assert main([*other, "--processes", "2"]) == 0
    together = json.loads((tmp_path / "other" / "results.json").read_text(encoding="utf-8"))
    assert together == alone


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategies", "random,guess"], "'guess'; valid: random, random_foreground"),
        (["--budget", "4,2"], "growing numbers from 1 to 6"),
        (["--budget", "2,7"], "growing numbers from 1 to 6"),
        (["--budget", "two"], "whole numbers, comma-separated"),
        (["--seeds", "0"], "whole numbers from 1"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(
    studies: list[str], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*studies, *arguments]) == 2
    assert said in capsys.readouterr().err


def rounds_of(strategy: str, *runs: tuple[float, ...]) -> list[Round]:
    budgets = (8, 16, 32)
    return [
        Round(strategy, seed, budget, (), {}, dice)
        for seed, run in enumerate(runs)
        for budget, dice in zip(budgets, run, strict=False)
    ]


def test_curve_is_the_mean_and_deviation_over_seeds() -> None:
    rounds = rounds_of("random", (0.5, 0.6, 0.8), (0.7, 0.8, 0.8)) + rounds_of("typical", (0.7, 0.8, 0.9))
    random, typical = summarise(rounds, ["random", "typical"])
    assert random.mean == pytest.approx((0.6, 0.7, 0.8))
    assert random.deviation == pytest.approx((math.sqrt(0.02), math.sqrt(0.02), 0.0))
    assert random.area[0] == pytest.approx((0.625 + 0.775) / 2)
    assert (random.labels_needed, random.seeds) == (32.0, 2)
    assert random.gain == (0.0, 0.0)
    assert typical.gain is not None and typical.gain[0] == pytest.approx(0.8 - 0.625), "of the same seed"
    assert typical.labels_needed == 16.0, "random's last Dice, 0.8, at half the labels"
    assert math.isnan(typical.deviation[0]) and typical.seeds == 1


def test_runs_that_are_not_complete_do_not_count() -> None:
    rounds = rounds_of("random", (0.5, 0.6, 0.8), (0.7, 0.8)) + rounds_of("bald", (0.9,))
    (curve,) = summarise(rounds, ["random", "bald"])
    assert (curve.strategy, curve.seeds) == ("random", 1)


@pytest.mark.parametrize(("goal", "expected"), [(0.5, 8.0), (0.7, 16.0), (0.75, 22.6), (0.9, None)])
def test_labels_needed(goal: float, expected: float | None) -> None:
    assert labels_needed([8, 32], [0.6, 0.8], goal) == expected
