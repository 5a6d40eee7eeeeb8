"""Work in the background waits for whoever infers, and keeps what it has done when it is ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.activelearning import pool_scoring
from lib.activelearning.case_scores import CaseScores
from lib.activelearning.pool_knowledge import PoolKnowledge
from lib.activelearning.pool_scoring import MAY_COMPUTE, PoolScorer, newest_first
from lib.activelearning.score_store import SCORES_FILE, CaseScoreRecord, LabelDisagreement, ScoreStore
from lib.activelearning.scoring_worker import LabelledCase
from lib.cases.labelled import Case
from lib.cluster.engine import LocalEngine
from lib.errors import NotFoundError
from lib.infers import interruption
from lib.models.weights import WeightsLocator
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from tests.tiny import tiny_preset


@pytest.fixture(autouse=True)
def _go_on_afterwards():
    yield
    MAY_COMPUTE.set()


def test_work_waits_before_its_next_window_while_it_is_held() -> None:
    windows: list[float] = []

    def work(one: str) -> None:
        for _ in range(3):
            interruption._run_check(None, None)  # as a network does before each window
            windows.append(time.monotonic())
            if len(windows) == 2:
                MAY_COMPUTE.clear()

    thread = threading.Thread(target=pool_scoring._each, args=(["a"], time.monotonic() + 60, "test", work))
    thread.start()
    time.sleep(0.3)
    assert len(windows) == 2, "held"
    MAY_COMPUTE.set()
    thread.join(10)
    assert len(windows) == 3


def test_work_that_is_held_ends_when_its_time_is_up() -> None:
    MAY_COMPUTE.clear()
    start = time.monotonic()
    assert pool_scoring._each(["a", "b"], start + 0.2, "test", lambda one: pytest.fail("held")) == 0
    assert time.monotonic() - start < 5


def test_work_in_the_middle_of_a_case_ends_when_its_time_is_up() -> None:
    done: list[str] = []

    def work(one: str) -> None:
        while one == "endless":
            time.sleep(0.01)
            interruption._run_check(None, None)
        done.append(one)

    assert pool_scoring._each(["a", "endless", "c"], time.monotonic() + 0.3, "test", work) == 1
    assert done == ["a"]


def test_newest_come_first() -> None:
    times = {"old": 1.0, "b": 5.0, "a": 5.0, "new": 9.0}
    assert newest_first(times, times.__getitem__) == ["new", "a", "b", "old"]


def test_store_keeps_versions_apart_and_reads_what_another_process_wrote(tmp_path: Path) -> None:
    writer, reader = ScoreStore(tmp_path), ScoreStore(tmp_path)
    assert reader.score_records("v0001") == {} and reader.latest() is None
    writer.keep("v0001", "a", CaseScoreRecord(CaseScores({"entropy/volume": 0.5}, 7.0), scored=True))
    assert reader.score_records("v0001")["a"].scores.values == {"entropy/volume": 0.5}
    writer.keep("v0001", "a", CaseScoreRecord(CaseScores({"entropy/volume": 0.7}, 7.0), scored=True))
    writer.keep("v0002", "b", CaseScoreRecord(CaseScores(), scored=False))
    assert reader.score_records("v0001")["a"].scores.values == {"entropy/volume": 0.7}
    assert list(reader.score_records("v0002")) == ["b"] and reader.latest() == "v0002"
    writer.keep_disagreement("v0001", LabelDisagreement("a", "stamp", {"left": 0.5}, 0.5))
    assert reader.disagreements("v0001")["a"].dice == {"left": 0.5} and reader.disagreements("v0002") == {}
    writer.prune(1)
    writer.close()
    reader.close()
    again = ScoreStore(tmp_path)
    assert (
        again.score_records("v0001") == {}
        and again.disagreements("v0001") == {}
        and list(again.score_records("v0002")) == ["b"]
    )
    again.close()


def test_damaged_store_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / SCORES_FILE).write_bytes(b"not a database, but long enough to be looked at as one" * 100)
    store = ScoreStore(tmp_path)
    assert store.score_records("v0001") == {}
    store.keep("v0001", "a", CaseScoreRecord(CaseScores(), scored=True))
    assert list(store.score_records("v0001")) == ["a"]
    store.close()
    assert len(list(tmp_path.glob("scores.sqlite.damaged-*"))) == 1


@pytest.fixture
def knowledge(tmp_path: Path) -> Iterator[PoolKnowledge]:
    """The tiny task with shipped weights, and nothing looked at yet."""
    torch.manual_seed(0)
    preset = tiny_preset()
    (tmp_path / "tiny").mkdir()
    write_checkpoint(tmp_path / "tiny" / "shipped.pt", Checkpoint(build_unetr(preset).state_dict(), preset, {}))
    made = PoolKnowledge(preset, WeightsLocator(tmp_path / "tiny"), ScoreStore(tmp_path / "scores"))
    yield made
    made.store.close()


def test_cluster_gives_the_scores_that_this_process_would(
    knowledge: PoolKnowledge, tmp_path: Path, make_cases: Callable[..., tuple[Case, ...]]
) -> None:
    cases = {case.case_id: case for case in make_cases(2)}
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")

    def file_of(image: str) -> Path:
        if image == "gone":
            raise NotFoundError("image", image)
        return cases[image].image if image in cases else tmp_path / "broken.nii.gz"

    def look(cluster: LocalEngine | None) -> tuple[list[dict[str, int]], Any, Any, str]:
        scorer = PoolScorer(knowledge, torch.device("cpu"), passes="tta", cluster=cluster)
        images = [*cases, "broken", "gone"]
        said = [scorer.score(images, file_of, "embedding"), scorer.score(images, file_of)]
        said.append(scorer.compare_labels(dict.fromkeys(cases, "1"), lambda image: LabelledCase(cases[image])))
        kept = dict(knowledge.store.score_records(scorer.version)), knowledge.store.disagreements(scorer.version)
        for image in images:
            knowledge.store.forget(image)
        return said, *kept, scorer.version

    said, records, doubts, version = look(None)
    assert said[1] == {"done": 2, "known": 1, "failed": 2, "left": 0}, "the one that is gone is tried at each stage"
    assert sorted(records) == ["broken", *sorted(cases)] and "damaged" in records["broken"].problem
    for image in cases:
        knowledge.store.keep_disagreement(version, replace(doubts[image], label="another"))
    said_there, there, doubts_there, _ = look(LocalEngine(["cpu"]))
    assert said_there == said and doubts_there == doubts
    for image, record in records.items():
        assert there[image].problem == record.problem
        assert dict(there[image].scores.values) == dict(record.scores.values)
        assert image == "broken" or np.array_equal(there[image].scores.embedding, record.scores.embedding)


def test_cluster_is_given_nothing_more_once_the_time_is_up(knowledge: PoolKnowledge) -> None:
    scorer = PoolScorer(knowledge, torch.device("cpu"), passes="tta", minutes=-1, cluster=LocalEngine(["cpu"]))
    assert scorer.score(["a", "b"], Path) == {"done": 0, "known": 0, "failed": 0, "left": 2}
