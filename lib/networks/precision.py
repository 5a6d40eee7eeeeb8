"""Chooses number formats and memory formats for a device."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from lib.errors import ParameterError
from lib.networks.convolutions import multiply_pointwise
from lib.networks.norms import keep_channels_last

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str | None) -> torch.device:
    """Return the named device; None, an empty name, or MONAI Label's default without GPU mean the best one.

    Raises:
        ParameterError: for an invalid name, or a CUDA device that this machine does not have.
    """
    best = "cuda" if torch.cuda.is_available() else "cpu"
    if not name or name == "cuda":
        return torch.device(best)
    names = {torch.cuda.get_device_name(i): f"cuda:{i}" for i in range(torch.cuda.device_count())}
    names |= {f"{gpu}:{device.removeprefix('cuda:')}": device for gpu, device in list(names.items())}
    valid = ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *names]
    if name not in valid:
        raise ParameterError("device", name, ", ".join(valid))
    return torch.device(names.get(name, name))


def resolve_precision(asked: str, device: torch.device) -> torch.dtype:
    """Return the number format for matrix products and convolutions.

    ``auto`` is bf16 where the hardware supports it, fp16 on older GPUs, and fp32 on other CPUs, where emulated bf16 is
    slower than fp32.
    """
    if asked != "auto":
        return DTYPES[asked]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if cpu_computes_bf16() else torch.float32


def resolve_fallback(dtype: torch.dtype) -> torch.dtype:
    """Return the number format for weights of ``dtype`` while they are on the CPU, without loss of precision.

    fp32 stays fp32, and fp16 becomes fp32: bf16 would round both, and they would stay rounded back on the GPU.
    """
    return dtype if dtype is torch.bfloat16 and cpu_computes_bf16() else torch.float32


def cpu_computes_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AMX or AVX512-BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Mixed precision in ``dtype``; does nothing for fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


def place_for_training(network: nn.Module, device: torch.device) -> None:
    """Like :func:`place`; on a CPU also with norms and 1x1x1 convolutions that preserve the memory format."""
    if device.type == "cpu":
        keep_channels_last(network)
        multiply_pointwise(network)
    place(network, device)


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to ``device`` with channels last, the layout in which 3D convolutions in bf16 are fast."""
    return network.to(device=device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload,no-any-return]
