"""Drawn CTs of body parts without abdominal organs; not by the code that draws crops for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lib.transforms.volume import Volume

SPACING_MM = (2.0, 2.0, 3.0)
AIR, FAT, MUSCLE, BONE = -1000, -100, 55, 800

Grid = Sequence[npt.NDArray[np.float32]]
Mask = npt.NDArray[np.bool_]


def _grid(shape: tuple[int, int, int]) -> Grid:
    """Coordinates in mm from the middle, right to left, back to front, feet to head."""
    ends = [(n - 1) / 2 * s for n, s in zip(shape, SPACING_MM, strict=True)]
    axes = [np.linspace(-end, end, n, dtype=np.float32) for end, n in zip(ends, shape, strict=True)]
    return np.meshgrid(*axes, indexing="ij", sparse=True)


def _inside(grid: Grid, middle: Sequence[float], radii: Sequence[float]) -> Mask:
    """An ellipsoid, or with two radii a tube from feet to head."""
    distance = sum(((x - at) / radius) ** 2 for x, at, radius in zip(grid, middle, radii, strict=False))
    return np.broadcast_to(np.asarray(distance) <= 1, np.broadcast_shapes(*(axis.shape for axis in grid)))


def _finish(hu: npt.NDArray[np.float32]) -> Volume:
    """Blur of a scanner, and noise of 12 HU."""
    blurred = ndimage.gaussian_filter(hu, [0.8 / spacing for spacing in SPACING_MM])
    noise = np.random.default_rng(0).normal(0, 12, hu.shape)
    return Volume((blurred + noise).astype(np.float32), np.diag([*SPACING_MM, 1.0]))


def draw_head() -> Volume:
    """A head and a neck: skull, brain, ventricles, nose, vertebrae, trachea, carotid arteries."""
    grid = _grid((128, 128, 80))
    hu = np.full((128, 128, 80), AIR, dtype=np.float32)
    middle = (0, 0, 10)
    for radii, value in (((82, 100, 115), -70), ((79, 97, 112), 40), ((76, 94, 108), BONE), ((69, 87, 101), 35)):
        hu[_inside(grid, middle, radii)] = value
    for side in (-1, 1):
        hu[_inside(grid, (side * 12, 10, 20), (8, 28, 14))] = 5
    hu[_inside(grid, (0, 80, -40), (25, 18, 22))] = -950
    hu[_inside(grid, (0, 70, -75), (30, 25, 18))] = 50
    neck = _inside(grid, (0, -20), (62, 58)) & (grid[2] < -95)
    hu[neck] = MUSCLE
    for place, radii, value in (((0, -35), (18, 18), 400), ((0, 5), (9, 9), -980), ((30, 0), (5, 5), 200)):
        hu[neck & _inside(grid, place, radii)] = value
    return _finish(hu)


def draw_legs() -> Volume:
    """Two thighs: skin, muscle, femur, vessels."""
    grid = _grid((210, 128, 150))
    hu = np.full((210, 128, 150), AIR, dtype=np.float32)
    for side in (-1, 1):
        parts = (
            ((95, 0), (85, 90), FAT),
            ((95, 0), (72, 77), MUSCLE),
            ((120, -35), (22, 16), MUSCLE + 10),
            ((90, 10), (15, 15), BONE),
            ((90, 10), (8, 8), -40),
            ((70, -10), (5, 5), 180),
        )
        for place, radii, value in parts:
            hu[_inside(grid, (side * place[0], place[1]), radii)] = value
    return _finish(hu)


def draw_chest() -> Volume:
    """A chest above the diaphragm: lungs, heart and vessels with contrast, oesophagus, trachea, spine, ribs."""
    grid = _grid((200, 150, 90))
    hu = np.full((200, 150, 90), AIR, dtype=np.float32)
    hu[_inside(grid, (0, 0), (180, 120))] = FAT
    hu[_inside(grid, (0, 0), (165, 105))] = 50
    for side in (-1, 1):
        hu[_inside(grid, (side * 80, 0, 0), (68, 88, 150))] = -850
    hu[_inside(grid, (-20, 35, -60), (58, 45, 55))] = 150
    hu[_inside(grid, (-28, -45), (13, 13))] = 190
    hu[_inside(grid, (0, -75), (20, 18))] = 350
    hu[_inside(grid, (-5, -32), (9, 6))] = 35
    hu[_inside(grid, (0, 10), (9, 9)) & (grid[2] > 30)] = -980
    hu[_inside(grid, (25, 25), (10, 10)) & (grid[2] > -10)] = 190
    wall = _inside(grid, (0, 0), (163, 103)) & ~_inside(grid, (0, 0), (152, 92))
    hu[wall & ((grid[2] + 20 * np.arctan2(grid[1], grid[0])) % 25 < 9)] = 500
    return _finish(hu)


BODY_PARTS: Mapping[str, Callable[[], Volume]] = {"head": draw_head, "legs": draw_legs, "chest": draw_chest}


def lay_arms_beside(volume: Volume, width_voxels: int) -> Volume:
    """A CT with an arm on either side, in what the image is wider by; axes right to left, back to front, feet to head.

    Args:
        volume: the CT.
        width_voxels: of what is added on each side.
    """
    wider = np.pad(volume.voxels, [(width_voxels, width_voxels), (0, 0), (0, 0)], constant_values=volume.voxels.min())
    spacing = np.linalg.norm(volume.affine_ras[:3, :3], axis=0)
    radius = 0.45 * width_voxels * spacing[0]
    x, y = (np.arange(length, dtype=np.float32)[:, None] for length in wider.shape[:2])
    for at in (width_voxels / 2, wider.shape[0] - 1 - width_voxels / 2):
        distance = np.hypot((x - at) * spacing[0], (y.T - wider.shape[1] / 2) * spacing[1])
        for part, value in ((1, FAT), (0.85, MUSCLE), (0.3, BONE), (0.18, -40)):
            wider[distance < part * radius] = value
    affine = volume.affine_ras.copy()
    affine[:3, 3] -= width_voxels * affine[:3, 0]
    return Volume(wider, affine)
