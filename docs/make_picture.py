"""Draw README's pictures: a synthetic case with its reference contour and the shipped model's mask.

    .venv/bin/python docs/make_picture.py
    .venv/bin/python docs/make_picture.py --what abdomen --out docs/images/abdomen.png

It needs the test tools (``run.py setup --dev``), since it draws with matplotlib.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sample-data")]

from synthetic_abdomen import draw_abdomen  # noqa: E402
from synthetic_hippocampus import draw_case  # noqa: E402

from lib.cases.metrics import dice_per_label  # noqa: E402
from lib.configs.catalogue import load_preset  # noqa: E402
from lib.infers.segmenter import Segmenter  # noqa: E402
from lib.models.weights import WeightsLocator, preset_for  # noqa: E402
from lib.networks.checkpoint import read_checkpoint  # noqa: E402
from lib.transforms.volume import Volume  # noqa: E402

PLANES = (("sagittal", 0, "A", "S"), ("coronal", 1, "R", "S"), ("axial", 2, "R", "A"))
"""Name, the axis looked along, and the directions in which the picture's horizontal and vertical axes grow (RAS)."""

LabelArray = npt.NDArray[np.uint8]
PRESETS = {"hippocampus": "hippocampus_mr", "abdomen": "abdomen_ct"}
SOFT_TISSUE_HU = (-160.0, 240.0)
WORST_DICE_IN_THE_TITLE = 0.7
LETTERS_IN_A_LINE = 120


@dataclass(frozen=True)
class Case:
    """A drawn image with its reference, axes to right, anterior, superior, and the intensities that are shown.

    Attributes:
        image: shape (X, Y, Z).
        label: reference, of the same shape.
        affine_ras: 4x4, from voxels to millimetres.
        window: what is shown black and white.
    """

    image: npt.NDArray[np.float32]
    label: LabelArray
    affine_ras: npt.NDArray[np.float64]
    window: tuple[float, float]


def draw_synthetic(what: str, number: int, seed: int) -> Case:
    """A case of the sample data."""
    if what == "abdomen":
        scan = draw_abdomen(number, seed)
        return Case(scan.image_hu.astype(np.float32), scan.label, scan.affine_ras, SOFT_TISSUE_HU)
    crop = draw_case(number, seed)
    low, high = np.percentile(crop.image, (0.5, 99.5))
    return Case(crop.image, crop.label, crop.affine_ras, (float(low), float(high)))


def main() -> None:
    """Draw one case and write the picture."""
    parser = argparse.ArgumentParser(description="Draw a synthetic case with reference and prediction.")
    parser.add_argument("--what", choices=sorted(PRESETS), default="hippocampus")
    parser.add_argument("--case", type=int, default=0, help="number of the synthetic case (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the synthetic cases (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "segmentation.png")
    options = parser.parse_args()
    segmenter = load_shipped(PRESETS[options.what])
    case = draw_synthetic(options.what, options.case, options.seed)
    predicted = segmenter.segment(Volume(case.image, case.affine_ras)).labels
    figure = draw(case, predicted, segmenter)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # without the metadata, the same picture is the same file
    figure.savefig(options.out, dpi=110, facecolor="white", metadata={"Software": None})
    print(f"{options.out} ({options.out.stat().st_size / 1000:.0f} kB)")


def load_shipped(name: str) -> Segmenter:
    """The segmenter that a fresh install serves."""
    checkpoint = read_checkpoint(WeightsLocator(ROOT / "model" / name).shipped)
    preset = preset_for(checkpoint, load_preset(name))
    return Segmenter.from_checkpoint(checkpoint, preset, torch.device("cpu"), "fp32")


def draw(case: Case, predicted: LabelArray, segmenter: Segmenter) -> Figure:
    """Three planes through the middle of the reference: filled is the prediction, dashed the reference."""
    matplotlib.use("Agg")
    widths = [case.image.shape[1 if axis == 0 else 0] for _, axis, _, _ in PLANES]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    spacing_mm = np.linalg.norm(case.affine_ras[:3, :3], axis=0)
    centre = np.argwhere(case.label > 0).mean(axis=0).round().astype(int)
    for axes, (name, axis, right, up) in zip(figure.subplots(1, 3, width_ratios=widths), PLANES, strict=True):
        image, reference, prediction = (
            np.take(volume, centre[axis], axis=axis).T for volume in (case.image, case.label, predicted)
        )
        axes.imshow(
            image, cmap="gray", vmin=case.window[0], vmax=case.window[1], origin="lower", interpolation="bicubic"
        )
        across, along = [edge for index, edge in enumerate(spacing_mm) if index != axis]
        axes.set_aspect(along / across)
        for label in segmenter.preset.labels:
            color = tuple(part / 255 for part in label.color)
            shown = prediction == label.index
            if shown.any():
                axes.contourf(shown, levels=[0.5, 1.5], colors=[color], alpha=0.35)
                axes.contour(shown, levels=[0.5], colors=[color], linewidths=1.6)
            if (reference == label.index).any():
                axes.contour(
                    reference == label.index, levels=[0.5], colors="white", linewidths=1.2, linestyles="dashed"
                )
        axes.set_title(name)
        axes.set_xlabel(f"{right} →", loc="right", fontsize=8)
        axes.set_ylabel(f"{up} →", loc="top", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(_scores(case, predicted, segmenter), fontsize=11)
    return figure


def _scores(case: Case, predicted: LabelArray, segmenter: Segmenter) -> str:
    dice = dice_per_label(predicted, case.label, segmenter.preset.label_indices)
    good = {name: value for name, value in dice.items() if value >= WORST_DICE_IN_THE_TITLE}
    scores = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in good.items())
    rest = f"; {len(dice) - len(good)} others below {WORST_DICE_IN_THE_TITLE}" if len(good) < len(dice) else ""
    lines = textwrap.wrap(f"Dice {scores}{rest}", LETTERS_IN_A_LINE)
    return "\n".join(["synthetic case: prediction in colour, reference dashed", *lines])


if __name__ == "__main__":
    main()
