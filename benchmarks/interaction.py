"""Clicks of a simulated annotator on held-out cases: Dice after each, beside painting a ball at the click, and times.

    python -m benchmarks.interaction --preset hippocampus_mr --data <folder of images and labels> --cases 12

Without held-out cases in ``model/<preset>/split.json`` all cases of the folder are used, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lib.cases.labelled import find_cases, read_case
from lib.cases.metrics import dice_per_label, mean_known
from lib.cases.split import shipped_split
from lib.configs.catalogue import load_preset
from lib.infers.segmenter import Segmenter
from lib.interaction.annotator import Correction, next_click, prompts_of
from lib.interaction.editing import Scene, edit_clicks
from lib.networks.checkpoint import read_checkpoint
from lib.transforms.preprocess import preprocess_volume

STOPS = (0, 1, 3, 5, 10)
BALLS_MM = (1.0, 1.5, 2.0, 3.0, 5.0)
MODEL = Path(__file__).resolve().parents[1] / "model"
Editor = Callable[[np.ndarray, list[Correction]], np.ndarray]


def paint(labels: np.ndarray, click: Correction, radius_mm: float, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """The mask with a ball around a click."""
    reach = [int(np.ceil(radius_mm / s)) for s in spacing_mm]
    low = [max(0, p - r) for p, r in zip(click.point, reach, strict=True)]
    box = tuple(slice(a, p + r + 1) for a, p, r in zip(low, click.point, reach, strict=True))
    painted = labels.copy()
    places = np.indices(painted[box].shape).astype(float)
    square = sum(((places[i] + low[i] - click.point[i]) * spacing_mm[i]) ** 2 for i in range(3))
    painted[box][square <= radius_mm**2] = click.value
    return painted


def follow(start: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, ...], indices: dict[str, int], edit: Editor,
           seconds: list[float]) -> list[float]:  # fmt: skip
    """Mean Dice after 0, 1, 2 ... clicks."""
    labels, clicks, random = start, [], np.random.default_rng(0)
    dice = [mean_known(dice_per_label(labels, truth, indices).values())]
    for _ in range(STOPS[-1]):
        click = next_click(labels, truth, spacing_mm, random, [c.point for c in clicks])
        if click is not None:
            clicks.append(click)
            began = time.perf_counter()
            labels = edit(labels, clicks)
            seconds.append(time.perf_counter() - began)
        dice.append(mean_known(dice_per_label(labels, truth, indices).values()))
    return dice


def main() -> None:
    """Print the table, and write it as JSON beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preset", default="hippocampus_mr")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=12)
    asked = parser.parse_args()
    checkpoint = read_checkpoint(MODEL / asked.preset / "shipped.pt")
    preset = checkpoint.preset or load_preset(asked.preset)
    segmenter = Segmenter.from_checkpoint(checkpoint, preset, torch.device("cpu"))
    split = shipped_split(MODEL / asked.preset)
    cases = find_cases(asked.data / "images", asked.data / "labels")
    held_out = [case for case in cases if split is not None and case.case_id in split.validation]
    cases = (held_out or cases)[: asked.cases]
    rows: dict[str, list[list[float]]] = {}
    seconds: list[float] = []
    for case in cases:
        volume, truth = read_case(case, preset)
        automatic, spacing = segmenter.segment(volume).labels, volume.spacing_mm
        image = preprocess_volume(volume, preset)
        editors: dict[str, Editor] = {
            "click": lambda _, c, i=image, a=automatic, v=volume: (
                edit_clicks(  # type: ignore[misc]
                    Scene(i, a.copy(order="K"), v.affine_ras), prompts_of(c)
                ).labels
            )
        }
        for radius in BALLS_MM:
            editors[f"ball of {radius:g} mm"] = lambda m, c, r=radius, s=spacing: paint(m, c[-1], r, s)  # type: ignore[misc]
        for name, edit in editors.items():
            spent = seconds if name == "click" else []
            found = follow(automatic, truth, spacing, preset.label_indices, edit, spent)
            rows.setdefault(name, []).append(found)
    kind = "held-out" if held_out else "training"
    print(f"{preset.name}: mean Dice (worst case) of {len(cases)} {kind} cases after clicks a case")
    print(f"{'':16}" + "".join(f"{stop:>16}" for stop in STOPS))
    for name, found in rows.items():
        cells = [f"{np.mean([f[s] for f in found]):.4f} ({min(f[s] for f in found):.3f})" for s in STOPS]
        print(f"{name:16}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"{1000 * float(np.median(seconds)):.0f} ms to recompute all clicks so far (median)")
    result = {"preset": preset.name, "cases": len(cases), "held_out": bool(held_out), "dice": rows, "seconds": seconds}
    Path(__file__).with_name(f"interaction-{preset.name}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
