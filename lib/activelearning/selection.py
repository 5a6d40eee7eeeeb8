"""Selects the cases to label next: pure functions of the stored scores of a pool.

Every strategy is deterministic for a seed, whatever the order of the cases, and excludes leased cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.cluster.vq import kmeans2

from lib.activelearning.case_scores import score_name
from lib.errors import NotFoundError

Array = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32] | npt.NDArray[np.float64]

NEIGHBOURS_FOR_ESTIMATE = 5
NEIGHBOURS_FOR_TYPICALITY = 20
MOST_CLUSTERS = 50
MOST_PER_CLUSTER = 1000
MOST_CLUSTERED = 500
MOST_TEACHERS = 500
CANDIDATES_PER_PICK = 4
SMALLEST_SCORE = 1e-6
SMALLEST_DISTANCE = 1e-6


@dataclass(frozen=True)
class Candidate:
    """An unlabelled case.

    Attributes:
        case_id: id of the image.
        scores: see ``case_scores.CaseScores.values``; empty if the case has not been scored.
        embedding: shape (d,); None if there is none yet.
        foreground_voxels: NaN if unknown.
    """

    case_id: str
    scores: Mapping[str, float] = field(default_factory=dict)
    embedding: Vectors | None = None
    foreground_voxels: float = math.nan


@dataclass(frozen=True)
class Pool:
    """The cases from which a selection chooses.

    Attributes:
        candidates: unlabelled cases.
        labelled: embeddings of the labelled cases, shape (m, d); None if there are none.
        leased: ids of cases that an annotator is working on.
    """

    candidates: Sequence[Candidate]
    labelled: Vectors | None = None
    leased: frozenset[str] = frozenset()

    def free(self) -> list[Candidate]:
        """The candidates that no client has on lease, sorted by case id."""
        return sorted((c for c in self.candidates if c.case_id not in self.leased), key=lambda c: c.case_id)


@dataclass(frozen=True)
class Pick:
    """A selected case, and the reason."""

    case_id: str
    reason: str


Selection = Callable[[list[Candidate], Pool, int, str, np.random.Generator], list[Pick]]


def select(name: str, pool: Pool, count: int = 1, seed: int = 0, region: str = "foreground") -> list[Pick]:
    """Select cases of a pool to label next, by a strategy.

    Args:
        name: one of ``STRATEGIES``.
        pool: the cases and their scores.
        count: number of cases; fewer are returned if the pool has fewer.
        seed: seed of ties and random choices.
        region: region over which maps are averaged: ``foreground``, ``volume`` or ``patches``.

    Returns:
        The selected cases, best first.

    Raises:
        NotFoundError: for an unknown strategy.
    """
    if name not in STRATEGIES:
        raise NotFoundError("strategy", name, list(STRATEGIES))
    free = pool.free()
    if not free or count < 1:
        return []
    return STRATEGIES[name](free, pool, min(count, len(free)), region, np.random.default_rng(seed))


def first(free: list[Candidate], pool: Pool, count: int, region: str, random: np.random.Generator) -> list[Pick]:
    """The first cases in the order of their names."""
    return [Pick(c.case_id, f"first of {len(free)} unlabelled cases") for c in free[:count]]


def at_random(free: list[Candidate], pool: Pool, count: int, region: str, random: np.random.Generator) -> list[Pick]:
    """Random cases."""
    chosen = random.permutation(len(free))[:count]
    return [Pick(free[i].case_id, f"random, one of {len(free)} unlabelled cases") for i in chosen]


def random_foreground(
    free: list[Candidate], pool: Pool, count: int, region: str, random: np.random.Generator
) -> list[Pick]:
    """Random cases, with a probability that grows with the predicted foreground volume.

    This is the stronger of the random baselines for 3D segmentation (nnActive, Lüth 2025): images without any of the
    labels are drawn last. A case with an unknown foreground volume is treated as average.
    """
    voxels = np.array([c.foreground_voxels for c in free])
    known = voxels[np.isfinite(voxels)]
    weights = np.where(np.isfinite(voxels), voxels, known.mean() if known.size else 1.0)
    # the largest of log weight + Gumbel noise is a draw in proportion to the weights (Gumbel-max)
    keys = np.log(np.maximum(weights, SMALLEST_SCORE)) + random.gumbel(size=len(free))
    chosen = np.argsort(-keys, kind="stable")[:count]
    return [Pick(free[i].case_id, f"random, weighed by {_voxels(voxels[i])}, 1 of {len(free)}") for i in chosen]


def by_score(measure: str, noisy: bool = False) -> Selection:
    """Cases with the highest scores; ties are in random order.

    Args:
        measure: one of ``case_scores.MEASURES``.
        noisy: whether to add Gumbel noise to the logarithm of the scores, so that the cases of a batch are not all
            alike (power acquisition of Kirsch 2023, "Stochastic Batch Acquisition", arXiv 2106.12059, with beta 1).
    """

    def choose(free: list[Candidate], pool: Pool, count: int, region: str, random: np.random.Generator) -> list[Pick]:
        values, how = known_or_estimated(free, pool, score_name(measure, region))
        keys = np.log(np.maximum(values, SMALLEST_SCORE)) + random.gumbel(size=len(free)) if noisy else values
        chosen = _highest(keys, count, random)
        ranks = np.empty(len(free), dtype=int)
        ranks[_highest(values, len(free), random)] = np.arange(1, len(free) + 1)
        label = f"noisy {measure}" if noisy else measure
        return [Pick(free[i].case_id, _score_reason(label, values[i], how[i], ranks[i], len(free))) for i in chosen]

    return choose


def core_set(free: list[Candidate], pool: Pool, count: int, region: str, random: np.random.Generator) -> list[Pick]:
    """Greedy core-set: the case farthest from all labelled ones (Sener and Savarese 2018, arXiv 1708.00489)."""
    seen, unseen = _with_embedding(free)
    chosen = k_centre(_matrix(seen), pool.labelled, count, random) if seen else []
    picks = [
        Pick(seen[i].case_id, f"least like what is labelled (distance {distance:.2f}), 1 of {len(free)}")
        for i, distance in chosen
    ]
    return picks + _unseen(unseen, count - len(picks), len(free), random)


def typical(free: list[Candidate], pool: Pool, count: int, region: str, random: np.random.Generator) -> list[Pick]:
    """The most typical case of each cluster without labelled cases (TypiClust, Hacohen 2022, arXiv 2202.02794)."""
    seen, unseen = _with_embedding(free)
    picks = []
    for i, size in typical_of_clusters(_matrix(seen), pool.labelled, count, random) if seen else []:
        picks.append(Pick(seen[i].case_id, f"most typical of a cluster of {size} of {len(free)} unlabelled cases"))
    return picks + _unseen(unseen, count - len(picks), len(free), random)


def hybrid(free: list[Candidate], pool: Pool, count: int, region: str, random: np.random.Generator) -> list[Pick]:
    """Uncertain and diverse cases: the core-set of the ``4 * count`` most uncertain ones, at least of a quarter of all.

    After suggestive annotation (Yang 2017, arXiv 1706.04737). Without scores, typical cases are chosen.
    """
    name = score_name("entropy", region)
    if not any(math.isfinite(c.scores.get(name, math.nan)) for c in free):
        return typical(free, pool, count, region, random)
    values, how = known_or_estimated(free, pool, name)
    most = max(CANDIDATES_PER_PICK * count, math.ceil(len(free) / CANDIDATES_PER_PICK))
    uncertain = sorted(_highest(values, min(most, len(free)), random))
    estimates = {free[i].case_id: (values[i], how[i]) for i in uncertain}
    picks = core_set([free[i] for i in uncertain], pool, count, region, random)
    return [Pick(p.case_id, f"entropy {_figure(*estimates[p.case_id])}, and {p.reason} of {len(free)}") for p in picks]


def known_or_estimated(free: Sequence[Candidate], pool: Pool, name: str) -> tuple[Array, list[str]]:
    """A value for every case, including cases that have no score yet.

    An unscored case with an embedding gets the mean score of its nearest scored neighbours. If no case has a score, its
    distance to the labelled cases is used instead. A case without an embedding comes last (minus infinity).

    Returns:
        Values of shape (n,), and the origin of each value: ``scored``, ``estimated``, ``distance`` or ``unknown``.
    """
    values = np.array([c.scores.get(name, math.nan) for c in free], dtype=np.float64)
    values[~np.isfinite(values)] = math.nan
    scored = np.isfinite(values)
    embedded = np.array([c.embedding is not None for c in free])
    how = np.where(scored, "scored", "unknown").astype(object)
    wanting = np.flatnonzero(~scored & embedded)
    if wanting.size:
        vectors = _matrix([free[i] for i in wanting])
        teachers = _spread(np.flatnonzero(scored & embedded), MOST_TEACHERS)
        if teachers.size:
            distances = _distances(vectors, _matrix([free[i] for i in teachers]))
            count = min(NEIGHBOURS_FOR_ESTIMATE, teachers.size)
            nearest = np.argpartition(distances, count - 1, axis=1)[:, :count]
            values[wanting], how[wanting] = values[teachers][nearest].mean(axis=1), "estimated"
        elif not scored.any():
            values[wanting], how[wanting] = _distance_to(vectors, pool.labelled), "distance"
    return np.where(np.isfinite(values), values, -math.inf), list(how)


def k_centre(
    vectors: Array, labelled: Vectors | None, count: int, random: np.random.Generator
) -> list[tuple[int, float]]:
    """Greedy k-centre: each pick is the one farthest from all earlier picks and from the labelled cases.

    Returns:
        Index and distance of each pick. Without labelled cases, the first pick is the one nearest to the mean.
    """
    picks: list[tuple[int, float]] = []
    nearest = np.full(len(vectors), math.inf)
    if labelled is not None and len(labelled):
        nearest = _distance_to(vectors, labelled)
    else:
        to_mean = np.linalg.norm(vectors - vectors.mean(axis=0), axis=1)
        picks.append((int(_highest(-to_mean, 1, random)[0]), float(to_mean.min())))
        nearest = np.linalg.norm(vectors - vectors[picks[0][0]], axis=1)
    taken = np.zeros(len(vectors), dtype=bool)
    taken[[i for i, _ in picks]] = True
    while len(picks) < min(count, len(vectors)):
        index = int(_highest(np.where(taken, -math.inf, nearest), 1, random)[0])
        picks.append((index, float(nearest[index])))
        taken[index] = True
        nearest = np.minimum(nearest, np.linalg.norm(vectors - vectors[index], axis=1))
    return picks


def typical_of_clusters(
    vectors: Array, labelled: Vectors | None, count: int, random: np.random.Generator
) -> list[tuple[int, int]]:
    """One pick from each of the largest clusters without labelled cases, then from those with the fewest.

    The number of clusters equals the number of labels after this selection, at most fifty. The most typical case of a
    cluster has the smallest mean distance to its twenty nearest neighbours in the cluster.

    Returns:
        Index of each pick, and the size of its cluster.
    """
    known = np.empty((0, vectors.shape[1])) if labelled is None else np.asarray(labelled, dtype=np.float64)
    everything = np.concatenate([vectors, known])
    clusters = min(len(known) + count, MOST_CLUSTERS, len(everything))
    cluster_of = _cluster(everything, clusters, random)
    mine, covered = cluster_of[: len(vectors)], np.bincount(cluster_of[len(vectors) :], minlength=clusters)
    free = np.ones(len(vectors), dtype=bool)
    picks: list[tuple[int, int]] = []
    while len(picks) < min(count, len(vectors)):
        sizes = np.bincount(mine[free], minlength=clusters)
        best = min((c for c in range(clusters) if sizes[c]), key=lambda c: (covered[c], -sizes[c], c))
        members = np.flatnonzero(free & (mine == best))
        picks.append((int(members[_most_typical(vectors[members], random)]), int(sizes[best])))
        free[picks[-1][0]] = False
        covered[best] += 1
    return picks


def _cluster(vectors: Array, clusters: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """k-means, on a sample of very large pools; there are at most as many clusters as distinct points."""
    sample = vectors[_spread(np.arange(len(vectors)), MOST_CLUSTERED)]
    first, *others = k_centre(sample, None, clusters, random)
    starts = [first[0], *(i for i, distance in others if distance > SMALLEST_DISTANCE)]
    if len(starts) < 2:
        return np.zeros(len(vectors), dtype=np.int64)
    centres, _ = kmeans2(sample, sample[starts], minit="matrix", missing="warn", iter=10)
    nearest: npt.NDArray[np.int64] = _distances(vectors, centres).argmin(axis=1)
    return nearest


def _most_typical(members: Array, random: np.random.Generator) -> int:
    if len(members) > MOST_PER_CLUSTER:  # a sample finds the dense core of a large cluster as well
        return int(_most_typical(members[:MOST_PER_CLUSTER], random))
    distances = np.sort(_distances(members, members), axis=1)[:, 1 : NEIGHBOURS_FOR_TYPICALITY + 1]
    spread = distances.mean(axis=1) if distances.shape[1] else np.zeros(len(members))
    return int(_highest(-spread, 1, random)[0])


def _highest(values: Array, count: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Indices of the highest values, highest first, with ties in random order."""
    # values that differ only by rounding are treated as equal
    order: npt.NDArray[np.int64] = np.lexsort((random.permutation(len(values)), -np.round(values, 9)))
    return order[:count]


