"""Draw README's picture: a synthetic case with its reference contour and the shipped model's.

    .venv/bin/python docs/make_picture.py

It needs the test tools (``run.py setup --dev``), since it draws with matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sample-data")]

from synthetic_hippocampus import SyntheticCase, draw_case  # noqa: E402

from lib.cases.metrics import dice_per_label  # noqa: E402
from lib.configs.catalogue import load_preset  # noqa: E402
from lib.infers.segmenter import Segmenter  # noqa: E402
from lib.models.weights import WeightsLocator, preset_for  # noqa: E402
from lib.networks.checkpoint import read_checkpoint  # noqa: E402
from lib.transforms.volume import Volume  # noqa: E402

PLANES = (("sagittal", 0, "A", "S"), ("coronal", 1, "R", "S"), ("axial", 2, "R", "A"))
"""Name, the axis looked along, and the directions in which the picture's horizontal and vertical axes grow (RAS)."""

LabelArray = npt.NDArray[np.uint8]


def main() -> None:
    """Draw one case and write the picture."""
    parser = argparse.ArgumentParser(description="Draw a synthetic case with reference and prediction.")
    parser.add_argument("--case", type=int, default=0, help="number of the synthetic case (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the synthetic cases (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "segmentation.png")
    options = parser.parse_args()
    segmenter = load_shipped("hippocampus_mr")
    case = draw_case(options.case, options.seed)
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


def draw(case: SyntheticCase, predicted: LabelArray, segmenter: Segmenter) -> Figure:
    """Three planes through the middle of the reference: filled is the prediction, dashed the reference."""
    matplotlib.use("Agg")
    widths = [case.image.shape[1 if axis == 0 else 0] for _, axis, _, _ in PLANES]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    centre = np.argwhere(case.label > 0).mean(axis=0).round().astype(int)
    low, high = np.percentile(case.image, (0.5, 99.5))
    for axes, (name, axis, right, up) in zip(figure.subplots(1, 3, width_ratios=widths), PLANES, strict=True):
        image, reference, prediction = (
            np.take(volume, centre[axis], axis=axis).T for volume in (case.image, case.label, predicted)
        )
        axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="bicubic")
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


def _scores(case: SyntheticCase, predicted: LabelArray, segmenter: Segmenter) -> str:
    dice = dice_per_label(predicted, case.label, segmenter.preset.label_indices)
    scores = ", ".join(f"{name} {value:.2f}" for name, value in dice.items())
    return f"synthetic case: prediction in colour, reference dashed; Dice {scores}"


if __name__ == "__main__":
    main()
