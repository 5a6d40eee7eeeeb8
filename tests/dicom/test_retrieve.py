"""WADO-RS of instances as other programs store them: big endian, colours, without preamble, damaged."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian

from lib.dicom.index import Instance
from lib.dicom.resources import Resource, parse_accept
from lib.dicom.retrieve import frame_parts, instance_parts, picture
from lib.errors import ImageError
from tests.dicom.conftest import edit, strip_preamble
from tests.dicom.test_pixels import blow_up

Make = Callable[..., list[Path]]
EXPLICIT = "1.2.840.10008.1.2.1"
AS_FILE = parse_accept(f"application/dicom; transfer-syntax={EXPLICIT}")
AS_NUMBERS = parse_accept(f"multipart/related; type=application/octet-stream; transfer-syntax={EXPLICIT}")


def indexed(file: Path) -> Instance:
    """A file as the index has it."""
    header = dcmread(file, force=True)
    return Instance("1.2.3", "1", "1.2", file, str(header.file_meta.get("TransferSyntaxUID", EXPLICIT)))


def data_file(name: str) -> Path:
    file = get_testdata_file(name, download=False)
    assert file is not None
    return Path(file)


def sent(file: Path) -> Dataset:
    """An instance as a client gets it that takes explicit VR little endian alone."""
    (part,) = instance_parts([indexed(file)], AS_FILE)
    assert part.media_type == f"application/dicom; transfer-syntax={EXPLICIT}"
    instance = dcmread(io.BytesIO(part.content))
    assert instance.file_meta.TransferSyntaxUID == EXPLICIT
    return instance


def as_big_endian(file: Path, vr: str, bits: int) -> None:
    """Rewrite a little-endian file, its pixels of ``bits`` bits as ``vr``."""
    instance = dcmread(file)
    pixels = instance.pixel_array.astype(f">u{bits // 8}")
    content = pixels.tobytes() + bytes(pixels.nbytes % 2)
    if bits == 8 and vr == "OW":
        content = np.frombuffer(content, "<u2").byteswap().tobytes()
    instance.BitsAllocated = instance.BitsStored = bits
    instance.HighBit = bits - 1
    for _ in instance.iterall():  # decoded while the byte order is still the old one
        pass
    instance.PixelData = content
    instance["PixelData"].VR = vr
    instance.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    instance.is_little_endian = False
    instance.save_as(file)


@pytest.mark.parametrize(("vr", "bits"), [("OW", 16), ("OW", 8), ("OB", 8), ("OW", 32)])
def test_big_endian_instance_is_sent_in_little_endian(make_series: Make, vr: str, bits: int) -> None:
    file = make_series("axial", "MR")[2]
    as_big_endian(file, vr, bits)
    expected = dcmread(file).pixel_array
    assert len(np.unique(expected)) > 100
    np.testing.assert_array_equal(sent(file).pixel_array, expected)
    (part,) = frame_parts(indexed(file), [1], AS_NUMBERS)
    found = np.frombuffer(part.content, f"<u{bits // 8}")[: expected.size]
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
@pytest.mark.parametrize("name", ["MR_small_bigendian.dcm", "rtdose_expb.dcm", "SC_rgb_small_odd_big_endian.dcm"])
def test_big_endian_files_of_others_are_sent_in_little_endian(name: str) -> None:
    np.testing.assert_array_equal(sent(data_file(name)).pixel_array, dcmread(data_file(name)).pixel_array)


def test_instance_without_preamble_is_sent_as_a_file(make_series: Make) -> None:
    file = make_series()[0]
    expected = dcmread(file).pixel_array
    strip_preamble(file)
    np.testing.assert_array_equal(sent(file).pixel_array, expected)


@pytest.mark.parametrize(
    ("name", "meaning"), [("SC_rgb_dcmtk_+eb+cy+n2.dcm", "YBR_FULL"), ("GDCMJ2K_TextGBR.dcm", "RGB")]
)
def test_decoded_colours_say_that_all_samples_are_there(name: str, meaning: str) -> None:
    stored = dcmread(data_file(name))
    instance = sent(data_file(name))
    assert (instance.PhotometricInterpretation, instance.PlanarConfiguration) == (meaning, 0)
    assert len(instance.PixelData) == stored.Rows * stored.Columns * 3
    np.testing.assert_array_equal(instance.pixel_array, stored.pixel_array)


def test_native_ybr_full_422_is_sent_as_it_is() -> None:
    file = data_file("SC_ybr_full_422_uncompressed.dcm")
    (part,) = frame_parts(indexed(file), [1], AS_NUMBERS)
    assert part.content == dcmread(file).PixelData


@pytest.mark.parametrize(
    "name",
    ["SC_ybr_full_422_uncompressed.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm"],
)
def test_colours_are_shown_as_rgb(name: str) -> None:
    part = picture(indexed(data_file(name)), Resource("rendered", "rendered"), {}, parse_accept("image/png"))
    shown = np.asarray(Image.open(io.BytesIO(part.content))).astype(int)
    assert np.abs(shown[5, 50] - (255, 0, 0)).max() <= 12
    assert np.abs(shown[45, 50] - (0, 0, 255)).max() <= 12


def test_palette_is_shown_in_its_colours(make_series: Make) -> None:
    file = make_series()[0]
    instance = dcmread(file)
    instance.BitsAllocated, instance.BitsStored, instance.HighBit = 8, 8, 7
    instance.PhotometricInterpretation = "PALETTE COLOR"
    instance.PixelData = bytes([1]) * (instance.Rows * instance.Columns)
    for colour, values in {"Red": [0, 65535], "Green": [0, 32768], "Blue": [0, 0]}.items():
        instance.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [2, 0, 16])
        setattr(instance, f"{colour}PaletteColorLookupTableData", np.array(values, "<u2").tobytes())
    instance.save_as(file)
    part = picture(indexed(file), Resource("rendered", "rendered"), {}, parse_accept("image/png"))
    assert np.asarray(Image.open(io.BytesIO(part.content)))[3, 3].tolist() == [255, 128, 0]


def of_no_rows(file: Path) -> None:
    edit(file, Rows=0)


def of_many_frames(file: Path) -> None:
    edit(file, NumberOfFrames=30)


def of_half_its_pixels(file: Path) -> None:
    edit(file, PixelData=dcmread(file).PixelData[:100])


@pytest.mark.parametrize("damage", [of_no_rows, of_many_frames, of_half_its_pixels])
@pytest.mark.parametrize("view", ["rendered", "thumbnail"])
def test_picture_of_a_damaged_instance_is_refused_in_words(
    make_series: Make, damage: Callable[[Path], None], view: str
) -> None:
    file = make_series()[0]
    damage(file)
    with pytest.raises(ImageError, match="instance"):
        picture(indexed(file), Resource(view, view), {}, parse_accept("image/png"))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="instance"):
        frame_parts(indexed(file), [1], AS_NUMBERS)


def test_compressed_stream_of_another_size_is_refused_in_every_form(make_series: Make) -> None:
    file = make_series()[0]
    blow_up(file, with_header=False)
    with pytest.raises(ImageError, match="JPEG 2000 stream 60000 and 60000"):
        frame_parts(indexed(file), [1], AS_NUMBERS)
    with pytest.raises(ImageError, match="JPEG 2000 stream 60000 and 60000"):
        sent(file)


def test_instance_without_pixels_has_no_picture() -> None:
    with pytest.raises(ImageError, match=r"\(SR\) has no pixels"):
        picture(indexed(data_file("test-SR.dcm")), Resource("rendered", "rendered"), {}, parse_accept("image/png"))


def test_frame_of_an_instance_that_says_no_number_of_frames_is_its_only_one(make_series: Make) -> None:
    file = make_series()[0]
    expected = dcmread(file).pixel_array
    edit(file, NumberOfFrames=0)
    (part,) = frame_parts(indexed(file), [1], AS_NUMBERS)
    np.testing.assert_array_equal(np.frombuffer(part.content, "<u2").reshape(expected.shape), expected)


def test_file_that_is_gone_is_told(make_series: Make) -> None:
    file = make_series()[0]
    instance = indexed(file)
    shutil.move(file, file.with_name("away"))
    with pytest.raises(Exception, match="there is no file of instance"):
        frame_parts(instance, [1], AS_NUMBERS)
