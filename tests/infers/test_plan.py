"""Plans fit into what there is, say what they take, and shrink when memory runs out all the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lib.configs.preset import Preset
from lib.errors import MemoryBudgetError
from lib.infers.costs import CostBook, WindowCost, cost_key
from lib.infers.memory import GIB, MIB, MemoryProbe
from lib.infers.plan import Plan, Planner
from lib.infers.segmenter import Segmenter
from lib.networks.inference import InferenceNetwork
from lib.networks.placement import Placement
from lib.networks.unetr import build_unetr
from lib.transforms.preprocess import network_shape, preprocess_volume
from lib.transforms.volume import Volume
from tests.forks import run_code
from tests.tiny import axis_affine, boxes, oblique_affine, tiny_preset

WIDE_NETWORK = {"feature_size": 16, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
CPU, FP32 = torch.device("cpu"), torch.float32


class Never(nn.Module):
    """A network whose costs are known already."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        raise AssertionError


def _volume(*shape: int, spacing_mm: tuple[float, float, float] = (1, 1, 1)) -> Volume:
    """A volume that takes no memory."""
    return Volume(np.broadcast_to(np.float32(0), shape), axis_affine("LPS", spacing_mm))


def _one_mib(*_: object) -> WindowCost:
    """The cost of any batch, instead of a measurement."""
    return WindowCost(MIB, 1.0)


def _plan(
    volume: Volume,
    free: int,
    preset: Preset | None = None,
    costs: dict[int, WindowCost] | None = None,
    book: CostBook | None = None,
) -> Plan:
    preset, book = preset or tiny_preset(), book or CostBook()
    for batch, cost in (costs or {1: WindowCost(MIB, 1.0)}).items():
        book.keep(cost_key(Placement(preset, CPU, FP32)), batch, cost)
    planner = Planner(None, book, memory=MemoryProbe(of_host=lambda budget: free))
    return planner.plan(Never(), Placement(preset, CPU, FP32), volume, name="scan")


@pytest.mark.parametrize("axcodes", ["RAS", "LPI", "SAR"])
@pytest.mark.parametrize("shape", [(20, 18, 17), (40, 5, 33)])
def test_network_shape_is_known_before_preprocessing(shape: tuple[int, int, int], axcodes: str) -> None:
    preset = tiny_preset(spacing_mm=[1.1, 1.0, 0.8])
    image = np.random.default_rng(0).random(shape).astype(np.float32)
    for affine in (oblique_affine(axcodes, (0.7, 1.3, 2.1)), axis_affine(axcodes, (1.1, 1.1, 0.8))):
        expected = tuple(preprocess_volume(Volume(image, affine), preset).shape[1:])
        assert network_shape(shape, affine, preset) == expected


def test_plan_takes_the_batch_whose_windows_are_fastest() -> None:
    preset = tiny_preset(inference={"window_batch_size": 4})
    costs = {1: WindowCost(MIB, 1.0), 2: WindowCost(2 * MIB, 1.5), 4: WindowCost(4 * MIB, 4.4)}
    found = _plan(_volume(64, 64, 64), GIB, preset, costs)
    assert (found.stitching.window_batch, found.stitching.bands) == (2, 1)
    assert found.windows == 5**3
    assert found.seconds == pytest.approx(5**3 / 2 * 1.5)
    assert found.fits


def test_plan_cuts_into_bands_only_where_a_slab_does_not_fit() -> None:
    volume = _volume(200, 200, 200)
    labels = [{"index": number, "name": f"label {number}"} for number in range(1, 61)]
    preset = tiny_preset(roi_size=[64, 16, 16], labels=labels)
    whole = _plan(volume, 10 * GIB, preset)
    assert whole.stitching.bands == 1
    tight = _plan(volume, whole.host_bytes - 1, preset)
    assert tight.stitching.bands > 1
    assert tight.host_bytes < whole.host_bytes
    assert tight.windows > whole.windows


