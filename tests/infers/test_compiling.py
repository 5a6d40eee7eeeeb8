"""OpenVINO takes over where it says the same in less time, and nowhere else."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from lib.configs.settings import Settings
from lib.infers.compiling import Compiler, compile_if_faster
from lib.infers.costs import CostBook, WindowCost, cost_key
from lib.infers.devices.lanes import Lanes
from lib.infers.memory import MIB, MemoryProbe
from lib.infers.model_cache import ModelCache
from lib.infers.plan import Planner
from lib.infers.segmenter import Segmenter
from lib.infers.task import UnetrInferTask
from lib.models.weights import WeightsLocator
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.compiled import CompiledForward, has_openvino
from lib.networks.inference import InferenceNetwork
from lib.networks.placement import Placement
from lib.networks.unetr import build_unetr
from lib.transforms.volume import Volume
from tests.tiny import axis_affine, boxes, tiny_preset

CPU, FP32 = torch.device("cpu"), torch.float32
needs_openvino = pytest.mark.skipif(not has_openvino(), reason="there is no OpenVINO for this machine")


class Clock:
    """Seconds that windows take, and that nobody has to wait for."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


class Instead:
    """In OpenVINO's place: the network itself, without what makes it slow, and what is added to its logits."""

    def __init__(self, network: nn.Module, added: float, seconds: float, error: Exception | None = None) -> None:
        self._network, self._added, self._seconds, self._error = network, added, seconds, error

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        if self._error is not None:
            raise self._error
        CLOCK.advance(self._seconds)
        logits: torch.Tensor = self._network.forward(windows)
        return logits + self._added * torch.arange(logits.shape[1])[:, None, None, None]

    def release_memory(self) -> None:
        pass


def _book() -> CostBook:
    """Seconds of a window, as if measured before."""
    book = CostBook()
    for engine, seconds in (("pytorch", 2.0), ("openvino", 1.0)):
        for batch in (1, 2, 4):
            book.keep(cost_key(Placement(tiny_preset(), CPU, FP32), engine), batch, WindowCost(MIB, seconds))
    return book


class CountingBook(CostBook):
    """Counts what is measured."""

    kept = 0

    def keep(self, key: str, batch: int, cost: WindowCost) -> None:
        self.kept += 1
        super().keep(key, batch, cost)


def _segmenter(pytorch: float = 0.5) -> Segmenter:
    """One whose windows PyTorch takes so many seconds for."""
    torch.manual_seed(0)
    network = InferenceNetwork(build_unetr(tiny_preset()), CPU, FP32)
    network.network.register_forward_pre_hook(lambda *_: CLOCK.advance(pytorch))
    return Segmenter(network, tiny_preset(), CPU, "fp32", Planner(None, _book()))


def _instead(
    added: float = 0.0, seconds: float = 0.0, error: Exception | None = None, memory: MemoryProbe | None = None
) -> Compiler:
    """A compiler that makes :class:`Instead`; what does not use OpenVINO itself is tested without it too."""
    made = partial(Instead, added=added, seconds=seconds, error=error)
    return Compiler(lambda: True, lambda own, shape: made(own.network), memory or MemoryProbe(), CLOCK)


def _engine(segmenter: Segmenter) -> str:
    assert isinstance(segmenter.network, InferenceNetwork)
    return segmenter.network.engine


@needs_openvino
def test_compiled_network_segments_the_same_and_says_who_computed() -> None:
    segmenter, volume = _segmenter(), Volume(boxes()[0], axis_affine("LPS", (1, 1, 1)))
    before = segmenter.segment(volume)
    compile_if_faster(segmenter, threading.Lock(), Compiler(clock=CLOCK))
    after = segmenter.segment(volume)
    assert before.plan.engine == "pytorch" and before.plan.seconds == pytest.approx(2.0 * before.plan.windows)
    assert after.plan.engine == "openvino" and after.plan.seconds == pytest.approx(1.0 * after.plan.windows)
    assert (
        after.plan.as_json()["engine"] == "openvino" and "in float32 by openvino, 1 at a time" in after.plan.explain()
    )
    assert len(np.unique(before.labels)) > 1
    np.testing.assert_array_equal(after.labels, before.labels)


def test_cost_of_a_window_is_measured_before_the_next_request() -> None:
    segmenter, key = _segmenter(), cost_key(Placement(tiny_preset(), CPU, FP32), "openvino")
    book = CountingBook()
    segmenter.planner = Planner(None, book)
    compile_if_faster(segmenter, threading.Lock(), _instead())
    assert book.cost(key, 1) is not None
    measured = book.kept
    assert segmenter.plan(Volume(boxes()[0], np.eye(4))).engine == "openvino"
    assert book.kept == measured > 0, "nothing is measured again"


@pytest.mark.parametrize(
    ("pytorch", "openvino", "added", "expected"),
    [
        (0.5, 0.0, 0.0, "openvino"),
        (0.0, 0.5, 0.0, "pytorch"),
        (0.5, 0.48, 0.0, "pytorch"),
        (0.5, 0.0, 1e-6, "openvino"),
        (0.5, 0.0, 0.01, "pytorch"),
        (0.5, 0.0, float("nan"), "pytorch"),
    ],
)
def test_it_takes_over_where_it_is_clearly_faster_and_says_the_same(
    pytorch: float, openvino: float, added: float, expected: str
) -> None:
    segmenter = _segmenter(pytorch)
    compile_if_faster(segmenter, threading.Lock(), _instead(added, openvino))
    assert _engine(segmenter) == expected


