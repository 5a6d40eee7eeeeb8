"""Drawn CT crops of limbs, heads and chests, in which none of a preset's organs is, and arms beside real bodies."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable
from scipy import ndimage
from torch.nn import functional

from lib.transforms.intensity import Windowed

Volume = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Random = np.random.RandomState

AIR_HU, FAT_HU = -1000.0, -100.0
ARM_SPACE_MM = 100.0
"""What a case becomes wider by on each side, for an arm."""


class RandPhantomd(MapTransform, Randomizable):
    """Replaces a crop by a drawn one whose label is background, with a given probability.

    A network that has seen nothing but abdomens takes the muscles of a thigh for a liver.

    Args:
        image: dictionary key of the image of a crop, a tensor of shape (1, X, Y, Z).
        cleared: keys of tensors that become 0: the label, and what is said about where it comes from.
        probability: probability of a replacement.
        spacing_mm: edges of a voxel.
        window: lowest and highest HU of the network's intensities.
    """

    def __init__(
        self,
        image: str,
        cleared: Sequence[str],
        probability: float,
        spacing_mm: Sequence[float],
        window: tuple[float, float],
    ) -> None:
        MapTransform.__init__(self, (image, *cleared))
        self.image, self.cleared, self.probability = image, tuple(cleared), probability
        self.spacing_mm, self.window = tuple(spacing_mm), window

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw an image of the same shape, or change nothing."""
        changed = dict(data)
        if self.R.random() >= self.probability:
            return changed
        drawn = draw_phantom(changed[self.image].shape[1:], self.spacing_mm, self.R)
        changed[self.image] = _as_image(drawn, self.window)
        changed |= {key: torch.zeros_like(torch.as_tensor(changed[key])) for key in self.cleared}
        return changed


