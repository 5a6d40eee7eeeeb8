"""One process or several: the same plan, the same weights on every rank."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib.cases.labelled import Case
from lib.errors import ParameterError, TrainingError
from lib.networks.checkpoint import read_checkpoint
from lib.networks.unetr import build_unetr
from lib.trainers.launch import launch, launch_processes
from lib.trainers.loop import BEST_FILE, run_training
from lib.trainers.run.job import TrainingJob, TrainingResult
from tests.tiny import QUIET_AUGMENTATION, boxes, tiny_preset, write_nifti

MakeCases = Callable[..., tuple[Case, ...]]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RESULT = TrainingResult({}, 1, {}, (0.5,))


@pytest.fixture
def plan(make_cases: MakeCases, tmp_path: Path) -> TrainingJob:
    recipe = {"max_epochs": 4, "learning_rate": 4e-3, "precision": "fp32", "augmentation": QUIET_AUGMENTATION}
    cases = make_cases(5)
    return TrainingJob(tiny_preset(training=recipe), cases[:4], cases[4:], tmp_path / "run", CPU)


class Launches:
    """Devices of each launch; nothing is trained."""

    def __init__(self) -> None:
        self.devices: list[list[str]] = []

    def train(self, plan: TrainingJob) -> TrainingResult:
        return self.train_together(plan, [plan.device])

    def train_together(self, plan: TrainingJob, devices: list[torch.device]) -> TrainingResult:
        self.devices.append([str(device) for device in devices])
        return RESULT


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Launches on a machine with three GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    return Launches()


@pytest.mark.parametrize(
    ("device", "multi_gpu", "gpus", "expected"),
    [
        (CPU, True, "all", ["cpu"]),
        (CUDA, False, "all", ["cuda"]),
        (CUDA, True, "all", ["cuda:0", "cuda:1", "cuda:2"]),
        (CUDA, True, "0, 2", ["cuda:0", "cuda:2"]),
        (CUDA, True, "1", ["cuda:1"]),
    ],
)
def test_launch_uses_the_gpus_that_it_may(
    plan: TrainingJob, launches: Launches, device: torch.device, multi_gpu: bool, gpus: str, expected: list[str]
) -> None:
    job = replace(plan, device=device)
    assert launch(job, multi_gpu, gpus, launches.train, launches.train_together) is RESULT
    assert launches.devices == [expected]


@pytest.mark.parametrize("gpus", ["3", "0,x", "-1", ",", ""])
def test_launch_on_a_gpu_that_is_not_there_is_refused(plan: TrainingJob, launches: Launches, gpus: str) -> None:
    with pytest.raises(ParameterError, match=r"'gpus' is .*; valid: all, or indices from 0 to 2"):
        launch(replace(plan, device=CUDA), True, gpus, launches.train, launches.train_together)
    assert not launches.devices


@pytest.fixture(scope="module", autouse=True)
def _imported_once() -> None:
    """Processes are forks of one that has imported what they need, which takes longer than what they do here."""
    multiprocessing.set_forkserver_preload(["lib.trainers.launch"])


def test_two_processes_follow_the_curve_of_one_with_the_same_global_batch(plan: TrainingJob) -> None:
    several = launch_processes(plan, [CPU, CPU], "forkserver")
    recipe = plan.preset.training.model_copy(update={"batch_size": 2})
    alone = run_training(replace(plan, preset=plan.preset.model_copy(update={"training": recipe}),
                                 run_dir=plan.run_dir / "alone"))  # fmt: skip
    assert len(several.losses) == 4 * 2
    # AdamW moves a weight whose gradient is about zero by the learning rate, up or down by the last bit of a sum. Each
    # bound is about three times what that came to on a CPU in fp32; without averaged gradients the losses were up to
    # 0.0037 apart at the second step, 0.010 at the fourth, and the weights 0.0069.
    assert several.losses[0] == pytest.approx(alone.losses[0], abs=1e-5)
    assert several.losses[:4] == pytest.approx(alone.losses[:4], abs=5e-4)
    assert several.losses == pytest.approx(alone.losses, abs=4e-3)
    assert several.losses[-1] < several.losses[0] - 0.05
    assert several.dice == pytest.approx(alone.dice, abs=2e-2)
    apart = torch.cat([(several.weights[key] - alone.weights[key]).abs().flatten() for key in alone.weights])
    assert apart.mean() < 2.5e-3
    torch.testing.assert_close(read_checkpoint(plan.run_dir / BEST_FILE).model, several.weights, rtol=0, atol=0)
    assert not any(key.startswith("module.") for key in several.weights)


def test_two_processes_learn_from_a_teacher_as_one_does(plan: TrainingJob) -> None:
    """One of them has crops of which a model has drawn something, and the other, in some steps, has not."""
    torch.manual_seed(7)
    teacher = build_unetr(plan.preset).state_dict()
    first, second, *others = plan.train_cases
    cases = (replace(first, predicted=(1, 2)), replace(second, predicted=(2,)), *others)
    taught = replace(plan, train_cases=cases, teacher=teacher, validation_cases=())
    several = launch_processes(taught, [CPU, CPU], "forkserver")
    recipe = plan.preset.training.model_copy(update={"batch_size": 2})
    whole = plan.preset.model_copy(update={"training": recipe})
    alone = run_training(replace(taught, preset=whole, run_dir=plan.run_dir / "alone"))
    untaught = run_training(replace(plan, preset=whole, validation_cases=(), run_dir=plan.run_dir / "untaught"))
    # the bounds of the test above
    assert several.losses[0] == pytest.approx(alone.losses[0], abs=1e-5)
    assert several.losses[:4] == pytest.approx(alone.losses[:4], abs=5e-4)
    assert several.losses == pytest.approx(alone.losses, abs=4e-3)
    apart = [abs(a - b) for a, b in zip(alone.losses, untaught.losses, strict=True)]
    assert max(apart) > 0.02, "the teacher matters more than the bounds"


def test_process_that_fails_ends_the_others_and_says_why(plan: TrainingJob) -> None:
    write_nifti(plan.train_cases[2].label, boxes()[1][:-1])
    with pytest.raises(TrainingError, match=r"training in 2 processes failed: .*label of 'case_003' has shape"):
        launch_processes(plan, [CPU, CPU], "forkserver")


class Tries:
    """Device and checkpointing of each try; none finds enough memory on a GPU."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def train(self, plan: TrainingJob) -> TrainingResult:
        recomputed = plan.preset.training.activation_checkpointing
        self.seen.append(f"{plan.device}{' recomputed' * recomputed}{' resumed' * plan.resume}")
        if plan.device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return RESULT

    def train_together(self, plan: TrainingJob, devices: list[torch.device]) -> TrainingResult:
        return self.train(plan)


def test_run_that_is_out_of_memory_on_a_gpu_goes_on_on_the_cpu(plan: TrainingJob) -> None:
    tries = Tries()
    assert launch(replace(plan, device=CUDA), train=tries.train) is RESULT
    assert tries.seen == ["cuda", "cpu resumed"]


def test_processes_that_are_out_of_memory_shrink_together_first(
    plan: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    tries, job = Tries(), replace(plan, device=CUDA)
    assert launch(job, True, train=tries.train, train_together=tries.train_together) is RESULT
    assert tries.seen == ["cuda", "cuda recomputed resumed", "cpu recomputed resumed"]


def test_run_that_stays_out_of_memory_ends_with_advice(plan: TrainingJob) -> None:
    def train(_: TrainingJob) -> TrainingResult:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with pytest.raises(TrainingError, match=r"out of memory on cpu .*; lower train_batch_size \(1\) or crops_per_case"):
        launch(plan, train=train)


def test_other_errors_are_not_taken_for_memory(plan: TrainingJob) -> None:
    def train(_: TrainingJob) -> TrainingResult:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        launch(plan, train=train)
