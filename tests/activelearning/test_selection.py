"""One contract that every strategy keeps, and what each of them prefers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lib.activelearning.selection import STRATEGIES, Candidate, Pool, k_centre, known_or_estimated, select
from lib.errors import NotFoundError

SCORES = (
    "entropy/foreground",
    "margin/foreground",
    "bald/foreground",
    "class_balanced_entropy",
    "dice_disagreement",
)


def candidate(
    name: str, score: float = math.nan, embedding: list[float] | None = None, voxels: float = math.nan
) -> Candidate:
    values = {} if math.isnan(score) else dict.fromkeys(SCORES, score)
    return Candidate(name, values, None if embedding is None else np.array(embedding), voxels)


def pool_of(count: int = 12, seed: int = 0, **changes) -> Pool:
    random = np.random.default_rng(seed)
    made = [
        candidate(f"case_{i:02d}", float(random.random()), list(random.normal(size=3)), 100.0 + i) for i in range(count)
    ]
    return Pool(**{"candidates": made, "labelled": random.normal(size=(6, 3))} | changes)


def ids(name: str, pool: Pool, count: int = 1, seed: int = 0) -> list[str]:
    return [pick.case_id for pick in select(name, pool, count, seed)]


every_strategy = pytest.mark.parametrize("name", list(STRATEGIES))


@every_strategy
def test_strategy_is_deterministic_by_seed_whatever_the_order(name: str) -> None:
    pool = pool_of()
    backwards = Pool(list(reversed(pool.candidates)), pool.labelled)
    for seed in range(3):
        assert select(name, pool, 4, seed) == select(name, backwards, 4, seed)


@every_strategy
def test_strategy_picks_different_cases_as_many_as_asked_for(name: str) -> None:
    assert len(set(ids(name, pool_of(), 5))) == 5
    assert len(set(ids(name, pool_of(), 99))) == 12


@every_strategy
def test_strategy_with_one_case_picks_it(name: str) -> None:
    assert ids(name, pool_of(1), 3) == ["case_00"]


@every_strategy
def test_strategy_without_cases_picks_none(name: str) -> None:
    assert select(name, Pool([]), 3) == []
    assert select(name, pool_of(), 0) == []


@every_strategy
def test_strategy_with_ties_can_pick_each_of_the_tied(name: str) -> None:
    tied = Pool([candidate(f"c{i}", 0.5, [1.0, 0.0], 50) for i in range(4)])
    found = {ids(name, tied, 1, seed)[0] for seed in range(40)}
    assert found == ({"c0"} if name == "first" else {"c0", "c1", "c2", "c3"})


@every_strategy
@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_strategy_with_all_scored_equal_still_picks(name: str, value: float) -> None:
    pool = pool_of()
    equal = Pool([candidate(c.case_id, value, list(c.embedding), 7) for c in pool.candidates], pool.labelled)
    assert len(set(ids(name, equal, 6))) == 6


@every_strategy
def test_strategy_with_nan_scores_picks_all_in_the_end(name: str) -> None:
    made = [candidate(f"c{i}", 0.1 * i if i % 2 else math.nan, [float(i), 1.0] if i % 3 else None) for i in range(9)]
    broken = Candidate("broken", dict.fromkeys(SCORES, math.nan), None, math.nan)
    assert len(set(ids(name, Pool([*made, broken]), 10))) == 10


@every_strategy
def test_strategy_knowing_nothing_of_any_case_still_picks(name: str) -> None:
    assert len(set(ids(name, Pool([candidate(f"c{i}") for i in range(5)]), 5))) == 5


@every_strategy
def test_strategy_leaves_out_what_is_leased(name: str) -> None:
    leased = frozenset(["case_00", "case_03", "case_07"])
    found = ids(name, pool_of(leased=leased), 99)
    assert len(found) == 9 and not leased & set(found)
    everything = frozenset(c.case_id for c in pool_of().candidates)
    assert ids(name, pool_of(leased=everything), 1) == []


@every_strategy
def test_strategy_says_why(name: str) -> None:
    for pick in select(name, pool_of(), 3):
        assert pick.reason and "nan" not in pick.reason and "inf" not in pick.reason


def test_unknown_strategy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(NotFoundError, match=r"'guess'; known: bald, class_balanced_entropy, core_set"):
        select("guess", pool_of())


@pytest.mark.parametrize("name", ["entropy", "margin", "bald", "class_balanced_entropy", "dice_disagreement"])
def test_scores_are_ranked_from_the_highest(name: str) -> None:
    pool = Pool([candidate("low", 0.1), candidate("high", 0.9), candidate("middle", 0.5)])
    assert ids(name, pool, 3) == ["high", "middle", "low"]
    assert select(name, pool)[0].reason == f"{name} 0.90, rank 1 of 3"


def test_region_chooses_the_score() -> None:
    a = Candidate("a", {"entropy/foreground": 0.9, "entropy/volume": 0.1})
    b = Candidate("b", {"entropy/foreground": 0.2, "entropy/volume": 0.3})
    assert [select("entropy", Pool([a, b]), 1, 0, region)[0].case_id for region in ("foreground", "volume")] == [
        "a",
        "b",
    ]


def test_noise_prefers_the_uncertain_without_always_taking_them() -> None:
    pool = Pool([candidate("low", 0.1), candidate("high", 0.9)])
    share = np.mean([ids("power_entropy", pool, 1, seed) == ["high"] for seed in range(2000)])
    assert share == pytest.approx(0.9, abs=0.02)  # in proportion to the scores: 0.9 / (0.9 + 0.1)


def test_random_foreground_draws_in_proportion_to_the_voxels() -> None:
    pool = Pool([candidate("empty", voxels=0), candidate("small", voxels=100), candidate("large", voxels=300)])
    drawn = [ids("random_foreground", pool, 1, seed)[0] for seed in range(2000)]
    assert drawn.count("empty") == 0
    assert drawn.count("large") / 2000 == pytest.approx(0.75, abs=0.03)


def test_random_draws_all_alike() -> None:
    pool = Pool([candidate(f"c{i}", 0.1 * i) for i in range(4)])
    drawn = [ids("random", pool, 1, seed)[0] for seed in range(2000)]
    assert all(drawn.count(f"c{i}") / 2000 == pytest.approx(0.25, abs=0.04) for i in range(4))


def test_case_without_a_score_gets_that_of_its_neighbours() -> None:
    pool = Pool(
        [
            *(candidate(f"hard{i}", 0.8, [1.0, 0.1 * i]) for i in range(5)),
            *(candidate(f"easy{i}", 0.2, [-1.0, 0.1 * i]) for i in range(5)),
            candidate("new", math.nan, [1.0, 0.05]),
            candidate("dark"),
        ]
    )
    free = pool.free()
    values, how = known_or_estimated(free, pool, "entropy/foreground")
    found = {c.case_id: (v, h) for c, v, h in zip(free, values, how, strict=True)}
    assert found["new"] == (pytest.approx(0.8), "estimated")
    assert found["dark"] == (-math.inf, "unknown")
    assert ids("entropy", pool, 12)[-1] == "dark"
    reasons = {pick.case_id: pick.reason for pick in select("entropy", pool, 12)}
    assert "0.80 (estimated from similar cases)" in reasons["new"]


def test_without_any_score_the_distance_from_what_is_labelled_ranks() -> None:
    pool = Pool(
        [candidate("near", embedding=[0.0, 1.0]), candidate("far", embedding=[3.0, 1.0])], np.array([[0.0, 0.0]])
    )
    assert ids("entropy", pool, 2) == ["far", "near"]


def test_core_set_takes_the_farthest_first() -> None:
    made = [candidate("a", embedding=[0.0]), candidate("b", embedding=[4.0]), candidate("c", embedding=[10.0])]
    assert ids("core_set", Pool(made, np.array([[1.0]])), 3) == ["c", "b", "a"]


def test_k_centre_begins_in_the_middle_where_nothing_is_labelled() -> None:
    vectors = np.array([[0.0], [4.0], [5.0], [11.0]])  # mean 5
    found = k_centre(vectors, None, 3, np.random.default_rng(0))
    assert [i for i, _ in found] == [2, 3, 0]
    assert [d for _, d in found] == pytest.approx([0.0, 6.0, 5.0])


def test_typical_takes_the_middle_of_clusters_that_have_no_label() -> None:
    def cluster(name: str, x: float) -> list[Candidate]:
        return [
            candidate(f"{name}{i}", embedding=[x + step, 0.0]) for i, step in enumerate((-0.2, -0.1, 0.0, 0.12, 0.25))
        ]

    made = [*cluster("left", -10.0), *cluster("middle", 0.0), *cluster("right", 10.0)]
    found = ids("typical", Pool(made, np.array([[0.01, 0.0]])), 2)
    assert set(found) == {"left2", "right2"}


def test_hybrid_takes_what_is_both_uncertain_and_different() -> None:
    certain = [candidate(f"certain{i}", 0.01, [100.0 + i]) for i in range(12)]
    uncertain = [
        candidate("near", 0.9, [0.0]),
        candidate("alike", 0.9, [0.01]),
        candidate("far", 0.9, [5.0]),
        candidate("x", 0.9, [0.02]),
    ]
    assert ids("hybrid", Pool([*certain, *uncertain], np.array([[0.0]])), 1) == ["far"]


def test_hybrid_without_scores_is_typical() -> None:
    made = [candidate(f"c{i}", embedding=[float(i % 3), 0.1 * i]) for i in range(9)]
    assert select("hybrid", Pool(made), 3) == select("typical", Pool(made), 3)
