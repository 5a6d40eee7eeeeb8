"""The training loop: it learns, repeats itself by seed, keeps the best, and stops when it should."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib.cases.labelled import Case
from lib.configs.preset import Training
from lib.errors import LabelError, TrainingError
from lib.infers.costs import CostBook
from lib.infers.memory import MemoryProbe
from lib.infers.predictor import Prediction, predict
from lib.networks.checkpoint import read_checkpoint
from lib.networks.layouts import StateDict
from lib.networks.unetr import build_unetr
from lib.trainers.loop import BEST_FILE, RunFunctions, run_training
from lib.trainers.memory import forward_in_parts
from lib.trainers.optimization import build_loss
from lib.trainers.pause import is_paused, wait_while_paused
from lib.trainers.plan import CACHE_SHARE, KEEPING_FACTOR, StepLadder, StepPlanner
from lib.trainers.run.data import Batch, TrainingData, count_loading_threads
from lib.trainers.run.job import TrainingJob
from lib.trainers.run.state import RunState
from lib.trainers.run.step import StepTrainer
from tests.tiny import QUIET_AUGMENTATION, boxes, tiny_preset, write_nifti

MakeCases = Callable[..., tuple[Case, ...]]
CPU = torch.device("cpu")


@pytest.fixture
def make_plan(make_cases: MakeCases, tmp_path: Path) -> Callable[..., TrainingJob]:
    """A plan on tiny cases: ``make_plan(train, validation, **recipe)``."""

    def make(train: int = 2, validation: int = 0, network: dict[str, Any] | None = None, **recipe: Any) -> TrainingJob:
        cases = make_cases(train + validation)
        quiet = {"precision": "fp32", "augmentation": QUIET_AUGMENTATION, "crops_per_case": 1, "max_epochs": 1}
        size = {"feature_size": 4, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4} | (network or {})
        preset = tiny_preset(training=quiet | recipe, network=size)
        return TrainingJob(preset, cases[:train], cases[train:], tmp_path / "run", CPU)

    return make


def measured(job: TrainingJob) -> tuple[TrainingJob, int]:
    """The job with a file of what its steps cost, and the bytes that they take by it."""
    job = replace(job, costs=job.run_dir / "costs.json")
    planner = StepPlanner(book=CostBook(job.costs))
    return job, planner.plan(job.preset, len(job.train_cases), CPU, always_measure=True).needed_bytes


def test_training_on_blobs_learns_them(make_plan: Callable[..., TrainingJob]) -> None:
    recipe = {"max_epochs": 20, "batch_size": 2, "learning_rate": 8e-3, "warmup_fraction": 0.1, "val_interval": 5}
    plan = make_plan(4, 2, **recipe)
    result = run_training(plan)
    assert len(result.losses) == 40
    # One minus the Dice of guessing plus the cross-entropy of three classes: where any run of the recipe starts.
    assert result.losses[0] == pytest.approx(0.97, abs=0.05)
    assert sum(result.losses[-4:]) / 4 < 0.55
    assert result.dice["Left Box"] > 0.8
    assert result.dice["core"] > 0.6
    assert result.mean_dice == pytest.approx(sum(result.dice.values()) / 2)
    kept = read_checkpoint(plan.run_dir / BEST_FILE)
    assert kept.preset == plan.preset
    assert kept.info["epoch"] == result.best_epoch
    torch.testing.assert_close(kept.model, result.weights, rtol=0, atol=0)
    progress = json.loads((plan.run_dir / "progress.json").read_text(encoding="utf-8"))
    assert (progress["step"], progress["total_steps"], progress["epoch"]) == (40, 40, 20)
    assert progress["dice"] == pytest.approx(result.dice)


def test_same_seed_trains_the_same_weights_and_another_seed_others(make_plan: Callable[..., TrainingJob]) -> None:
    noisy = {"spatial_probability": 1, "rotation_degrees": 10, "noise_probability": 1, "elastic_probability": 0.5}
    plan = make_plan(3, 1, max_epochs=2, batch_size=2, crops_per_case=2, augmentation=noisy)
    other = plan.preset.training.model_copy(update={"seed": 1})
    first, second = run_training(plan), run_training(plan)
    third = run_training(replace(plan, preset=plan.preset.model_copy(update={"training": other})))
    assert first.losses == second.losses
    torch.testing.assert_close(first.weights, second.weights, rtol=0, atol=0)
    assert first.losses != third.losses


class KilledError(Exception):
    """Stands for a signal."""


def _kill_at(step: int) -> Callable[[int], None]:
    def on_step(now: int) -> None:
        if now == step:
            raise KilledError

    return on_step


@pytest.mark.parametrize("killed_at", [1, 5, 6])
def test_run_that_was_killed_goes_on_as_if_nothing_had_happened(
    make_plan: Callable[..., TrainingJob], killed_at: int
) -> None:
    noisy = {"spatial_probability": 1, "rotation_degrees": 10, "noise_probability": 1}
    plan = make_plan(4, 1, max_epochs=4, batch_size=2, network={"dropout_rate": 0.2}, augmentation=noisy)
    whole = run_training(plan)
    plan = replace(plan, run_dir=plan.run_dir / "again", state_seconds=0)
    with pytest.raises(KilledError):
        run_training(plan, _kill_at(killed_at))
    steps: list[int] = []
    resumed = run_training(replace(plan, resume=True), steps.append)
    assert steps[0] == killed_at, "the step in which it was killed is taken again"
    assert resumed.losses == whole.losses
    assert (resumed.best_epoch, resumed.dice, resumed.validations) == (whole.best_epoch, whole.dice, whole.validations)
    torch.testing.assert_close(resumed.weights, whole.weights, rtol=0, atol=0)
    again = run_training(replace(plan, resume=True), steps.append)
    assert (again.losses, steps[-1]) == (whole.losses, 8), "what has ended is not trained again"
    torch.testing.assert_close(again.weights, whole.weights, rtol=0, atol=0)


@pytest.mark.parametrize("what", ["damaged", "other cases", "other recipe", "none"])
def test_state_that_is_not_of_this_run_is_not_resumed(
    make_plan: Callable[..., TrainingJob], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = replace(make_plan(3, max_epochs=2), state_seconds=0, resume=True)
    with pytest.raises(KilledError):
        run_training(plan, _kill_at(4))
    state = plan.run_dir / "state.pt"
    if what == "damaged":
        state.write_bytes(state.read_bytes()[:1000])
    elif what == "none":
        state.unlink()
    elif what == "other cases":
        plan = replace(plan, train_cases=plan.train_cases[:2])
    else:
        recipe = plan.preset.training.model_copy(update={"learning_rate": 1e-5})
        plan = replace(plan, preset=plan.preset.model_copy(update={"training": recipe}))
    steps: list[int] = []
    run_training(plan, steps.append)
    assert steps[0] == 1
    assert ("starting anew" in caplog.text) == (what != "none")


def test_full_disk_does_not_end_a_run(
    make_plan: Callable[..., TrainingJob], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lib.trainers import resume

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    plan = replace(make_plan(2, max_epochs=2), state_seconds=0, dataset="Dataset")
    monkeypatch.setattr(resume.torch, "save", disk_full)
    assert len(run_training(plan).losses) == 4
    assert "could not be written, and the run goes on without: [Errno 28]" in caplog.text
    assert not list(plan.run_dir.glob("*.pt*")), "half a file is not left"


def test_run_stands_still_while_requests_wait(make_plan: Callable[..., TrainingJob]) -> None:
    plan = replace(make_plan(3, max_epochs=3), pause_file=make_plan(1).run_dir.parent / "pause")
    assert plan.pause_file is not None
    pause, looks, steps = plan.pause_file, list[bool](), list[int]()

    def sleep(_: float) -> None:
        """Time passes for the server, too: the third time, no request waits any more."""
        looks.append(is_paused(pause))
        if len(looks) == 3:
            pause.unlink()
        assert steps[-1] == 4, "no step is taken meanwhile"

    def on_step(step: int) -> None:
        steps.append(step)
        if step == 4:
            pause.touch()

    functions = RunFunctions(wait=lambda file: wait_while_paused(file, sleep))
    assert len(run_training(plan, on_step, functions).losses) == 9
    assert looks == [True] * 3
    assert steps == list(range(1, 10))


def test_pause_of_a_server_that_died_ends_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "pause"
    file.touch()
    assert is_paused(file)
    os.utime(file, (time.time() - 6, time.time() - 6))
    assert not is_paused(file)
    assert wait_while_paused(file) < 1
    assert not is_paused(tmp_path / "none")


@pytest.mark.parametrize("roomy", [True, False])
def test_freed_memory_is_kept_as_planned(roomy: bool, make_plan: Callable[..., TrainingJob]) -> None:
    (job, needed), called = measured(make_plan(1)), list[bool]()
    free = math.ceil(KEEPING_FACTOR * needed) - (not roomy)
    memory = MemoryProbe(of_device=lambda _: free, of_host=lambda _: free)
    run_training(job, functions=RunFunctions(keep_freed_memory=lambda: called.append(True), memory=memory))
    assert bool(called) is roomy


def test_dropout_is_repeatable_too(make_plan: Callable[..., TrainingJob]) -> None:
    plan = make_plan(4, max_epochs=2, network={"dropout_rate": 0.3})
    assert run_training(plan).losses == run_training(plan).losses


def test_run_that_runs_out_of_memory_goes_on_with_less_and_learns_the_same(
    make_plan: Callable[..., TrainingJob],
) -> None:
    plan = make_plan(2, max_epochs=3, batch_size=2)
    roomy = run_training(plan)

    def tight(network: nn.Module, image: torch.Tensor, at_once: int) -> torch.Tensor:
        if at_once > 1:
            raise torch.OutOfMemoryError("out of memory")
        return forward_in_parts(network, image, at_once)

    found = run_training(replace(plan, costs=plan.run_dir / "costs.json"), functions=RunFunctions(forward=tight))
    assert found.losses == pytest.approx(roomy.losses, abs=1e-4)
    assert roomy.step_plan is not None and (roomy.step_plan.at_once, roomy.step_plan.fallbacks) == (2, ())
    assert found.step_plan is not None and found.step_plan.fallbacks == ("2 crops at a time",)
    progress = json.loads((plan.run_dir / "progress.json").read_text(encoding="utf-8"))
    assert progress["plan"].endswith("gave up: 2 crops at a time")


@pytest.mark.gpu
def test_run_on_a_gpu_that_is_full_goes_on_in_parts_and_learns_the_same(
    make_cases: MakeCases, tmp_path: Path, limit_gpu: Callable[[int], None]
) -> None:
    """Memory really runs out: the card's free memory is there to see, and is refused when it is asked for."""
    recipe = {"precision": "fp32", "augmentation": QUIET_AUGMENTATION, "crops_per_case": 4, "max_epochs": 3}
    network = {"feature_size": 16, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
    preset = tiny_preset(training=recipe, network=network, roi_size=[64, 64, 64])
    plan = TrainingJob(preset, make_cases(2, (70, 70, 70)), (), tmp_path / "run", torch.device("cuda"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole = run_training(plan)
    assert whole.step_plan is not None
    assert whole.step_plan.at_once == 4
    limit_gpu(int(0.6 * (torch.cuda.max_memory_allocated() - before)))
    short = run_training(replace(plan, run_dir=tmp_path / "short"))
    assert short.step_plan is not None
    assert short.step_plan.fallbacks[0] == "4 crops at a time"
    assert short.step_plan.device == "cuda"
    assert len(short.losses) == 6
    assert short.losses == pytest.approx(whole.losses, abs=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_a_gpu_follows_that_on_the_cpu(make_plan: Callable[..., TrainingJob], precision: str) -> None:
    plan = make_plan(4, 2, max_epochs=5, batch_size=2, learning_rate=8e-3, val_interval=5)
    on_cpu = run_training(plan)
    recipe = plan.preset.training.model_copy(update={"precision": precision})
    preset = plan.preset.model_copy(update={"training": recipe})
    found = run_training(replace(plan, preset=preset, device=torch.device("cuda"), run_dir=plan.run_dir / "gpu"))
    assert found.losses == pytest.approx(on_cpu.losses, abs=0.02)
    assert found.dice == pytest.approx(on_cpu.dice, abs=0.05)


def test_activation_checkpointing_trains_the_same(make_plan: Callable[..., TrainingJob]) -> None:
    plain, checkpointed = (make_plan(2, max_epochs=3, activation_checkpointing=on) for on in (False, True))
    assert run_training(plain).losses == pytest.approx(run_training(checkpointed).losses, abs=1e-6)


def test_start_weights_are_where_it_starts(make_plan: Callable[..., TrainingJob]) -> None:
    plan = make_plan(2, learning_rate=1e-12, weight_decay=0)
    torch.manual_seed(99)
    start = {f"module.{key}": value for key, value in build_unetr(plan.preset).state_dict().items()}
    result = run_training(replace(plan, start=start))
    for key, value in result.weights.items():
        torch.testing.assert_close(value, start[f"module.{key}"], rtol=0, atol=1e-6)


def test_best_epoch_is_kept_when_later_ones_are_worse(make_plan: Callable[..., TrainingJob]) -> None:
    scores = iter([0.3, 0.8, 0.5, 0.8])
    seen: list[dict[str, torch.Tensor]] = []

    def validate(network: nn.Module) -> dict[str, float]:
        seen.append({key: value.clone() for key, value in network.state_dict().items()})
        return {"core": next(scores)}

    result = run_training(make_plan(1, 1, max_epochs=4), functions=RunFunctions(validate=validate))
    assert (result.best_epoch, result.dice) == (2, {"core": 0.8})
    torch.testing.assert_close(result.weights, seen[1], rtol=0, atol=0)


def test_epoch_that_is_no_better_is_not_even_copied() -> None:
    state, kept = RunState(), list[StateDict]()

    def weights() -> StateDict:
        kept.append({"weight": torch.zeros(1)})
        return kept[-1]

    for state.epoch, score in enumerate([0.3, 0.8, 0.5, 0.8], 1):
        state.keep_if_best({"core": score}, weights)
    assert len(kept) == 2
    assert state.best is not None
    assert (state.best.epoch, state.best.weights) == (2, kept[1])


def test_validation_comes_every_interval_and_at_the_end(make_plan: Callable[..., TrainingJob]) -> None:
    steps, validated = list[int](), list[int]()

    def validate(_: nn.Module) -> dict[str, float]:
        validated.append(len(steps))
        return {"core": 0.5}

    plan = make_plan(1, 1, max_epochs=5, val_interval=2)
    run_training(plan, steps.append, RunFunctions(validate=validate))
    assert validated == [2, 4, 5], "an epoch is one step"


def test_early_stop_ends_a_run_that_no_longer_improves(make_plan: Callable[..., TrainingJob]) -> None:
    scores = iter([0.3, 0.8, 0.7, 0.8, 0.9])
    functions = RunFunctions(validate=lambda _: {"core": next(scores)})
    result = run_training(make_plan(1, 1, max_epochs=50, early_stop_patience=2), functions=functions)
    assert len(result.losses) == 4, "two epochs after the best, of which the last equals it"
    assert result.best_epoch == 2


def test_validation_is_of_the_averaged_weights_on_whole_cases(make_plan: Callable[..., TrainingJob]) -> None:
    shown = []

    def observed(network: nn.Module, image: torch.Tensor, *rest: Any) -> Prediction:
        shown.append((tuple(image.shape), network.training))
        return predict(network, image, *rest)

    run_training(make_plan(1, 2), functions=RunFunctions(predict=observed))
    assert shown == [((1, 20, 18, 16), False)] * 2


def test_validation_that_runs_out_of_memory_goes_on_with_fewer_windows_and_says_the_same(
    make_plan: Callable[..., TrainingJob],
) -> None:
    plan = make_plan(1, 2, max_epochs=2)
    inference = plan.preset.inference.model_copy(update={"window_batch_size": 4})
    plan = replace(plan, preset=plan.preset.model_copy(update={"inference": inference}))
    roomy = run_training(plan)
    tried = list[int]()

    def tight(*arguments: Any) -> Prediction:
        tried.append(arguments[-1].window_batch)
        if tried[-1] > 1:
            raise torch.OutOfMemoryError("out of memory")
        return predict(*arguments)

    found = run_training(plan, functions=RunFunctions(predict=tight))
    assert found.dice == pytest.approx(roomy.dice, abs=1e-6)
    assert found.losses == roomy.losses
    assert tried == [4, 2, 1, 1, 1, 1], "two cases after each of two epochs"


def test_validation_of_which_not_one_window_fits_ends_the_run(make_plan: Callable[..., TrainingJob]) -> None:
    def full(*_: Any) -> Prediction:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run_training(make_plan(1, 1), functions=RunFunctions(predict=full))


def test_run_without_validation_ends_with_the_last_weights(make_plan: Callable[..., TrainingJob]) -> None:
    plan = make_plan(2, 0, max_epochs=3)
    result = run_training(plan)
    assert result.best_epoch == 3
    assert result.dice == {}
    assert math.isnan(result.mean_dice)
    assert not (plan.run_dir / BEST_FILE).exists()


def test_validation_case_without_a_label_does_not_count_for_it(make_plan: Callable[..., TrainingJob]) -> None:
    plan = make_plan(1, 2)
    image, label = boxes(seed=7)
    label[label == 2] = 1
    write_nifti(plan.validation_cases[0].label, label)
    write_nifti(plan.validation_cases[0].image, image)
    assert set(run_training(plan).dice) == {"Left Box", "core"}


def test_max_steps_ends_a_run_in_the_middle_of_an_epoch(make_plan: Callable[..., TrainingJob]) -> None:
    result = run_training(replace(make_plan(4, 1, max_epochs=10, batch_size=1), max_steps=6))
    assert len(result.losses) == 6
    assert result.best_epoch == 2, "what was learned is validated"


def test_on_step_is_told_each_step_and_can_end_the_run(make_plan: Callable[..., TrainingJob]) -> None:
    class StopError(Exception):
        pass

    steps = []

    def on_step(step: int) -> None:
        steps.append(step)
        if step == 3:
            raise StopError

    with pytest.raises(StopError):
        run_training(make_plan(2, max_epochs=9), on_step)
    assert steps == [1, 2, 3]


class _Spoiling(nn.Module):
    """A loss whose value or gradient is not finite on some steps."""

    def __init__(self, loss: nn.Module, bad_steps: set[int], spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.loss, self.bad_steps, self.spoil, self.step = loss, bad_steps, spoil, 0

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.step += 1
        loss = self.loss(logits, label)
        if self.step not in self.bad_steps:
            return loss
        return loss + self.spoil(logits)


def _nan_loss(logits: torch.Tensor) -> torch.Tensor:
    return (logits * math.nan).sum()


def _infinite_gradient(logits: torch.Tensor) -> torch.Tensor:
    """0 with an infinite slope."""
    return (logits - logits.detach()).abs().sqrt().sum()


@pytest.mark.parametrize("spoil", [_nan_loss, _infinite_gradient])
def test_step_without_finite_gradients_changes_nothing_and_the_run_goes_on(
    make_plan: Callable[..., TrainingJob], spoil: Any
) -> None:
    functions = RunFunctions(build_loss=lambda recipe: _Spoiling(build_loss(recipe), {2, 5}, spoil))
    result = run_training(make_plan(2, max_epochs=4), functions=functions)
    assert len(result.losses) == 8
    assert all(torch.isfinite(value).all() for value in result.weights.values())
    assert math.isnan(result.losses[1]) == (spoil is _nan_loss)
    assert math.isfinite(result.losses[-1])


def test_run_whose_gradients_stay_infinite_ends_with_advice(make_plan: Callable[..., TrainingJob]) -> None:
    functions = RunFunctions(build_loss=lambda recipe: _Spoiling(build_loss(recipe), set(range(99)), _nan_loss))
    with pytest.raises(TrainingError, match=r"not finite for 20 steps; lower learning_rate \(0.0001\)"):
        run_training(make_plan(5, max_epochs=50), functions=functions)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(make_plan: Callable[..., TrainingJob], precision: str) -> None:
    result = run_training(make_plan(2, 1, max_epochs=6, learning_rate=5e-3, precision=precision))
    assert all(math.isfinite(loss) for loss in result.losses)
    assert result.losses[-1] < result.losses[0] - 0.05
    assert {value.dtype for value in result.weights.values()} == {torch.float32}


def test_batch_norm_trains_and_its_counters_are_averaged_along(make_plan: Callable[..., TrainingJob]) -> None:
    result = run_training(make_plan(2, 0, max_epochs=2, network={"norm_name": "batch"}))
    counters = [int(value) for key, value in result.weights.items() if key.endswith("num_batches_tracked")]
    assert counters
    assert set(counters) == {4}


@pytest.mark.parametrize("dataset", ["CacheDataset", "SmartCacheDataset", "Dataset"])
@pytest.mark.parametrize("dataloader", ["DataLoader", "ThreadDataLoader"])
def test_every_dataset_and_loader_trains(make_plan: Callable[..., TrainingJob], dataset: str, dataloader: str) -> None:
    plan = replace(make_plan(3, 1, max_epochs=2, batch_size=2), dataset=dataset, dataloader=dataloader)
    assert len(run_training(plan).losses) == 4


def test_smart_cache_with_little_memory_sees_new_cases_each_epoch(make_plan: Callable[..., TrainingJob]) -> None:
    """Four cases that are known by the values in their labels."""
    job, needed = measured(replace(make_plan(4, max_epochs=5), dataset="SmartCacheDataset"))
    both = boxes()[1]
    labels = (both, np.where(both == 1, both, 0), np.where(both == 2, both, 0), np.ones_like(both))
    for case, label in zip(job.train_cases, labels, strict=True):
        write_nifti(case.label, label.astype(np.uint8))
    bytes_of_case = 20 * 18 * 16 * (4 + 1)
    room = needed + int(2.5 * bytes_of_case / CACHE_SHARE)
    seen = set[tuple[float, ...]]()

    class Recording(nn.Module):
        """The recipe's loss; the values of each crop's label are kept."""

        def __init__(self, recipe: Training) -> None:
            super().__init__()
            self.loss = build_loss(recipe)

        def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            seen.add(tuple(label.unique().tolist()))
            return self.loss(logits, label)

    memory = MemoryProbe(of_device=lambda _: room, of_host=lambda _: room)
    result = run_training(job, functions=RunFunctions(build_loss=Recording, memory=memory))
    assert len(result.losses) == 10, "two cases an epoch"
    assert seen == {(0.0, 1.0, 2.0), (0.0, 1.0), (0.0, 2.0), (1.0,)}


def test_batch_larger_than_the_data_is_what_there_is(make_plan: Callable[..., TrainingJob]) -> None:
    assert len(run_training(make_plan(2, batch_size=64)).losses) == 1


@pytest.mark.parametrize("dataset", ["PersistentDataset", "CacheDataset"])
@pytest.mark.parametrize("dataloader", ["DataLoader", "ThreadDataLoader"])
def test_unusable_case_ends_the_run_and_names_itself(
    make_plan: Callable[..., TrainingJob], dataset: str, dataloader: str
) -> None:
    plan = replace(make_plan(3), dataset=dataset, dataloader=dataloader)
    write_nifti(plan.train_cases[1].label, boxes()[1][:-1])
    with pytest.raises(LabelError, match=r"^label of 'case_002' has shape \(19, 18, 16\)"):
        run_training(plan)


@pytest.mark.parametrize(
    ("device", "cores", "processes", "threads"),
    [("cpu", 64, 1, 1), ("cuda", 16, 1, 8), ("cuda", 64, 1, 8), ("cuda", 64, 8, 4), ("cuda", 2, 1, 1)],
)
def test_crops_for_a_gpu_are_drawn_by_a_share_of_the_cores(
    device: str, cores: int, processes: int, threads: int
) -> None:
    assert count_loading_threads(torch.device(device), processes, cores) == threads


class _ReadValues(TorchDispatchMode):
    """Numbers that are read from tensors, by their type: each is waited for, where a GPU computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self.read.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_step_reads_no_single_number_of_what_it_computes() -> None:
    """What is read is kept on the host: whether labels are missing, and the average's count with two comparisons."""
    preset, planner = tiny_preset(), StepPlanner()
    network = build_unetr(preset)
    ladder = StepLadder(planner.plan(preset, 2, CPU), planner, preset, network)
    trainer, state = StepTrainer(network, ladder, preset.training, 4, torch.float32), RunState()
    crops = torch.rand(2, 1, *preset.roi_size), torch.zeros(2, 1, *preset.roi_size)
    nothing, before = torch.zeros(2, preset.out_channels, dtype=torch.bool), list[list[torch.dtype]]()
    batch = Batch(*crops, missing=nothing, predicted=nothing)
    trainer.take(state, batch)
    with _ReadValues() as reads:
        loss = trainer.take(state, batch, lambda: before.append(list(reads.read)))
    assert math.isfinite(loss)
    assert before == [[torch.bool]], "the next batch is prepared before anything of the step is waited for"
    assert reads.read.count(torch.bool) == 3 and reads.read.count(torch.int64) == 1 and len(reads.read) == 4


def test_next_batch_is_prepared_once_whenever_that_is_asked_for(make_plan: Callable[..., TrainingJob]) -> None:
    data = TrainingData(make_plan(3, batch_size=1), CPU, 1, 0)

    def draw(early: bool) -> list[torch.Tensor]:
        data.begin_epoch(1, 0)
        images = []
        for batch, prepare in data.batches(CPU):
            for _ in range(2 * early):
                prepare()
            images.append(batch.image)
        return images

    late, early = draw(False), draw(True)
    assert len(late) == 3
    assert all(torch.equal(a, b) for a, b in zip(late, early, strict=True))
    data.close()


def test_plan_without_cases_is_refused() -> None:
    with pytest.raises(TrainingError, match="no labelled case to train on; save at least one label first"):
        TrainingJob(tiny_preset(), (), (), Path("run"), CPU)