def test_image_that_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(MemoryBudgetError, match=r"'scan' \(512x512x1500 voxels, .*needs \d+\.\d\d GiB.*are 1\.00 GiB"):
        _plan(_volume(512, 512, 1500), GIB)


def test_plan_explains_itself_in_one_line_and_as_json() -> None:
    found = _plan(_volume(64, 64, 64), GIB)
    text = found.explain()
    assert "\n" not in text
    assert "125 windows on cpu in float32 by pytorch, 1 at a time; stitched slab by slab on the host, 0.0" in text
    data = json.loads(json.dumps(found.as_json()))
    assert (data["window_batch"], data["bands"], data["text"]) == (1, 1, text)


def test_costs_are_measured_once(tmp_path: Path) -> None:
    calls = []

    class Counting(nn.Module):
        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            calls.append(len(windows))
            return torch.zeros(len(windows), 3, *windows.shape[2:])

    preset, volume = tiny_preset(inference={"window_batch_size": 2}), _volume(20, 20, 20)
    for _ in range(2):
        planner = Planner(None, CostBook(tmp_path / "costs.json"))
        planner.plan(Counting(), Placement(preset, CPU, FP32), volume)
        assert calls == [2, 2, 1, 1]


PROMISE = """
import numpy as np, torch
from lib.infers.memory import PeakMemory, release_memory
from lib.infers.segmenter import Segmenter
from lib.networks.unetr import build_unetr
from lib.transforms.volume import Volume
from tests.tiny import tiny_preset
torch.set_num_threads(1)
preset = tiny_preset(roi_size=[64, 64, 64], network={"feature_size": 16, "hidden_size": 48, "num_heads": 4})
segmenter = Segmenter(build_unetr(preset), preset, torch.device("cpu"), "fp32")
volume = Volume(np.random.default_rng(0).random((80, 70, 64)).astype(np.float32), np.eye(4))
promised = segmenter.plan(volume)
release_memory(torch.device("cpu"))
with PeakMemory(torch.device("cpu")) as peak:
    segmenter.segment(volume)
print(peak.bytes / promised.host_bytes)
"""


def test_plan_holds_what_it_promises(tmp_path: Path) -> None:
    """A window larger than all else: the peak of a real run lies below the plan's, and not far.

    In a process of its own, which gives back what planning took: memory in hand is taken without asking for it.
    """
    assert 0.4 < float(run_code(PROMISE, tmp_path).split()[-1]) < 1.3


MEASURED_TWICE = """
import torch
from lib.infers.costs import measure_windows
from lib.networks.placement import Placement
from lib.networks.unetr import build_unetr
from tests.tiny import tiny_preset
torch.set_num_threads(1)
preset = tiny_preset(roi_size=[64, 64, 64], network={"feature_size": 16, "hidden_size": 48, "num_heads": 4})
network, device = build_unetr(preset), torch.device("cpu")
first, second = (measure_windows(network, Placement(preset, device, torch.float32), 1).bytes for _ in range(2))
print(second / first)
"""


def test_window_is_measured_as_large_in_a_process_that_has_computed_before(tmp_path: Path) -> None:
    assert float(run_code(MEASURED_TWICE, tmp_path).split()[-1]) > 0.5


# ---------------------------------------------------------------------------------------------- the ladder


class Hungry(nn.Module):
    """Runs out of memory for batches of more than one, and so many more times."""

    def __init__(self, error: Callable[[], Exception], failures: int = 0) -> None:
        super().__init__()
        self.error, self.failures, self.measured = error, failures, 0

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        if self.measured < 4:  # the planner measures two batches, each twice
            self.measured += 1
        elif len(windows) > 1 or self.failures > 0:
            self.failures -= len(windows) == 1
            raise self.error()
        return -(windows - torch.arange(3).reshape(1, 3, 1, 1, 1)).abs()


ERRORS = [MemoryError, lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError]