def _distance_to(vectors: Array, labelled: Vectors | None) -> Array:
    """Distance of each case to the nearest labelled one; to the mean of all cases if none is labelled."""
    known = vectors.mean(axis=0, keepdims=True) if labelled is None or not len(labelled) else labelled
    nearest: Array = _distances(vectors, np.asarray(known, dtype=np.float64)).min(axis=1)
    return nearest


def _distances(a: Array, b: Array) -> Array:
    """Euclidean distances, shape (len(a), len(b)), by one matrix product, since thousands of cases are compared."""
    squares: Array = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * (a @ b.T)
    distances: Array = np.sqrt(np.maximum(squares, 0))
    return distances


def _spread(indices: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """At most ``most`` of the indices, evenly spaced."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).round().astype(np.int64)]


def _with_embedding(free: list[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    return [c for c in free if c.embedding is not None], [c for c in free if c.embedding is None]


def _matrix(candidates: Sequence[Candidate]) -> Array:
    return np.array([c.embedding for c in candidates], dtype=np.float64)


def _unseen(unseen: list[Candidate], count: int, total: int, random: np.random.Generator) -> list[Pick]:
    """Cases without any scores or embedding, in random order."""
    chosen = random.permutation(len(unseen))[: max(0, count)]
    return [
        Pick(unseen[i].case_id, f"not scored yet; chosen at random, one of {total} unlabelled cases") for i in chosen
    ]


def _score_reason(label: str, value: float, how: str, rank: int, total: int) -> str:
    if how == "unknown":
        return f"not scored yet, one of {total} unlabelled cases"
    return f"{label} {_figure(value, how)}, rank {rank} of {total}"


def _figure(value: float, how: str) -> str:
    note = {"estimated": " (estimated from similar cases)", "distance": " (distance from what is labelled)"}
    return f"{value:.2f}{note.get(how, '')}" if how != "unknown" else "unknown"


def _voxels(voxels: float) -> str:
    return f"{voxels:.0f} voxels of labels" if math.isfinite(voxels) else "an average case's labels"


STRATEGIES: Mapping[str, Selection] = {
    "random": at_random,
    "random_foreground": random_foreground,
    "first": first,
    "entropy": by_score("entropy"),
    "class_balanced_entropy": by_score("class_balanced_entropy"),
    "margin": by_score("margin"),
    "bald": by_score("bald"),
    "dice_disagreement": by_score("dice_disagreement"),
    "power_entropy": by_score("entropy", noisy=True),
    "power_bald": by_score("bald", noisy=True),
    "core_set": core_set,
    "typical": typical,
    "hybrid": hybrid,
}

MEASURE_OF: Mapping[str, str] = {
    "entropy": "entropy",
    "class_balanced_entropy": "class_balanced_entropy",
    "margin": "margin",
    "bald": "bald",
    "dice_disagreement": "dice_disagreement",
    "power_entropy": "entropy",
    "power_bald": "bald",
    "hybrid": "entropy",
}
"""The measure by which each strategy that needs a model ranks the cases."""
