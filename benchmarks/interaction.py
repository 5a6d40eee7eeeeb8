"""Clicks of a simulated annotator on held-out cases: Dice and surface Dice after each, beside baselines, time, memory.

    python -m benchmarks.interaction --preset hippocampus_mr --data <folder of images and labels> --cases 12
    python -m benchmarks.interaction --preset abdomen_ct --data <folder> --ids btcv_0001,btcv_0006 --each-label --empty
    python -m benchmarks.interaction --preset hippocampus_mr --data <folder> --ways deepedit,editor --train-deepedit 30
    python -m benchmarks.interaction --preset hippocampus_mr --data <folder> --each-label --scribbles
    python -m benchmarks.interaction --preset hippocampus_mr --data <folder> --cases 45 --ways "" --server own

Compared are clicks that follow the logit margins of the automatic mask (``margins``), growth without weights, the
editor network, a ball painted at the click (of several radii, of which the best after ten clicks is named), the random
walker of scikit-image in a crop around the click, and a DeepEdit-style UNETR that is trained for the minutes of
``--train-deepedit`` on the cases that are not held out. With ``--server`` the clicks are sent over REST as 3D Slicer
sends them, and what Slicer then shows counts (``benchmarks/slicer_clicks.py``); that way is called ``served``. It
begins with the mask that the server answers. ``--server own`` starts a server for it, of the same images (with
``--changed-image`` the changed ones, with ``--empty`` without weights); an address is that of a running one, whose
studies hold the cases under the names that they have here.
With ``--each-label`` the whole automatic mask is corrected, and the label that is clicked counts alone.
Without ``--ids`` the held-out cases of ``model/<preset>/split.json`` are used, or all cases of the folder where there
are none, and the table says so. ``--weights`` and ``--split`` name other weights and the split they were trained on.
The annotator clicks into a wrong part that chance draws, the larger the likelier; with ``--largest`` into the largest.
With ``--scribbles`` the annotator scribbles instead, and the only way of editing is that of the scribbles of 3D Slicer.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from skimage.segmentation import random_walker

from benchmarks.deepedit import DeepEdit
from benchmarks.slicer_clicks import OWN, Slicer, own_server
from lib.cases.labelled import Case, find_cases, read_case
from lib.cases.split import read_split, shipped_split
from lib.configs.catalogue import load_preset
from lib.configs.preset import Preset
from lib.infers.logit_margins import LogitMargins
from lib.infers.segmenter import Segmenter
from lib.interaction.annotator import Correction, prompts_of
from lib.interaction.editing import Scene, edit_clicks, edit_scribbles
from lib.interaction.editor import Editor
from lib.interaction.evaluation import STOPS, Edit, EditingScores, segment_with_margins, simulate_editing
from lib.interaction.prompts import Prompts
from lib.interaction.training import change_image, read_material
from lib.networks.checkpoint import read_checkpoint
from lib.transforms.postprocess import restore_to_grid
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import Volume

GOALS = (0.90, 0.95)
BALLS_MM = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
BALL = "ball of "
WALKER_VOXELS = 20
MODEL = Path(__file__).resolve().parents[1] / "model"


@dataclass(frozen=True)
class Start:
    """A case with the mask that clicks correct.

    Attributes:
        case: its files.
        volume: the image on its own grid.
        image: the same as the network sees it.
        begin: the mask, on the image's own grid, with all its labels.
        indices: the labels that count, by name.
        empty: whether ``begin`` is no automatic mask.
        margins: how nearly the network of the automatic mask chose otherwise; None for an empty start.
    """

    case: Case
    volume: Volume
    image: MetaTensor
    begin: np.ndarray
    indices: Mapping[str, int]
    empty: bool
    margins: LogitMargins | None = None

    def counted(self, mask: np.ndarray) -> np.ndarray:
        """The labels of a mask that count, and no others."""
        return np.where(np.isin(mask, list(self.indices.values())), mask, 0).astype(np.uint8)


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


def ways_of(
    start: Start, editor: Editor | None, deepedit: DeepEdit | None, slicer: Slicer | None, asked: argparse.Namespace
) -> dict[str, tuple[np.ndarray, Edit]]:
    """The ways of editing that are compared: the mask that each begins with, and what it makes of clicks."""
    volume, names = start.volume, asked.ways.split(",")
    begin = start.counted(start.begin)
    if asked.scribbles:
        return {"scribbles": (begin, by_scribbles(start))}

    def by(network: Editor | None, margins: LogitMargins | None = None) -> Edit:
        return lambda _, clicks: start.counted(
            edit_clicks(
                Scene(start.image, start.begin, volume.affine_ras, margins=margins), prompts_of(clicks), network
            ).labels
        )

    ways: dict[str, tuple[np.ndarray, Edit]] = {}
    if slicer is not None:
        ways["served"] = by_slicer(slicer, start)
    if editor is not None:
        ways["editor"] = begin, by(editor)
    if "margins" in names and start.margins is not None:
        ways["margins"] = begin, by(None, start.margins)
    if "growth" in names:
        ways["growth"] = begin, by(None)
    if deepedit is not None:
        drawn = by_deepedit(deepedit, start, [])
        ways["DeepEdit style"] = drawn, lambda _, clicks: by_deepedit(deepedit, start, clicks)
    if "walker" in names:
        ways["random walker"] = begin, lambda mask, clicks: walk(volume.voxels, mask, clicks[-1])
    if "ball" in names:
        for mm in asked.balls:
            ways[f"{BALL}{mm:g} mm"] = begin, by_ball(mm, volume.spacing_mm)
    return ways


def by_ball(radius_mm: float, spacing_mm: Sequence[float]) -> Edit:
    """Balls of one radius at the clicks."""
    return lambda mask, clicks: paint(mask, clicks[-1], radius_mm, spacing_mm)


def by_scribbles(start: Start) -> Edit:
    """Scribbles on one label, as 3D Slicer sends them: the mask as it is shown, and all scribbles so far."""
    (value,) = start.indices.values()

    def edit(labels: np.ndarray, scribbled: Sequence[Correction]) -> np.ndarray:
        structure = (labels == value).astype(np.uint8)
        scene = Scene(start.image, structure, start.volume.affine_ras)
        drawn, erased = (
            np.array([s.point for s in scribbled if (s.value == value) is inside], dtype=np.int64).reshape(-1, 3)
            for inside in (True, False)
        )
        return edit_scribbles(scene, drawn, erased, Prompts()) * np.uint8(value)

    return edit


def by_slicer(slicer: Slicer, start: Start) -> tuple[np.ndarray, Edit]:
    """What 3D Slicer shows of a case before any click, and after clicks: the labels that count."""
    case_id, empty = start.case.case_id, start.volume if start.empty else None
    shown = np.zeros_like(start.begin) if start.empty else slicer.segment(case_id)
    before = [shown]

    def click(_: np.ndarray, clicks: Sequence[Correction]) -> np.ndarray:
        before.append(slicer.click(case_id, before[-1], clicks, empty))
        return start.counted(before[-1])

    return start.counted(shown), click


def by_deepedit(network: DeepEdit, start: Start, clicks: Sequence[Correction]) -> np.ndarray:
    """What the network makes of a case with clicks, on the image's own grid: the labels that count, and no others."""
    scene = Scene(start.image, start.begin, start.volume.affine_ras)
    placed = []
    for click in clicks:
        x, y, z = (int(v) for v in scene.on_network([click.point])[0])
        placed.append(Correction(click.value, (x, y, z)))
    found = network.segment(scene.voxels, placed)
    labels = restore_to_grid(found, scene.affine_network, start.volume.voxels.shape, start.volume.affine_ras)
    return start.counted(labels)


