"""Work that gives way does so before its next window, and only the work that was asked to."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch

from lib.configs.preset import Preset
from lib.infers.interruption import InterruptedWork, interruptible_by
from lib.infers.segmenter import Segmenter
from lib.networks.unetr import build_unetr
from lib.transforms.volume import Volume


@pytest.fixture
def segmenter(preset: Preset) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(build_unetr(preset), preset, torch.device("cpu"), "fp32")


def test_check_runs_before_each_window_and_can_end_the_work(segmenter: Segmenter, volume: Volume) -> None:
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise InterruptedWork

    with interruptible_by(check), pytest.raises(InterruptedWork):
        segmenter.segment(volume)
    assert len(asked) == 3
    segmenter.segment(volume)
    assert len(asked) == 3, "work outside is not asked"


def test_check_follows_a_copied_context_into_a_thread_and_no_further(segmenter: Segmenter, volume: Volume) -> None:
    asked: list[str] = []
    with interruptible_by(lambda: asked.append(threading.current_thread().name)):
        context = contextvars.copy_context()
    ahead = threading.Thread(target=context.run, args=(segmenter.segment, volume), name="ahead")
    other = threading.Thread(target=segmenter.segment, args=(volume,), name="other")
    for thread in (ahead, other):
        thread.start()
        thread.join()
    assert set(asked) == {"ahead"}
