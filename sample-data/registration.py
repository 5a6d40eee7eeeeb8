"""Warps that bring cases onto one common shape, for the fits of statistical models.

Diffeomorphic demons (Vercauteren et al. 2009, doi:10.1016/j.neuroimage.2008.10.040) towards a mean that is made anew
after each round (Joshi et al. 2004, doi:10.1016/j.neuroimage.2004.07.068). Fields are displacements in voxels,
float32, shape (3, X, Y, Z): ``warp(volume, field)`` has ``volume[x + field(x)]`` at ``x``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from synthetic_hippocampus import warp

Array = npt.NDArray[np.float32]

ROUNDS = ((30, 2.0), (40, 1.5), (50, 1.2))
"""Iterations, and smoothing of the field in voxels: from coarse to fine."""


def register_to_common_shape(
    guides: Sequence[Array], jobs: int = 1, rounds: Sequence[tuple[int, float]] = ROUNDS
) -> list[Array]:
    """Fields that warp each guide onto the mean of all warped guides; the same for any number of jobs."""
    _use_one_thread()
    template = np.mean(guides, axis=0, dtype=np.float32)
    fields: list[Array] = []
    with ProcessPoolExecutor(jobs, initializer=_use_one_thread) as pool:
        for turn, (iterations, smoothing) in enumerate(rounds, start=1):
            register = partial(demons, template, iterations=iterations, smoothing=smoothing)
            fields = list(pool.map(register, guides, chunksize=4))
            warped = [warp(guide, field) for guide, field in zip(guides, fields, strict=True)]
            template = np.mean(warped, axis=0, dtype=np.float32)
            print(f"registration: round {turn} of {len(rounds)} done", file=sys.stderr, flush=True)
    return fields


def demons(fixed: Array, moving: Array, iterations: int, smoothing: float) -> Array:
    """Smooth field u such that ``warp(moving, u)`` looks like ``fixed``."""
    registration = sitk.DiffeomorphicDemonsRegistrationFilter()
    registration.SetNumberOfIterations(iterations)
    registration.SetStandardDeviations(smoothing)
    return _field_from_itk(registration.Execute(sitk.GetImageFromArray(fixed), sitk.GetImageFromArray(moving)))


def invert(field: Array) -> Array:
    """Field that undoes ``field``."""
    itk_field = sitk.GetImageFromArray(np.moveaxis(field[::-1], 0, -1).astype(np.float64), isVector=True)
    return _field_from_itk(sitk.InvertDisplacementField(itk_field, maximumNumberOfIterations=20))


def _field_from_itk(field: sitk.Image) -> Array:
    """ITK keeps components as x, y, z for arrays indexed z, y, x: reversed, they follow the array's axes."""
    return np.moveaxis(sitk.GetArrayFromImage(field), -1, 0)[::-1].astype(np.float32)


def _use_one_thread() -> None:
    """Sums in one order, so that the result is the same on every machine with the same library."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
