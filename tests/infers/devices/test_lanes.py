"""Lanes with fake devices: who waits, what fails, and what comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.errors import ConfigError, DeviceError, ImageError, MemoryBudgetError
from lib.infers.devices.failures import is_device_error, try_device
from lib.infers.devices.lane import Lane, computing_on, device_in_use, lane_in_use, parse_devices
from lib.infers.devices.lanes import Lanes
from lib.infers.task import UnetrInferTask
from lib.models.weights import WeightsLocator
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from tests.tiny import boxes, tiny_preset, write_nifti

CPU = torch.device("cpu")
BROKEN = RuntimeError(
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"
)


class FakeGpus:
    """Two fake lanes. ``broken`` ones raise, also when they are tried again."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.tried = threading.Semaphore(0)
        self.lanes = Lanes([fake(index) for index in range(2)], self.try_again, retry_seconds=0.01)

    def try_again(self, device: torch.device) -> None:
        self.tried.release()
        if str(device) in self.broken:
            raise BROKEN

    def compute(self, lane: Lane) -> str:
        if lane.name in self.broken:
            raise BROKEN
        return lane.name

    def run(self, compute: Callable[[Lane], str] | None = None, device: torch.device | None = None) -> str:
        return self.lanes.run(self.lanes.work(device), compute or self.compute)

    def wait_until_works(self, name: str) -> None:
        lane = next(lane for lane in self.lanes if lane.name == name)
        deadline = time.monotonic() + 30
        while self.lanes.state(lane).failure is not None:
            assert time.monotonic() < deadline, f"{name} did not come back"
            time.sleep(0.005)


def fake(index: int) -> Lane:
    """A lane of an accelerator that is not there; what is computed on it is computed on the host."""
    return Lane(f"xpu:{index}", torch.device("xpu", index))


@pytest.fixture
def gpus() -> FakeGpus:
    return FakeGpus()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ["cpu"]),
        ("cpu", ["cpu"]),
        ("all", ["cpu"]),
        ("cpu,cpu", ["cpu", "cpu#2"]),
        (" cpu , cpu ", ["cpu", "cpu#2"]),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the best device is another")
def test_devices_are_read(text: str, names: list[str]) -> None:
    lanes = parse_devices(text)
    assert [lane.name for lane in lanes] == names
    assert {lane.device for lane in lanes} == {CPU}


def test_lanes_of_one_cpu_share_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    assert [lane.threads for lane in parse_devices("cpu,cpu,cpu,cpu")] == [2] * 4
    assert [lane.threads for lane in parse_devices("cpu")] == [0], "all there are, whatever they are then"


@pytest.mark.parametrize("text", ["gpu", "cuda:99", "cpu,tpu", ",".join(["cpu"] * 65)])
def test_devices_that_there_are_not_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--conf device"):
        parse_devices(text)


def test_thread_knows_its_lane_only_inside() -> None:
    lane = Lane("cpu#2", CPU)
    assert (lane_in_use(), device_in_use(torch.device("cuda"))) == (None, torch.device("cuda"))
    with computing_on(lane):
        assert (lane_in_use(), device_in_use(torch.device("cuda"))) == (lane, CPU)
    assert lane_in_use() is None


def test_two_threads_compute_at_once_on_two_lanes_and_one_at_a_time_on_each() -> None:
    lanes = Lanes([Lane(name, CPU) for name in ("cpu", "cpu#2")])
    meeting, inside, most = threading.Barrier(2, timeout=30), dict[str, int](), list[int]()

    def compute(lane: Lane) -> str:
        inside[lane.name] = inside.get(lane.name, 0) + 1
        most.append(inside[lane.name])
        meeting.wait()
        inside[lane.name] -= 1
        return lane.name

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: lanes.run(lanes.work(None), compute), range(8)))
    assert (found.count("cpu"), found.count("cpu#2")) == (4, 4), "nobody meets alone"
    assert max(most) == 1


def test_work_inside_of_a_lane_stays_on_it() -> None:
    lanes = Lanes([Lane(name, CPU) for name in ("cpu", "cpu#2")])
    for lane in lanes:
        with computing_on(lane):
            assert lanes.run(lanes.work(None), lambda found: found.name) == lane.name


def test_device_that_is_named_is_kept_to_and_gets_a_lane_where_it_is_not_in_the_pool(gpus: FakeGpus) -> None:
    assert gpus.run(lambda lane: lane.name, torch.device("xpu:1")) == "xpu:1"
    assert gpus.run(lambda lane: lane.name, torch.device("xpu")) in ("xpu:0", "xpu:1")
    assert gpus.run(lambda lane: lane.name, CPU) == "cpu"
    assert {gpus.run(lambda lane: lane.name) for _ in range(4)} <= {"xpu:0", "xpu:1"}, "which nobody named"


def test_error_of_the_work_is_its_own_and_the_lane_goes_on(gpus: FakeGpus) -> None:
    def refuse(lane: Lane) -> str:
        raise ImageError("flat")

    with pytest.raises(ImageError, match="flat"):
        gpus.run(refuse)
    assert gpus.lanes.problems() == []
    assert gpus.run() == "xpu:0"


