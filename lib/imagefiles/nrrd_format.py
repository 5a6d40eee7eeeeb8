"""Reads NRRD with header and voxels in one file (https://teem.sourceforge.net/nrrd/format.html).

pynrrd parses the header once. A header that refers to another file, or does not end, is refused, and the voxels are
read from the file that is already open, so that no other file can be accessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import nrrd
import numpy as np
import numpy.typing as npt
from nrrd.errors import NRRDError

from lib.errors import ImageError
from lib.imagefiles.header import Affine, ImageHeader
from lib.imagefiles.kinds import Kind
from lib.imagefiles.payload import BROKEN_STREAM, check_end, check_promise, open_stream, read_exactly

MOST_HEADER_BYTES = 4 * 2**20
LONGEST_NUMBER = 400
_TEXT_BLOCK_BYTES = 64 * 1024
_ENCODINGS = {
    "raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2",
    "ascii": "text", "ASCII": "text", "text": "text", "txt": "text",
}  # fmt: skip
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_DTYPES = {name: code for code, names in _TYPES.items() for name in names}
_OTHER_FILES = ("datafile",)
_SKIPS = ("lineskip", "byteskip")
_SPATIAL_KINDS = ("domain", "space", "???", "none")
# Conversion to left-posterior-superior as in ITK, which treats unknown spaces as left-posterior-superior.
_TO_LPS = {
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
}
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def read_nrrd_header(file: BinaryIO, name: str) -> ImageHeader:
    """Parse the header of an open file.

    Raises:
        ImageError: if it refers to another file, does not end, or is damaged.
    """
    lines, offset = _read_lines(file, name)
    _check_attached({line.partition(":")[0].strip(): "" for line in lines if not line.startswith("#")}, name)
    try:
        fields = nrrd.read_header(lines)
        _check_attached(fields, name)
        return _header_of(fields, offset, name)
    except (NRRDError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        reason = f"it has no field {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise ImageError(f"image {name!r} is damaged or no image: {reason}") from error


def read_nrrd_voxels(file: BinaryIO, size: int, header: ImageHeader, name: str) -> npt.NDArray[Any]:
    """The voxels of an open file of ``size`` bytes in the file's type; layers, if any, are the last axis.

    Raises:
        ImageError: if they are damaged or cut off, or if their checksum is wrong.
    """
    check_promise(header.size_bytes, size - header.offset, header.encoding, name)
    file.seek(header.offset)
    try:
        if header.encoding == "text":
            numbers = _read_text(file, size, header, name)
        else:
            stream = open_stream(file, header.encoding)
            numbers = read_exactly(stream, header.size_bytes, name).view(header.dtype)
            if header.encoding != "raw":
                check_end(stream, name)
    except (OSError, ValueError, OverflowError, *BROKEN_STREAM) as error:
        raise ImageError(f"image {name!r} is damaged: {error}") from error
    voxels = numbers.reshape(header.sizes, order="F")
    return voxels if header.layer_axis is None else np.moveaxis(voxels, header.layer_axis, -1)


def read_nrrd_planes(file: BinaryIO, size: int, header: ImageHeader, name: str) -> Iterator[npt.NDArray[np.float32]]:
    """Like :func:`read_nrrd_voxels`, plane by plane of the first two axes in float32; only one plane is in memory.

    Text files, and files whose layer axis is not the first one, are read as a whole.

    Raises:
        ImageError: see :func:`read_nrrd_voxels`; damage is detected with the last plane at the latest.
    """
    if header.encoding == "text" or header.layer_axis not in (None, len(header.sizes) - 1):
        voxels = read_nrrd_voxels(file, size, header, name)
        planes = voxels.reshape(*voxels.shape[:2], -1, order="F")
        yield from (np.asarray(planes[:, :, index], dtype=np.float32) for index in range(planes.shape[2]))
        return
    check_promise(header.size_bytes, size - header.offset, header.encoding, name)
    count = int(np.prod(header.sizes[:2]))
    file.seek(header.offset)
    try:
        stream = open_stream(file, header.encoding)
        for _ in range(header.voxel_count // count):
            numbers = read_exactly(stream, count * header.dtype.itemsize, name).view(header.dtype)
            yield np.asarray(numbers.reshape(header.sizes[:2], order="F"), dtype=np.float32)
        if header.encoding != "raw":
            check_end(stream, name)
    except (OSError, ValueError, *BROKEN_STREAM) as error:
        raise ImageError(f"image {name!r} is damaged: {error}") from error


def _read_lines(file: BinaryIO, name: str) -> tuple[list[str], int]:
    """The header's lines up to the empty line that ends it, and the position of the voxels."""
    file.seek(0)
    lines: list[str] = []
    while True:
        line = file.readline(MOST_HEADER_BYTES)
        if not line:
            raise ImageError(
                f"image {name!r} is damaged or no image: no voxels follow its header, or they are in another file; "
                "valid: one file that holds both, with an empty line between them"
            )
        if file.tell() > MOST_HEADER_BYTES:
            raise ImageError(
                f"image {name!r} is damaged: its header does not end within {MOST_HEADER_BYTES // 2**20} MiB"
            )
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        if b"\r" in text or b"\0" in text:
            raise ImageError(f"image {name!r} is damaged: a line of its header holds control characters")
        if not text.strip():
            return lines, file.tell()
        lines.append(text.decode("utf-8", "replace"))