def best_ball(rows: Mapping[str, list[EditingScores]]) -> str:
    """The radius that is best after ten clicks, in the mean; empty where no ball was painted."""
    balls = [name for name in rows if name.startswith(BALL)]
    return max(balls, key=lambda name: float(np.mean([f.dice[-1] for f in rows[name]])), default="")


def show(rows: Mapping[str, list[EditingScores]]) -> None:
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


def parse() -> argparse.Namespace:
    """The command line."""
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
    parser.add_argument("--largest", action="store_true", help="click into the largest wrong part each time")
    parser.add_argument("--scribbles", action="store_true", help="scribble instead of clicking; with --each-label")
    parser.add_argument("--ways", default="margins,growth,walker,ball", help="what is compared; also: editor, deepedit")
    parser.add_argument("--balls", type=float, nargs="+", default=BALLS_MM, metavar="MM", help="radii that are tried")
    parser.add_argument("--weights", type=Path, help="of the automatic masks; the preset's shipped ones by default")
    parser.add_argument("--split", type=Path, help="of the cases, where the weights are not the shipped ones")
    parser.add_argument("--editor", type=Path, default=MODEL / "editor" / "shipped.pt")
    parser.add_argument("--train-deepedit", type=float, default=30.0, metavar="MINUTES")
    parser.add_argument("--server", default="", help="own, or the address of a server with these cases in its studies")
    parser.add_argument("--out", type=Path, help="beside this file by default")
    asked = parser.parse_args()
    if asked.scribbles and not asked.each_label:
        parser.error("scribbles belong to one label: add --each-label")
    return asked


