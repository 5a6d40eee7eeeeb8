"""Simulates the annotation of a fully labelled data set, to measure how many labels each strategy needs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from lib.activelearning.case_scores import NEED_PASSES, CaseScores, score_case
from lib.activelearning.embedding import AnyUnetr, embed
from lib.activelearning.passes import TestTimeAugmentation
from lib.activelearning.selection import MEASURE_OF, Candidate, Pool, select
from lib.cases.labelled import Case, read_case
from lib.cases.metrics import dice_per_label, mean_known
from lib.configs.preset import Preset
from lib.infers.segmenter import Segmenter
from lib.networks.checkpoint import Checkpoint, load_weights, read_checkpoint, write_checkpoint
from lib.networks.layouts import StateDict
from lib.networks.placement import Placement
from lib.networks.unetr import build_unetr
from lib.storage.json_files import read_json, write_json
from lib.trainers.loop import run_training
from lib.trainers.run.job import TrainingJob, TrainingResult
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import Volume

logger = logging.getLogger("unetr.simulate")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """The parameters that all runs of a simulation share.

    Attributes:
        preset: the preset, with whose recipe every round trains.
        pool: cases that start unlabelled.
        held_out: cases on which every round is scored, of subjects outside of the pool.
        budgets: increasing numbers of labels at which the network is trained and scored.
        first_steps: training steps of the first round, from random weights.
        steps: training steps of the later rounds, from the weights of the previous round.
        folder: folder of the rounds, from which an interrupted simulation resumes.
        device: computing device.
    """

    preset: Preset
    pool: tuple[Case, ...]
    held_out: tuple[Case, ...]
    budgets: tuple[int, ...]
    first_steps: int
    steps: int
    folder: Path
    device: torch.device

    def fingerprint(self) -> str:
        """A value that changes with everything that affects a round."""
        content = {
            "preset": self.preset.model_dump(mode="json"),
            "held_out": [case.case_id for case in self.held_out],
            "pool": [case.case_id for case in self.pool],
            "steps": [self.first_steps, self.steps],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Round:
    """One round: the labelled cases, and the resulting Dice."""

    strategy: str
    seed: int
    budget: int
    labelled: tuple[str, ...]
    dice: Mapping[str, float]
    mean_dice: float


@dataclass
class _Loaded:
    """A case in memory."""

    case: Case
    volume: Volume
    label: npt.NDArray[np.uint8]
    image: torch.Tensor = field(repr=False)


class Simulation:
    """Runs of strategies over the same cases, whose volumes are read once.

    Rounds that several strategies share (such as the first one, if it is a random draw) are trained once: a round is
    identified by the cases that were labelled in each round, and by the seed.

    Args:
        plan: the parameters.
        train: trains a job; by default :func:`run_training`.

    Raises:
        InputError: if a case cannot be used.
    """

    def __init__(self, plan: Plan, train: Callable[[TrainingJob], TrainingResult] | None = None) -> None:
        self.plan, self._run = plan, train or run_training
        self._pool = {case.case_id: _load(case, plan.preset) for case in plan.pool}
        self._held_out = [_load(case, plan.preset) for case in plan.held_out]

    def play(self, strategy: str, seed: int, report: Report = lambda _: None) -> list[Round]:
        """Simulate one strategy from no labels to the largest budget.

        Args:
            strategy: one of ``selection.STRATEGIES``.
            seed: seed of the selection, the first weights and the training.
            report: called with a sentence at each step.
        """
        file = self.plan.folder / f"{strategy}-{seed}-{self.plan.fingerprint()}.json"
        rounds = _read_rounds(file)
        batches: list[tuple[str, ...]] = []
        for number, budget in enumerate(self.plan.budgets):
            if number < len(rounds):
                batches.append(_added(rounds, number))
                report("kept")
                continue
            chosen = self._choose(strategy, seed, batches, budget, report)
            batches.append(chosen)
            report("training")
            dice = self._outcome(seed, batches)
            labelled = tuple(case for batch in batches for case in batch)
            rounds.append(Round(strategy, seed, budget, labelled, dice, mean_known(dice.values())))
            write_json(file, [asdict(one) for one in rounds])
            report("done")
        return rounds

    def _choose(
        self, strategy: str, seed: int, batches: Sequence[tuple[str, ...]], budget: int, report: Report
    ) -> tuple[str, ...]:
        """The cases that the strategy adds. Without a model, strategies that need one draw at random."""
        labelled = [case for batch in batches for case in batch]
        wanted = budget - len(labelled)
        needs_model = (strategy in MEASURE_OF and strategy != "hybrid") or strategy == "random_foreground"
        if not batches and needs_model:
            strategy = "random"
        if strategy in ("random", "first"):
            known = {case: CaseScores() for case in self._pool}
        else:
            report("scoring")
            known = self._look(strategy, seed, batches)
        candidates = [
            Candidate(case, known[case].values, known[case].embedding, known[case].foreground_voxels)
            for case in self._pool
            if case not in labelled
        ]
        vectors = [e for case in labelled if (e := known[case].embedding) is not None]
        pool = Pool(candidates, np.array(vectors) if vectors else None)
        return tuple(pick.case_id for pick in select(strategy, pool, wanted, seed + 1000 * len(batches)))

    def _look(self, strategy: str, seed: int, batches: Sequence[tuple[str, ...]]) -> dict[str, CaseScores]:
        """The scores of each case by the newest network, which has random weights at first."""
        segmenter = self._segmenter(self._weights(seed, batches) if batches else None, seed)
        network = cast(AnyUnetr, segmenter.network)
        where = Placement(self.plan.preset, self.plan.device, segmenter.dtype)
        if strategy in ("core_set", "typical") or not batches:
            vectors = {n: embed(network, one.image, where) for n, one in self._pool.items()}
            return {name: CaseScores(embedding=vector) for name, vector in vectors.items()}
        again = MEASURE_OF.get(strategy) in NEED_PASSES
        passes = TestTimeAugmentation(network, where.preset) if again else None
        return {name: score_case(network, one.image, where, passes) for name, one in self._pool.items()}

    def _outcome(self, seed: int, batches: Sequence[tuple[str, ...]]) -> dict[str, float]:
        """Train on the labelled cases, and score on the held-out ones."""
        file = self._round_file(seed, batches).with_suffix(".json")
        if file.is_file():
            kept: dict[str, float] = read_json(file)
            return kept
        segmenter = self._segmenter(self._weights(seed, batches), seed)
        rows = []
        for one in self._held_out:
            predicted = segmenter.segment(one.volume, name=one.case.case_id).labels
            rows.append(dice_per_label(predicted, one.label, segmenter.preset.label_indices))
        dice = {name: mean_known(row[name] for row in rows) for name in segmenter.preset.label_indices}
        write_json(file, dice)
        return dice

    def _weights(self, seed: int, batches: Sequence[tuple[str, ...]]) -> StateDict:
        """The weights after these rounds, trained if necessary."""
        file = self._round_file(seed, batches).with_suffix(".pt")
        if not file.is_file():
            weights = self._train(seed, batches, file.with_suffix(".run"))
            write_checkpoint(file, Checkpoint(weights, self.plan.preset))
        return read_checkpoint(file).model

    def _train(self, seed: int, batches: Sequence[tuple[str, ...]], run_dir: Path) -> StateDict:
        steps = self.plan.steps if len(batches) > 1 else self.plan.first_steps
        recipe = self.plan.preset.training.model_copy(update={"seed": seed + len(batches), "max_epochs": steps})
        cases = tuple(self._pool[case].case for batch in batches for case in sorted(batch))
        plan = TrainingJob(
            preset=self.plan.preset.model_copy(update={"training": recipe}),
            train_cases=cases,
            validation_cases=(),
            run_dir=run_dir,
            device=self.plan.device,
            start=self._weights(seed, batches[:-1]) if len(batches) > 1 else None,
            cache_dir=self.plan.folder / "cache",
            max_steps=steps,
        )
        try:
            return self._run(plan).weights
        finally:
            shutil.rmtree(run_dir, ignore_errors=True)

    def _round_file(self, seed: int, batches: Sequence[tuple[str, ...]]) -> Path:
        history = json.dumps([self.plan.fingerprint(), seed, [sorted(batch) for batch in batches]])
        return self.plan.folder / "rounds" / hashlib.sha256(history.encode()).hexdigest()[:24]

    def _segmenter(self, weights: StateDict | None, seed: int) -> Segmenter:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = build_unetr(self.plan.preset)
        if weights is not None:
            load_weights(network, weights)
        return Segmenter(network, self.plan.preset, self.plan.device, self.plan.preset.training.precision)


@dataclass(frozen=True)
class Curve:
    """The Dice of a strategy as a function of the number of labels, over its seeds.

    Attributes:
        area: area under the curve over the logarithm of the labels, as a mean Dice; mean and standard deviation over
            seeds.
        gain: area minus that of random sampling for each seed; mean and standard deviation. None without random
            sampling.
        labels_needed: number of labels at which the mean curve reaches the target Dice; None if it does not.
    """

    strategy: str
    budgets: tuple[int, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    area: tuple[float, float]
    gain: tuple[float, float] | None
    labels_needed: float | None
    seeds: int


def summarise(rounds: Sequence[Round], strategies: Sequence[str], wanted_dice: float | None = None) -> list[Curve]:
    """Curves of the strategies that are complete for at least one seed.

    Args:
        rounds: rounds of all runs.
        strategies: strategies in the order of the result.
        wanted_dice: the target Dice, for which the number of labels is computed; by default the Dice of random sampling
            with all labels.
    """
    largest = max((one.budget for one in rounds), default=0)
    by_run: dict[str, dict[int, list[Round]]] = {}
    for one in rounds:
        by_run.setdefault(one.strategy, {}).setdefault(one.seed, []).append(one)
    complete = {
        name: {seed: sorted(run, key=_budget) for seed, run in runs.items() if max(map(_budget, run)) == largest}
        for name, runs in by_run.items()
    }
    random = complete.get("random", {})
    goal = wanted_dice
    if goal is None and random:
        goal = float(np.mean([run[-1].mean_dice for run in random.values()]))
    return [_curve(name, complete[name], random, goal) for name in strategies if complete.get(name)]


def _budget(one: Round) -> int:
    return one.budget


def _curve(
    strategy: str, by_seed: Mapping[int, Sequence[Round]], random: Mapping[int, Sequence[Round]], goal: float | None
) -> Curve:
    runs = list(by_seed.values())
    budgets = np.array([one.budget for one in runs[0]])
    dice = np.array([[one.mean_dice for one in run] for run in runs])
    areas = [_area_of(run) for run in runs]
    gains = [_area_of(by_seed[seed]) - _area_of(random[seed]) for seed in by_seed if seed in random]
    mean = dice.mean(axis=0)
    return Curve(
        strategy,
        tuple(int(b) for b in budgets),
        tuple(float(m) for m in mean),
        tuple(float(d) for d in _deviation(dice)),
        _mean_and_deviation(areas),
        _mean_and_deviation(gains) if gains else None,
        None if goal is None else labels_needed(budgets, mean, goal),
        len(runs),
    )


def labels_needed(budgets: npt.ArrayLike, dice: npt.ArrayLike, goal: float) -> float | None:
    """Number of labels at which a curve first reaches a Dice, interpolated between budgets on a logarithmic scale.

    >>> labels_needed([8, 32], [0.6, 0.8], 0.7)
    16.0
    """
    labels, values = np.log2(np.asarray(budgets, dtype=float)), np.asarray(dice, dtype=float)
    for i, value in enumerate(values):
        if value >= goal:
            if i == 0:
                return float(2 ** labels[0])
            share = (goal - values[i - 1]) / (value - values[i - 1])
            return round(float(2 ** (labels[i - 1] + share * (labels[i] - labels[i - 1]))), 1)
    return None


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(_deviation(np.array(values)[:, None])[0])


def _area_of(run: Sequence[Round]) -> float:
    """Mean height of a run's curve over the logarithm of the labels (trapezoids)."""
    x, dice = np.log2([one.budget for one in run]), np.array([one.mean_dice for one in run])
    if len(x) < 2:
        return float(dice[0])
    return float(((dice[1:] + dice[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))


def _deviation(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sample standard deviation over the first axis; NaN for a single value."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1], math.nan)


def _load(case: Case, preset: Preset) -> _Loaded:
    volume, label = read_case(case, preset)
    return _Loaded(case, volume, label, preprocess_volume(volume, preset).as_tensor())


def _read_rounds(file: Path) -> list[Round]:
    if not file.is_file():
        return []
    data: list[dict[str, Any]] = read_json(file)
    return [Round(**{**row, "labelled": tuple(row["labelled"])}) for row in data]


def _added(rounds: Sequence[Round], number: int) -> tuple[str, ...]:
    before = set(rounds[number - 1].labelled) if number else set()
    return tuple(case for case in rounds[number].labelled if case not in before)
