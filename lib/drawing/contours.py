"""Outlines of masks, as SVG paths and as pixels of an image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

Line = Literal["solid", "dashed", "dotted"]
DASHES: Mapping[Line, tuple[int, int]] = {"solid": (1, 1), "dashed": (10, 6), "dotted": (4, 2)}
"""Period of a dashed line and length of its dashes, in pixels."""


def outline_path(mask: npt.NDArray[np.bool_]) -> str:
    """The outline of a mask of shape (rows, columns) along the edges of its pixels, as an SVG path.

    >>> import numpy as np
    >>> outline_path(np.array([[True]]))
    'M0 0h1M0 1h1M0 0v1M1 0v1'
    """
    padded = np.pad(mask, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # edges between a pixel and the one above it
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    return "".join([*(f"M{x} {y}h1" for y, x in across), *(f"M{x} {y}v1" for y, x in down)])


def draw_outline(
    picture: npt.NDArray[np.float32],
    labels: npt.NDArray[np.generic],
    colors: Mapping[int, tuple[int, ...]],
    line: Line,
) -> None:
    """Draw the outlines of a slice's labels, two pixels wide, into an image.

    Args:
        picture: red, green, blue from 0 to 255, shape (rows, columns, 3); modified in place.
        labels: labels of the slice, shape (rows, columns), which are enlarged to the size of the image.
        colors: label value to red, green, blue.
        line: line style, which distinguishes different masks.
    """
    size = picture.shape[1], picture.shape[0]
    enlarged = np.asarray(Image.fromarray(np.ascontiguousarray(labels)).resize(size, Image.Resampling.NEAREST))
    rows, columns = np.indices(enlarged.shape)
    period, drawn = DASHES[line]
    shown = (rows + columns) % period < drawn
    for value, color in colors.items():
        inside = enlarged == value
        edge = inside & ~ndimage.binary_erosion(inside, iterations=2, border_value=1)
        picture[edge & shown] = color


def hex_color(color: Sequence[int]) -> str:
    """A colour in HTML notation.

    >>> hex_color((255, 0, 16))
    '#ff0010'
    """
    return "#{:02x}{:02x}{:02x}".format(*color[:3])


def inline_png(shades: npt.NDArray[np.uint8]) -> str:
    """A PNG image as a data URL."""
    file = io.BytesIO()
    Image.fromarray(shades).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
