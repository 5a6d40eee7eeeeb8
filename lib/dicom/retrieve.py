"""WADO-RS (PS3.18, 10.4) over an index: instances, frames and rendered images, in a form that the client accepts."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import generate_pixel_data_frame
from pydicom.uid import ExplicitVRLittleEndian

from lib.dicom.files import has_preamble, read_instance, reading
from lib.dicom.index import Instance
from lib.dicom.pixels import NATIVE, decode, decode_cells, frame_count, shape_of, to_rgb
from lib.dicom.resources import MediaType, Resource
from lib.errors import NotFoundError, ParameterError, UnetrError

COMPRESSED_TYPES = {
    "1.2.840.10008.1.2.4.50": "image/jpeg",
    "1.2.840.10008.1.2.4.51": "image/jpeg",
    "1.2.840.10008.1.2.4.57": "image/jpeg",
    "1.2.840.10008.1.2.4.70": "image/jpeg",
    "1.2.840.10008.1.2.4.80": "image/jls",
    "1.2.840.10008.1.2.4.81": "image/jls",
    "1.2.840.10008.1.2.4.90": "image/jp2",
    "1.2.840.10008.1.2.4.91": "image/jp2",
    "1.2.840.10008.1.2.5": "image/dicom-rle",
}
PIXEL_DATA = 0x7FE00010
WORD_BYTES = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}
"""Number of bytes in a word of a binary value, by VR (PS3.5, 6.2)."""
DECODED_MEANING = {"YBR_FULL_422": "YBR_FULL", "YBR_RCT": "RGB", "YBR_ICT": "RGB"}
"""Photometric Interpretation after decoding: chroma is upsampled, and JPEG 2000 has undone its colour transform."""
PICTURES = {"image/jpeg": "JPEG", "image/png": "PNG"}
THUMBNAIL_PIXELS = 128


class NotAcceptableError(UnetrError):
    """The requested resource cannot be sent in any form that the client accepts."""


@dataclass(frozen=True)
class Part:
    """One part of a ``multipart/related`` response."""

    media_type: str
    content: bytes


def instance_parts(instances: Sequence[Instance], accepted: Sequence[MediaType]) -> Iterator[Part]:
    """Files as in PS3.10; uncompressed if the client does not accept the stored transfer syntax.

    Raises:
        NotAcceptableError: if the client accepts neither.
    """
    wanted = next((entry for entry in accepted if entry.name in ("application/dicom", "application/*", "*/*")), None)
    if wanted is None:
        raise NotAcceptableError("instances are sent as application/dicom, which the client does not accept")
    return (_instance_part(instance, wanted) for instance in instances)


def _instance_part(instance: Instance, wanted: MediaType) -> Part:
    as_stored = wanted.syntax in ("*", instance.syntax) or (not wanted.syntax and instance.syntax in NATIVE)
    if not as_stored and wanted.syntax not in ("", ExplicitVRLittleEndian):
        raise NotAcceptableError(
            f"instance {instance.sop} is stored as {instance.syntax} and can be sent as that or as "
            f"{ExplicitVRLittleEndian}, not as {wanted.syntax}"
        )
    if as_stored and instance.is_renamed:
        return whole_file(_read(instance))
    content = instance.file.read_bytes() if as_stored else b""
    if not has_preamble(
        content
    ):  # a data set without preamble, which is not a PS3.10 file, or one that has to be decoded
        as_stored, content = False, _uncompressed(instance)
    syntax = instance.syntax if as_stored else ExplicitVRLittleEndian
    return Part(f"application/dicom; transfer-syntax={syntax}", content)


def _uncompressed(instance: Instance) -> bytes:
    """The instance as a PS3.10 file in explicit VR little endian."""
    dataset = _read(instance)
    with reading(f"instance {instance.sop} cannot be decoded"):
        for _ in dataset.iterall():  # values are decoded in the byte order of the file
            pass
        if instance.syntax not in NATIVE:
            _decompress(dataset)
        elif not dataset.is_little_endian:
            _swap(dataset)
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.is_little_endian, dataset.is_implicit_VR = True, False
        buffer = io.BytesIO()
        dataset.save_as(buffer, write_like_original=False)
    return buffer.getvalue()


def _swap(dataset: Dataset) -> None:
    """Convert binary values of a big-endian instance to little endian (PS3.5, 7.3); pixels by their cell size."""
    for element in dataset.iterall():
        if element.tag != PIXEL_DATA and element.VR in WORD_BYTES and element.value:
            element.value = _swapped(element.value, WORD_BYTES[element.VR])
    if "PixelData" in dataset:
        dataset.PixelData = _little_endian_pixels(dataset)


def _little_endian_pixels(dataset: Dataset) -> bytes:
    """Pixel Data of a native instance; cells of at most 8 bits are stored in words of 16 bits if the VR is OW."""
    content: bytes = dataset.PixelData
    if dataset.is_little_endian:
        return content
    cell = int(dataset.BitsAllocated) // 8
    return _swapped(content, cell if cell > 1 else 2 if dataset["PixelData"].VR == "OW" else 1)


def _swapped(content: bytes, word: int) -> bytes:
    padded = content + bytes(-len(content) % word)
    return np.frombuffer(padded, f">u{word}").astype(f"<u{word}").tobytes()


def frame_parts(instance: Instance, numbers: Sequence[int], accepted: Sequence[MediaType]) -> list[Part]:
    """Frames, compressed as stored if the client accepts that, otherwise as little-endian numbers.

    Raises:
        NotAcceptableError: if the client accepts neither.
        ParameterError: for a frame that does not exist.
        ImageError: if the pixels cannot be decoded.
    """
    dataset = _read(instance)
    total = frame_count(dataset)
    for number in numbers:
        if not 1 <= number <= total:
            raise ParameterError("frames", number, f"1 to {total}")
    media_type = _frame_type(instance, accepted)
    with reading(f"instance {instance.sop} cannot be decoded"):
        if instance.syntax not in NATIVE and instance.syntax in media_type:
            frames = list(generate_pixel_data_frame(dataset.PixelData, total))
            if len(frames) < total:
                raise ValueError(f"{len(frames)} frames of pixels where {total} are needed")
            return [Part(media_type, frames[number - 1]) for number in numbers]
        return [Part(media_type, content) for content in _native_frames(dataset, numbers, total)]


def native_frames(dataset: FileDataset, numbers: Sequence[int]) -> list[Part]:
    """Frames of a generated instance, as little-endian numbers.

    Raises:
        ParameterError: for a frame that does not exist.
    """
    total = frame_count(dataset)
    for number in numbers:
        if not 1 <= number <= total:
            raise ParameterError("frames", number, f"1 to {total}")
    media_type = f"application/octet-stream; transfer-syntax={ExplicitVRLittleEndian}"
    return [Part(media_type, content) for content in _native_frames(dataset, numbers, total)]


def whole_file(dataset: Dataset) -> Part:
    """A generated instance as a PS3.10 file."""
    buffer = io.BytesIO()
    dataset.save_as(buffer, write_like_original=False)
    return Part(f"application/dicom; transfer-syntax={dataset.file_meta.TransferSyntaxUID}", buffer.getvalue())


def _frame_type(instance: Instance, accepted: Sequence[MediaType]) -> str:
    """Content type of the frames of an instance."""
    compressed = COMPRESSED_TYPES.get(instance.syntax, "")
    raw = f"application/octet-stream; transfer-syntax={ExplicitVRLittleEndian}"
    for entry in accepted:
        any_of = entry.name in ("*/*", "application/octet-stream")
        if compressed and entry.name in (compressed, "image/*", "*/*") and entry.syntax in ("", "*", instance.syntax):
            return f"{compressed}; transfer-syntax={instance.syntax}"
        if compressed and any_of and entry.syntax in ("*", instance.syntax):
            return f"application/octet-stream; transfer-syntax={instance.syntax}"
        if any_of and entry.syntax in ("", "*", ExplicitVRLittleEndian):
            return raw
    raise NotAcceptableError(
        f"frames of instance {instance.sop} are sent as application/octet-stream"
        f"{f' or {compressed} ({instance.syntax})' if compressed else ''}, which the client does not accept"
    )


def _native_frames(dataset: FileDataset, numbers: Sequence[int], total: int) -> Iterator[bytes]:
    if int(dataset.BitsAllocated) == 1:
        pixels = decode_cells(dataset).reshape(total, -1)
        yield from (np.packbits(pixels[number - 1], bitorder="little").tobytes() for number in numbers)
        return
    if dataset.file_meta.TransferSyntaxUID not in NATIVE:
        _decompress(dataset)
    shape_of(dataset)
    content = _little_endian_pixels(dataset)
    # horizontally adjacent pixels share two of their three samples (PS3.3, C.7.6.3.1.2)
    samples = 2 if dataset.PhotometricInterpretation == "YBR_FULL_422" else int(dataset.SamplesPerPixel)
    size = int(dataset.Rows) * int(dataset.Columns) * samples * int(dataset.BitsAllocated) // 8
    if len(content) < size * total:
        raise ValueError(f"{len(content)} bytes of pixels where {size * total} are needed")
    yield from (content[(number - 1) * size : number * size] for number in numbers)


def _decompress(dataset: FileDataset) -> None:
    """Replace compressed pixels by little-endian numbers, and adapt the attributes that describe them."""
    pixels = decode_cells(dataset)
    content = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    dataset.PixelData = content + bytes(len(content) % 2)
    dataset["PixelData"].is_undefined_length = False
    dataset["PixelData"].VR = "OW" if int(dataset.BitsAllocated) > 8 else "OB"
    dataset.is_little_endian = True
    if int(dataset.get("SamplesPerPixel") or 1) > 1:
        dataset.PlanarConfiguration = 0
        meaning = str(dataset.get("PhotometricInterpretation", ""))
        dataset.PhotometricInterpretation = DECODED_MEANING.get(meaning, meaning)


def picture(instance: Instance, resource: Resource, query: Mapping[str, str], accepted: Sequence[MediaType]) -> Part:
    """A frame rendered as an image (PS3.18, 8.3.5), with the window of the instance or of the query.

    Raises:
        NotAcceptableError: if the client accepts neither JPEG nor PNG.
        ParameterError: for an invalid window, size or frame.
        ImageError: if the pixels cannot be decoded.
    """
    return picture_of(_read(instance), resource, query, accepted)


def picture_of(
    dataset: FileDataset, resource: Resource, query: Mapping[str, str], accepted: Sequence[MediaType]
) -> Part:
    """Like :func:`picture`, for an instance that has been read or generated."""
    media_type = _picture_type(accepted)
    total = frame_count(dataset)
    number = resource.frames[0] if resource.frames else (total + 1) // 2
    if not 1 <= number <= total:
        raise ParameterError("frames", number, f"1 to {total}")
    frame = decode(dataset)[number - 1]
    is_colour = frame.ndim == 3 or dataset.get("PhotometricInterpretation") == "PALETTE COLOR"
    with reading(f"instance {dataset.get('SOPInstanceUID', '')} cannot be shown"):
        image = Image.fromarray(to_rgb(frame, dataset) if is_colour else _windowed(frame, dataset, query))
    size = _viewport(query) or ((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS) if resource.view == "thumbnail" else None)
    if size:
        image.thumbnail(size)
    buffer = io.BytesIO()
    image.save(buffer, PICTURES[media_type], quality=90)
    return Part(media_type, buffer.getvalue())


def _picture_type(accepted: Sequence[MediaType]) -> str:
    for entry in accepted:
        if entry.name in PICTURES:
            return entry.name
        if entry.name in ("*/*", "image/*"):
            return "image/jpeg"
    raise NotAcceptableError(f"pictures are sent as {' or '.join(PICTURES)}, which the client does not accept")


def _windowed(frame: npt.NDArray[np.generic], dataset: FileDataset, query: Mapping[str, str]) -> npt.NDArray[np.uint8]:
    """Grey values from 0 to 255 (PS3.3, C.11.2.1.2)."""
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    values = frame.astype(np.float64) * float(1 if slope is None else slope)
    values += float(0 if intercept is None else intercept)
    center, width = _window(values, dataset, query)
    grey = np.clip((values - (center - 0.5)) / max(width - 1, 1e-6) + 0.5, 0, 1) * 255
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
    picture: npt.NDArray[np.uint8] = np.rint(grey).astype(np.uint8)
    return picture


def _window(values: npt.NDArray[np.float64], dataset: FileDataset, query: Mapping[str, str]) -> tuple[float, float]:
    if query.get("window"):
        try:
            center, width, *_ = (float(text) for text in query["window"].split(",")[:2])
            if np.isfinite([center, width]).all() and width >= 1:
                return center, width
        except ValueError:
            pass
        raise ParameterError("window", query["window"][:50], "center,width,function with a width of at least 1")
    center, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    first = [
        value[0] if hasattr(value, "__iter__") and not isinstance(value, str) else value for value in (center, width)
    ]
    if None not in first and float(first[1]) >= 1:
        return float(first[0]), float(first[1])
    low, high = float(values.min()), float(values.max())
    return (low + high + 1) / 2, max(high - low + 1, 1)


def _viewport(query: Mapping[str, str]) -> tuple[int, int] | None:
    text = query.get("viewport")
    if not text:
        return None
    try:
        width, height = (int(part) for part in text.split(",")[:2])
    except ValueError:
        width = height = 0
    if not (1 <= width <= 8192 and 1 <= height <= 8192):
        raise ParameterError("viewport", text[:50], "width,height of 1 to 8192 pixels")
    return width, height


def _read(instance: Instance) -> FileDataset:
    """Read the file of an instance.

    Raises:
        NotFoundError: if it has been deleted since it was indexed.
        ImageError: if it can no longer be read.
    """
    if not instance.file.is_file():
        raise NotFoundError("file of instance", instance.sop)
    with reading(f"instance {instance.sop} cannot be read"):
        dataset = read_instance(instance.file)
        if instance.is_renamed:
            dataset.SeriesInstanceUID = instance.series
        return dataset


def multipart(parts: Iterator[Part] | Sequence[Part], boundary: str) -> Iterator[bytes]:
    """The body of a ``multipart/related`` answer, part by part."""
    for part in parts:
        yield f"--{boundary}\r\nContent-Type: {part.media_type}\r\n".encode()
        yield f"Content-Length: {len(part.content)}\r\n\r\n".encode()
        yield part.content
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode()
