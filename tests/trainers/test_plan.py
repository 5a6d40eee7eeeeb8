"""Training plans fit, fastest first; what memory ran out on is given up, told and remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib.configs.catalogue import load_preset
from lib.configs.preset import Preset
from lib.errors import TrainingError
from lib.infers.costs import CostBook, WindowCost, cost_key
from lib.infers.memory import GIB, MemoryProbe
from lib.networks.placement import Placement
from lib.networks.precision import resolve_precision
from lib.networks.unetr import CheckpointedBlocks, build_unetr
from lib.trainers.memory import count_kept_bytes
from lib.trainers.plan import StepLadder, StepPlanner, count_step_bytes, step_key
from tests.tiny import preset_data, tiny_preset

CPU, CUDA, FP32 = torch.device("cpu"), torch.device("cuda"), torch.float32


def _base(**recipe: object) -> Preset:
    """The base network with a recipe of its own; in fp32 on every machine."""
    preset = load_preset("abdomen_ct_base")
    return preset.model_copy(update={"training": preset.training.model_copy(update={"precision": "fp32", **recipe})})


Measure = Callable[[Placement, int, bool], WindowCost]


def planner_with(
    gib: float, book: CostBook | None = None, measure: Measure | None = None, gpu_gib: float = 0.0, beside: bool = False
) -> StepPlanner:
    """A planner of a machine with so much free memory, on which nothing is measured unless ``measure`` does it."""
    memory = MemoryProbe(of_device=lambda device: int(gpu_gib * GIB), of_host=lambda budget: int(gib * GIB))
    measured = measure or (lambda *_: pytest.fail("measured"))
    return StepPlanner(book=book, memory=memory, measure=measured, beside_server=beside)


@pytest.fixture
def book() -> CostBook:
    """Measured costs of the base network: 2 GiB a crop; recomputed, 1.2."""
    book, key = CostBook(), step_key(Placement(_base(), CPU, FP32))
    for way, gib, seconds in (("kept", 2.0, 3.0), ("recomputed", 1.2, 4.0)):
        book.keep(f"{key} {way}", 1, WindowCost(int(gib * GIB), seconds))
        book.keep(f"{key} {way}", 2, WindowCost(int(2 * gib * GIB), 2 * seconds))
    return book


WEIGHTS_GIB = 4 * 92.8e6 * 4 / GIB
LOGITS_GIB = 3 * 14 * 96**3 * 4 / GIB


@pytest.mark.parametrize(
    ("free_gib", "at_once", "checkpointing", "passes_gib", "seconds"),
    [
        (24, 4, False, 1.25 * 8, 12),
        (8, 4, True, 1.25 * 4.8, 16),
        (7, 2, False, 1.25 * 4 + 2 * LOGITS_GIB, 16),
        (5, 1, False, 1.25 * 2 + 3 * LOGITS_GIB, 16),
        (4, 1, True, 1.25 * 1.2 + 3 * LOGITS_GIB, 21.3),
    ],
)
def test_plan_is_the_fastest_that_fits(
    free_gib: float,
    at_once: int,
    checkpointing: bool,
    passes_gib: float,
    seconds: float,
    book: CostBook,
) -> None:
    plan = planner_with(free_gib, book).plan(_base(), 10, CPU)
    assert (plan.at_once, plan.checkpointing, plan.crops) == (at_once, checkpointing, 4)
    assert plan.needed_bytes / GIB == pytest.approx(WEIGHTS_GIB + passes_gib, abs=0.01)
    assert plan.seconds == pytest.approx(seconds, rel=0.01)
    assert plan.cache_bytes == (plan.free_bytes - plan.needed_bytes) // 4
    assert f"1 case x {at_once} crops at a time" in plan.explain()
    assert ("parts a step" in plan.explain()) == (at_once < 4)


@pytest.mark.parametrize(("free_gib", "keeps"), [(17.3, True), (16.9, False)])
def test_freed_memory_is_kept_where_half_more_than_is_needed_is_there(
    free_gib: float, keeps: bool, book: CostBook
) -> None:
    plan = planner_with(free_gib, book).plan(_base(), 10, CPU)
    assert 1.5 * plan.needed_bytes / GIB == pytest.approx(17.08, abs=0.05)
    assert plan.keeps_freed_memory is keeps
    assert ("freed memory is kept" in plan.explain()) is keeps


def test_crop_more_takes_at_least_what_is_counted(book: CostBook) -> None:
    book.keep(f"{step_key(Placement(_base(), CPU, FP32))} kept", 2, WindowCost(int(2.1 * GIB), 6.0))
    plan = planner_with(24, book).plan(_base(), 10, CPU)
    counted = count_kept_bytes(_base(), False)[0] / GIB + LOGITS_GIB
    assert plan.needed_bytes / GIB == pytest.approx(WEIGHTS_GIB + 1.25 * (2 + 3 * counted), abs=0.01)


def test_requests_of_a_server_on_the_same_device_are_left_room(book: CostBook) -> None:
    alone, beside = (planner_with(8, book, beside=server).plan(_base(), 10, CPU) for server in (False, True))
    assert (alone.free_bytes, alone.at_once) == (8 * GIB, 4)
    assert (beside.free_bytes, beside.at_once) == (pytest.approx(7.2 * GIB, abs=1), 2)
    dtype = resolve_precision("auto", CPU)
    book.keep(cost_key(Placement(_base(), CPU, dtype)), 1, WindowCost(2 * GIB, 1.0))
    weights = WEIGHTS_GIB / 4 * dtype.itemsize / 4  # in the number format of requests, and once
    beside = planner_with(8, book, beside=True).plan(_base(), 10, CPU)
    assert beside.free_bytes / GIB == pytest.approx(6 - weights, abs=0.01), "a window, where it takes more than that"


def test_step_that_cannot_fit_is_refused_with_the_numbers(book: CostBook) -> None:
    with pytest.raises(
        TrainingError, match=r"\(1 crop of 96x96x96 at a time\) needs 3.30 GiB of memory; there are 2.00"
    ):
        planner_with(2.0, book).plan(_base(), 10, CPU)


def test_gpu_without_room_gives_way_to_the_cpu(book: CostBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    plan = planner_with(24, book, gpu_gib=1).plan(_base(), 10, CUDA)
    assert (plan.device, plan.at_once) == ("cpu", 4)
    assert "; gave up: cuda (" in plan.explain()


def test_recipe_that_asks_for_checkpointing_gets_it(book: CostBook) -> None:
    plan = planner_with(24, book).plan(_base(activation_checkpointing=True), 10, CPU)
    assert (plan.at_once, plan.checkpointing) == (4, True)


def test_batch_has_no_more_cases_than_there_are(book: CostBook) -> None:
    plan = planner_with(100, book).plan(_base(batch_size=3), 2, CPU)
    assert plan.crops == 8
    assert "2 cases x 4 crops at a time" in plan.explain()


def test_processes_that_train_together_do_not_shrink_alone(book: CostBook) -> None:
    plan = planner_with(0.5, book).plan(_base(), 10, CPU, whole=True)
    assert (plan.at_once, plan.checkpointing, plan.fits) == (4, True, False)


def test_count_grows_with_crops_and_falls_with_checkpointing() -> None:
    preset = load_preset("abdomen_ct_base")
    one, two, recomputed = (
        count_step_bytes(preset, crops, recompute, FP32) / GIB
        for crops, recompute in ((1, False), (2, False), (2, True))
    )
    assert two - one == pytest.approx(1.6 * 1.31 + LOGITS_GIB, abs=0.05), "activations of a crop, and its logits"
    assert 0.8 < two - recomputed < 1.5
    assert count_step_bytes(preset, 2, False, torch.bfloat16) / GIB == pytest.approx(1.38 + 1.6 * 1.31 + 0.46, abs=0.1)


def test_teacher_takes_its_weights_and_the_targets(book: CostBook) -> None:
    alone, taught = (
        planner_with(64, book).plan(_base(), 10, CPU, with_teacher=with_teacher).needed_bytes / GIB
        for with_teacher in (False, True)
    )
    assert taught - alone == pytest.approx(WEIGHTS_GIB / 4 + 4 * LOGITS_GIB, abs=0.01)
    crowded = planner_with(alone + 0.5, book)
    assert crowded.plan(_base(), 10, CPU).at_once == 4
    shared = crowded.plan(_base(), 10, CPU, with_teacher=True)
    assert shared.fits and (shared.at_once < 4 or shared.checkpointing)


def test_costs_are_measured_once_and_kept(tmp_path: Path) -> None:
    measured = []

    def measure(where: Placement, crops: int, checkpointing: bool) -> WindowCost:
        measured.append((crops, checkpointing))
        return WindowCost(crops * 1000, 0.5)

    preset = tiny_preset(training=preset_data()["training"] | {"batch_size": 3})
    for _ in range(2):
        planner = planner_with(24, CostBook(tmp_path / "costs.json"), measure)
        plan = planner.plan(preset, 9, CPU, always_measure=True)
        assert plan.seconds == pytest.approx(0.75)
    assert measured == [(1, False), (2, False)]


def test_step_that_fits_many_times_over_is_not_measured() -> None:
    plan = planner_with(4).plan(tiny_preset(), 9, CPU)
    assert "(counted)" in plan.explain()


def test_step_is_measured_where_it_decides() -> None:
    counted = planner_with(4).plan(tiny_preset(), 9, CPU).needed_bytes
    planner = planner_with(2 * counted / GIB, measure=lambda *_: WindowCost(1000, 0.5))
    assert "(measured; about 0.5 s a step)" in planner.plan(tiny_preset(), 9, CPU).explain()


@pytest.mark.parametrize("error", [MemoryError, lambda: RuntimeError("can't allocate memory")])
def test_ladder_goes_down_to_one_recomputed_crop(
    error: Callable[[], Exception], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    preset = tiny_preset(training=preset_data()["training"] | {"batch_size": 4})
    planner, network, calls = planner_with(24, CostBook(tmp_path / "costs.json")), build_unetr(preset), []

    def step(at_once: int) -> torch.Tensor:
        recomputed = isinstance(network.vit.blocks, CheckpointedBlocks)
        calls.append((at_once, recomputed))
        if not recomputed:
            raise error()
        return torch.tensor(0.5)

    ladder = StepLadder(planner.plan(preset, 9, CPU), planner, preset, network)
    assert ladder.run(step) == 0.5
    assert ladder.run(step) == 0.5
    assert calls == [(4, False), (2, False), (1, False), (1, True), (1, True)]
    assert "gave up: 4 crops at a time; gave up: 2 crops at a time; gave up: keeping the transformer's" in caplog.text
    again = planner_with(24, CostBook(tmp_path / "costs.json")).plan(preset, 9, CPU)
    assert (again.at_once, again.checkpointing) == (1, True), "the next run remembers"


def test_step_whose_only_crop_does_not_fit_fails() -> None:
    preset, planner = tiny_preset(), planner_with(24)
    plan = replace(planner.plan(preset, 9, CPU), at_once=1, checkpointing=True)

    def step(at_once: int) -> torch.Tensor:
        raise MemoryError

    for may_shrink in (True, False):
        with pytest.raises(MemoryError):
            StepLadder(plan, planner, preset, build_unetr(preset), may_shrink).run(step)


def test_other_errors_go_through() -> None:
    preset, planner = tiny_preset(), planner_with(24)

    def step(at_once: int) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        StepLadder(planner.plan(preset, 9, CPU), planner, preset, build_unetr(preset)).run(step)