def test_failing_device_falls_out_and_its_work_goes_on_elsewhere(gpus: FakeGpus) -> None:
    gpus.broken = {"xpu:0"}
    assert [gpus.run() for _ in range(3)] == ["xpu:1"] * 3
    (problem,) = gpus.lanes.problems()
    assert "device xpu:0 failed (CUDA error: an illegal memory access was encountered)" in problem
    assert gpus.lanes.any_works and gpus.lanes.first.name == "xpu:1"


def test_device_that_works_again_comes_back_with_weights_to_be_loaded_anew(gpus: FakeGpus) -> None:
    lane = gpus.lanes.first
    gpus.broken = {"xpu:0"}
    gpus.run()
    assert lane.generation == 1
    assert gpus.tried.acquire(timeout=10), "it is tried without a request"
    gpus.broken = set()
    gpus.wait_until_works("xpu:0")
    assert gpus.lanes.problems() == []
    assert gpus.run() == "xpu:0"
    assert gpus.lanes.state(lane).failures == 1


def test_without_a_device_that_works_requests_are_told_and_so_is_who_waited(gpus: FakeGpus) -> None:
    gpus.broken = {"xpu:0", "xpu:1"}
    with pytest.raises(DeviceError, match=r"no device works: xpu:0 \(CUDA error.*xpu:1 \(CUDA error") as refused:
        gpus.run()
    assert refused.value.retry_after_seconds >= 1
    assert not gpus.lanes.any_works


def test_image_that_breaks_devices_does_not_take_all_of_them() -> None:
    lanes = Lanes([fake(index) for index in range(3)], lambda device: None, retry_seconds=60)

    def poison(lane: Lane) -> str:
        raise BROKEN

    with pytest.raises(DeviceError, match="failed on it, and no other is tried"):
        lanes.run(lanes.work(None), poison)
    assert len(lanes.problems()) == 2
    assert lanes.run(lanes.work(None), lambda lane: lane.name) == "xpu:2"


def test_device_without_memory_falls_out_only_where_another_had_enough(gpus: FakeGpus) -> None:
    def too_large(lane: Lane) -> str:
        raise MemoryBudgetError("it needs 900 GiB")

    with pytest.raises(MemoryBudgetError, match="900"):
        gpus.run(too_large)
    assert gpus.lanes.problems() == [], "it fits nowhere, and that is the image's"

    def full(lane: Lane) -> str:
        if lane.name == "xpu:0":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lane.name

    assert gpus.run(full) == "xpu:1"
    (problem,) = gpus.lanes.problems()
    assert "device xpu:0 failed (memory ran out" in problem


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (BROKEN, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ImageError("CUDA error in a file's name"), False),
    ],
)
def test_errors_of_devices_are_told_from_those_of_the_work(error: Exception, device: bool) -> None:
    assert is_device_error(error) is device


def test_watchers_hear_which_devices_somebody_uses(gpus: FakeGpus) -> None:
    heard: list[set[str]] = []
    gpus.lanes.watch(lambda devices: heard.append(set(devices)))
    gpus.run(device=torch.device("xpu:1"))
    ahead = gpus.lanes.work(None, ahead=True)
    gpus.lanes.enter(ahead)
    gpus.lanes.leave(ahead)
    assert heard == [{"xpu:1"}, set()], "what is done ahead does not count"


def test_work_of_other_processes_goes_to_the_last_device_with_least_to_do(gpus: FakeGpus) -> None:
    assert str(gpus.lanes.quietest("xpu")) == "xpu:1"
    gpus.lanes.occupy(frozenset({"xpu:1"}))
    assert str(gpus.lanes.quietest("xpu")) == "xpu:0"
    assert gpus.run() == "xpu:0", "and requests to the one without it"


@pytest.mark.gpu
def test_every_gpu_computes_and_gives_the_same_mask(tmp_path: Path) -> None:
    preset, image = tiny_preset(), write_nifti(tmp_path / "scan.nii.gz", boxes()[0])
    torch.manual_seed(0)
    write_checkpoint(tmp_path / "shipped.pt", Checkpoint(dict(build_unetr(preset).state_dict()), preset))
    lanes = Lanes.of("all")
    task = UnetrInferTask(preset, WeightsLocator(tmp_path), lanes=lanes)
    names = [lane.name for lane in lanes]
    assert names == [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    masks = [task.mask_of(task.parse({"image": str(image), "device": name})) for name in names]
    assert [mask.payload["plan"]["device"] for mask in masks] == names
    assert all(np.array_equal(mask.labels, masks[0].labels) for mask in masks)
    assert [lanes.state(lane).done for lane in lanes] == [1] * len(names)


@pytest.mark.gpu
def test_device_that_works_is_tried_without_an_error() -> None:
    for index in range(torch.cuda.device_count()):
        try_device(torch.device("cuda", index))
