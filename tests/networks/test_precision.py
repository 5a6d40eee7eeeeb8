"""Devices and number formats by name."""

from __future__ import annotations

import pytest
import torch

from lib.errors import ParameterError
from lib.networks.precision import autocast, place, resolve_device, resolve_fallback, resolve_precision
from lib.networks.unetr import build_unetr
from tests.tiny import tiny_preset

BEST = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", [None, "", "cuda"])
def test_device_that_is_not_chosen_is_the_best_there_is(name: str | None) -> None:
    assert resolve_device(name).type == BEST


def test_device_cpu_is_the_cpu() -> None:
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "mps:3", "cpu;rm"])
def test_device_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(ParameterError, match=rf"'device' is '{name}'; valid: cpu, cuda"):
        resolve_device(name)


def test_precision_by_name() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) is torch.float32
    assert resolve_precision("bf16", cpu) is torch.bfloat16
    assert resolve_precision("fp16", cpu) is torch.float16


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_precision_auto_is_bf16_only_where_the_cpu_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", torch.device("cpu")) is expected


@pytest.mark.parametrize("capabilities", [{"amx_bf16": True}, {}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_back_from_the_cpu_as_they_went(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    away = resolve_fallback(dtype)
    torch.testing.assert_close(weights.to(away).to(dtype), weights, rtol=0, atol=0)
    assert (away is torch.bfloat16) == (dtype is torch.bfloat16 and bool(capabilities))


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_precision_auto_on_a_gpu_is_bf16_or_fp16(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert resolve_precision("auto", torch.device("cuda")) is expected


def test_autocast_computes_in_the_format_and_fp32_means_none() -> None:
    a = torch.ones(4, 4)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert (a @ a).dtype is torch.bfloat16
    with autocast(torch.device("cpu"), torch.float32):
        assert (a @ a).dtype is torch.float32


def test_placed_network_gives_the_same_logits() -> None:
    torch.manual_seed(0)
    network = build_unetr(tiny_preset()).eval()
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        before = network(image)
        after = place(network, torch.device("cpu"))(image.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
