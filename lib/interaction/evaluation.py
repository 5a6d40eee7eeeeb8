"""Measures how masks improve with clicks and scribbles of a simulated annotator, who knows the reference masks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor

from lib.cases.labelled import Case, read_case
from lib.cases.metrics import dice_per_label, mean_known, surface_per_label
from lib.configs.preset import Preset
from lib.infers.logit_margins import LogitMargins
from lib.infers.segmenter import Segmenter
from lib.interaction.annotator import Correction, next_prompt, prompts_of
from lib.interaction.editing import Scene, edit_clicks
from lib.interaction.editor import Editor
from lib.transforms.postprocess import restore_to_grid
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import Affine, Volume

LabelArray = npt.NDArray[np.uint8]
STOPS = (0, 1, 3, 5, 10)
"""Numbers of clicks or scribbles after which masks are scored."""
Edit = Callable[[LabelArray, Sequence[Correction]], LabelArray]
"""The mask after prompts, from the mask of before the last one, and the voxels of all prompts so far."""


@dataclass
class EditingScores:
    """Scores of one editing method on one mask.

    Attributes:
        dice: mean over the labels after 0, 1, 2 ... clicks or scribbles.
        surface: mean surface Dice at each of the stops; empty if it was not asked for.
        seconds: duration of each click or scribble.
    """

    dice: list[float] = field(default_factory=list)
    surface: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def simulate_editing(
    start: LabelArray,
    truth: LabelArray,
    spacing_mm: Sequence[float],
    indices: Mapping[str, int],
    edit: Edit,
    seed: int | None,
    surface: bool = False,
    scribbles: bool = False,
) -> EditingScores:
    """Correct a mask by simulated clicks or scribbles up to the last stop, and score it.

    Args:
        start, truth: the mask to correct and the reference mask, shape (X, Y, Z).
        spacing_mm: voxel size of both masks.
        indices: labels to score, by name.
        edit: the editing method.
        seed: seed of the simulated annotator, who makes the same clicks for the same masks; None for one who always
            clicks the largest wrong component.
        surface: whether the surface Dice is computed at the stops, with the largest voxel edge as tolerance.
        scribbles: whether the annotator scribbles instead of clicking; the editing method gets the voxels of all
            scribbles so far.
    """
    labels, corrected, followed = start, list[Correction](), EditingScores()
    random = None if seed is None else np.random.default_rng(seed)
    for count in range(STOPS[-1] + 1):
        taken = [voxel.point for voxel in corrected]
        prompt = next_prompt(labels, truth, spacing_mm, random, taken, scribbles) if count else ()
        if prompt:
            corrected.extend(prompt)
            began = time.perf_counter()
            labels = edit(labels, corrected)
            followed.seconds.append(time.perf_counter() - began)
        followed.dice.append(mean_known(dice_per_label(labels, truth, indices).values()))
        if surface and count in STOPS:
            _, near = surface_per_label(labels, truth, indices, spacing_mm, max(spacing_mm))
            followed.surface.append(mean_known(near.values()))
    return followed


@dataclass(frozen=True)
class JudgedCase:
    """A held-out case on its preset's grid.

    Attributes:
        case_id: its id.
        image: preprocessed image, shape (1, X, Y, Z).
        truth, automatic: the reference mask and the preset's own mask, reduced to the labels that the reference covers.
        indices: those labels, by name.
        margins: of the network that made the mask; None where there was no network.
    """

    case_id: str
    image: MetaTensor
    truth: LabelArray
    automatic: LabelArray
    indices: Mapping[str, int]
    margins: LogitMargins | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of memory that the case takes."""
        margins = self.margins.nbytes if self.margins is not None else 0
        return int(self.image.nbytes + self.truth.nbytes + self.automatic.nbytes) + margins


def segment_with_margins(segmenter: Segmenter, volume: Volume, name: str) -> tuple[LabelArray, LogitMargins | None]:
    """The mask of an image on its own grid, and the network's logit margins on the network's grid.

    Raises:
        ImageError: if the image cannot be segmented.
    """
    computed = segmenter.compute(volume, name=name, margins=True)
    return segmenter.restore(computed).labels, computed.prediction.margins


def read_judged(case: Case, preset: Preset, segmenter: Segmenter | None) -> JudgedCase:
    """Read and segment a held-out case; without a network, the clicks start from an empty mask.

    Raises:
        ImageError, LabelError: when image or label cannot be used.
    """
    volume, truth = read_case(case, preset)
    image = preprocess_volume(volume, preset)
    place = preset.display_channel
    voxels, affine = image.as_subclass(torch.Tensor)[place : place + 1], image.affine.numpy()
    automatic, margins = (
        (np.zeros_like(truth), None) if segmenter is None else segment_with_margins(segmenter, volume, case.case_id)
    )
    indices = {name: value for name, value in preset.label_indices.items() if value not in case.missing}
    on_grid = []
    for mask in (truth, automatic):
        known = np.where(np.isin(mask, list(indices.values())), mask, 0).astype(np.uint8)
        on_grid.append(restore_to_grid(known, volume.affine_ras, tuple(voxels.shape[1:]), affine))
    return JudgedCase(
        case.case_id, MetaTensor(voxels.clone(), affine=image.affine), on_grid[0], on_grid[1], indices, margins
    )


def score_clicks(cases: Sequence[JudgedCase], editor: Editor | None) -> dict[str, list[float]]:
    """Mean Dice of each case at each stop, with an editor, or with region growing where there is none.

    The annotator's seed is the index of the case, so that two editors get the same clicks where their masks are the
    same.
    """
    scores = {}
    for seed, case in enumerate(cases):
        affine = np.asarray(case.image.affine.numpy(), dtype=np.float64)

        def edit(
            _: LabelArray, clicks: Sequence[Correction], case: JudgedCase = case, affine: Affine = affine
        ) -> LabelArray:
            scene = Scene(case.image, case.automatic, affine, margins=case.margins)
            return edit_clicks(scene, prompts_of(clicks), editor).labels

        spacing_mm = [float(s) for s in np.linalg.norm(affine[:3, :3], axis=0)]
        followed = simulate_editing(case.automatic, case.truth, spacing_mm, case.indices, edit, seed)
        if not math.isnan(followed.dice[0]):
            scores[case.case_id] = [followed.dice[stop] for stop in STOPS]
    return scores
