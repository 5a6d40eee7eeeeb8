"""Compares strategies by simulating the annotation of a fully labelled data set.

    python -m lib.experiments.simulate --studies DIR --split split.json --strategies random,entropy,typical \
        --seeds 3 --budget 8,16,32,64 --out simulation
"""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from lib.activelearning.selection import STRATEGIES
from lib.cases.labelled import find_cases
from lib.cases.split import SUBJECT_RULES, Split, extend_split, read_split
from lib.commandline import run_command
from lib.configs.catalogue import find_preset, shipped_preset_names
from lib.errors import ParameterError
from lib.experiments.simulation import Plan, Round, Simulation, summarise
from lib.experiments.simulation_report import draw, table
from lib.networks.precision import resolve_device
from lib.storage.json_files import write_json
from lib.trainers.loop import run_training
from lib.trainers.run.job import TrainingJob, TrainingResult

DEFAULT_STRATEGIES = "random,random_foreground,entropy,bald,core_set,typical,hybrid"


Train = Callable[[TrainingJob], TrainingResult]


def main(arguments: Sequence[str] | None = None, train: Train = run_training) -> int:
    """Run the simulation, and write table, figure and JSON.

    Args:
        arguments: of the command line.
        train: trains a job.

    Returns:
        0 on success, 2 with a sentence if the input was wrong.
    """
    options = build_parser().parse_args(arguments)
    return run_command(functools.partial(_play_and_write, options, train), level=logging.WARNING)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.experiments.simulate", description="Compare ways to choose the next case to label."
    )
    parser.add_argument("--studies", type=Path, required=True, help="folder with the folders images and labels")
    parser.add_argument(
        "--preset", default="hippocampus_mr", help=f"{', '.join(shipped_preset_names())}, or a YAML file"
    )
    parser.add_argument("--split", type=Path, help="persisted split (JSON): its training side is the pool")
    parser.add_argument("--subjects", choices=sorted(SUBJECT_RULES), default="stem", help="what makes a subject")
    parser.add_argument("--strategies", default=DEFAULT_STRATEGIES, help="comma-separated (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each strategy (default %(default)s)")
    parser.add_argument("--budget", default="8,16,32,64", help="labels of each round (default %(default)s)")
    parser.add_argument("--first-steps", type=int, default=300, help="training steps of the first round")
    parser.add_argument("--steps", type=int, default=120, help="training steps of a later round, from the one before")
    parser.add_argument("--dice", type=float, help="count labels to this Dice; to random's last one by default")
    parser.add_argument(
        "--out", type=Path, default=Path("simulation"), help="results; an interrupted run goes on there"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; the best there is by default")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    return parser


def _play_and_write(options: argparse.Namespace, train: Train) -> None:
    plan, strategies = make_plan(options)
    rounds = play_all(plan, strategies, options.seeds, options.processes, options.threads, train)
    print(write_results(options.out, rounds, strategies, options.dice))


def make_plan(options: argparse.Namespace) -> tuple[Plan, list[str]]:
    """Validate the options.

    Raises:
        UnetrError: naming the problem.
    """
    strategies = [name.strip() for name in options.strategies.split(",") if name.strip()]
    unknown = sorted(set(strategies) - set(STRATEGIES))
    if unknown or not strategies:
        raise ParameterError("--strategies", ", ".join(unknown), ", ".join(STRATEGIES))
    preset = find_preset(options.preset)
    cases = find_cases(options.studies / "images", options.studies / "labels")
    ids = [case.case_id for case in cases]
    rule = SUBJECT_RULES[options.subjects]
    split = read_split(options.split) if options.split else extend_split(Split((), ()), ids, 0.2, rule)
    pool = tuple(case for case in cases if case.case_id in split.train)
    held_out = tuple(case for case in cases if case.case_id in split.validation)
    budgets = parse_budgets(options.budget, len(pool))
    if not held_out:
        raise ParameterError("--split", str(options.split), "a split with held-out cases among the studies")
    if options.seeds < 1 or options.steps < 1 or options.first_steps < 1:
        raise ParameterError("--seeds, --steps, --first-steps", "below 1", "whole numbers from 1")
    device = resolve_device(options.device)
    return Plan(preset, pool, held_out, budgets, options.first_steps, options.steps, options.out, device), strategies


def parse_budgets(text: str, most: int) -> tuple[int, ...]:
    """Increasing numbers of labels.

    Raises:
        ParameterError: for other values, or more than there are cases.
    """
    try:
        budgets = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ParameterError("--budget", text, "whole numbers, comma-separated") from error
    if list(budgets) != sorted(set(budgets)) or budgets[0] < 1 or budgets[-1] > most:
        raise ParameterError("--budget", text, f"growing numbers from 1 to {most}, the cases of the pool")
    return budgets


def play_all(
    plan: Plan, strategies: Sequence[str], seeds: int, processes: int, threads: int, train: Train = run_training
) -> list[Round]:
    """Simulate every strategy with every seed, seed by seed, so that early results are comparable."""
    runs = [(strategy, seed) for seed in range(seeds) for strategy in strategies]
    rounds: list[Round] = []
    with tqdm(total=len(runs) * len(plan.budgets), unit="round", smoothing=0) as bar:
        if processes <= 1:
            torch.set_num_threads(threads)
            simulation = Simulation(plan, train)
            for strategy, seed in runs:

                def report(what: str, run: str = f"{strategy} seed {seed}") -> None:
                    bar.set_description(f"{run}: {what}")
                    bar.update(what in ("done", "kept"))

                rounds += simulation.play(strategy, seed, report)
            return rounds
        # spawn: a forked child of a process that has computed hangs in OpenMP
        context = multiprocessing.get_context("spawn")
        with (
            _own_thread_count(threads),
            ProcessPoolExecutor(processes, context, _begin, (plan, threads, train)) as pool,
        ):
            for future in as_completed([pool.submit(_play, strategy, seed) for strategy, seed in runs]):
                rounds += future.result()
                bar.update(len(plan.budgets))
    return sorted(rounds, key=lambda one: (one.seed, strategies.index(one.strategy), one.budget))


def write_results(folder: Path, rounds: Sequence[Round], strategies: Sequence[str], wanted_dice: float | None) -> str:
    """Write ``results.json``, ``table.md`` and ``curves.png``; returns the table."""
    curves = summarise(rounds, strategies, wanted_dice)
    text = table(curves)
    write_json(
        folder / "results.json",
        {"curves": [asdict(curve) for curve in curves], "rounds": [asdict(one) for one in rounds]},
    )
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw(curves, folder / "curves.png")
    return text


_simulation: Simulation | None = None


def _begin(plan: Plan, threads: int, train: Train) -> None:
    """Initialise one of several processes: it reads the cases once."""
    global _simulation
    torch.set_num_threads(threads)
    _simulation = Simulation(plan, train)


def _play(strategy: str, seed: int) -> list[Round]:
    assert _simulation is not None
    return _simulation.play(strategy, seed)


@contextmanager
def _own_thread_count(threads: int) -> Iterator[None]:
    """Limit the threads of each process, since several processes that all use every core are slower than one."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


if __name__ == "__main__":
    sys.exit(main())