class RandArmsd(MapTransform, Randomizable):
    """Lays drawn arms on both sides of the body of a case, with a given probability.

    In training images arms are often raised out of the picture. A network that knows them from phantoms alone takes
    them for a sign that no organ is near. Half of the cases are then cut to what a window at one of the sides shows,
    since crops around organs rarely lie there.

    Args:
        image, label: dictionary keys of the case, tensors of shape (1, X, Y, Z) with X from right to left or back; the
            lowest value of the image, 0, is air.
        probability: probability of a change.
        spacing_mm: edges of a voxel.
        window: lowest and highest HU of the network's intensities.
        side_voxels: voxels along X of a case that is cut to one side.
    """

    def __init__(
        self,
        image: str,
        label: str,
        probability: float,
        spacing_mm: Sequence[float],
        window: tuple[float, float],
        side_voxels: int,
    ) -> None:
        MapTransform.__init__(self, (image, label))
        self.image, self.label, self.probability, self.side_voxels = image, label, probability, side_voxels
        self.spacing_mm, self.window = tuple(spacing_mm), window

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add arms in what the case becomes wider by, or change nothing."""
        changed = dict(data)
        if self.R.random() >= self.probability:
            return changed
        width = round(ARM_SPACE_MM / self.spacing_mm[0])
        image, label = (
            functional.pad(torch.as_tensor(changed[key]).as_subclass(torch.Tensor), (0, 0, 0, 0, width, width))
            for key in (self.image, self.label)
        )
        for side in (slice(0, 2 * width), slice(image.shape[1] - 2 * width, None)):
            image[:, side] = self._with_arm(image[:, side])
        if self.R.random() < 0.5:
            least = min(self.side_voxels, image.shape[1])
            start = int(self.R.randint(0, max(1, width // 2)))
            start = start if self.R.random() < 0.5 else max(0, image.shape[1] - least - start)
            image, label = (tensor[:, start : start + least].contiguous() for tensor in (image, label))
        return {**changed, self.image: image, self.label: label}

    def _with_arm(self, part: torch.Tensor) -> torch.Tensor:
        """An arm about the middle of what is free on this side, hidden by the body where that is in its way."""
        shape = tuple(part.shape[1:])
        reach = np.array(shape[:2]) * np.array(self.spacing_mm[:2]) / 2
        middle = np.array([*(self.R.uniform(-0.6, 0.6, size=2) * reach), 0])
        hu: Volume = np.full(shape, AIR_HU, dtype=np.float32)
        radii = self.R.uniform(25, 50) * self.R.uniform(0.85, 1.15, size=2)
        _draw_limb(hu, _tilted_grid(shape, self.spacing_mm, self.R), middle, radii, self.R)
        return torch.where(part <= 0, _as_image(_as_scanned(hu, self.R), self.window), part)


def draw_phantom(shape: Sequence[int], spacing_mm: Sequence[float], random: Random) -> Volume:
    """Draw a part of a limb, a head or a chest in HU, with blurred borders, texture and noise.

    Shapes, sizes, densities and the position of the crop in the body are random. The long axis of the body is the third
    one of the image, but for a random tilt.

    Args:
        shape: (X, Y, Z).
        spacing_mm: edges of a voxel.
        random: source of all randomness.
    """
    grid = _tilted_grid(shape, spacing_mm, random)
    hu: Volume = np.full(tuple(shape), AIR_HU, dtype=np.float32)
    draw: Callable[[Volume, Volume, Random], None] = (_draw_limbs, _draw_head, _draw_chest)[random.choice(3)]
    draw(hu, grid, random)
    return _as_scanned(hu, random)


def _as_scanned(hu: Volume, random: Random) -> Volume:
    """With blurred borders, texture and noise."""
    hu = ndimage.gaussian_filter(hu, random.uniform(0.2, 0.6))
    texture = ndimage.gaussian_filter(random.standard_normal(hu.shape).astype(np.float32), random.uniform(0.5, 1.5))
    hu += texture * np.float32(random.uniform(0, 15) / max(float(texture.std()), 1e-6))
    hu += random.standard_normal(hu.shape).astype(np.float32) * np.float32(random.uniform(0, 12))
    return hu


def _as_image(hu: Volume, window: tuple[float, float]) -> torch.Tensor:
    """The network's intensities, shape (1, X, Y, Z)."""
    image = MetaTensor(torch.from_numpy(hu)[None])
    scaled: MetaTensor = Windowed(("image",), *window)({"image": image})["image"]
    return scaled.as_subclass(torch.Tensor)


def _tilted_grid(shape: Sequence[int], spacing_mm: Sequence[float], random: Random) -> Volume:
    """Coordinates of all voxels in mm, from the middle of the crop, shape (3, X, Y, Z)."""
    axes = [
        (np.arange(length, dtype=np.float32) - (length - 1) / 2) * np.float32(spacing)
        for length, spacing in zip(shape, spacing_mm, strict=True)
    ]
    grid: Volume = np.stack(np.meshgrid(*axes, indexing="ij"))
    for first, second in ((1, 2), (0, 2), (0, 1)):
        angle = random.normal(0, np.radians(8))
        cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        a, b = grid[first], grid[second]
        grid[first], grid[second] = cosine * a - sine * b, sine * a + cosine * b
    return grid


def _draw_limbs(hu: Volume, grid: Volume, random: Random) -> None:
    """One or two limbs: skin fat, muscles with fat between them, a bone or two, vessels."""
    radius = random.uniform(30, 110)
    shift = random.uniform(-70, 70, size=2)
    for side in (-1, 1) if random.random() < 0.6 else (0,):
        middle = np.array([shift[0] + side * radius * random.uniform(0.95, 1.5), shift[1], 0])
        radii = radius * random.uniform(0.85, 1.15, size=2)
        _draw_limb(hu, grid, middle, radii, random)


def _draw_limb(hu: Volume, grid: Volume, middle: Any, radii: Any, random: Random) -> None:
    _soft_part(hu, grid, middle, radii, random)
    for _ in range(random.randint(1, 3)):
        _bone(hu, grid, middle[:2] + random.uniform(-0.35, 0.35, size=2) * radii, random.uniform(7, 22), random)
    for _ in range(random.randint(0, 4)):
        place = middle[:2] + random.uniform(-0.6, 0.6, size=2) * radii
        hu[_tube(grid, place, random.uniform(2, 6, size=2))] = random.uniform(40, 250)


