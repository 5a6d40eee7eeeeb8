"""Writes synthetic studies with reference labels, to try the server with: no patient is in them.

    python sample-data/generate.py --out studies/sample --count 8 --seed 0
    python sample-data/generate.py --out studies/ct --what abdomen --count 2 --format both
    python sample-data/generate.py --out studies/ct --what torso --shape 512 512 200 --count 1

Images lie flat in the folder (``synthetic_hippocampus_0000.nii.gz``: the file's name is the image's id in MONAI Label),
DICOM series in ``dicom/<PatientID>/``, and references in ``references/``, where MONAI Label does not take them for
clinicians' labels. What is there already is left as it is.
"""

from __future__ import annotations

import argparse
import gzip
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
from dicom_series import PLANES, Plane, SeriesIdentity, is_complete_series, write_series
from nibabel.filebasedimages import ImageFileError
from synthetic_abdomen import draw_abdomen
from synthetic_hippocampus import draw_case
from torso_phantom import draw_torso, grid_affine, render, spacing_for

What = Literal["abdomen", "hippocampus", "torso"]
Shape = tuple[int, int, int]

TORSO_SHAPE: Shape = (256, 256, 100)
LEAST_TORSO_SIZE = 8
MODALITIES: dict[str, Literal["MR", "CT"]] = {"abdomen": "CT", "hippocampus": "MR", "torso": "CT"}
BODY_PARTS = {"abdomen": "ABDOMEN", "hippocampus": "HEAD", "torso": "ABDOMEN"}
PATIENTS = {"abdomen": "ABDOMEN", "hippocampus": "MR", "torso": "CT"}
"""What stands in a patient's ID, which no two studies of a folder share."""
COMPRESSION = 4
"""Of gzip: noise hardly shrinks further with more, and takes longer."""


class StudyConflictError(ValueError):
    """A file of this name is there, and is something else: it is never overwritten."""


@dataclass(frozen=True)
class StudyPlan:
    """Which study is to be written.

    Attributes:
        what: ``abdomen``, ``hippocampus`` or ``torso``.
        index: number of the study within its seed.
        seed: of the drawing.
        shape: voxels, of a torso; the others have their models'.

    Raises:
        ValueError: for a negative number, or a shape that does not fit.
    """

    what: What
    index: int
    seed: int
    shape: Shape = TORSO_SHAPE

    def __post_init__(self) -> None:
        if self.what not in MODALITIES:
            raise ValueError(f"what {self.what!r} must be one of {sorted(MODALITIES)}")
        if min(self.index, self.seed) < 0:
            raise ValueError(f"index ({self.index}) and seed ({self.seed}) must be 0 or more")
        if min(self.shape) < LEAST_TORSO_SIZE:
            raise ValueError(f"--shape {self.shape} must be at least {LEAST_TORSO_SIZE} along each axis")

    @property
    def name(self) -> str:
        """File name without ending, and MONAI Label's image id."""
        return f"synthetic_{self.what}_{self.index:04d}"

    @property
    def description(self) -> str:
        """What the file says of itself; a file that says something else is another study."""
        size = f" {'x'.join(map(str, self.shape))}" if self.what == "torso" else ""
        return f"synthetic {self.what}{size} seed {self.seed} case {self.index}"

    @property
    def identity(self) -> SeriesIdentity:
        """Of the DICOM series."""
        modality = MODALITIES[self.what]
        patient_id = f"SYNTH-{PATIENTS[self.what]}-{self.index:04d}"
        return SeriesIdentity(patient_id, modality, self.description, self.seed, BODY_PARTS[self.what])


