"""Stored pixel values of an instance (PS3.3, C.7.6.3): decoded, and without unused bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.pixel_data_handlers.util import apply_color_lut, convert_color_space
from pydicom.uid import RLELossless

from lib.dicom.files import read_instance, reading
from lib.errors import ImageError

Pixels = npt.NDArray[Any]
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2")
LARGEST_BYTES = 4 << 30
"""Largest size of the decoded pixels of one instance, in bytes."""
MOST_RLE_RATIO = 64
"""Largest expansion of run-length encoding: two bytes encode a run of at most 128 (PS3.5, annex G)."""
JPEG_2000_SIZE = b"\xff\x4f\xff\x51"
"""First bytes of a JPEG 2000 code stream, whose first segment holds its size (ISO 15444-1, A.5.1)."""
YBR = ("YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420")


def frame_count(instance: Dataset) -> int:
    """Number of Frames; an empty value or 0, which many single-frame images have, is replaced by 1.

    Raises:
        ImageError: if it is not a whole number from 0.
    """
    with reading(f"instance {name_of(instance)} has a Number of Frames that is no number"):
        count = int(instance.get("NumberOfFrames", 1) or 0)
    if count < 0:
        raise ImageError(f"instance {name_of(instance)} has a Number of Frames of {count}; valid: at least 1")
    if count == 0:
        instance.NumberOfFrames = 1
    return max(count, 1)


def decode_file(file: Path, uid: str) -> Pixels:
    """Like :func:`decode`, for a file.

    Raises:
        ImageError: naming the instance.
    """
    with reading(f"instance {uid} cannot be decoded"):
        instance = read_instance(file)
    return decode(instance)


def decode(instance: Dataset) -> Pixels:
    """Stored values of one instance, not rescaled.

    Returns:
        Shape (frames, rows, columns), or (frames, rows, columns, samples) of colours.

    Raises:
        ImageError: naming the instance, if its pixels cannot be decoded or do not fit into memory.
    """
    cells = decode_cells(instance)
    with reading(f"instance {name_of(instance)} cannot be decoded"):
        return _without_other_bits(cells, instance)


def decode_cells(instance: Dataset) -> Pixels:
    """Like :func:`decode`, including the unused bits of each pixel cell, between Bits Stored and Bits Allocated.

    Raises:
        ImageError: see :func:`decode`.
    """
    shape = shape_of(instance)
    with reading(f"instance {name_of(instance)} cannot be decoded"):
        _check_code_stream(instance, shape)
        cells: Pixels = instance.pixel_array.reshape(shape)
    return cells


def name_of(instance: Dataset) -> str:
    """SOP Instance UID, for error messages."""
    return str(instance.get("SOPInstanceUID", "")) or "(without UID)"


def to_rgb(frame: Pixels, instance: Dataset) -> npt.NDArray[np.uint8]:
    """One colour frame as 8-bit RGB.

    Args:
        frame: shape (rows, columns, samples), or (rows, columns) for palette colours.
        instance: instance that defines the meaning of the samples.
    """
    meaning = str(instance.get("PhotometricInterpretation", ""))
    if meaning == "PALETTE COLOR":
        frame = apply_color_lut(frame, instance)
        bits = 8 * frame.dtype.itemsize
    else:
        bits = int(instance.get("BitsStored") or 8 * frame.dtype.itemsize)
    eight = frame.astype(np.uint8) if bits <= 8 else (frame >> (bits - 8)).astype(np.uint8)
    if meaning in YBR:
        eight = convert_color_space(eight, "YBR_FULL", "RGB")
    return np.ascontiguousarray(eight[..., :3])


def shape_of(instance: Dataset) -> tuple[int, ...]:
    """Frames, rows, columns and, for colour images, samples.

    Raises:
        ImageError: if one of them is missing or not positive, or if the total is too large.
    """
    name = name_of(instance)
    if "Rows" not in instance:
        raise ImageError(f"instance {name} ({instance.get('Modality', '')}) has no pixels")
    with reading(f"instance {name} does not say the size of its pixels"):
        rows, columns, bits = (int(instance[key].value) for key in ("Rows", "Columns", "BitsAllocated"))
        samples = int(instance.get("SamplesPerPixel") or 1)
    frames = frame_count(instance)
    if min(rows, columns, bits, samples) < 1:
        raise ImageError(
            f"instance {name} has {rows} rows and {columns} columns of {samples} samples of {bits} bits; "
            "valid: at least 1 each"
        )
    needed = frames * rows * columns * samples * max(bits, 8) // 8
    if needed > LARGEST_BYTES:
        raise ImageError(f"instance {name} has {needed >> 20} MiB of pixels; valid: at most {LARGEST_BYTES >> 20} MiB")
    return (frames, rows, columns) if samples == 1 else (frames, rows, columns, samples)


def _check_code_stream(instance: Dataset, shape: tuple[int, ...]) -> None:
    """Refuse JPEG 2000 of another size than the instance, and run-length encoding with too few bytes.

    Otherwise, a decoder would allocate memory for the size stated in the stream or the header.

    Raises:
        ImageError: naming both sizes.
    """
    if str(instance.file_meta.TransferSyntaxUID) == RLELossless:
        most = MOST_RLE_RATIO * len(instance.get("PixelData", b""))
        if math.prod(shape) * int(instance.BitsAllocated) // 8 > most:
            raise ImageError(
                f"instance {name_of(instance)} has pixels of {shape} and, run-length encoded, at most {most} bytes"
            )
    data = bytes(instance.get("PixelData", b"")[:4096])
    at = data.find(JPEG_2000_SIZE)
    if str(instance.file_meta.TransferSyntaxUID) in NATIVE or at < 0:
        return
    numbers = [int.from_bytes(data[at + 8 + 4 * n : at + 12 + 4 * n], "big") for n in range(4)]
    columns, rows = numbers[0] - numbers[2], numbers[1] - numbers[3]
    if (rows, columns) != shape[1:3]:
        raise ImageError(
            f"instance {name_of(instance)} has {shape[1]} rows and {shape[2]} columns, and its JPEG 2000 stream "
            f"{rows} and {columns}; valid: the same"
        )


def _without_other_bits(pixels: Pixels, instance: Dataset) -> Pixels:
    """Values of the Bits Stored bits up to High Bit, without the bits above and below (PS3.5, 8.1.1).

    Signed values are sign-extended from their highest stored bit. JPEG streams have their own precision, so for these
    only the sign is extended, and only if the header agrees with the stream.
    """
    if pixels.dtype.kind not in "iu":
        return pixels
    allocated = 8 * pixels.dtype.itemsize
    stored = int(instance.get("BitsStored") or allocated)
    if not 1 < stored < allocated:
        return pixels
    is_signed = int(instance.get("PixelRepresentation") or 0) == 1
    syntax, mask, sign = str(instance.file_meta.TransferSyntaxUID), (1 << stored) - 1, 1 << (stored - 1)
    low, high = int(pixels.min()), int(pixels.max())
    if syntax in (*NATIVE, RLELossless):
        below = max(0, int(instance.get("HighBit", stored - 1)) + 1 - stored)
        fits = (-sign <= low and high < sign) if is_signed else high <= mask
        if fits and not below:
            return pixels
        pixels = (pixels >> below) & mask
    elif not is_signed or low < -sign or high > mask:
        return pixels
    return ((pixels & mask) ^ sign) - sign if is_signed else pixels
