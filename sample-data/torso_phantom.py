"""An analytic CT of a torso with the 13 organs of BTCV (``abdomen_ct``), for geometry tests and benchmarks.

    >>> from torso_phantom import draw_torso, grid_affine, render
    >>> affine_ras = grid_affine((64, 64, 50), (6.4, 6.4, 8.0), "LPS")
    >>> case = render(draw_torso(seed=0), (64, 64, 50), affine_ras)
    >>> case.image_hu.dtype, case.label.dtype, int(case.label.max())
    (dtype('int16'), dtype('uint8'), 13)

Organs are solids in millimetres (RAS; the origin lies in the middle of the body at about the first lumbar vertebra),
so that the same torso can be sampled with any shape, spacing, orientation and obliqueness. Hounsfield units are those
of a portal venous phase. The organs' places and sizes follow an adult's; it is a phantom, not a statistical model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import nibabel as nib
import numpy as np
import numpy.typing as npt
from implicit_solids import FloatArray, Solid, Superellipsoid, Triple, Tube, rotation_matrix
from scipy import ndimage

Affine = npt.NDArray[np.float64]
Shape = tuple[int, int, int]

ORGANS = {
    "spleen": 1,
    "right_kidney": 2,
    "left_kidney": 3,
    "gallbladder": 4,
    "esophagus": 5,
    "liver": 6,
    "stomach": 7,
    "aorta": 8,
    "inferior_vena_cava": 9,
    "portal_and_splenic_veins": 10,
    "pancreas": 11,
    "right_adrenal_gland": 12,
    "left_adrenal_gland": 13,
}
"""BTCV's names and numbers (Synapse, Multi-Atlas Labeling Beyond the Cranial Vault)."""

FULL_SHAPE: Shape = (512, 512, 200)
FIELD_OF_VIEW_MM: Triple = (409.6, 409.6, 400.0)
AIR_HU = -1000
NOISE_HU = 22.0
"""Standard deviation before the reconstruction kernel's smoothing."""
KERNEL_SIGMA_VOXELS = 0.7
SLAB_VOXELS = 2_500_000
"""Voxels at a time: what is held beside the result is some tens of megabytes."""
DEVIATION_LIMIT = 2.0


@dataclass(frozen=True)
class Tissue:
    """A solid with what a scanner sees in it.

    Attributes:
        name: an organ's, or that of a tissue without a label.
        solid: where it is.
        hu: Hounsfield units.
    """

    name: str
    solid: Solid
    hu: int

    @property
    def label(self) -> int:
        """The organ's number, 0 for all else."""
        return ORGANS.get(self.name, 0)


@dataclass(frozen=True)
class Torso:
    """Tissues in the order in which they are laid down; a later one replaces the earlier ones."""

    seed: int
    tissues: tuple[Tissue, ...]


@dataclass(frozen=True)
class TorsoCase:
    """A sampled torso.

    Attributes:
        image_hu: shape (X, Y, Z), int16.
        label: BTCV's numbers, the same shape, uint8.
        affine_ras: 4x4, voxel indices to millimetres in RAS.

    Raises:
        ValueError: for shapes that differ or are not 3D.
    """

    image_hu: npt.NDArray[np.int16]
    label: npt.NDArray[np.uint8]
    affine_ras: Affine

    def __post_init__(self) -> None:
        if self.image_hu.shape != self.label.shape or self.label.ndim != 3:
            raise ValueError(f"image {self.image_hu.shape} and label {self.label.shape} must be 3D and of one shape")


