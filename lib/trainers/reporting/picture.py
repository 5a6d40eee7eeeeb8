"""A slice of a case with the contours of both masks, as a self-contained SVG image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lib.drawing.contours import hex_color, inline_png, outline_path
from lib.transforms.volume import FloatArray

LabelArray = npt.NDArray[np.uint8]
WIDTH_PIXELS = 360


def draw_slice(
    image: FloatArray, reference: LabelArray, predicted: LabelArray, colors: Mapping[int, tuple[int, ...]]
) -> str:
    """The slice along the last axis in which both masks differ most, with their contours.

    Args:
        image: intensities, shape (X, Y, Z).
        reference: reference labels of the same shape, drawn as dashed white lines.
        predicted: predicted labels of the same shape, drawn in the labels' colours.
        colors: label value to red, green, blue.

    Returns:
        An ``<svg>`` element, the image inside it as PNG.
    """
    place = int((reference != predicted).sum(axis=(0, 1)).argmax())
    grey, ours, theirs = (np.flipud(array[:, :, place].T) for array in (image, reference, predicted))
    height, width = grey.shape
    drawn = [f'<image width="{width}" height="{height}" href="{_as_png(grey)}" style="image-rendering:pixelated"/>']
    for value, color in colors.items():
        stroke = hex_color(color)
        drawn.append(f'<path d="{outline_path(theirs == value)}" stroke="{stroke}" stroke-width="0.5" fill="none"/>')
        style = 'stroke="#fff" stroke-width="0.35" stroke-dasharray="1 0.7" fill="none"'
        drawn.append(f'<path d="{outline_path(ours == value)}" {style}/>')
    size = f'width="{WIDTH_PIXELS}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(drawn)}</svg>'


def _as_png(grey: FloatArray) -> str:
    low, high = np.percentile(grey, (0.5, 99.5))
    shades = np.clip((grey - low) / max(float(high - low), 1e-6) * 255, 0, 255).astype(np.uint8)
    return inline_png(shades)
