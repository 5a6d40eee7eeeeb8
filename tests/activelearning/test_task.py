"""MONAI Label's strategies and scoring methods over a datastore: cold start, reasons, versions, what is left to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from lib.activelearning.case_scores import CaseScores, score_name
from lib.activelearning.pool_knowledge import PoolKnowledge, version_key, version_name
from lib.activelearning.score_store import UNTRAINED, CaseScoreRecord, ScoreStore
from lib.activelearning.selection import MEASURE_OF, STRATEGIES
from lib.activelearning.task import (
    DESCRIPTIONS,
    PoolScoring,
    PoolStrategy,
    check_passes,
    make_scoring_methods,
    make_strategies,
)
from lib.cases.labelled import Case
from lib.cluster.engine import Recipe
from lib.configs.preset import Preset
from lib.errors import ConfigError, NotFoundError, ParameterError
from lib.models.versions import VersionStore
from lib.models.weights import WeightsLocator
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from tests.tiny import preset_data, tiny_preset

MakeCases = Callable[..., tuple[Case, ...]]


class FakeDatastore:
    """Images of the tiny task; the first ``labelled`` of them have a final label."""

    def __init__(self, cases: tuple[Case, ...], labelled: int = 0) -> None:
        self.cases = {case.case_id: case for case in cases}
        self.labelled = [case.case_id for case in cases[:labelled]]

    def list_images(self) -> list[str]:
        return list(self.cases)

    def get_unlabeled_images(self) -> list[str]:
        return [image for image in self.cases if image not in self.labelled]

    def get_labeled_images(self) -> list[str]:
        return self.labelled

    def get_image_uri(self, image: str) -> str:
        return str(self.cases[image].image)

    def get_image_info(self, image: str) -> dict[str, Any]:
        return {"ts": sorted(self.cases).index(image)}

    def get_label_uri(self, image: str, tag: str) -> str:
        return str(self.cases[image].label)

    def get_label_info(self, image: str, tag: str) -> dict[str, Any]:
        return {}


def network_weights(preset: Preset, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build_unetr(preset).state_dict()


@pytest.fixture
def knowledge(tmp_path: Path) -> PoolKnowledge:
    """The tiny task with two published versions."""
    preset, folder = tiny_preset(), tmp_path / "model" / "tiny"
    for seed in range(2):
        VersionStore(folder).publish(network_weights(preset, seed), preset, {"parent": ""})
    return PoolKnowledge(preset, WeightsLocator(folder), ScoreStore(folder))


@pytest.fixture
def untrained(tmp_path: Path) -> PoolKnowledge:
    folder = tmp_path / "model" / "new"
    return PoolKnowledge(tiny_preset(), WeightsLocator(folder), ScoreStore(folder))


def keep(knowledge: PoolKnowledge, version: str, **entropies: float) -> None:
    """Pretend that a version scored cases so."""
    for place, (image, value) in enumerate(entropies.items()):
        values = {score_name(m, "foreground"): value for m in ("entropy", "margin", "bald")}
        values |= {"class_balanced_entropy": value, "dice_disagreement": value}
        look = CaseScoreRecord(CaseScores(values, 100.0, np.array([1.0, place], dtype=np.float32)), scored=True)
        knowledge.store.keep(version, image, look)


class Names(FakeDatastore):
    """Images without files."""

    def __init__(self, unlabelled: list[str], labelled: list[str] | None = None) -> None:
        self.unlabelled, self.labelled = unlabelled, labelled or []

    def get_unlabeled_images(self) -> list[str]:
        return self.unlabelled


MANY_LABELS = [f"done{i}" for i in range(9)]


def test_all_strategies_and_scoring_methods_are_there_by_name(knowledge: PoolKnowledge) -> None:
    strategies = make_strategies({"tiny": knowledge}, 5, "typical")
    assert next(iter(strategies)) == "typical", "the default comes first, where clients find theirs"
    assert set(strategies) == set(STRATEGIES) == set(DESCRIPTIONS)
    assert all(strategies[name].info() == {"description": DESCRIPTIONS[name]} for name in STRATEGIES)
    methods = make_scoring_methods({"tiny": knowledge})
    assert {"all", "embedding", "labels", "entropy", "bald", "margin", "dice_disagreement"} <= set(methods)


def test_unknown_default_strategy_stops_the_start(knowledge: PoolKnowledge) -> None:
    with pytest.raises(ConfigError, match=r"--conf strategy is 'guess'; valid: random, random_foreground"):
        make_strategies({"tiny": knowledge}, 5, "guess")


def test_dropout_without_dropout_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="the network of 'tiny' has no dropout"):
        check_passes("dropout", {"tiny": tiny_preset()})
    check_passes("dropout", {"tiny": tiny_preset(network=preset_data()["network"] | {"dropout_rate": 0.1})})
    check_passes("auto", {"tiny": tiny_preset()})


def test_reason_says_score_rank_and_model(knowledge: PoolKnowledge) -> None:
    keep(knowledge, "v0002", a=0.2, b=0.41, c=0.3)
    found = PoolStrategy("entropy", {"tiny": knowledge})({}, Names(["a", "b", "c"], MANY_LABELS))
    assert found == {
        "id": "b",
        "reason": "entropy 0.41, rank 1 of 3, model v0002",
        "model": "tiny",
        "next": ["c", "a"],
        "next_reasons": ["entropy 0.30, rank 2 of 3, model v0002", "entropy 0.20, rank 3 of 3, model v0002"],
    }


def test_scores_of_the_version_before_serve_until_the_new_one_has_looked(knowledge: PoolKnowledge) -> None:
    keep(knowledge, "v0001", a=0.9, b=0.1)
    strategy, names = PoolStrategy("entropy", {"tiny": knowledge}), Names(["a", "b"], MANY_LABELS)
    assert strategy({}, names)["reason"] == "entropy 0.90, rank 1 of 2, model v0001"
    keep(knowledge, "v0002", b=0.5)
    found = strategy({}, names)
    assert found["id"] == "b" and found["reason"].endswith("model v0002")


@pytest.mark.parametrize("name", sorted(MEASURE_OF))
def test_cold_start_is_typical(name: str, knowledge: PoolKnowledge, untrained: PoolKnowledge) -> None:
    keep(knowledge, "v0002", a=0.9, b=0.1, c=0.5)
    few = PoolStrategy(name, {"tiny": knowledge})({}, Names(["a", "b", "c"], ["done0"]))
    assert few["reason"].startswith(f"1 labelled so far, {name} begins at 5: most typical of a cluster of")
    keep(untrained, UNTRAINED, a=0.9, b=0.1)
    none = PoolStrategy(name, {"tiny": untrained})({}, Names(["a", "b"], MANY_LABELS))
    assert none["reason"].startswith(f"no model to be {name} by yet: most typical of a cluster of")
    assert none["reason"].endswith("model untrained")


def test_cold_start_can_be_switched_off(knowledge: PoolKnowledge) -> None:
    keep(knowledge, "v0002", a=0.2, b=0.8)
    found = PoolStrategy("entropy", {"tiny": knowledge}, cold_start_labels=0)({}, Names(["a", "b"]))
    assert found["reason"] == "entropy 0.80, rank 1 of 2, model v0002"


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_strategy_over_a_store_keeps_the_contract(name: str, knowledge: PoolKnowledge) -> None:
    strategy = PoolStrategy(name, {"tiny": knowledge})
    assert strategy({}, Names([])) is None
    assert strategy({}, Names(["only"]))["id"] == "only"
    assert strategy({"seed": 4}, Names(["a", "b", "c"])) == strategy({"seed": 4}, Names(["c", "b", "a"]))
    keep(knowledge, "v0002", a=0.5, b=0.5, c=float("nan"))
    chosen = {strategy({"seed": seed}, Names(["a", "b", "c"], MANY_LABELS))["id"] for seed in range(20)}
    assert chosen <= {"a", "b", "c"}


@pytest.mark.parametrize("seed", ["7", [1], {}, 0.5, -1, True])
def test_seed_that_is_no_whole_number_is_refused(seed: object, knowledge: PoolKnowledge) -> None:
    with pytest.raises(ParameterError, match=r"'seed' is .*; valid: a whole number from 0"):
        PoolStrategy("random", {"tiny": knowledge})({"seed": seed}, Names(["a"]))


def test_unknown_region_and_model_are_refused(knowledge: PoolKnowledge) -> None:
    strategy = PoolStrategy("entropy", {"tiny": knowledge})
    with pytest.raises(ParameterError, match="foreground, volume, patches"):
        strategy({"region": "left"}, Names(["a"]))
    with pytest.raises(NotFoundError, match="model 'huge'; known: tiny"):
        strategy({"model": "huge"}, Names(["a"]))


def test_without_a_seed_random_varies(knowledge: PoolKnowledge) -> None:
    names = Names([f"case_{i}" for i in range(1000)])
    assert len({PoolStrategy("random", {"tiny": knowledge})({}, names)["id"] for _ in range(10)}) > 1


def test_scoring_looks_at_all_the_newest_first_and_compares_labels(
    knowledge: PoolKnowledge, make_cases: MakeCases
) -> None:
    store = FakeDatastore(make_cases(5), labelled=2)
    said = PoolScoring("all", {"tiny": knowledge}, device="cpu", precision="fp32")({}, store)["tiny"]
    assert said["version"] == "v0002"
    assert said["embedded"] == {"done": 0, "known": 0, "failed": 0, "left": 0}
    assert said["scored"] == {"done": 3, "known": 0, "failed": 0, "left": 0}
    assert said["compared"] == {"done": 2, "known": 0, "failed": 0, "left": 0}
    looks = knowledge.store.score_records("v0002")
    assert set(looks) == set(store.cases)
    assert [image for image in looks if looks[image].scored] == sorted(store.get_unlabeled_images(), reverse=True)
    assert all(look.scores.embedding is not None and look.scores.embedding.shape == (48,) for look in looks.values())
    assert "bald/foreground" in looks[store.get_unlabeled_images()[0]].scores.values
    again = PoolScoring("all", {"tiny": knowledge}, device="cpu", precision="fp32")({}, store)["tiny"]
    assert again["scored"] == {"done": 0, "known": 3, "failed": 0, "left": 0}
    assert again["compared"]["known"] == 2


def test_scoring_without_weights_embeds(untrained: PoolKnowledge, make_cases: MakeCases) -> None:
    store = FakeDatastore(make_cases(3))
    said = PoolScoring("all", {"tiny": untrained}, device="cpu", precision="fp32")({}, store)["tiny"]
    assert said["version"] == UNTRAINED
    looks = untrained.store.score_records(UNTRAINED)
    assert len(looks) == 3 and not any(look.scored for look in looks.values())
    found = PoolStrategy("typical", {"tiny": untrained})({}, store)
    assert found["reason"].startswith("most typical of a cluster of")


def test_scoring_stops_when_its_time_is_up_and_goes_on_later(knowledge: PoolKnowledge, make_cases: MakeCases) -> None:
    store = FakeDatastore(make_cases(3))
    method = PoolScoring("entropy", {"tiny": knowledge}, device="cpu", precision="fp32")
    said = method({"minutes": 1e-9}, store)["tiny"]
    assert said["scored"] == {"done": 0, "known": 0, "failed": 0, "left": 3}
    assert knowledge.store.score_records("v0002") == {}
    assert method({}, store)["tiny"]["scored"]["done"] == 3


def test_image_that_cannot_be_read_is_told_and_not_tried_again(knowledge: PoolKnowledge, make_cases: MakeCases) -> None:
    store = FakeDatastore(make_cases(3))
    bad = next(iter(store.cases))
    store.cases[bad].image.write_bytes(b"no image")
    method = PoolScoring("entropy", {"tiny": knowledge}, device="cpu", precision="fp32")
    said = method({}, store)["tiny"]
    assert said["embedded"]["failed"] == 1 and said["scored"] == {"done": 2, "known": 1, "failed": 0, "left": 0}
    assert "damaged" in knowledge.store.score_records("v0002")[bad].problem
    assert method({}, store)["tiny"]["scored"]["known"] == 3


def test_wrong_scoring_request_is_refused(knowledge: PoolKnowledge) -> None:
    method = PoolScoring("all", {"tiny": knowledge}, device="cpu")
    with pytest.raises(ParameterError, match="'minutes'"):
        method({"minutes": "many"}, Names([]))
    with pytest.raises(NotFoundError, match="model 'huge'"):
        method({"model": "huge"}, Names([]))


def test_two_versions_make_an_ensemble(knowledge: PoolKnowledge, make_cases: MakeCases) -> None:
    class Cluster:
        """Makes the worker that a machine of it would, and does no more."""

        made: ClassVar[set[str]] = set()

        def run(self, items: Iterable[Any], recipe: Callable[[], Recipe[Any, Any]]) -> Iterator[Any]:
            self.made.add(recipe().make("cpu").passes.name)
            return iter(())

    store = FakeDatastore(make_cases(1))
    for passes, made in (("auto", {"ensemble"}), ("tta", {"ensemble", "tta"})):
        PoolScoring("all", {"tiny": knowledge}, "cpu", "fp32", passes, cluster=Cluster())({}, store)
        assert Cluster.made == made


def test_version_key_of_a_file_that_can_be_replaced_holds_a_stamp(tmp_path: Path) -> None:
    preset, file = tiny_preset(), tmp_path / "own.pt"
    write_checkpoint(file, Checkpoint(network_weights(preset), preset))
    locator = WeightsLocator(tmp_path / "model", str(file))
    first = version_key(locator.find())
    assert first.startswith("pretrained-") and version_name(first) == "pretrained"
    shutil.copy(file, tmp_path / "other.pt")
    write_checkpoint(file, Checkpoint(network_weights(preset, 1), preset, {"more": "text" * 50}))
    assert version_key(locator.find()) != first
    assert version_key(None) == UNTRAINED
