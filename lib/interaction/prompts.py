"""Clicks, scribbles and boxes of a user as immutable records, independent of the viewer that sent them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lib.errors import ParameterError

Voxel = tuple[int, int, int]
Shape = tuple[int, int, int]

MOST_POINTS = 500
"""Largest number of points in one request, which is more than any user clicks."""


@dataclass(frozen=True)
class Box:
    """A box of voxels, outside of which nothing changes.

    Attributes:
        start: index of its first voxel.
        stop: index one beyond its last voxel, along each axis.
    """

    start: Voxel
    stop: Voxel

    def __contains__(self, voxel: Voxel) -> bool:
        return all(low <= v < high for low, v, high in zip(self.start, voxel, self.stop, strict=True))

    def clipped(self, shape: Shape) -> Box:
        """The part of the box that lies inside an image.

        Raises:
            ParameterError: if no part of the box lies inside.
        """
        stop = tuple(min(high, size) for high, size in zip(self.stop, shape, strict=True))
        if any(low >= high for low, high in zip(self.start, stop, strict=True)):
            ends = ", ".join(f"0 to {size - 1}" for size in shape)
            raise ParameterError(
                "roi", f"voxels {list(self.start)} to {[v - 1 for v in self.stop]}", f"some of the voxels {ends}"
            )
        return Box(self.start, (stop[0], stop[1], stop[2]))


@dataclass(frozen=True)
class Prompts:
    """Clicks on one image, in voxels of its own grid.

    Attributes:
        positive: for each label value, the points that belong to this label.
        negative: points that belong to none of the labels that were clicked.
        of_label: the label that negative points remove; None to remove whichever label is drawn there.
        box: region outside of which nothing changes; None for no box.
    """

    positive: tuple[tuple[int, tuple[Voxel, ...]], ...] = ()
    negative: tuple[Voxel, ...] = ()
    of_label: int | None = None
    box: Box | None = None

    def __post_init__(self) -> None:
        owner: dict[Voxel, str] = dict.fromkeys(self.negative, "background")
        for value, points in self.positive:
            for point in points:
                if owner.setdefault(point, str(value)) != str(value):
                    valid = "each voxel for one label, or for the background; take one of the two points away"
                    raise ParameterError("points", list(point), valid)

    @property
    def is_empty(self) -> bool:
        """Whether there are no points."""
        return not self.positive and not self.negative

    @property
    def points(self) -> tuple[Voxel, ...]:
        """All points, positive and negative."""
        return tuple(p for _, points in self.positive for p in points) + self.negative

    def key(self) -> Hashable:
        """A key that is equal for the same prompts, in whatever order they were clicked."""
        return tuple((value, tuple(sorted(p))) for value, p in self.positive), self.negative, self.of_label, self.box

    def check_inside(self, shape: Shape) -> None:
        """Refuse points outside of the image or of the box.

        Raises:
            ParameterError: naming the point and the valid range.
        """
        for point in self.points:
            if not all(0 <= v < size for v, size in zip(point, shape, strict=True)):
                ends = ", ".join(f"0 to {size - 1}" for size in shape)
                raise ParameterError("points", list(point), f"a voxel of the image: {ends}")
            if self.box is not None and point not in self.box:
                last = [v - 1 for v in self.box.stop]
                raise ParameterError("points", list(point), f"inside of roi, from {list(self.box.start)} to {last}")


def make_prompts(
    positive: Mapping[int, Iterable[Voxel]],
    negative: Iterable[Voxel] = (),
    of_label: int | None = None,
    box: Box | None = None,
) -> Prompts:
    """Prompts with sorted, distinct points.

    Raises:
        ParameterError: if a voxel is clicked for two labels, or if there are too many points.
    """
    sides = tuple((value, tuple(sorted(set(points)))) for value, points in sorted(positive.items()))
    made = Prompts(tuple(side for side in sides if side[1]), tuple(sorted(set(negative))), of_label, box)
    if len(made.points) > MOST_POINTS:
        raise ParameterError("points", f"{len(made.points)} points", f"at most {MOST_POINTS}")
    return made


def parse_points(value: Any, name: str) -> list[Voxel]:
    """Parse points as viewers send them: a list of ``[i, j, k]``.

    Raises:
        ParameterError: naming the malformed point.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise ParameterError(name, _shorten(value), "a list of points [i, j, k]")
    if len(value) > MOST_POINTS:
        raise ParameterError(name, f"{len(value)} points", f"at most {MOST_POINTS}")
    return [_parse_voxel(point, name) for point in value]


def parse_box(value: Any) -> Box | None:
    """Parse a box as 3D Slicer sends it: ``[i0, i1, j0, j1, k0, k1]``, where a pair may descend; empty for no box.

    The box may extend beyond the image, whose size is unknown here: see :meth:`Box.clipped`.

    Raises:
        ParameterError: if the value is not a box, or if the box lies before the first voxel of the image.
    """
    valid = "[i0, i1, j0, j1, k0, k1] in voxels"
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) != 6 or not all(_is_number(v) for v in value):
        raise ParameterError("roi", _shorten(value), valid)
    pairs = [sorted(round(v) for v in value[2 * axis : 2 * axis + 2]) for axis in range(3)]
    lows, highs = [max(0, pair[0]) for pair in pairs], [pair[1] + 1 for pair in pairs]
    if any(low >= high for low, high in zip(lows, highs, strict=True)):
        raise ParameterError("roi", _shorten(value), f"{valid}, inside of the image")
    return Box((lows[0], lows[1], lows[2]), (highs[0], highs[1], highs[2]))


def _parse_voxel(point: Any, name: str) -> Voxel:
    if not isinstance(point, list) or len(point) != 3:
        raise ParameterError(name, _shorten(point), "points of three whole numbers [i, j, k]")
    if not all(_is_number(v) and v == int(v) for v in point):
        raise ParameterError(name, _shorten(point), "points of three whole numbers [i, j, k]")
    i, j, k = (int(v) for v in point)
    return i, j, k


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _shorten(value: Any, most: int = 100) -> Any:
    text = repr(value)
    return value if len(text) <= most else text[:most] + "..."