def draw_torso(seed: int = 0) -> Torso:
    """The torso of a seed: sizes and places differ by a few per cent and millimetres, within two deviations.

    Raises:
        ValueError: for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed ({seed}) must be 0 or more")
    random = np.random.default_rng([seed, 13])
    # Every tissue of a name moves as one, so that parts of an organ stay together.
    moves = {tissue.name: _draw_move(random) for tissue in _adult() if tissue.label}
    varied = (
        replace(tissue, solid=_moved(tissue.solid, moves[tissue.name])) if tissue.label else tissue
        for tissue in _adult()
    )
    return Torso(seed, tuple(varied))


def grid_affine(
    shape: Shape,
    spacing_mm: Triple,
    axcodes: str = "RAS",
    rotation_degrees: Triple = (0.0, 0.0, 0.0),
    center_ras_mm: Triple = (0.0, 0.0, 0.0),
) -> Affine:
    """Affine (4x4, to RAS millimetres) of a grid around a point.

    Args:
        shape: voxels along each array axis.
        spacing_mm: along each array axis.
        axcodes: where the array axes lead to, for example ``LPS``.
        rotation_degrees: of the grid about x, y and z: an oblique affine.
        center_ras_mm: the grid's middle.

    Raises:
        ValueError: for a size or spacing that is not above 0, or axis codes that do not name the three axes.
    """
    if min(shape) < 1 or min(spacing_mm) <= 0:
        raise ValueError(f"shape {shape} and spacing_mm {spacing_mm} must all be above 0")
    if sorted(code in "RL" or (code in "AP") * 2 or (code in "SI") * 3 for code in axcodes) != [1, 2, 3]:
        raise ValueError(f"axcodes {axcodes!r} must name each axis once: one of R and L, of A and P, of S and I")
    ornt = nib.orientations.axcodes2ornt(tuple(axcodes))
    linear = np.zeros((3, 3))
    for index, (axis, sign) in enumerate(ornt):
        linear[int(axis), index] = sign * spacing_mm[index]
    affine = np.eye(4)
    affine[:3, :3] = rotation_matrix(rotation_degrees) @ linear
    affine[:3, 3] = np.array(center_ras_mm) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def spacing_for(shape: Shape) -> Triple:
    """Millimetres along x, y, z with which a shape covers the whole field of view."""
    x, y, z = (extent / size for extent, size in zip(FIELD_OF_VIEW_MM, shape, strict=True))
    return x, y, z


def render(torso: Torso, shape: Shape, affine_ras: Affine, noise_hu: float = NOISE_HU) -> TorsoCase:
    """Sample a torso on a grid: tissue at each voxel's centre, the scanner's blur in the plane, and its noise.

    The work is done slab by slab along the last array axis.

    Args:
        torso: what to sample.
        shape: voxels along each array axis.
        affine_ras: 4x4, indices to RAS millimetres; any orientation, any obliqueness.
        noise_hu: standard deviation of the noise before smoothing, 0 for none.

    Raises:
        ValueError: for a shape that is not 3D, an affine that cannot be inverted, or negative noise.
    """
    if len(shape) != 3 or min(shape) < 1 or noise_hu < 0:
        raise ValueError(f"shape {shape} must be three numbers above 0, and noise_hu ({noise_hu}) 0 or more")
    if affine_ras.shape != (4, 4) or abs(np.linalg.det(affine_ras)) < 1e-9:
        raise ValueError(f"affine_ras must be 4x4 and invertible, and is {affine_ras.tolist()}")
    image = np.full(shape, AIR_HU, dtype=np.int16)
    label = np.zeros(shape, dtype=np.uint8)
    for slab in _slabs(shape):
        for tissue in torso.tissues:
            _lay_down(tissue, image, label, affine_ras, slab)
        for index in range(slab.start, slab.stop):
            image[..., index] = _scan(image[..., index], noise_hu, np.random.default_rng([torso.seed, index, 7]))
    return TorsoCase(image, label, affine_ras)


def _slabs(shape: Shape) -> Iterator[slice]:
    thickness = max(1, SLAB_VOXELS // (shape[0] * shape[1]))
    return (slice(start, min(start + thickness, shape[2])) for start in range(0, shape[2], thickness))


def _lay_down(
    tissue: Tissue, image: npt.NDArray[np.int16], label: npt.NDArray[np.uint8], affine_ras: Affine, slab: slice
) -> None:
    """Write a tissue's values, in place, wherever it lies in the slab."""
    box = _voxel_box(tissue.solid, affine_ras, image.shape, slab)
    if any(part.start >= part.stop for part in box):
        return
    inside = tissue.solid.contains(_points_ras_mm(affine_ras, box))
    image[box][inside] = tissue.hu
    label[box][inside] = tissue.label


