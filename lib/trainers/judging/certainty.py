"""Suits the limits of ``component_entropy`` to new weights.

The limits of a preset belong to weights that were trained for long: real organs have a third of them. After the first
hundreds of steps from random weights a network finds organs, but is sure of nothing, and the same limits would leave
its masks empty.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from lib.cases.labelled import Case, read_case
from lib.configs.preset import Preset
from lib.errors import MemoryBudgetError
from lib.infers.plan import Planner
from lib.infers.segmenter import Segmenter
from lib.networks.checkpoint import Checkpoint
from lib.networks.layouts import StateDict
from lib.transforms.postprocess import NEIGHBOURS, certain_tenth, find_boxes

logger = logging.getLogger("unetr.train")

MOST_CASES = 4
# Times the entropy of the least certain organ that is right, as the preset's own limits were chosen.
MARGIN = 3.0
# The largest limit that a preset may have, which no component exceeds.
NO_LIMIT = math.nextafter(1.0, 0.0)


def suit_limits(preset: Preset, segmenter_of: Callable[[Preset], Segmenter], cases: Sequence[Case]) -> Preset:
    """The preset with limits that a network's own right components stay within, on cases of known label.

    A limit is only ever raised. A label of which no component is right in any of the cases has no limit.

    Args:
        preset: the preset of the network.
        segmenter_of: returns the network's segmenter for a preset with other limits.
        cases: cases of the training, of which some are looked at.

    Raises:
        InputError: if a case cannot be read.
    """
    limits = dict(preset.inference.component_entropy)
    if not limits:
        return preset
    segmenter = segmenter_of(preset.with_component_entropy({}))
    entropies: dict[str, list[float]] = {name: [] for name in limits}
    for case in _some(cases):
        volume, label = read_case(case, preset)
        try:
            segmentation = segmenter.segment(volume, largest_component=False, name=case.case_id, entropy=True)
        except MemoryBudgetError as error:
            logger.warning("%s is not looked at for the limits of component_entropy: %s", case.case_id, error)
            continue
        assert segmentation.entropy is not None
        boxes = find_boxes(segmentation.labels, len(preset.labels))
        for name, of_name in entropies.items():
            index = preset.label_indices[name]
            if (label == index).any():
                box = boxes[index - 1] or (slice(0),) * 3
                mask, truth = segmentation.labels[box] == index, label[box] == index
                of_name.append(entropy_of_right_component(mask, truth, segmentation.entropy[box]))
    suited = {name: _limit(limits[name], of_name) for name, of_name in entropies.items()}
    raised = [f"{name} {limits[name]:g} to {limit:.3g}" for name, limit in suited.items() if limit > limits[name]]
    if raised:
        logger.info("the weights are less certain than component_entropy asks; raised: %s", ", ".join(raised))
    return preset.with_component_entropy(suited)


def suit_limits_of_weights(
    preset: Preset, weights: StateDict, cases: Sequence[Case], device: torch.device, planner: Planner | None = None
) -> Preset:
    """:func:`suit_limits` for weights of the preset's UNETR.

    Args:
        preset: the preset of the weights.
        weights: the weights.
        cases: cases of the training, of which some are looked at.
        device: device of the computation.
        planner: memory planner; by default within the free memory.

    Raises:
        InputError: if a case cannot be read.
    """

    def segmenter_of(other: Preset) -> Segmenter:
        return Segmenter.from_checkpoint(Checkpoint(weights, other), other, device, planner=planner)

    return suit_limits(preset, segmenter_of, cases)


def is_sure(start: Preset | None, preset: Preset) -> bool:
    """Whether the weights that a training goes on from meet the limits of a preset as it is configured.

    Args:
        start: the preset of these weights; None if there are none, or if it is not known.
        preset: the configured preset.
    """
    limits = dict(preset.inference.component_entropy)
    return start is not None and all(limits.get(n, 1) >= limit for n, limit in start.inference.component_entropy)


def entropy_of_right_component(
    mask: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_], entropy: npt.NDArray[np.float32]
) -> float:
    """Entropy of the most certain tenth of the largest component that lies in the truth by half; infinity if none does.

    Args:
        mask: of a label, shape (X, Y, Z).
        truth: its true mask, of the same shape.
        entropy: of each voxel, of the same shape.
    """
    components, count = ndimage.label(mask, structure=NEIGHBOURS)
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    inside = np.bincount(components[truth], minlength=count + 1)
    right = np.where(2 * inside >= sizes, sizes, 0)
    right[0] = 0
    return certain_tenth(entropy[components == right.argmax()]) if right.any() else math.inf


def _limit(configured: float, entropies: Sequence[float]) -> float:
    """The limit of a label that is within :data:`MARGIN` of what was seen."""
    seen = [entropy for entropy in entropies if math.isfinite(entropy)]
    return min(NO_LIMIT, max(configured, MARGIN * max(seen))) if seen else NO_LIMIT


def _some(cases: Sequence[Case]) -> list[Case]:
    """A few of the cases at even distances; each of an oversampled one once."""
    single = list({case.case_id: case for case in cases}.values())
    return single[:: math.ceil(len(single) / MOST_CASES)] if single else []