def choose_cases(asked: argparse.Namespace) -> tuple[list[Case], list[Case], bool]:
    """The cases to click on, those that may be trained on, and whether the former were held out."""
    cases = find_cases(asked.data / "images", asked.data / "labels")
    split = read_split(asked.split) if asked.split else shipped_split(MODEL / asked.preset)
    held_out = set(split.validation) | set(split.test) if split is not None else set()
    if asked.ids:
        chosen = [case for case in cases if case.case_id in asked.ids.split(",")]
        known = {case.case_id for case in chosen} <= held_out
    else:
        validated = [case for case in cases if split is not None and case.case_id in split.validation]
        chosen, known = (validated or cases)[: asked.cases], bool(validated)
    left = [case for case in cases if case.case_id not in held_out and case not in chosen]
    return chosen, left, known


def image_of(case: Case, preset: Preset, asked: argparse.Namespace, seed: int) -> tuple[Volume, Volume, np.ndarray]:
    """A case's image, the same as the preset's network is to see it, and the reference."""
    volume, truth = read_case(case, preset)
    seen = change_image(volume, np.random.default_rng(seed)) if asked.changed_image else volume
    return volume, seen, truth


def starts_of(
    case: Case, preset: Preset, segmenter: Segmenter, asked: argparse.Namespace, seed: int
) -> list[tuple[Start, np.ndarray]]:
    """A case as often as labels are clicked by themselves, each with its reference."""
    volume, seen, truth = image_of(case, preset, asked, seed)
    found, margins = np.zeros_like(truth), None
    if not asked.empty and asked.ways:
        found, margins = segment_with_margins(segmenter, seen, case.case_id)
    image = preprocess_volume(volume, preset)
    names = asked.labels.split(",") if asked.labels else list(preset.label_indices)
    made = []
    for group in [[name] for name in names] if asked.each_label else [names]:
        start = Start(case, volume, image, found, {n: preset.label_indices[n] for n in group}, asked.empty, margins)
        right = start.counted(truth)
        if right.any():
            made.append((start, right))
    return made


def main() -> None:
    """Print the table, and write it as JSON."""
    asked = parse()
    names = asked.ways.split(",")
    checkpoint = read_checkpoint(asked.weights or MODEL / asked.preset / "shipped.pt")
    preset = checkpoint.preset or load_preset(asked.preset)
    segmenter = Segmenter.from_checkpoint(checkpoint, preset, torch.device("cpu"))
    editor = Editor.from_file(asked.editor, torch.device("cpu")) if "editor" in names else None
    cases, trainable, held_out = choose_cases(asked)
    deepedit = None
    if "deepedit" in names:
        deepedit = DeepEdit(preset, dict(checkpoint.model))
        steps = deepedit.train([read_material(case, preset, None) for case in trainable], asked.train_deepedit)
        print(f"DeepEdit style: {steps} steps in {asked.train_deepedit:g} minutes on {len(trainable)} cases")
    rows: dict[str, list[EditingScores]] = {}
    with ExitStack() as opened:
        url, slicer = asked.server, None
        if url == OWN:
            images = {case.case_id: image_of(case, preset, asked, seed)[1] for seed, case in enumerate(cases)}
            url = opened.enter_context(own_server(preset, images, asked.empty, asked.weights))
        if url:
            slicer = Slicer(url, preset, Path(opened.enter_context(tempfile.TemporaryDirectory())))
        for seed, case in enumerate(cases):
            for start, right in starts_of(case, preset, segmenter, asked, seed):
                clicking = None if asked.largest else seed
                for name, (begin, edit) in ways_of(start, editor, deepedit, slicer, asked).items():
                    made = simulate_editing(
                        begin, right, start.volume.spacing_mm, start.indices, edit, clicking, True, asked.scribbles
                    )
                    rows.setdefault(name, []).append(made)
        if slicer is not None:
            print(f"the server's clicks corrected: {', '.join(sorted(slicer.starts))}")
    prompts = "scribbles" if asked.scribbles else "clicks"
    kind, unit = "held-out" if held_out else "not held-out", "label" if asked.each_label else "case"
    begun = "an empty mask" if asked.empty else "the automatic mask" + " of a changed image" * asked.changed_image
    print(
        f"{preset.name}: mean Dice (worst {unit}) of {len(cases)} {kind} cases from {begun}, after {prompts} a {unit}"
    )
    best = best_ball(rows)
    show({name: found for name, found in rows.items() if not name.startswith(BALL) or name == best})
    if best:
        print(f"the best of balls of {', '.join(f'{mm:g}' for mm in asked.balls)} mm after ten clicks: {best}")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory at most")
    result = {"preset": preset.name, "cases": [c.case_id for c in cases], "held_out": held_out, "empty": asked.empty,
              "ways": {name: [asdict(f) for f in found] for name, found in rows.items()}}  # fmt: skip
    file = asked.out or Path(__file__).with_name(f"interaction-{preset.name}{'-empty' if asked.empty else ''}.json")
    file.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
