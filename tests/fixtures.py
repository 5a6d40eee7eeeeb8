"""Fixtures for the tiny task of ``tests.tiny``, and the way to real data; a plugin of each process that runs tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from lib.cases.labelled import Case
from lib.configs.preset import Preset
from lib.infers.memory import release_memory
from lib.transforms.volume import Volume
from tests.forks import REPOSITORY
from tests.tiny import boxes, oblique_affine, tiny_preset, write_cases


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors are slower on several threads, and sums differ in their last bits."""
    torch.set_num_threads(1)


@pytest.fixture
def preset() -> Preset:
    """The tiny task."""
    return tiny_preset()


@pytest.fixture
def volume() -> Volume:
    """An image of the tiny task on an oblique grid, 20x18x16 voxels."""
    return Volume(boxes()[0], oblique_affine())


@pytest.fixture
def make_cases(tmp_path: Path) -> Callable[..., tuple[Case, ...]]:
    """Write cases of the tiny task as NIfTI: ``make_cases(count)``."""

    return partial(write_cases, tmp_path)


@pytest.fixture
def limit_gpu() -> Iterator[Callable[[int], None]]:
    """``limit_gpu(more)``: this process gets so many bytes of the GPU beyond what it holds, whatever is free."""

    def limit(more_bytes: int) -> None:
        release_memory(torch.device("cuda"))
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more_bytes) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data that is not part of the project: ``UNETR_DATA``, or ``../shared/data``."""
    folder = Path(os.environ.get("UNETR_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs the real data: set UNETR_DATA to its folder")
    return folder