def _draw_head(hu: Volume, grid: Volume, random: Random) -> None:
    """A head, a neck, or the passage between them: brain in a skull, air in the nose, vertebrae and trachea."""
    middle = np.array([*random.uniform(-50, 50, size=2), random.uniform(-130, 60)])
    radii = np.array([random.uniform(65, 85), random.uniform(80, 105), random.uniform(90, 120)])
    neck = middle + np.array([0, -0.2 * radii[1], 0])
    below = grid[2] < middle[2] - 0.6 * radii[2]
    _soft_part(hu, grid, neck, random.uniform(45, 75, size=2), random, within=below)
    hu[_ellipsoid(grid, middle, radii)] = random.uniform(-90, 60)
    skull = radii - random.uniform(4, 12)
    hu[_ellipsoid(grid, middle, skull)] = random.uniform(400, 1200)
    hu[_ellipsoid(grid, middle, skull - random.uniform(4, 9))] = random.uniform(20, 45)
    for side in (-1, 1):
        place = middle + np.array([side * random.uniform(6, 16), random.uniform(-15, 15), random.uniform(0, 25)])
        hu[_ellipsoid(grid, place, random.uniform((4, 12, 6), (10, 32, 16)))] = random.uniform(0, 15)
    for _ in range(random.randint(0, 5)):
        place = middle + np.array([random.uniform(-35, 35), 0.75 * radii[1], -random.uniform(0.1, 0.7) * radii[2]])
        hu[_ellipsoid(grid, place, random.uniform(6, 25, size=3))] = random.choice([-950.0, 40.0])
    hu[_tube(grid, _beside(neck, 0, random.uniform(10, 30)), random.uniform(6, 10, size=2)) & below] = -980
    _bone(hu, grid, _beside(neck, 0, -random.uniform(5, 25)), random.uniform(10, 20), random, within=below)
    for side in (-1, 1):
        place = _beside(neck, side * random.uniform(20, 40), random.uniform(-5, 20))
        hu[_tube(grid, place, random.uniform(2, 7, size=2)) & below] = random.uniform(40, 300)


def _draw_chest(hu: Volume, grid: Volume, random: Random) -> None:
    """A chest above the diaphragm: lungs with vessels, heart, airways, spine and ribs.

    It has no descending aorta and no oesophagus, which are organs of abdominal presets.
    """
    middle = np.array([*random.uniform(-110, 110, size=2), random.uniform(-80, 80)])
    radii = np.array([random.uniform(140, 190), random.uniform(95, 130)])
    _soft_part(hu, grid, middle, radii, random)
    lung = radii - random.uniform(15, 40)
    for side in (-1, 1):
        place = middle + np.array([side * lung[0] * random.uniform(0.45, 0.55), 0, random.uniform(-20, 20)])
        size = np.array([lung[0] * random.uniform(0.38, 0.46), lung[1] * random.uniform(0.75, 0.95), 300])
        inside = _ellipsoid(grid, place, size)
        hu[inside] = random.uniform(-920, -700)
        for _ in range(random.randint(0, 12)):
            at = place + random.uniform(-0.7, 0.7, size=3) * (size[0], size[1], 90)
            hu[inside & _ellipsoid(grid, at, random.uniform((2, 2, 4), (9, 9, 40)))] = 50
    if random.random() < 0.7:
        place = middle + np.array([random.uniform(-35, 15), random.uniform(10, 45), random.uniform(-60, 60)])
        size = np.array([random.uniform(40, 70), random.uniform(35, 55), random.uniform(40, 70)])
        hu[_ellipsoid(grid, place, size)] = random.uniform(30, 70)
        for _ in range(random.randint(1, 5)):
            at = place + random.uniform(-0.4, 0.4, size=3) * size
            hu[_ellipsoid(grid, at, size * random.uniform(0.3, 0.6, size=3))] = random.uniform(40, 250)
    for _ in range(random.randint(0, 4)):
        place = _beside(middle, random.uniform(-25, 25), random.uniform(0, 50))
        hu[_tube(grid, place, random.uniform(5, 14, size=2))] = random.choice([-980.0, 40.0, random.uniform(60, 250)])
    _bone(hu, grid, _beside(middle, 0, -0.7 * radii[1]), random.uniform(14, 22), random)
    _ribs(hu, grid, middle, radii - random.uniform(8, 25), random)