def _check_attached(fields: Mapping[str, Any], name: str) -> None:
    plain = {key.lower().replace(" ", "").replace("_", ""): value for key, value in fields.items()}
    if any(key in plain for key in _OTHER_FILES):
        raise ImageError(f"image {name!r} has its voxels in another file; valid: one file that holds both")
    for key in _SKIPS:
        if plain.get(key) not in (None, 0, ""):
            raise ImageError(f"image {name!r} skips {plain[key]} {key[:4]}s before its voxels; valid: none")


def _header_of(fields: Mapping[str, Any], offset: int, name: str) -> ImageHeader:
    sizes = tuple(int(size) for size in fields["sizes"])
    if fields["dimension"] != len(sizes) or not 1 <= len(sizes) <= 16 or min(sizes) < 1:
        raise ImageError(f"image {name!r} is damaged: {fields['dimension']} dimensions, and the sizes {sizes}")
    encoding = _ENCODINGS.get(str(fields["encoding"]))
    if encoding is None:
        raise ImageError(f"image {name!r} has the encoding {fields['encoding']!r}; valid: raw, gzip, bzip2, ascii")
    kinds = [str(kind) for kind in fields.get("kinds", ())]
    layers = _layer_axes(fields, kinds, len(sizes))
    if len(layers) > 1:
        raise ImageError(f"image {name!r} has shape {sizes} with {len(layers)} axes of layers; valid: 3D")
    own = {key: value for key, value in fields.items() if isinstance(value, str)}
    return ImageHeader(
        kind=Kind.NRRD,
        sizes=sizes,
        dtype=_dtype_of(fields, encoding, name),
        affine_ras=_affine_ras(fields, [axis for axis in range(len(sizes)) if axis not in layers]),
        offset=offset,
        encoding=encoding,
        layer_axis=layers[0] if layers else None,
        fields=own,
    )


def _dtype_of(fields: Mapping[str, Any], encoding: str, name: str) -> np.dtype[Any]:
    code = _DTYPES.get(str(fields["type"]))
    if code is None:
        raise ImageError(f"image {name!r} has voxels of type {fields['type']!r}; valid: one real number each")
    if code.endswith("1") or encoding == "text":
        return np.dtype(code)
    order = {"little": "<", "big": ">"}.get(str(fields["endian"]))
    if order is None:
        raise ImageError(f"image {name!r} has the endian {fields['endian']!r:.80}; valid: little, big")
    return np.dtype(order + code)


def _layer_axes(fields: Mapping[str, Any], kinds: list[str], axes: int) -> list[int]:
    """The axes that are not spatial: colours, vectors, or Slicer's layers."""
    directions = fields.get("space directions")
    if directions is not None:
        if len(directions) != axes:
            raise ValueError(f"it has {len(directions)} space directions; valid: {axes}, one for each axis")
        return [axis for axis in range(axes) if np.isnan(directions[axis]).any()]
    return [axis for axis in range(axes) if kinds and kinds[axis].lower() not in _SPATIAL_KINDS]