@dataclass(frozen=True)
class Study:
    """An image, its reference label (the same shape), and their 4x4 affine to RAS millimetres."""

    image: npt.NDArray[np.generic]
    label: npt.NDArray[np.uint8]
    affine_ras: npt.NDArray[np.float64]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what is asked for and is not there yet.

    Returns:
        0; 2 with a sentence when something cannot be done as asked, 1 when the disk refuses.
    """
    options = _parser().parse_args(arguments)
    if options.shape and options.what != "torso":
        return _fail(2, "--shape is for --what torso; the sizes of the others are those of their models")
    references = options.references or options.out / "references"
    try:
        shape = tuple(options.shape or TORSO_SHAPE)
        plans = [StudyPlan(options.what, index, options.seed, shape) for index in range(options.count)]
        written = sum(write_study(plan, options.out, references, options.format, options.plane) for plan in plans)
    except ValueError as error:
        return _fail(2, str(error))
    except OSError as error:
        return _fail(1, f"cannot write: {error}")
    kept = f" ({options.count - written} were there)" if written < options.count else ""
    print(f"{options.count} synthetic {options.what} studies in {options.out}{kept}, references in {references}")
    return 0


def write_study(plan: StudyPlan, out: Path, references: Path, format_name: str, plane: Plane = "axial") -> bool:
    """Write whichever files of a study are missing; whether there were any.

    Args:
        plan: which study.
        out: folder of the images; DICOM series go into ``dicom`` in it.
        references: folder of the reference labels, always NIfTI.
        format_name: ``nifti``, ``dicom`` or ``both``.
        plane: of the DICOM slices.

    Raises:
        StudyConflictError: when a file of that name is another study.
        OSError: when the disk refuses.
    """
    image, reference = (folder / f"{plan.name}.nii.gz" for folder in (out, references))
    series = out / "dicom" / plan.identity.patient_id
    missing_image = format_name != "dicom" and not _is_there(image, plan)
    missing_series = format_name != "nifti" and not _is_series_there(series, plan)
    missing_reference = not _is_there(reference, plan)
    if not (missing_image or missing_series or missing_reference):
        return False
    study = draw_study(plan)
    # The image comes last: whoever sees it can count on its reference.
    if missing_reference:
        write_nifti(reference, study.label, study.affine_ras, plan.description)
    if missing_series:
        write_series(series, study.image, study.affine_ras, plan.identity, plane)
    if missing_image:
        write_nifti(image, study.image, study.affine_ras, plan.description)
    return True


def draw_study(plan: StudyPlan) -> Study:
    """Draw what a plan says."""
    if plan.what == "hippocampus":
        case = draw_case(plan.index, plan.seed)
        return Study(case.image, case.label, case.affine_ras)
    if plan.what == "abdomen":
        scan = draw_abdomen(plan.index, plan.seed)
        return Study(scan.image_hu, scan.label, scan.affine_ras)
    affine_ras = grid_affine(plan.shape, spacing_for(plan.shape), "LPS")
    # One seed stands for many people: each case is a torso of its own
    torso = draw_torso(plan.seed * 10_000 + plan.index)
    rendered = render(torso, plan.shape, affine_ras)
    return Study(rendered.image_hu, rendered.label, affine_ras)


def write_nifti(
    path: Path, volume: npt.NDArray[np.generic], affine_ras: npt.NDArray[np.float64], description: str
) -> None:
    """Write under another name and rename, so that a broken-off run leaves no half file.

    The name's ending keeps the half file out of MONAI Label's list. No time is stored: one volume is one file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume, affine_ras)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file, gzip.GzipFile("", "wb", COMPRESSION, file, mtime=0) as stream:
            image.to_stream(stream)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_complete_nifti(path: Path) -> bool:
    """Whether a gzipped file exists and ends where its header says: gzip keeps the unpacked length at its end."""
    try:
        image = nib.load(path)
        with path.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            (length,) = struct.unpack("<I", file.read())
    except (OSError, ValueError, ImageFileError, EOFError):
        return False
    expected = image.dataobj.offset + int(np.prod(image.shape)) * image.get_data_dtype().itemsize
    return bool(length == expected % 2**32)


def _is_there(path: Path, plan: StudyPlan) -> bool:
    """Whether the file holds the plan's study.

    Raises:
        StudyConflictError: when it is complete and holds something else.
    """
    if not is_complete_nifti(path):
        return False
    found = nib.load(path).header["descrip"].item().decode(errors="replace")
    if found != plan.description:
        raise StudyConflictError(_conflict(path, found, plan))
    return True


def _is_series_there(folder: Path, plan: StudyPlan) -> bool:
    """Whether the folder holds the plan's study.

    Raises:
        StudyConflictError: when it holds anything else.
    """
    if not folder.exists():
        return False
    if not is_complete_series(folder, plan.identity):
        raise StudyConflictError(_conflict(folder, "another or an incomplete series", plan))
    return True


def _conflict(path: Path, found: str, plan: StudyPlan) -> str:
    return f"{path} is {found!r}, not {plan.description!r}: remove it, or choose another --out or --references"


def _fail(code: int, sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the studies")
    parser.add_argument("--count", type=_whole, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=_whole, default=0, help="0 or more (default: %(default)s)")
    parser.add_argument("--what", choices=sorted(MODALITIES), default="hippocampus", help="default: %(default)s")
    parser.add_argument("--format", choices=["nifti", "dicom", "both"], default="nifti", help="default: %(default)s")
    parser.add_argument("--plane", choices=PLANES, default="axial", help="of DICOM slices (default: %(default)s)")
    parser.add_argument("--references", type=Path, help="folder of the reference labels (default: OUT/references)")
    size = "x".join(map(str, TORSO_SHAPE))
    parser.add_argument("--shape", type=int, nargs=3, metavar=("X", "Y", "Z"), help=f"of a torso (default: {size})")
    return parser


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