def _soft_part(
    hu: Volume, grid: Volume, middle: npt.NDArray[np.float64], radii: Any, random: Random, within: Mask | bool = True
) -> None:
    """A part of the body along the third axis: fat below the skin, then muscles of several densities."""
    hu[_tube(grid, middle[:2], radii) & within] = FAT_HU + random.uniform(-20, 20)
    muscle = np.maximum(np.asarray(radii) - random.uniform(2, 30), 5)
    flesh = _tube(grid, middle[:2], muscle) & within
    density = random.uniform(25, 95)
    hu[flesh] = density
    for _ in range(random.randint(0, 10)):
        place = middle[:2] + random.uniform(-0.8, 0.8, size=2) * muscle
        part = flesh & _tube(grid, place, random.uniform(0.1, 0.6, size=2) * muscle)
        hu[part] = density + random.normal(0, 15)
    for _ in range(random.randint(0, 6)):
        normal = random.standard_normal(3) * (1, 1, 0.3)
        normal /= max(float(np.linalg.norm(normal)), 1e-6)
        place = middle + np.array([*(random.uniform(-0.7, 0.7, size=2) * muscle), 0])
        distance = np.tensordot(normal.astype(np.float32), grid, axes=1) - np.float32(normal @ place)
        hu[flesh & (np.abs(distance) < random.uniform(0.5, 3))] = FAT_HU + random.uniform(-10, 60)


def _bone(hu: Volume, grid: Volume, place: Any, radius: float, random: Random, within: Mask | bool = True) -> None:
    """A bone along the third axis, with marrow."""
    radii = radius * random.uniform(0.8, 1.2, size=2)
    hu[_tube(grid, place, radii) & within] = random.uniform(300, 1200)
    hu[_tube(grid, place, radii * random.uniform(0.4, 0.85)) & within] = random.uniform(-60, 250)


def _ribs(hu: Volume, grid: Volume, middle: npt.NDArray[np.float64], radii: Any, random: Random) -> None:
    """Rings of ribs in the wall of a chest, sloping forwards."""
    thickness, distance = random.uniform(5, 10), random.uniform(20, 35)
    wall = _tube(grid, middle[:2], radii) & ~_tube(grid, middle[:2], radii - thickness)
    height = grid[2] + np.float32(random.uniform(-0.5, 0.5)) * grid[1] + np.float32(random.uniform(0, distance))
    hu[wall & (height % np.float32(distance) < random.uniform(6, 12))] = random.uniform(250, 800)


def _beside(place: Any, x_mm: float, y_mm: float) -> npt.NDArray[np.float64]:
    """A place in the plane of the first two axes."""
    beside: npt.NDArray[np.float64] = np.asarray(place[:2]) + np.array([x_mm, y_mm])
    return beside


def _tube(grid: Volume, place: Any, radii: Any) -> Mask:
    """A tube of elliptical section along the third axis."""
    inside: Mask = sum(((grid[axis] - place[axis]) / np.float32(radii[axis])) ** 2 for axis in (0, 1)) <= 1
    return inside


def _ellipsoid(grid: Volume, middle: Any, radii: Any) -> Mask:
    inside: Mask = sum(((grid[axis] - middle[axis]) / np.float32(radii[axis])) ** 2 for axis in (0, 1, 2)) <= 1
    return inside
