"""The editor that is trained after a preset: judged by clicks, kept as a version, served only if it is better."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.cases.labelled import Case
from lib.configs.retraining import Retraining
from lib.errors import MemoryBudgetError
from lib.interaction.background import EditorTrainer
from lib.interaction.editor import EditorDesign, EditorWeights, SharedEditor, build_editor, write_editor
from lib.interaction.editor_gate import judge_clicks
from lib.interaction.editor_memory import fitting_voxels, step_bytes
from lib.interaction.evaluation import STOPS, read_judged, score_clicks
from lib.interaction.served import ServedEditor
from lib.models.weights import WeightsLocator
from lib.trainers.material import EndedRun, Material
from tests.tiny import tiny_preset

MakeCases = Callable[..., tuple[Case, ...]]
SMALL = EditorDesign((4, 8, 8), (16, 16, 16))
SETTINGS = Retraining(editor_training="on", editor_training_minutes=5, gate_margin=0.001)
GROWN = {"a": [0.5, 0.6, 0.7, 0.7, 0.8], "b": [0.5, 0.6, 0.7, 0.7, 0.8]}


def trainer(folder: Path, served: ServedEditor | None = None, budget: int | None = None) -> EditorTrainer:
    served = served or ServedEditor("tiny", folder / "editor")
    return EditorTrainer(tiny_preset(), WeightsLocator(folder), served, SETTINGS, budget, SMALL, most_steps=2)


def ended(run: str, folder: Path, cases: tuple[Case, ...], held_out: int) -> EndedRun:
    train = cases[held_out:]
    material = Material(train + train[:1], cases[:held_out], labels={case.case_id: "1" for case in cases})
    return EndedRun(run, material, folder / run)


def random_editor(path: Path, seed: int) -> EditorWeights:
    torch.manual_seed(seed)
    weights = EditorWeights(build_editor(SMALL).state_dict(), SMALL)
    write_editor(path, weights)
    return weights


def test_editor_that_is_better_at_some_and_worse_at_none_is_published() -> None:
    better = {case: [0.5, 0.6, 0.75, 0.7, 0.8] for case in GROWN}
    verdict = judge_clicks(better, GROWN, 0.001, "growth")
    assert verdict.publish and verdict.compared and "0.7500 instead of 0.7000 after 3" in verdict.reason
    assert verdict.comparison["challenger"] == pytest.approx([0.5, 0.6, 0.75, 0.7, 0.8])


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ([0.5, 0.9, 0.9, 0.9, 0.79], "worse after 10 clicks"),
        ([0.5, 0.59, 0.9, 0.9, 0.9], "worse after 1 clicks"),
        ([0.5, 0.6, 0.7, 0.7, 0.8], "nowhere better by more than the margin"),
        ([0.5, 0.6, 0.7005, 0.7, 0.8], "nowhere better by more than the margin"),
    ],
)
def test_editor_that_is_worse_somewhere_or_better_nowhere_is_rejected(after: list[float], words: str) -> None:
    verdict = judge_clicks(dict.fromkeys(GROWN, after), GROWN, 0.001, "growth")
    assert verdict.status == "rejected" and words in verdict.reason and not verdict.publish


def test_nothing_is_published_where_no_case_judges() -> None:
    verdict = judge_clicks({}, {}, 0.001, "growth")
    assert verdict.status == "unproven" and not verdict.publish and not verdict.compared


def test_run_without_held_out_cases_keeps_an_unproven_version_that_a_person_can_serve(
    tmp_path: Path, make_cases: MakeCases
) -> None:
    served = ServedEditor("tiny", tmp_path / "editor")
    told = trainer(tmp_path, served)(ended("run1", tmp_path, make_cases(2), 0))
    assert told["status"] == "unproven" and told["version"] == "v0001"
    assert served.current() is None and served.serving() == ("", "")
    assert not (tmp_path / "run1" / "editor").exists(), "its state is not needed any more"
    served.versions.rollback("v0001")
    editor = served.current()
    assert editor is not None and editor.serves("tiny") and not editor.serves("other")
    assert served.version() == "v0001"


def test_run_is_judged_on_held_out_cases_and_a_second_call_makes_no_second_version(
    tmp_path: Path, make_cases: MakeCases
) -> None:
    work, run = trainer(tmp_path), ended("run1", tmp_path, make_cases(3), 1)
    told = work(run)
    (version,) = ServedEditor("tiny", tmp_path / "editor").versions.list()
    details = version.details
    assert told == {"version": "v0001", "status": version.status, "reason": details["reason"]}
    assert details["comparison"]["clicks"] == list(STOPS) and details["comparison"]["cases"] == 1
    assert details["comparison"]["champion"][0] == details["comparison"]["challenger"][0], "the same mask before"
    assert details["split"] == {"train": ["case_002", "case_003"], "validation": ["case_001"]}
    assert details["training"]["steps"] == 2 and details["parent"] == ""
    assert work(run) == told and len(ServedEditor("tiny", tmp_path / "editor").versions.list()) == 1


def test_training_goes_on_from_the_editor_that_is_served(tmp_path: Path, make_cases: MakeCases) -> None:
    random_editor(tmp_path / "shared.pt", 3)
    served = ServedEditor("tiny", tmp_path / "editor", SharedEditor(tmp_path / "shared.pt"))
    work = EditorTrainer(
        tiny_preset(), WeightsLocator(tmp_path), served, SETTINGS, design=EditorDesign((2, 4, 4), (16, 16, 16)),
        most_steps=1,
    )  # fmt: skip
    work(ended("run1", tmp_path, make_cases(1), 0))
    (version,) = served.versions.list()
    assert version.details["started_from"] == SharedEditor(tmp_path / "shared.pt").sha256
    assert SharedEditor(version.weights).on(torch.device("cpu")).design == SMALL, "its design, not that of a new one"


def test_training_that_does_not_fit_into_memory_is_refused_before_it_starts(
    tmp_path: Path, make_cases: MakeCases
) -> None:
    with pytest.raises(MemoryBudgetError, match="the editor's training needs"):
        trainer(tmp_path, budget=1)(ended("run1", tmp_path, make_cases(1), 0))
    assert not ServedEditor("tiny", tmp_path / "editor").versions.list()


def test_step_is_halved_until_it_fits() -> None:
    window = 16**3
    whole, one = step_bytes(SMALL, 8 * window), step_bytes(SMALL, window)
    assert whole > one > step_bytes(EditorDesign((2, 4, 4), (16, 16, 16)), window)
    assert fitting_voxels(SMALL, 8 * window, 2 * whole) == 8 * window
    assert fitting_voxels(SMALL, 8 * window, 2 * whole - 2) == 4 * window
    assert fitting_voxels(SMALL, 8 * window, 2 * one) == window


def test_served_editor_follows_versions_and_withdrawal(tmp_path: Path) -> None:
    random_editor(tmp_path / "shared.pt", 0)
    shared = SharedEditor(tmp_path / "shared.pt")
    served = ServedEditor("tiny", tmp_path / "editor", shared)
    assert served.current() is shared and served.version() == ""
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights = EditorWeights(build_editor(SMALL).state_dict(), SMALL, ("tiny",))
        details = {"parent": served.version()}
        served.versions.add_file("published", lambda path, *_, w=weights: write_editor(path, w), details)
        current = served.current()
        assert current is not None and current is served.current()
        seen.append(current.sha256)
    assert len({*seen, shared.sha256}) == 3
    assert served.versions.withdraw() == "v0001"
    current = served.current()
    assert current is not None and current.sha256 == seen[0]
    assert served.versions.withdraw() == "" and served.current() is shared


def test_damaged_version_gives_way_to_the_one_before(tmp_path: Path) -> None:
    served = ServedEditor("tiny", tmp_path / "editor")
    for _ in range(2):
        served.versions.add_file(
            "published", lambda path, *_: write_editor(path, random_editor(tmp_path / "x.pt", 1)),
            {"parent": served.version()},
        )  # fmt: skip
    weights = tmp_path / "editor" / "v0002" / "weights.pt"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    version, problem = served.serving()
    assert version == "v0001" and "'v0002' are damaged" in problem


def test_annotator_asks_both_editors_from_the_same_mask_and_labels_that_are_missing_do_not_count(
    tmp_path: Path, make_cases: MakeCases
) -> None:
    (case,) = make_cases(1)
    judged = read_judged(case, tiny_preset(), None)
    assert judged.indices == {"Left Box": 1, "core": 2} and set(np.unique(judged.truth)) == {0, 1, 2}
    scores = score_clicks([judged], None)[case.case_id]
    assert len(scores) == len(STOPS) and scores[0] == 0 and scores[-1] > scores[1] > 0
    assert score_clicks([judged], None)[case.case_id] == scores
    partial = read_judged(Case(case.case_id, case.image, case.label, missing=(1,)), tiny_preset(), None)
    assert partial.indices == {"core": 2} and set(np.unique(partial.truth)) == {0, 2}