def _affine_ras(fields: Mapping[str, Any], spatial: list[int]) -> Affine:
    """As ITK has it; an image of other than three axes in space has none, and is refused for its shape."""
    affine = np.eye(4)
    if len(spatial) != 3:
        return affine
    if fields.get("space directions") is not None:
        directions = np.asarray(fields["space directions"], dtype=np.float64)[spatial]
        if directions.shape != (3, 3):
            raise ValueError(f"its space has {directions.shape[-1]} dimensions; valid: 3")
        flips = np.diag(_TO_LPS.get(str(fields.get("space", "")).lower(), (1, 1, 1)))
        affine[:3, :3] = flips @ directions.T
        origin = np.asarray(fields.get("space origin", (0, 0, 0)), dtype=np.float64)
        if origin.shape != (3,):
            raise ValueError(f"its space origin has {origin.size} numbers; valid: 3")
        affine[:3, 3] = flips @ origin
    elif fields.get("spacings") is not None:
        spacings = np.asarray(fields["spacings"], dtype=np.float64)[spatial]
        spacings = np.where(np.isfinite(spacings), spacings, 1.0)
        affine[:3, :3], affine[:3, 3] = np.diag(spacings), _first_centers(fields, spatial, spacings)
    affine[:3] = _LPS_TO_RAS @ affine[:3]
    return affine


def _first_centers(fields: Mapping[str, Any], spatial: list[int], spacings: Affine) -> Affine:
    """The centres of the first voxels: half a voxel from the end of each axis, unless it is sampled at nodes."""
    if fields.get("axis mins") is None:
        return np.zeros(3)
    mins = np.asarray(fields["axis mins"], dtype=np.float64)[spatial]
    centerings = fields.get("centerings", ["cell"] * len(fields["sizes"]))
    halves = [0.0 if str(centerings[axis]) == "node" else 0.5 for axis in spatial]
    return np.where(np.isfinite(mins), mins + halves * spacings, 0.0)


def _read_text(file: BinaryIO, size: int, header: ImageHeader, name: str) -> npt.NDArray[Any]:
    # at least a digit and a blank for each number
    check_promise(2 * header.voxel_count - 1, size - header.offset, "raw", name)
    numbers: npt.NDArray[Any] = np.empty(header.voxel_count, dtype=header.dtype)
    done = 0
    rest: bytes | None = b""
    while rest is not None:  # a block at a time: words take many times the memory of what they say
        words, rest = _next_words(file, rest, name)
        if done + len(words) > header.voxel_count:
            raise ImageError(f"image {name!r} is damaged: it holds more than its {header.voxel_count} numbers")
        numbers[done : done + len(words)] = _numbers_of(words, header.dtype, name)
        done += len(words)
    if done != header.voxel_count:
        raise ImageError(f"image {name!r} is damaged: it holds {done} of {header.voxel_count} numbers")
    return numbers


def _next_words(file: BinaryIO, rest: bytes, name: str) -> tuple[list[bytes], bytes | None]:
    """The words of the next block of a text, and the beginning of one that goes on after it; None at the end."""
    block = file.read(_TEXT_BLOCK_BYTES)
    words = (rest + block).split()
    goes_on = bool(words) and bool(block) and not block[-1:].isspace()
    last = words.pop() if goes_on else b""
    if max(map(len, (*words, last)), default=0) > LONGEST_NUMBER:
        raise ImageError(f"image {name!r} is damaged: it holds a number of more than {LONGEST_NUMBER} characters")
    return words, last if block else None


def _numbers_of(words: list[bytes], dtype: np.dtype[Any], name: str) -> npt.NDArray[Any]:
    if not words:
        return np.empty(0, dtype=dtype)
    if dtype.kind == "f":
        return np.array(words).astype(dtype)
    numbers, bounds = np.array(words).astype(np.int64), np.iinfo(dtype.name)
    if numbers.min() < bounds.min or numbers.max() > bounds.max:  # NumPy would wrap them round
        raise ImageError(f"image {name!r} is damaged: it holds numbers that are none of type {dtype.name}")
    return numbers.astype(dtype)
