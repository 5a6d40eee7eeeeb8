"""The review queue finds labels that somebody spoiled, with the shipped model on synthetic hippocampi."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from synthetic_hippocampus import draw_cases

from lib.activelearning.pool_knowledge import PoolKnowledge
from lib.activelearning.pool_scoring import PoolScorer, suspicion_of
from lib.activelearning.score_store import ScoreStore
from lib.activelearning.scoring_worker import LabelledCase
from lib.cases.labelled import Case
from lib.configs.catalogue import load_preset
from lib.models.weights import WeightsLocator
from tests.forks import REPOSITORY
from tests.tiny import write_nifti


def spoil(label: np.ndarray, kind: int) -> np.ndarray:
    """What goes wrong in practice: swapped names, a shift, a forgotten part, a brush too large, the wrong side."""
    spoiled = label.copy()
    if kind == 0:
        spoiled[label == 1], spoiled[label == 2] = 2, 1
    elif kind == 1:
        spoiled = np.roll(label, 4, axis=1)
    elif kind == 2:
        spoiled[:, : int(np.argwhere(label)[:, 1].mean())] = 0
    elif kind == 3:
        grown = ndimage.grey_dilation(label, size=5)
        spoiled = np.where(label > 0, label, grown)
    else:
        spoiled = label[::-1].copy()
    return spoiled


def review(folder: Path, count: int, spoiled: int) -> list[str]:
    """Case ids, the most suspicious first, of ``count`` cases; the label of every so manieth is spoiled."""
    cases, step = {}, count // spoiled
    for number, case in enumerate(draw_cases(count, seed=23)):
        wrong = number % step == 0 and number < spoiled * step
        name = f"{'spoiled' if wrong else 'good'}_{number:02d}"
        label = spoil(case.label, number // step % 5) if wrong else case.label
        image = write_nifti(folder / "images" / f"{name}.nii.gz", case.image, case.affine_ras)
        file = write_nifti(folder / "labels" / f"{name}.nii.gz", label.astype(np.uint8), case.affine_ras)
        cases[name] = LabelledCase(Case(name, image, file))
    locator = WeightsLocator(REPOSITORY / "model" / "hippocampus_mr")
    knowledge = PoolKnowledge(load_preset("hippocampus_mr"), locator, ScoreStore(folder))
    scorer = PoolScorer(knowledge, torch.device("cpu"))
    assert scorer.compare_labels(dict.fromkeys(cases, "1"), cases.__getitem__) == {
        "done": count,
        "known": 0,
        "failed": 0,
        "left": 0,
    }
    doubts = knowledge.store.disagreements(scorer.version).values()
    knowledge.store.close()
    return [doubt.image_id for doubt in sorted(doubts, key=lambda doubt: -doubt.suspicion)]


def test_spoiled_labels_come_first(tmp_path: Path) -> None:
    ranked = review(tmp_path, 15, 5)
    assert sum(name.startswith("spoiled") for name in ranked[:5]) >= 4


@pytest.mark.slow
def test_at_least_eight_of_ten_spoiled_labels_among_sixty_are_in_the_first_ten(tmp_path: Path) -> None:
    ranked = review(tmp_path, 60, 10)
    assert sum(name.startswith("spoiled") for name in ranked[:10]) >= 8


def test_label_that_cannot_be_compared_is_the_most_suspicious(tmp_path: Path) -> None:
    case = next(iter(draw_cases(1, seed=5)))
    image = write_nifti(tmp_path / "a.nii.gz", case.image, case.affine_ras)
    label = write_nifti(tmp_path / "b.nii.gz", np.full(case.label.shape, 7, dtype=np.uint8), case.affine_ras)
    locator = WeightsLocator(REPOSITORY / "model" / "hippocampus_mr")
    knowledge = PoolKnowledge(load_preset("hippocampus_mr"), locator, ScoreStore(tmp_path))
    scorer = PoolScorer(knowledge, torch.device("cpu"))
    bad = LabelledCase(Case("bad", image, label))
    assert scorer.compare_labels({"bad": "1"}, lambda _: bad)["failed"] == 1
    assert knowledge.store.disagreements(scorer.version)["bad"].suspicion == 1.0
    knowledge.store.close()


def test_suspicion_is_one_less_the_mean_dice() -> None:
    assert suspicion_of({"a": 0.9, "b": 0.5}) == pytest.approx(0.3)
    assert suspicion_of({}) == 0.0
