"""Uploaded weights are looked at and tried before they are served; what no network could use is refused in words."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import UploadFile

from lib.configs.preset import Preset
from lib.errors import CheckpointError
from lib.models.versions import VersionStore
from lib.networks.checkpoint import FORMAT
from lib.networks.unetr import build_unetr
from lib.server.routes.models import publish_upload
from lib.transforms.volume import Volume
from tests.tiny import boxes, oblique_affine

State = dict[str, torch.Tensor]
LAST = "out.conv.conv"


@pytest.fixture
def state(preset: Preset) -> State:
    torch.manual_seed(0)
    return build_unetr(preset).state_dict()


@pytest.fixture
def upload(preset: Preset, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Uploads weights for the tiny task, of which nothing is served yet."""
    store, case = VersionStore(tmp_path / "tiny"), Volume(boxes()[0], oblique_affine())

    def send(model: object, cases: int = 2, **changes: Any) -> dict[str, Any]:
        content = io.BytesIO()
        data = {"format": FORMAT, "preset": preset.model_dump(mode="json"), "model": model, "info": {}}
        torch.save(data | changes, content)
        content.seek(0)
        trainer: Any = SimpleNamespace(versions=store, serving=lambda: ("", ""))
        task: Any = SimpleNamespace(preset=preset)
        tried = [(f"case_{number}", case) for number in range(cases)]
        try:
            return publish_upload(task, trainer, iter(tried), UploadFile(content, filename="w.pt"), "anna")
        finally:
            assert len(store.list()) == (0 if store.live() is None else 1), "what is refused is not kept"

    return send


def biased(state: State, label: int, value: float) -> State:
    """Weights that give every voxel the same label."""
    changed = {key: tensor.clone() for key, tensor in state.items()}
    changed[f"{LAST}.weight"].zero_()
    changed[f"{LAST}.bias"].zero_()
    changed[f"{LAST}.bias"][label] = value
    return changed


def test_weights_that_fit_are_published(upload: Callable[..., dict[str, Any]], state: State) -> None:
    assert upload(state)["version"] == "v0001"


def test_weights_are_published_untried_where_there_is_no_image(
    upload: Callable[..., dict[str, Any]], state: State
) -> None:
    assert upload(state, cases=0)["version"] == "v0001"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: biased(state, 0, 50.0), "segment nothing there"),
        (lambda state: biased(state, 1, 50.0), "'case_0': each of its voxels is 1; 'case_1'"),
        (lambda state: {k: v * 1e30 for k, v in state.items()}, "not finite"),
        (lambda state: state | {f"{LAST}.bias": torch.tensor([0.0, float("inf"), 0.0])}, "not finite"),
        (lambda state: {k: torch.complex(v.float(), v.float() * torch.nan) for k, v in state.items()}, "plain arrays"),
        (lambda state: {k: v.to_sparse() for k, v in state.items()}, "plain arrays"),
        (lambda state: {k: v.to(torch.float8_e4m3fn) for k, v in state.items()}, "plain arrays"),
        (lambda state: {k: v.to("meta") for k, v in state.items()}, "plain arrays"),
        (lambda state: state | {"more": torch.zeros(1).expand(10**13)}, "larger than their data: more"),
        (lambda state: {1: torch.zeros(3)}, "holds no weights"),
        (lambda state: state | {"more": torch.zeros(1)}, "1 left over: more"),
    ],
    ids=[
        "nothing",
        "all one",
        "overflow",
        "infinity",
        "complex",
        "sparse",
        "float8",
        "meta",
        "expanded",
        "numbers",
        "left over",
    ],
)
def test_weights_of_no_use_are_refused_in_words(
    upload: Callable[..., dict[str, Any]], state: State, change: Callable[[State], object], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        upload(change(state))


@pytest.mark.parametrize(
    "info",
    [[1, 2], "text", None, {"a": torch.zeros(3)}, {"a": b"x"}, {"a": 1j}, {"a": "\ud800"}, {"a": "x" * 2**21}],
    ids=["list", "text", "none", "tensor", "bytes", "complex", "surrogate", "huge"],
)
def test_info_that_is_no_plain_data_is_refused(
    upload: Callable[..., dict[str, Any]], state: State, info: object
) -> None:
    with pytest.raises(CheckpointError, match=r"the info in checkpoint 'w\.pt'"):
        upload(state, info=info)


def test_network_larger_than_memory_is_refused_before_it_is_made(
    upload: Callable[..., dict[str, Any]], state: State, preset: Preset
) -> None:
    data = preset.model_dump(mode="json")
    data["network"] |= {"hidden_size": 48 * 2**15, "mlp_dim": 2**22, "feature_size": 2**14}
    with pytest.raises(CheckpointError, match="of another shape"):
        upload(state, preset=data)


def test_weights_whose_preset_allows_no_case_are_refused(
    upload: Callable[..., dict[str, Any]], state: State, preset: Preset
) -> None:
    data = preset.model_dump(mode="json") | {"spacing_mm": [1e-4, 1e-4, 1e-4]}
    with pytest.raises(CheckpointError, match="'case_0': it cannot be segmented with them"):
        upload(state, preset=data)
