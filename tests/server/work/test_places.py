from __future__ import annotations

from typing import Any

import pytest
import torch

from lib.infers.devices.lane import Lane
from lib.infers.devices.lanes import Lanes
from lib.server.work.jobs import Job
from lib.server.work.pause import Pause
from lib.server.work.places import devices_of, idle_place, occupied, pooled_devices
from lib.trainers.pause import is_paused

GPUS = ["cuda:0", "cuda:1", "cuda:2"]


def _lanes(*names: str) -> Lanes:
    return Lanes([Lane(name, torch.device(name.split("#")[0])) for name in names])


@pytest.mark.parametrize(
    ("request_fields", "kind", "expected"),
    [
        ({}, "train", set(GPUS)),
        ({"gpus": "0,2"}, "train", {"cuda:0", "cuda:2"}),
        ({"multi_gpu": False, "device": "cuda:1"}, "train", {"cuda:1"}),
        ({"multi_gpu": False, "device": "NVIDIA H200:2"}, "train", {"cuda:2"}),
        ({"multi_gpu": False, "device": "cuda"}, "train", {"cuda:0"}),
        ({"multi_gpu": False, "gpus": "1"}, "train", {"cuda:1"}),
        ({"device": "cpu"}, "train", {"cpu"}),
        ({}, "scoring", {"cuda:0"}),
        ({"device": "cuda:2"}, "scoring", {"cuda:2"}),
    ],
)
def test_devices_of_a_job_follow_from_its_request(
    request_fields: dict[str, Any], kind: str, expected: set[str]
) -> None:
    assert devices_of(request_fields, kind, GPUS) == expected


def test_training_of_a_server_without_gpus_is_on_the_cpu() -> None:
    assert devices_of({"multi_gpu": True, "gpus": "all"}, "train", ["cpu"]) == {"cpu"}


def test_only_open_trainings_and_scorings_occupy_devices() -> None:
    jobs = [Job("train", {"multi_gpu": False, "device": "cuda:1"}), Job("scoring", {"device": "cuda:2"})]
    jobs += [Job("batch_infer", {"device": "cuda:0"}), Job("scoring", {"device": "cuda:0"}, status="DONE")]
    assert occupied(jobs, GPUS) == {"cuda:1", "cuda:2"}


def test_background_work_goes_to_the_quietest_of_several_devices() -> None:
    assert idle_place(_lanes("cpu", "cpu#2")) == {}
    assert idle_place(_lanes("cuda:0", "cuda:1")) == {"device": "cuda:1"}
    assert idle_place(_lanes("cuda:0", "cpu")) == {"device": "cuda:0"}, "a GPU, where there is one"
    assert pooled_devices(_lanes("cpu", "cpu#2")) == ["cpu"]


def test_training_on_other_gpus_is_not_asked_to_stand_still() -> None:
    pause = Pause()
    own, other = pause.file_for(frozenset({"cuda:1", "cuda:2"})), pause.file_for(frozenset({"cuda:0"}))
    with pause.asked("cuda:2"):
        assert is_paused(own) and is_paused(pause.file)
        assert not is_paused(other)
        with pause.asked("cuda:0"):
            assert is_paused(other)
        assert not is_paused(other) and is_paused(own)
    assert not own.exists() and not pause.file.exists()
