"""Stored pixel values: the bits that are theirs, the colours that they mean, and sizes that are none."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gdcm
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from lib.dicom.pixels import decode, to_rgb
from lib.dicom.series import read_series
from lib.errors import ImageError
from tests.dicom.conftest import edit, transcode

Make = Callable[..., list[Path]]


def with_pixels(file: Path, stored: np.ndarray, **attributes: object) -> Dataset:
    """An instance with given cells."""
    instance = dcmread(file)
    instance.Rows, instance.Columns = stored.shape
    instance.PixelData = stored.tobytes()
    for keyword, value in attributes.items():
        setattr(instance, keyword, value)
    return instance


def test_bits_above_those_stored_are_ignored(make_series: Make) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65
    instance = with_pixels(make_series()[0], values | 0x8000, BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(decode(instance)[0], values)


def test_signed_values_are_extended_from_their_own_highest_bit(make_series: Make) -> None:
    values = np.arange(-98, 95, 3, dtype=np.int16)[:64].reshape(8, 8)
    stored = (values & 0x0FFF).astype(np.uint16)
    instance = with_pixels(make_series()[0], stored, BitsStored=12, HighBit=11, PixelRepresentation=1)
    decoded = decode(instance)[0]
    np.testing.assert_array_equal(decoded, values)
    assert (decoded.min(), decoded.max()) == (-98, 91)


def test_bits_below_the_stored_ones_are_ignored(make_series: Make) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65
    instance = with_pixels(make_series()[0], values << 4 | 0x5, BitsStored=12, HighBit=15)
    np.testing.assert_array_equal(decode(instance)[0], values)


def test_series_with_a_bit_above_those_stored_is_the_same_volume(make_series: Make) -> None:
    files = make_series("axial", "MR")
    expected = read_series(files).read_voxels()
    for file in files:
        pixels = dcmread(file).pixel_array | 0x4000
        edit(file, PixelData=pixels.astype("<u2").tobytes(), BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(read_series(files).read_voxels(), expected)


@pytest.mark.parametrize("number_of_frames", ["7", "-1"])
def test_number_of_frames_that_there_are_not_is_told(make_series: Make, number_of_frames: str) -> None:
    instance = dcmread(make_series()[0])
    instance.NumberOfFrames = number_of_frames
    with pytest.raises(ImageError, match=str(instance.SOPInstanceUID)):
        decode(instance)


@pytest.mark.parametrize("number_of_frames", ["0", None])
def test_number_of_frames_that_says_nothing_is_one(make_series: Make, number_of_frames: str | None) -> None:
    instance = dcmread(make_series()[0])
    instance.NumberOfFrames = number_of_frames
    assert decode(instance).shape == (1, 19, 24)


def test_pixels_of_no_rows_are_told(make_series: Make) -> None:
    instance = dcmread(make_series()[0])
    instance.Rows = 0
    with pytest.raises(ImageError, match=r"has 0 rows and 24 columns .*valid: at least 1 each"):
        decode(instance)


def blow_up(file: Path, with_header: bool) -> None:
    """JPEG 2000 that says it has 60000 rows and columns, alone or with its header."""
    transcode(file, gdcm.TransferSyntax.JPEG2000Lossless)
    content = file.read_bytes()
    at = content.index(b"\xff\x4f\xff\x51") + 8
    file.write_bytes(content[:at] + (60_000).to_bytes(4, "big") * 2 + content[at + 8 :])
    if with_header:
        edit(file, Rows=60_000, Columns=60_000)


def test_jpeg_2000_of_another_size_than_its_header_is_refused(make_series: Make) -> None:
    files = make_series()
    blow_up(files[3], with_header=False)
    with pytest.raises(ImageError, match="has 19 rows and 24 columns, and its JPEG 2000 stream 60000 and 60000"):
        read_series(files).read_voxels()


def test_run_lengths_that_cannot_become_the_pixels_of_the_header_are_refused(make_series: Make) -> None:
    """The decoder takes memory for what the header says before it looks at the runs."""
    (file, *_) = make_series()
    transcode(file, gdcm.TransferSyntax.RLELossless)
    decode(dcmread(file))
    instance = dcmread(file)
    instance.Rows = instance.Columns = 20_000
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"pixels of \(1, 20000, 20000\) and, run-length encoded, at most"):
        decode(instance)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_pixels_that_no_memory_holds_are_refused(make_series: Make) -> None:
    file = make_series()[0]
    blow_up(file, with_header=True)
    with pytest.raises(ImageError, match="has 6866 MiB of pixels; valid: at most 4096 MiB"):
        decode(dcmread(file))


# pydicom's test images of one pattern: bars of these colours from above to below, ten rows each
BARS = [
    (255, 0, 0),
    (255, 128, 128),
    (0, 255, 0),
    (128, 255, 128),
    (0, 0, 255),
    (128, 128, 255),
    (0, 0, 0),
    (64, 64, 64),
]


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("SC_ybr_full_422_uncompressed.dcm", 5),
        ("SC_rgb_dcmtk_+eb+cy+n1.dcm", 12),
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", 12),
        ("SC_rgb_dcmtk_+eb+cr.dcm", 12),
        ("SC_rgb_rle.dcm", 0),
        ("SC_rgb_rle_16bit.dcm", 0),
        ("SC_rgb_rle_32bit.dcm", 0),
    ],
)
def test_colours_are_rgb_whatever_they_are_stored_as(name: str, tolerance: int) -> None:
    file = get_testdata_file(name, download=False)
    assert file is not None
    instance = dcmread(file)
    shown = to_rgb(decode(instance)[0], instance)
    assert shown.shape == (100, 100, 3)
    found = shown[5:85:10, 50].astype(int)
    assert np.abs(found - BARS).max() <= tolerance, found.tolist()
