"""Clicks of a simulated annotator on held-out cases: Dice and surface Dice after each, beside baselines, and times.

    python -m benchmarks.interaction --preset hippocampus_mr --data <folder of images and labels> --cases 12
    python -m benchmarks.interaction --preset abdomen_ct --data <folder> --ids btcv_0001,btcv_0006 --each-label --empty

Compared are the editor network, growth without weights, a ball painted at the click (of several radii), and the random
walker of scikit-image in a crop around the click. Without ``--ids`` the held-out cases of ``model/<preset>/split.json``
are used, or all cases of the folder where there are none, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from skimage.segmentation import random_walker

from lib.cases.labelled import find_cases, read_case
from lib.cases.metrics import dice_per_label, mean_known, surface_per_label
from lib.cases.split import shipped_split
from lib.configs.catalogue import load_preset
from lib.infers.segmenter import Segmenter
from lib.interaction.annotator import Correction, next_click, prompts_of
from lib.interaction.editing import Scene, edit_clicks
from lib.interaction.editor import Editor
from lib.interaction.training import change_image
from lib.networks.checkpoint import read_checkpoint
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import Volume

STOPS = (0, 1, 3, 5, 10)
GOALS = (0.90, 0.95)
BALLS_MM = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
WALKER_VOXELS = 20
MODEL = Path(__file__).resolve().parents[1] / "model"
Edit = Callable[[np.ndarray, Sequence[Correction]], np.ndarray]


@dataclass
class Followed:
    """What one way of editing made of one start: Dice after each click, surface Dice at the stops, seconds a click."""

    dice: list[float]
    surface: list[float]
    seconds: list[float]


def paint(labels: np.ndarray, click: Correction, radius_mm: float, spacing_mm: Sequence[float]) -> np.ndarray:
    """The mask with a ball around a click."""
    reach = [int(np.ceil(radius_mm / s)) for s in spacing_mm]
    low = [max(0, p - r) for p, r in zip(click.point, reach, strict=True)]
    box = tuple(slice(a, p + r + 1) for a, p, r in zip(low, click.point, reach, strict=True))
    painted = labels.copy()
    places = np.indices(painted[box].shape).astype(float)
    square = sum(((places[i] + low[i] - click.point[i]) * spacing_mm[i]) ** 2 for i in range(3))
    painted[box][square <= radius_mm**2] = click.value
    return painted


def walk(image: np.ndarray, labels: np.ndarray, click: Correction) -> np.ndarray:
    """The mask after a random walker (Grady 2006) from a click, in a crop; elsewhere it stays."""
    low = [max(0, p - WALKER_VOXELS) for p in click.point]
    box = tuple(slice(a, p + WALKER_VOXELS + 1) for a, p in zip(low, click.point, strict=True))
    crop, drawn = image[box].astype(float), labels[box]
    away = sum((np.indices(drawn.shape)[i] + low[i] - click.point[i]) ** 2 for i in range(3))
    seeds = np.zeros(drawn.shape, dtype=np.int32)
    seeds[away >= WALKER_VOXELS**2], seeds[away <= 1] = 2, 1
    seeds[(drawn == click.value) & (away > 1)] = 2
    spread = max(float(crop.std()), 1e-6)
    reached = random_walker((crop - crop.mean()) / spread, seeds, beta=130, mode="cg_j", tol=1e-4, prob_tol=0.01) == 1
    walked = labels.copy()
    walked[box][reached] = click.value
    return walked


def follow(start: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float], indices: Mapping[str, int],
           edit: Edit, seed: int) -> Followed:  # fmt: skip
    """Mean Dice after 0, 1, 2 ... clicks."""
    labels, clicks, random = start, list[Correction](), np.random.default_rng(seed)
    found = Followed([], [], [])
    for count in range(STOPS[-1] + 1):
        click = next_click(labels, truth, spacing_mm, random, [c.point for c in clicks]) if count else None
        if click is not None:
            clicks.append(click)
            began = time.perf_counter()
            labels = edit(labels, clicks)
            found.seconds.append(time.perf_counter() - began)
        found.dice.append(mean_known(dice_per_label(labels, truth, indices).values()))
        if count in STOPS:
            _, surface = surface_per_label(labels, truth, indices, spacing_mm, max(spacing_mm))
            found.surface.append(mean_known(surface.values()))
    return found


def ways_of(
    image: MetaTensor, volume: Volume, begin: np.ndarray, editor: Editor | None, names: Sequence[str]
) -> dict[str, Edit]:
    """The ways of editing that are compared."""

    def by(network: Editor | None) -> Edit:
        return lambda _, clicks: (
            edit_clicks(Scene(image, begin.copy(order="K"), volume.affine_ras), prompts_of(clicks), network).labels
        )

    ways: dict[str, Edit] = {}
    if editor is not None:
        ways["editor"] = by(editor)
    if "growth" in names:
        ways["growth"] = by(None)
    if "walker" in names:
        ways["random walker"] = lambda mask, clicks: walk(volume.voxels, mask, clicks[-1])
    if "ball" in names:
        for mm in BALLS_MM:
            ways[f"ball of {mm:g} mm"] = lambda m, clicks, r=mm: paint(m, clicks[-1], r, volume.spacing_mm)  # type: ignore[misc]
    return ways


def show(rows: Mapping[str, list[Followed]]) -> None:
    """Print the table of one start."""
    print(f"{'':18}" + "".join(f"{stop:>17}" for stop in STOPS) + "   to 0.90  to 0.95   ms a click")
    for name, all_found in rows.items():
        cells = [
            f"{np.mean([f.dice[s] for f in all_found]):.4f} ({min(f.dice[s] for f in all_found):.3f})" for s in STOPS
        ]
        needed = [
            np.mean([next((n for n, d in enumerate(f.dice) if d >= goal), STOPS[-1] + 1) for f in all_found])
            for goal in GOALS
        ]
        milliseconds = 1000 * float(np.median([s for f in all_found for s in f.seconds] or [0.0]))
        print(
            f"{name:18}"
            + "".join(f"{c:>17}" for c in cells)
            + f"   {needed[0]:7.1f}  {needed[1]:7.1f}   {milliseconds:10.0f}"
        )
        surface = np.mean([f.surface for f in all_found], axis=0)
        print(f"{'  surface Dice':18}" + "".join(f"{s:>17.4f}" for s in surface))


def main() -> None:
    """Print the table, and write it as JSON beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preset", default="hippocampus_mr")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--ids", default="", help="of the cases, with commas between them")
    parser.add_argument("--labels", default="", help="names of labels, with commas between them; all by default")
    parser.add_argument(
        "--each-label", action="store_true", help="click each label by itself, instead of the whole case"
    )
    parser.add_argument("--empty", action="store_true", help="start from an empty mask, not from the automatic one")
    parser.add_argument(
        "--changed-image",
        action="store_true",
        help="start from the mask of the blurred image with noise, for cases that the preset's weights have seen",
    )
    parser.add_argument("--ways", default="editor,growth,walker,ball", help="what is compared")
    parser.add_argument("--editor", type=Path, default=MODEL / "editor" / "shipped.pt")
    asked = parser.parse_args()
    checkpoint = read_checkpoint(MODEL / asked.preset / "shipped.pt")
    preset = checkpoint.preset or load_preset(asked.preset)
    segmenter = Segmenter.from_checkpoint(checkpoint, preset, torch.device("cpu"))
    editor = Editor.from_file(asked.editor, torch.device("cpu")) if "editor" in asked.ways.split(",") else None
    cases, held_out = find_cases(asked.data / "images", asked.data / "labels"), True
    split = shipped_split(MODEL / asked.preset)
    if asked.ids:
        cases = [case for case in cases if case.case_id in asked.ids.split(",")]
    else:
        known = [case for case in cases if split is not None and case.case_id in split.validation]
        cases, held_out = (known or cases)[: asked.cases], bool(known)
    names = asked.labels.split(",") if asked.labels else list(preset.label_indices)
    groups = [[name] for name in names] if asked.each_label else [names]
    rows: dict[str, list[Followed]] = {}
    for seed, case in enumerate(cases):
        volume, truth = read_case(case, preset)
        seen = change_image(volume, np.random.default_rng(seed)) if asked.changed_image else volume
        start = np.zeros_like(truth) if asked.empty else segmenter.segment(seen).labels
        image, spacing = preprocess_volume(volume, preset), volume.spacing_mm
        for group in groups:
            indices = {name: preset.label_indices[name] for name in group}
            right = np.where(np.isin(truth, list(indices.values())), truth, 0).astype(np.uint8)
            begin = np.where(np.isin(start, list(indices.values())), start, 0).astype(np.uint8)
            if not right.any():
                continue

            ways = ways_of(image, volume, begin, editor, asked.ways.split(","))
            for name, edit in ways.items():
                rows.setdefault(name, []).append(follow(begin, right, spacing, indices, edit, seed))
    kind = "held-out" if held_out else "training"
    unit = "label" if asked.each_label else "case"
    begun = "an empty mask" if asked.empty else "the automatic mask" + " of a changed image" * asked.changed_image
    print(f"{preset.name}: mean Dice (worst {unit}) of {len(cases)} {kind} cases from {begun}, after clicks a {unit}")
    show(rows)
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory at most")
    result = {"preset": preset.name, "cases": [c.case_id for c in cases], "held_out": held_out, "empty": asked.empty,
              "ways": {name: [vars(f) for f in found] for name, found in rows.items()}}  # fmt: skip
    file = f"interaction-{preset.name}{'-empty' if asked.empty else ''}.json"
    Path(__file__).with_name(file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
