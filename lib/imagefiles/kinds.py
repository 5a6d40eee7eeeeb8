"""The format of an image file, detected by its content and not by its name."""

from __future__ import annotations

import re
import zlib
from enum import Enum

HEAD_BYTES = 64 * 1024
_NIFTI_BYTES = 352


class Kind(Enum):
    """The supported formats."""

    NIFTI = "NIfTI"
    NIFTI_GZ = "NIfTI, compressed with gzip"
    NRRD = "NRRD"
    DICOM = "DICOM"

    @property
    def suffix(self) -> str:
        """The extension of files of this format."""
        return {Kind.NIFTI: ".nii", Kind.NIFTI_GZ: ".nii.gz", Kind.NRRD: ".nrrd", Kind.DICOM: ".dcm"}[self]


# Signatures of unsupported formats, which are named in the error.
_FOREIGN: tuple[tuple[str, int, tuple[bytes, ...]], ...] = (
    ("TIFF", 0, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("MRC", 208, (b"MAP ", b"MAP\0")),
    ("PNG", 0, (b"\x89PNG",)),
    ("JPEG", 0, (b"\xff\xd8\xff",)),
    ("JPEG 2000", 0, (b"\0\0\0\x0cjP  ",)),
    ("BMP", 0, (b"BM",)),
    ("GIF", 0, (b"GIF8",)),
    ("HDF5 or MINC", 0, (b"\x89HDF\r\n", b"CDF\x01", b"CDF\x02")),
    ("VTK", 0, (b"# vtk DataFile",)),
    ("GIPL", 252, (b"\xef\xff\xe9\xb0", b"\x2a\xe3\x89\x18")),
    ("NIfTI without its voxels", 344, (b"ni1\0",)),
    ("NIfTI without its voxels", 4, (b"ni2\0",)),
    ("PDF", 0, (b"%PDF",)),
    ("ZIP", 0, (b"PK\x03\x04",)),
)
_META_IMAGE = re.compile(
    rb"^[ \t]*(ObjectType|NDims|DimSize|ElementType|ElementDataFile)[ \t]*=", re.IGNORECASE | re.MULTILINE
)


def find_kind(head: bytes) -> Kind | None:
    """The format of a file that begins with ``head`` (up to ``HEAD_BYTES``); None for an unsupported one."""
    if head[:2] == b"\x1f\x8b":
        return Kind.NIFTI_GZ if _is_nifti(_inflate(head)) else None
    if head.startswith(b"NRRD0"):
        return Kind.NRRD
    if _is_nifti(head):
        return Kind.NIFTI
    return Kind.DICOM if head[128:132] == b"DICM" else None


def is_gzip(head: bytes) -> bool:
    """Whether a file is compressed with gzip, whatever its content."""
    return head[:2] == b"\x1f\x8b"


def name_foreign(head: bytes) -> str | None:
    """The name of an unsupported format, if its signature is known."""
    content = _inflate(head) if is_gzip(head) else head
    for name, offset, signatures in _FOREIGN:
        if any(content[offset : offset + len(signature)] == signature for signature in signatures):
            return name
    if len(content) >= 348 and content[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):
        return "Analyze 7.5"
    # MetaImage has no signature; its header consists of lines "key = value" in any order.
    return "MetaImage" if _META_IMAGE.search(content.replace(b"\r", b"\n")) else None


def _is_nifti(head: bytes) -> bool:
    return head[344:348] == b"n+1\0" or head[4:12] == b"n+2\0\r\n\x1a\n"


def _inflate(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, 16 * _NIFTI_BYTES)
    except zlib.error:
        return b""
