"""Solids that are defined by a formula, so that they can be sampled on any grid: what the torso phantom is made of.

Each has ``contains(points_mm)`` and an axis-aligned box, ``low_mm`` to ``high_mm``, that holds it. Points are given as
three arrays that broadcast to one shape; coordinates are millimetres in RAS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Vector = npt.NDArray[np.float64]
Triple = tuple[float, float, float]


class Solid(Protocol):
    """Anything with an inside."""

    @property
    def low_mm(self) -> Vector:
        """The box's least corner."""
        ...

    @property
    def high_mm(self) -> Vector:
        """The box's greatest corner."""
        ...

    def contains(self, points_mm: Sequence[FloatArray]) -> Mask:
        """Which points lie inside."""
        ...


@dataclass(frozen=True)
class Superellipsoid:
    """``|x/a|^n + |y/b|^n + |z/c|^n < 1`` in axes of its own: an ellipsoid for n = 2, boxier above (Barr 1981).

    Attributes:
        center_mm: RAS.
        semi_axes_mm: a, b, c.
        rotation_degrees: about x, then y, then z.
        exponent: n, at least 1.
        bumps: relative depth of a waviness of the surface, so that an organ does not look turned on a lathe.

    Raises:
        ValueError: for semi-axes that are not above 0, an exponent below 1, or bumps outside 0 to 0.3.
    """

    center_mm: Triple
    semi_axes_mm: Triple
    rotation_degrees: Triple = (0.0, 0.0, 0.0)
    exponent: float = 2.0
    bumps: float = 0.0

    def __post_init__(self) -> None:
        if min(self.semi_axes_mm) <= 0:
            raise ValueError(f"semi_axes_mm {self.semi_axes_mm} must all be above 0")
        if self.exponent < 1:
            raise ValueError(f"exponent {self.exponent} must be 1 or more")
        if not 0 <= self.bumps <= 0.3:
            raise ValueError(f"bumps {self.bumps} must lie from 0 to 0.3")

    @property
    def reach_mm(self) -> Vector:
        """Half the size of the box: that of the rotated corners of the solid's own box."""
        corners = np.abs(rotation_matrix(self.rotation_degrees)) @ np.array(self.semi_axes_mm)
        reach: Vector = corners * (1 + self.bumps)
        return reach

    @property
    def low_mm(self) -> Vector:
        """The box's least corner."""
        return np.array(self.center_mm) - self.reach_mm

    @property
    def high_mm(self) -> Vector:
        """The box's greatest corner."""
        return np.array(self.center_mm) + self.reach_mm

    def contains(self, points_mm: Sequence[FloatArray]) -> Mask:
        """Which points lie inside."""
        rows = (rotation_matrix(self.rotation_degrees).T / np.array(self.semi_axes_mm)[:, None]).astype(np.float32)
        offsets = [part - np.float32(start) for part, start in zip(points_mm, self.center_mm, strict=True)]
        own = [row[0] * offsets[0] + row[1] * offsets[1] + row[2] * offsets[2] for row in rows]
        if self.exponent == 2:
            level = own[0] * own[0] + own[1] * own[1] + own[2] * own[2]
        else:
            level = sum(np.abs(part) ** np.float32(self.exponent) for part in own)
        if not self.bumps:
            return np.asarray(level < 1)
        wave = np.sin(4 * own[0] + 1) * np.sin(4 * own[1] + 2) * np.sin(4 * own[2] + 3)
        return np.asarray(level < (1 + np.float32(self.bumps) * wave) ** np.float32(self.exponent))


@dataclass(frozen=True)
class Tube:
    """Round cones between consecutive points: a vessel.

    Attributes:
        points_mm: at least two, RAS.
        radii_mm: one a point.

    Raises:
        ValueError: for fewer than two points, another number of radii, or a radius that is not above 0.
    """

    points_mm: tuple[Triple, ...]
    radii_mm: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.points_mm) < 2 or len(self.radii_mm) != len(self.points_mm):
            raise ValueError(
                f"a tube has at least two points and a radius for each, not {len(self.points_mm)} points and "
                f"{len(self.radii_mm)} radii"
            )
        if min(self.radii_mm) <= 0:
            raise ValueError(f"radii_mm {self.radii_mm} must all be above 0")

    @property
    def low_mm(self) -> Vector:
        """The box's least corner."""
        low: Vector = (np.array(self.points_mm) - np.array(self.radii_mm)[:, None]).min(axis=0)
        return low

    @property
    def high_mm(self) -> Vector:
        """The box's greatest corner."""
        high: Vector = (np.array(self.points_mm) + np.array(self.radii_mm)[:, None]).max(axis=0)
        return high

    def contains(self, points_mm: Sequence[FloatArray]) -> Mask:
        """Which points lie inside."""
        inside: Mask = np.zeros(np.broadcast_shapes(*[part.shape for part in points_mm]), dtype=bool)
        ends = zip(self.points_mm[:-1], self.points_mm[1:], self.radii_mm[:-1], self.radii_mm[1:], strict=True)
        for start, end, start_radius, end_radius in ends:
            inside |= _in_segment(points_mm, start, end, start_radius, end_radius)
        return inside


def _in_segment(points_mm: Sequence[FloatArray], start: Triple, end: Triple, from_mm: float, to_mm: float) -> Mask:
    """Whether points lie within a radius, which changes evenly along the segment, of the segment."""
    along = np.subtract(end, start)
    length_squared = max(float(along @ along), 1e-12)
    offsets = [part - np.float32(at) for part, at in zip(points_mm, start, strict=True)]
    share = sum(np.float32(step / length_squared) * part for step, part in zip(along, offsets, strict=True))
    share = np.clip(share, 0, 1)
    squared = sum((part - np.float32(step) * share) ** 2 for step, part in zip(along, offsets, strict=True))
    radius = np.float32(from_mm) + np.float32(to_mm - from_mm) * share
    return np.asarray(squared < radius * radius)


def rotation_matrix(degrees: Triple) -> Vector:
    """Rotation about x, then y, then z, as a 3x3 matrix that turns column vectors."""
    about_x, about_y, about_z = np.deg2rad(degrees)
    (cx, sx), (cy, sy), (cz, sz) = ((np.cos(a), np.sin(a)) for a in (about_x, about_y, about_z))
    x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    rotation: Vector = z @ y @ x
    return rotation