def _voxel_box(solid: Solid, affine_ras: Affine, shape: Sequence[int], slab: slice) -> tuple[slice, slice, slice]:
    """The voxels of the slab that can lie in the solid: those in the box around its box's corners."""
    limits = np.stack([solid.low_mm, solid.high_mm])
    corners = np.array([[limits[i, 0], limits[j, 1], limits[k, 2], 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    indices = (np.linalg.inv(affine_ras) @ corners.T)[:3]
    low = np.maximum(np.floor(indices.min(axis=1)).astype(int), [0, 0, slab.start])
    high = np.minimum(np.ceil(indices.max(axis=1)).astype(int) + 1, [shape[0], shape[1], slab.stop])
    x, y, z = (slice(int(start), int(stop)) for start, stop in zip(low, high, strict=True))
    return x, y, z


def _points_ras_mm(affine_ras: Affine, box: Sequence[slice]) -> list[FloatArray]:
    """Coordinates of a box's voxels, as three arrays that broadcast to its shape."""
    axes = np.ogrid[tuple(box)]
    points = []
    for row in affine_ras[:3]:
        # Axes that a coordinate does not depend on stay of size 1: on an upright grid that saves most of the work.
        terms = [(row[axis] * axes[axis]).astype(np.float32) for axis in range(3) if abs(row[axis]) > 1e-9]
        total = np.asarray(sum(terms, start=np.zeros((1, 1, 1), dtype=np.float32)) + np.float32(row[3]))
        points.append(total.astype(np.float32))
    return points


def _scan(slice_hu: npt.NDArray[np.int16], noise_hu: float, random: np.random.Generator) -> npt.NDArray[np.int16]:
    """Blur and noise of the reconstruction in one slice."""
    noisy = slice_hu.astype(np.float32)
    if noise_hu:
        noisy += np.float32(noise_hu) * random.standard_normal(slice_hu.shape, dtype=np.float32)
    blurred = ndimage.gaussian_filter(noisy, KERNEL_SIGMA_VOXELS, mode="nearest", truncate=3)
    scanned: npt.NDArray[np.int16] = np.clip(np.rint(blurred), -1024, 3071).astype(np.int16)
    return scanned


@dataclass(frozen=True)
class _Move:
    """How one organ of one person differs from the adult's."""

    shift_mm: npt.NDArray[np.float64]
    scale: float
    rotation_degrees: npt.NDArray[np.float64]


def _draw_move(random: np.random.Generator) -> _Move:
    drawn: npt.NDArray[np.float64] = np.clip(random.standard_normal(7), -DEVIATION_LIMIT, DEVIATION_LIMIT)
    return _Move(drawn[:3] * 1.5, float(1 + 0.04 * drawn[3]), drawn[4:] * 3.0)


def _moved(solid: Solid, move: _Move) -> Solid:
    if isinstance(solid, Superellipsoid):
        return replace(
            solid,
            center_mm=_triple(np.add(solid.center_mm, move.shift_mm)),
            semi_axes_mm=_triple(np.multiply(solid.semi_axes_mm, move.scale)),
            rotation_degrees=_triple(np.add(solid.rotation_degrees, move.rotation_degrees)),
        )
    if isinstance(solid, Tube):
        points = tuple(_triple(np.add(point, move.shift_mm)) for point in solid.points_mm)
        return Tube(points, tuple(radius * move.scale for radius in solid.radii_mm))
    raise TypeError(f"a {type(solid).__name__} cannot be moved; known are Superellipsoid and Tube")


def _triple(values: npt.NDArray[np.float64]) -> Triple:
    x, y, z = (float(value) for value in values)
    return x, y, z


def _adult() -> list[Tissue]:
    """All tissues, from the outside in."""
    return [*_body_wall(), *_chest(), *_liver(), *_skeleton(), *_bowel(), *_abdominal_organs(), *_vessels()]


def _body_wall() -> list[Tissue]:
    """Skin, fat, muscle, and the fat of the abdominal cavity; it goes on beyond the field of view."""
    ring = [("skin", 172, 122, 20), ("fat", 170, 120, -105), ("muscle", 152, 101, 55), ("cavity_fat", 138, 86, -100)]
    tissues = [Tissue(name, _column((0, 0), (x, y), 2.4), hu) for name, x, y, hu in ring]
    for side in (-1, 1):
        tissues += [
            Tissue("muscle", _column((side * 38, -84), (30, 20), 2.4), 58),
            Tissue(
                "muscle", Tube(((side * 30, -50, 0), (side * 48, -45, -120), (side * 75, -20, -210)), (8, 20, 22)), 60
            ),
        ]
    return tissues


def _column(center_mm: tuple[float, float], semi_axes_mm: tuple[float, float], exponent: float) -> Superellipsoid:
    """A solid that runs through the whole field of view from bottom to top."""
    return Superellipsoid((*center_mm, 0.0), (*semi_axes_mm, 2000.0), exponent=exponent)


def _skeleton() -> list[Tissue]:
    tissues = [Tissue("disc", Tube(((0, -55, -260), (0, -50, -100), (0, -56, 60), (0, -62, 260)), (19,) * 4), 90)]
    for level in range(-7, 7):
        z = level * 33.0 + 10
        y = -56.0 if z > -20 else -52.0
        tissues += [
            Tissue("bone", Superellipsoid((0, y, z), (22, 17, 13), exponent=4), 520),
            Tissue("marrow", Superellipsoid((0, y, z), (20, 15, 11.5), exponent=4), 190),
            Tissue("bone", Superellipsoid((0, -98, z - 6), (4, 14, 9), (-20, 0, 0)), 420),
            Tissue("bone", Superellipsoid((0, -80, z), (38, 6, 6), exponent=3), 380),
        ]
    tissues.append(Tissue("spinal_canal", _column((0, -80), (9, 8), 2), 30))
    for side in (-1, 1):
        tissues += [Tissue("rib", _rib(side, 40.0 + 26 * number), 380) for number in range(7)]
        wing = Superellipsoid((side * 92, -38, -185), (9, 55, 48), (0, side * 18, side * -30), exponent=2.4)
        tissues.append(Tissue("bone", wing, 450))
    return tissues


def _rib(side: int, height_mm: float) -> Tube:
    """From the spine round to the front, sloping down."""
    angles = np.deg2rad(np.linspace(-65, 50, 10))
    points = tuple((side * 148 * np.cos(a), 100 * np.sin(a), height_mm - 22 * (a + 1)) for a in angles)
    return Tube(tuple(_triple(np.array(point)) for point in points), (5.0,) * len(points))


def _chest() -> list[Tissue]:
    tissues = [
        Tissue("lung", Superellipsoid((side * 72, -8, 185), (62, 82, 112), (6, 0, 0), exponent=2.5), -840)
        for side in (-1, 1)
    ]
    return [*tissues, Tissue("heart", Superellipsoid((-18, 34, 165), (62, 46, 50), (0, -25, 0)), 120)]


def _liver() -> list[Tissue]:
    """Two lobes, and the fat behind them in which the right adrenal gland and the vena cava lie."""
    return [
        Tissue("liver", Superellipsoid((66, 4, 58), (73, 76, 62), (0, -14, 12), exponent=2.3, bumps=0.05), 108),
        Tissue("liver", Superellipsoid((2, 48, 76), (62, 32, 28), (0, 12, -8), bumps=0.05), 108),
        Tissue("cavity_fat", Superellipsoid((24, -46, 44), (34, 26, 50), exponent=2.5), -100),
    ]


def _bowel() -> list[Tissue]:
    """Loops of small bowel and a colon with some gas."""
    random = np.random.default_rng(2015)  # the same loops in everyone: nothing is labelled here
    ends = [
        _triple(np.array([80 * np.cos(3.1 * t), 30 + 28 * np.sin(2.3 * t), -150 + 5.5 * t]) + random.normal(0, 8, 3))
        for t in range(22)
    ]
    loops = [Tissue("bowel", Tube((a, b), (13, 13)), 45) for a, b in pairwise(ends)]
    transverse = ((118, 5, -20), (60, 62, -40), (0, 68, -45), (-60, 62, -30), (-118, 5, 5))
    tissues = [*loops]
    for path in (((112, -5, -170), (118, 5, -20)), transverse, ((-118, 5, 5), (-112, -10, -190))):
        tissues += [
            Tissue("colon", Tube(path, (20,) * len(path)), 50),
            Tissue("colon_content", Tube(path, (17,) * len(path)), 20),
        ]
    return [*tissues, Tissue("gas", Tube(tuple((x, y + 6, z) for x, y, z in transverse[1:4]), (9, 9, 9)), -900)]


def _abdominal_organs() -> list[Tissue]:
    """The other organs; where two meet, the later one is on top."""
    stomach = Tube(((-72, -8, 92), (-74, 22, 62), (-56, 50, 30), (-22, 60, 8), (12, 48, 6)), (30, 33, 28, 20, 13))
    content = Tube(stomach.points_mm, tuple(radius - 4 for radius in stomach.radii_mm))
    return [
        Tissue("stomach", stomach, 85),
        Tissue("stomach", content, 18),
        Tissue("stomach", Superellipsoid((-64, 47, 60), (18, 9, 24), (30, 0, 0)), -880),
        Tissue("spleen", Superellipsoid((-106, -38, 62), (27, 44, 52), (18, -8, 22), bumps=0.05), 122),
        Tissue(
            "pancreas",
            Tube(((34, 14, -22), (30, 22, 4), (8, 34, 12), (-28, 20, 24), (-72, -14, 44)), (15, 16, 11, 12, 10)),
            98,
        ),
        Tissue("right_kidney", Superellipsoid((64, -48, -14), (27, 26, 55), (-8, 12, -25), bumps=0.04), 185),
        Tissue("right_kidney", Superellipsoid((60, -46, -14), (15, 13, 36), (-8, 12, -25)), 140),
        Tissue("left_kidney", Superellipsoid((-64, -48, -2), (27, 26, 56), (-8, -12, 25), bumps=0.04), 185),
        Tissue("left_kidney", Superellipsoid((-60, -46, -2), (15, 13, 37), (-8, -12, 25)), 140),
        Tissue("gallbladder", Superellipsoid((48, 54, 4), (15, 18, 30), (-35, 10, 0)), 8),
    ]


def _vessels() -> list[Tissue]:
    """Vessels, oesophagus and adrenal glands: small, so they go on top."""
    vena_cava = ((24, -22, -118), (22, -22, -20), (24, -18, 50), (26, -4, 100), (20, 10, 125))
    aorta = ((-12, -24, 240), (-14, -26, 120), (-8, -24, 20), (-4, -24, -110))
    portal = ((-86, -26, 52), (-58, -16, 38), (-24, 6, 23), (14, 19, 14), (26, 12, 40), (46, 16, 62))
    tissues = [Tissue("iliac", Tube((aorta[-1], (side * 42, -30, -200)), (8, 7)), 160) for side in (-1, 1)]
    tissues += [Tissue("iliac", Tube((vena_cava[0], (10 + side * 36, -38, -205)), (9, 8)), 130) for side in (-1, 1)]
    return [
        *tissues,
        Tissue("inferior_vena_cava", Tube(vena_cava, (11, 11, 12, 12, 13)), 130),
        Tissue("esophagus", Tube(((-2, -14, 240), (-4, -6, 150), (-18, -2, 116), (-48, -4, 98)), (9, 9, 9, 9)), 48),
        Tissue("aorta", Tube(aorta, (12, 11.5, 10, 9)), 165),
        Tissue("portal_and_splenic_veins", Tube(portal, (5, 5, 5.5, 7, 7.5, 6.5)), 155),
        Tissue("right_adrenal_gland", Superellipsoid((36, -38, 52), (4.5, 15, 13), (0, 0, 20)), 72),
        Tissue("right_adrenal_gland", Superellipsoid((42, -44, 46), (4.5, 13, 12), (0, 0, -35)), 72),
        Tissue("left_adrenal_gland", Superellipsoid((-34, -34, 50), (4.5, 15, 13), (0, 0, -20)), 72),
        Tissue("left_adrenal_gland", Superellipsoid((-40, -38, 48), (4.5, 14, 13), (0, 0, 35)), 72),
    ]
