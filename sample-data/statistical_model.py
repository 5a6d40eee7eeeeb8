"""What the fitted statistical models share: modes, 8-bit storage, the fit's command line, and the file beside them."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[np.generic]]

COEFFICIENT_LIMIT = 2.0
"""Standard deviations: what lies beyond is as likely a broken shape as a rare one."""
LARGEST_SHARE = 0.25
"""Of a mode's variance that may come from one case; beyond that, the mode would be that patient's image."""


def principal_modes(centred: Array, count: int) -> tuple[Array, Array]:
    """Unit modes, shape (count, features), and the standard deviations of their coefficients.

    The eigenvectors of the small case-by-case matrix give those of the covariance (Turk and Pentland 1991,
    doi:10.1162/jocn.1991.3.1.71). A mode's sign is such that its largest value is positive.
    """
    values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
    order = np.argsort(values)[::-1][:count]
    modes = vectors[:, order].T.astype(np.float32) @ centred
    modes /= np.linalg.norm(modes, axis=1, keepdims=True)
    largest = np.abs(modes).argmax(axis=1)
    modes *= np.sign(modes[np.arange(len(modes)), largest])[:, None]
    return modes, np.sqrt(values[order] / (len(centred) - 1)).astype(np.float32)


def check_shares(centred: Array, modes: Array) -> None:
    """See to it that every mode is made of many cases.

    Args:
        centred: shape (cases, features).
        modes: shape (count, features).

    Raises:
        ValueError: when one case makes up more than ``LARGEST_SHARE`` of a mode's variance.
    """
    squares = np.square(centred @ modes.T)
    shares = squares.max(axis=0) / squares.sum(axis=0)
    if shares.max() > LARGEST_SHARE:
        raise ValueError(
            f"one case makes up {shares.max():.2f} of mode {int(shares.argmax())}; at most {LARGEST_SHARE} keeps "
            "patients out of the model: leave the case out, or fit fewer modes"
        )


def quantised(name: str, modes: Array) -> Arrays:
    """Arrays as 8-bit numbers with a scale each: entries ``name`` and ``name_scale``."""
    scales = np.maximum(np.abs(modes).reshape(len(modes), -1).max(axis=1), 1e-12) / 127
    shaped = scales.reshape(-1, *[1] * (modes.ndim - 1))
    return {name: np.rint(modes / shaped).astype(np.int8), f"{name}_scale": scales.astype(np.float32)}


def dequantised(stored: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Array]:
    """Arrays of a model's file as float32: what :func:`quantised` made is scaled, and its scale stays beside it."""
    arrays = {name: values.astype(np.float32) for name, values in stored.items()}
    for name in [name for name in arrays if f"{name}_scale" in arrays]:
        scale = arrays[f"{name}_scale"]
        arrays[name] *= scale.reshape(-1, *[1] * (arrays[name].ndim - 1))
    return arrays


def draw_modes(modes: Array, deviations: Array, random: np.random.Generator, limit: float = COEFFICIENT_LIMIT) -> Array:
    """A random sum of modes, each within ``limit`` standard deviations."""
    drawn = np.clip(random.standard_normal(len(deviations)), -limit, limit) * deviations
    total: Array = np.tensordot(drawn.astype(np.float32), modes, axes=1)
    return total


def block_means(parts: Array, step: int) -> Array:
    """Mean over blocks of ``step`` voxels along each of the last three axes."""
    *others, x, y, z = parts.shape
    blocks = parts.reshape(*others, x // step, step, y // step, step, z // step, step)
    means: Array = blocks.mean(axis=(-5, -3, -1))
    return means


def save_model(model: Path, arrays: Arrays, description: Mapping[str, object]) -> None:
    """Write a model and its side-car, and say how large it is."""
    np.savez_compressed(model, **arrays)
    write_side_car(model, description)
    print(f"{description['cases']} cases -> {model} ({model.stat().st_size / 1e6:.2f} MB)")


def fit_parser(description: str | None, data: str, out: Path) -> argparse.ArgumentParser:
    """The command line of a fit.

    Args:
        description: of the command.
        data: folder of the cases, in that of the real data.
        out: the model's file.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("UNETR_DATA", "../shared/data")) / data,
        help="folder with images/ and labels/ (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=out, help="file to write (default: beside this script)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    return parser


def write_side_car(model: Path, description: Mapping[str, object]) -> None:
    """Write a JSON file beside a model: what it is, from which data, under which licence, and its SHA-256."""
    content = model.read_bytes()
    entries = {**description, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    model.with_suffix(".json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
