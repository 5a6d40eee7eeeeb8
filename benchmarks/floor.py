"""How far one window is from what the machine can do: its FLOPs and bytes against a plain matrix product and a copy.

    python benchmarks/floor.py [--preset abdomen_ct_base] [--precision auto]

For each part of the UNETR: multiply-adds (counted as two), bytes of its output, the time that the machine's best rate
for a square matrix product and for a copy would take (the larger of the two is the floor), and the time that it takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import REPOSITORY, describe_machine, show, write_json
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(REPOSITORY)]

from lib.configs.catalogue import load_preset  # noqa: E402
from lib.networks.inference import InferenceNetwork  # noqa: E402
from lib.networks.precision import resolve_device, resolve_precision  # noqa: E402
from lib.networks.unetr import build_unetr  # noqa: E402

REPEATS = 5
# A GPU is not filled by the smaller.
MATRIX_EDGE = {"cpu": 2048, "cuda": 8192}
COPY_NUMBERS = 64 * 2**20


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="abdomen_ct_base")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "floor.json")
    options = parser.parse_args()
    device = resolve_device(None)
    dtype = resolve_precision(options.precision, device)
    preset = load_preset(options.preset)
    network = InferenceNetwork(build_unetr(preset), device, dtype)
    window = torch.randn(1, 1, *preset.roi_size, device=device)
    with torch.inference_mode():
        flops_a_second, bytes_a_second = machine_rates(device, dtype)
        seconds, whole = time_parts(network, window)
        sizes = count_parts(network, window)
    rows = []
    for name, (flops, size) in sizes.items():
        floor = max(flops / flops_a_second, size / bytes_a_second)
        rows.append((name, round(flops / 1e9, 1), round(size / 1e6, 1), ms(floor), ms(seconds[name])))
    floor = sum(max(flops / flops_a_second, size / bytes_a_second) for flops, size in sizes.values())
    rows.append(("window", round(sum(f for f, _ in sizes.values()) / 1e9, 1), "", ms(floor), ms(whole)))
    machine = describe_machine()
    print(machine)
    print(f"{dtype}: {flops_a_second / 1e9:.0f} GFLOP/s in a matrix product, {bytes_a_second / 1e9:.1f} GB/s copied")
    show(("part", "GFLOP", "MB out", "floor ms", "taken ms"), rows)
    rates = {"flops_a_second": flops_a_second, "bytes_a_second": bytes_a_second}
    write_json(options.out, {"preset": options.preset, "dtype": str(dtype), **rates, "rows": rows})
    return 0


def machine_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a matrix product, and bytes read and written a second by a copy."""
    edge = MATRIX_EDGE[device.type]
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(COPY_NUMBERS, device=device)
    target = torch.empty_like(source)
    product = fastest(lambda: a @ b, device)
    copy = fastest(lambda: target.copy_(source), device)
    return 2 * edge**3 / product, 2 * source.numel() * 4 / copy


def fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of several calls."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def count_parts(network: InferenceNetwork, window: torch.Tensor) -> dict[str, tuple[int, int]]:
    """FLOPs of each part, and bytes that it writes as its result."""
    sizes: dict[str, int] = {}
    hooks = [
        part.register_forward_hook(lambda _m, _i, out, name=name: sizes.update({name: count_bytes(out)}))
        for name, part in network.network.named_children()
    ]
    counter = FlopCounterMode(display=False, depth=3)
    with counter:
        network(window)
    for hook in hooks:
        hook.remove()
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    prefix = f"{type(network).__name__}.network."
    return {name: (flops.get(prefix + name, 0), size) for name, size in sizes.items()}


def time_parts(network: InferenceNetwork, window: torch.Tensor) -> tuple[dict[str, float], float]:
    """Seconds of each part and of the whole, the fastest of several."""
    runs, started = defaultdict[str, list[float]](list), dict[str, float]()

    def before(name: str) -> Callable[..., None]:
        return lambda *_: (wait(window.device), started.update({name: time.perf_counter()}))[0]

    def after(name: str) -> Callable[..., None]:
        return lambda *_: (wait(window.device), runs[name].append(time.perf_counter() - started[name]))[0]

    hooks = []
    for name, part in network.network.named_children():
        hooks += [part.register_forward_pre_hook(before(name)), part.register_forward_hook(after(name))]
    whole = fastest(lambda: network(window), window.device)
    for hook in hooks:
        hook.remove()
    return {name: min(seconds) for name, seconds in runs.items()}, whole


def count_bytes(output: Any) -> int:
    """Bytes of a tensor, or of all in a tuple or list."""
    if isinstance(output, torch.Tensor):
        return output.numel() * output.element_size()
    return sum(count_bytes(part) for part in output) if isinstance(output, tuple | list) else 0


def wait(device: torch.device) -> None:
    """For a GPU to have finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ms(seconds: float) -> float:
    """Rounded milliseconds."""
    return round(seconds * 1000, 1)


if __name__ == "__main__":
    sys.exit(main())