@pytest.mark.parametrize("error", ERRORS)
def test_request_succeeds_with_less_at_once_and_says_so(
    error: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    preset = tiny_preset(intensity={"kind": "window", "lower": 0, "upper": 1}, inference={"window_batch_size": 2})
    image = np.random.default_rng(0).integers(0, 2, (40, 20, 18)).astype(np.float32)
    # twice as fast a window: the plan begins with two at a time
    planner = Planner(measure=_one_mib)
    network = Hungry(error, failures=2)
    network.measured = 4
    segmenter = Segmenter(network, preset, CPU, "fp32", planner)
    found = segmenter.segment(Volume(image, np.eye(4)), name="scan")
    np.testing.assert_array_equal(found.labels, image)
    assert found.plan.fallbacks == ("a batch of 2 windows", "1 band a slab", "2 bands a slab")
    assert "memory ran out on scan; gave up a batch of 2 windows" in caplog.text
    again = segmenter.plan(Volume(image, np.eye(4)))
    assert (again.stitching.window_batch, again.stitching.bands, again.fallbacks) == (1, 4, ())


def test_request_that_fits_in_no_way_is_refused() -> None:
    network = Hungry(MemoryError, failures=100)
    network.measured = 4
    segmenter = Segmenter(network, tiny_preset(), CPU, "fp32", Planner(measure=_one_mib))
    with pytest.raises(MemoryBudgetError, match="'scan', however little was done at once"):
        segmenter.segment(Volume(boxes()[0], np.eye(4)), name="scan")


def test_other_errors_of_a_network_are_not_swallowed() -> None:
    segmenter = Segmenter(Hungry(lambda: RuntimeError("shapes"), failures=1), tiny_preset(), CPU, "fp32")
    segmenter.network.measured = 2
    with pytest.raises(RuntimeError, match="shapes"):
        segmenter.segment(Volume(boxes()[0], np.eye(4)))


LIMITED = """
import resource, sys
import numpy as np, torch
from torch import nn
from lib.infers.costs import WindowCost
from lib.infers.plan import Planner
from lib.infers.segmenter import Segmenter
from lib.transforms.volume import Volume
from tests.tiny import tiny_preset

class Large(nn.Module):
    def forward(self, windows):
        torch.ones(len(windows) * 2**26)  # 256 MiB a window
        return -(windows - torch.arange(3).reshape(1, 3, 1, 1, 1)).abs()

torch.set_num_threads(1)
planner = Planner(measure=lambda *_: WindowCost(2**20, 1.0))
preset = tiny_preset(intensity={"kind": "window", "lower": 0, "upper": 1}, inference={"window_batch_size": 4})
image = np.random.default_rng(0).integers(0, 2, (40, 20, 18)).astype(np.float32)
segmenter = Segmenter(Large(), preset, torch.device("cpu"), "fp32", planner)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 400 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = segmenter.segment(Volume(image, np.eye(4)))
assert (found.labels == image).all()
print(found.plan.stitching.window_batch, *found.plan.fallbacks, sep="|")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_request_succeeds_under_a_real_limit_of_the_process(tmp_path: Path) -> None:
    """A network that takes 256 MiB for each window, in a process that may take 400 more."""
    printed = run_code(LIMITED, tmp_path).splitlines()
    assert printed[-1] == "1|a batch of 4 windows|a batch of 2 windows"


def test_image_stays_on_a_gpu_that_has_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of 1 MiB a window: 20 MB of voxels, with what preprocessing takes beside them."""
    device, preset, volume = torch.device("cuda"), tiny_preset(), _volume(200, 200, 125)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    book = CostBook()
    for batch in (1, 2, 4, 8):
        book.keep(cost_key(Placement(preset, device, FP32)), batch, WindowCost(batch * MIB, 1.0))
    plans = []
    for free in (100 * MIB, 60 * MIB, 2 * MIB):
        memory = MemoryProbe(of_device=lambda _, free=free: free, of_host=lambda budget: GIB)
        plans.append(Planner(None, book, memory=memory).plan(Never(), Placement(preset, device, FP32), volume))
    assert [(plan.image_on_device, plan.stitching.on_device) for plan in plans] == [
        (True, True),
        (False, True),
        (False, False),
    ]
    assert plans[0].device_bytes == 4 * 4 * 200 * 200 * 125, "preprocessing is the peak"
    assert "GiB on it with the image" in plans[0].explain()
    one_by_one = replace(plans[0], stitching=replace(plans[0].stitching, window_batch=1))
    fallbacks = Planner(None, book).next_fallback(one_by_one, Placement(preset, device, FP32))
    assert fallbacks is not None and not fallbacks.image_on_device and fallbacks.fallbacks == ("the image on cuda",)


class OnDevice(Planner):
    """Plans to keep every image where it is computed, as on a GPU with room for it."""

    def plan(self, *arguments: Any, **options: Any) -> Plan:
        return replace(super().plan(*arguments, **options), image_on_device=True)


def test_image_that_does_not_fit_on_the_gpu_after_all_is_preprocessed_on_the_host() -> None:
    preset, where = tiny_preset(), list[torch.device | None]()

    def full(volume: Volume, preset: Preset, device: torch.device | None = None) -> torch.Tensor:
        where.append(device)
        if device is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return preprocess_volume(volume, preset)

    network = InferenceNetwork(build_unetr(preset), CPU, FP32)
    segmenter = Segmenter(network, preset, CPU, "fp32", OnDevice(), full)
    found = segmenter.segment(Volume(boxes()[0], np.eye(4)))
    assert where == [CPU, None]
    assert found.plan.fallbacks == ("preprocessing on cpu",)


# ------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_ladder_on_a_gpu_that_is_full_ends_in_the_same_labels(limit_gpu: Callable[[int], None]) -> None:
    """Memory really runs out: the card's free memory is there to see, and is refused when it is asked for."""
    device = torch.device("cuda")
    preset = tiny_preset(roi_size=[64, 64, 64], network=WIDE_NETWORK, inference={"window_batch_size": 1})
    torch.manual_seed(0)
    segmenter = Segmenter(InferenceNetwork(build_unetr(preset), device, FP32), preset, device, "fp32")
    volume = Volume(boxes((150, 140, 130))[0], np.eye(4))
    planned = segmenter.plan(volume).stitching.window_batch
    assert planned > 1
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    expected = segmenter.segment(volume)
    assert not expected.plan.fallbacks
    taken = torch.cuda.max_memory_allocated() - before
    limit_gpu(int(0.6 * taken))
    found = segmenter.segment(volume)
    assert found.plan.fallbacks[0] == f"a batch of {planned} windows"
    assert found.plan.device == "cuda"
    assert (found.labels == expected.labels).mean() > 0.999
    again = segmenter.segment(volume).plan  # the next plan remembers
    assert not again.fallbacks
    assert again.stitching.window_batch == found.plan.stitching.window_batch


@pytest.mark.gpu
def test_plan_on_a_gpu_stitches_there_and_the_ladder_ends_on_the_cpu() -> None:
    preset, device = tiny_preset(inference={"window_batch_size": 2}), torch.device("cuda")
    torch.manual_seed(0)
    state = build_unetr(preset).state_dict()

    def build(where: torch.device) -> Segmenter:
        network = build_unetr(preset)
        network.load_state_dict(state)
        return Segmenter(InferenceNetwork(network, where, FP32), preset, where, "fp32")

    volume = Volume(boxes((60, 50, 40))[0], oblique_affine())
    expected = build(CPU).segment(volume).labels
    on_gpu = build(device)
    found = on_gpu.segment(volume, entropy=True)
    assert found.plan.stitching.on_device
    assert (found.labels == expected).mean() > 0.999
    plan: Plan | None = found.plan
    while plan is not None:
        last, plan = plan, on_gpu.planner.next_fallback(plan, Placement(preset, device, FP32))
    assert on_gpu._smaller(last, "scan").device == "cpu"
    assert on_gpu.device == CPU
    again = on_gpu.segment(volume)  # comes back
    assert again.plan.device == "cuda"
    assert not again.plan.stitching.on_device
    assert (again.labels == expected).mean() > 0.999