def test_network_that_cannot_be_compiled_stays_as_it_is_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(network: InferenceNetwork, shape: object) -> CompiledForward:
        raise TypeError("no rule for aten::fold")

    segmenter = _segmenter()
    compile_if_faster(segmenter, threading.Lock(), Compiler(lambda: True, refuse))
    assert _engine(segmenter) == "pytorch"
    assert "tiny stays with PyTorch: OpenVINO cannot compute it" in caplog.text and "aten::fold" in caplog.text


def test_network_that_fails_once_it_is_compiled_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    segmenter, computing = _segmenter(), threading.Lock()
    compile_if_faster(segmenter, computing, _instead(error=RuntimeError("could not create a primitive")))
    assert _engine(segmenter) == "pytorch" and not computing.locked()
    assert "could not create a primitive" in caplog.text
    assert segmenter.segment(Volume(boxes()[0], np.eye(4))).plan.engine == "pytorch"


def test_memory_that_requests_need_is_not_spent_on_it(caplog: pytest.LogCaptureFixture) -> None:
    """Three times the weights may be a quarter of what is left, and no more."""
    caplog.set_level(logging.INFO, "unetr.plan")
    segmenter = _segmenter()
    weights = sum(parameter.nbytes for parameter in segmenter.network.parameters())
    too_little, enough = MemoryProbe(of_host=lambda _: 12 * weights - 1), MemoryProbe(of_host=lambda _: 12 * weights)
    compile_if_faster(segmenter, threading.Lock(), _instead(memory=too_little))
    assert _engine(segmenter) == "pytorch" and "are too few for OpenVINO" in caplog.text
    compile_if_faster(segmenter, threading.Lock(), _instead(memory=enough))
    assert _engine(segmenter) == "openvino"


def test_requests_are_answered_while_it_compiles_and_none_while_it_compares() -> None:
    computing, seen = threading.Lock(), list[tuple[str, bool]]()

    def compile_network(own: InferenceNetwork, shape: object) -> CompiledForward:
        seen.append(("compile", computing.locked()))
        return Instead(own.network, 0.0, 0.0)

    def look(network: nn.Module, inputs: object) -> None:
        seen.append(("window", computing.locked()))

    segmenter = _segmenter()
    segmenter.network.register_forward_pre_hook(look)
    compile_if_faster(segmenter, computing, Compiler(lambda: True, compile_network, clock=CLOCK))
    assert seen == [*[("window", True)] * 3, ("compile", False), *[("window", True)] * 3]
    assert not computing.locked()


@pytest.mark.parametrize("why", ["no OpenVINO", "a GPU", "another kind of network"])
def test_where_it_has_no_place_nothing_is_tried(why: str) -> None:
    compiler = Compiler(lambda: why != "no OpenVINO", lambda own, shape: pytest.fail("compiled"))
    segmenter = _segmenter()
    if why == "a GPU":
        segmenter.device = torch.device("cuda")
    if why == "another kind of network":
        segmenter.network = build_unetr(tiny_preset())
    compile_if_faster(segmenter, threading.Lock(), compiler)


def _weights(folder: Path, seed: int) -> WeightsLocator:
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    write_checkpoint(folder / "shipped.pt", Checkpoint(dict(build_unetr(tiny_preset()).state_dict()), tiny_preset()))
    return WeightsLocator(folder)


@needs_openvino
def test_task_answers_at_once_and_later_with_what_was_compiled(tmp_path: Path) -> None:
    image = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(boxes()[0], axis_affine("LPS", (1, 1, 1))), image)
    planner = Planner(book=_book())
    lanes = Lanes.of("cpu")
    task = UnetrInferTask(
        tiny_preset(), _weights(tmp_path, 0), precision="fp32", planner=planner, compiles=True, lanes=lanes
    )
    with lanes.first.lock:  # nothing can have been compared yet
        task.load()
        segmenter = task._models.get(lanes.first).segmenter
        assert isinstance(segmenter.network, InferenceNetwork)
        assert segmenter.plan(Volume(boxes()[0], np.eye(4))).engine == "pytorch"
        # by much more than a tiny window takes
        segmenter.network.network.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    task.settle()
    mask, answer = task({"image": str(image), "device": "cpu", "result_extension": ".nii.gz"})
    Path(str(mask)).unlink()
    assert answer["plan"]["engine"] == "openvino"


def test_model_that_was_replaced_meanwhile_is_not_compiled(tmp_path: Path) -> None:
    compiled, going, waiting = list[Segmenter](), threading.Event(), threading.Event()

    def compile_slowly(segmenter: Segmenter, computing: threading.Lock) -> None:
        compiled.append(segmenter)
        waiting.set()
        assert going.wait(60)

    models = ModelCache(tiny_preset(), _weights(tmp_path, 0), "fp32", compiles=True, compile_model=compile_slowly)
    first = models.get(CPU).segmenter
    assert waiting.wait(60)
    _weights(tmp_path, 1)
    second = models.get(CPU).segmenter
    _weights(tmp_path, 2)
    third = models.get(CPU).segmenter
    going.set()
    models.settle()
    assert compiled[0] is first and compiled[-1] is third and second not in compiled


def test_cache_that_was_not_told_to_compile_does_not(tmp_path: Path) -> None:
    compiled = list[Segmenter]()
    models = ModelCache(
        tiny_preset(), _weights(tmp_path, 0), "fp32", compile_model=lambda model, _: compiled.append(model)
    )
    models.get(CPU)
    models.settle()
    assert not compiled


def test_setting_says_who_computes() -> None:
    assert Settings.from_conf({}).engine == "auto" and Settings.from_conf({"engine": "pytorch"}).engine == "pytorch"
