"""Headers that were changed at random places and in wicked ways end in a sentence, and reach no other file."""

from __future__ import annotations

import gzip
import random
import struct
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lib.errors import ImageError, MemoryBudgetError
from lib.imagefiles.reading import read_header, read_voxels
from lib.transforms.volume import read_grid, read_volume

SECRET = b"the secret of another file" * 20
NRRD = (
    b"NRRD0004\n# a comment\ntype: uint8\ndimension: 3\nspace: left-posterior-superior\nsizes: 8 8 8\n"
    b"space directions: (1,0,0) (0,1,0) (0,0,1)\nkinds: domain domain domain\nendian: little\nencoding: raw\n"
    b"space origin: (0,0,0)\n\n"
)
WORDS = (
    b"nan", b"inf", b"-1", b"0", b"1e999", b"9" * 400, b"none", b"(1,0,0)", b"()", b"", b"\xff\xfe", b"8 8",
    b"8 8 8 8", b"data file: secret", b"Data File: secret", b"datafile: LIST", b"data file:=secret",
    b"data_file: secret", b":", b":=", b"byte skip: -1", b"line skip: 3", b"type: block", b"encoding: gzip",
    b"encoding: hex", b"\x00", b"\r", b"\x0b", b"\xe2\x80\xa8",
)  # fmt: skip
ENDS = (b"\n", b"\r\n")


def _nrrd_headers(count: int, draw: random.Random) -> Iterator[bytes]:
    """The header with fields replaced, doubled, taken out and moved."""
    for _ in range(count):
        lines = NRRD.split(b"\n")[:-2]
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(1, len(lines))
            key, _, value = lines[at].partition(b": ")
            lines[at] = draw.choice([
                key + b": " + draw.choice(WORDS), draw.choice(WORDS), lines[at] + b" " + draw.choice(WORDS),
                draw.choice(WORDS) + b"\n" + lines[at], value, lines[at].swapcase(), lines[at] + b"\n" + lines[at],
            ])  # fmt: skip
        end = draw.choice(ENDS)
        yield end.join(lines) + end + end


def _read(path: Path) -> str:
    """What became of it: an array, or the sentence of the refusal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            read_header(path)
            _, voxels = read_voxels(path)
        except (ImageError, MemoryBudgetError) as error:
            assert "secret of" not in str(error)
            return str(error)
    assert SECRET[:10] not in voxels.tobytes()
    return ""


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A folder with a file that nobody may have."""
    (tmp_path / "secret").write_bytes(SECRET)
    return tmp_path


def test_changed_nrrd_headers_are_read_or_refused(beside: Path) -> None:
    draw, said = random.Random(1), []
    for header in _nrrd_headers(1500, draw):
        (beside / "x.nrrd").write_bytes(header + bytes(range(256)) * 2)
        said.append(_read(beside / "x.nrrd"))
    assert 30 < sum(not sentence for sentence in said) < 1400


def _nifti_header(second: bool) -> bytearray:
    kind = nib.Nifti2Image if second else nib.Nifti1Image
    return bytearray(kind(np.zeros((8, 8, 8), dtype=np.uint8), np.eye(4)).to_bytes())


@pytest.mark.parametrize("second", [False, True], ids=["NIfTI-1", "NIfTI-2"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_changed_nifti_headers_are_read_or_refused(beside: Path, second: bool, packed: bool) -> None:
    draw, whole = random.Random(2), _nifti_header(second)
    floats = [struct.pack("<f", value) for value in (np.nan, np.inf, -np.inf, 1e30, -1.0, 0.0, 352.0)]
    wide = [struct.pack("<d", value) for value in (np.nan, np.inf, -1e300, 1e300)]
    whole_numbers = [struct.pack("<q", value) for value in (-1, 0, 2**62, 2**63 - 1, 32767)]
    file = beside / ("x.nii.gz" if packed else "x.nii")
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            value = draw.choice([*floats, *wide, *whole_numbers, bytes([draw.randrange(256)])])
            at = draw.randrange(40, (540 if second else 348) - 8) // 4 * 4
            changed[at : at + len(value)] = value
        if bytes(changed[344:348]) != b"n+1\0" and not second:
            continue
        file.write_bytes(gzip.compress(bytes(changed), 1) if packed else bytes(changed))
        _read(file)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1.0, 3.4e38])
@pytest.mark.parametrize("packed", [False, True])
def test_voxels_that_begin_nowhere_are_refused(beside: Path, value: float, packed: bool) -> None:
    content = _nifti_header(False)
    content[108:112] = struct.pack("<f", value)  # vox_offset
    file = beside / "x.nii"
    file.write_bytes(gzip.compress(bytes(content)) if packed else bytes(content))
    assert "damaged" in _read(file)


ATTACKS = {
    "mark before NRRD": b"\xef\xbb\xbf" + NRRD,
    "mark before MetaImage": b"\xef\xbb\xbfObjectType = Image\nNDims = 3\nDimSize = 8 8 8\nElementDataFile = secret\n",
    "UTF-16": (b"\xff\xfe" + NRRD.decode().encode("utf-16-le")),
    "old NRRD": NRRD.replace(b"NRRD0004", b"NRRD00.01"),
    "detached, CRLF": NRRD.replace(b"\n", b"\r\n").replace(b"encoding: raw", b"data file: secret\r\nencoding: raw"),
    "detached, tab": NRRD.replace(b"encoding: raw", b"data file:\tsecret\nencoding: raw"),
    "detached, spaces": NRRD.replace(b"encoding: raw", b"  data file  : secret\nencoding: raw"),
    "detached, no blank": NRRD.replace(b"encoding: raw", b"datafile:secret\nencoding: raw"),
    "list": NRRD.replace(b"encoding: raw", b"data file: LIST\nencoding: raw") + b"secret\n",
    "pattern": NRRD.replace(b"encoding: raw", b"data file: secret%d 1 1 1\nencoding: raw"),
    "detached, as a key": NRRD.replace(b"encoding: raw", b"data file:=secret\nencoding: raw"),
    "nhdr": NRRD.rstrip(b"\n").replace(b"encoding: raw", b"data file: secret\nencoding: raw") + b"\n",
    "NRRD in gzip": gzip.compress(NRRD + bytes(512)),
    "gzip in gzip": gzip.compress(gzip.compress(bytes(_nifti_header(False)))),
    "MetaImage in gzip": gzip.compress(b"ObjectType = Image\nNDims = 3\nElementDataFile = secret\n"),
    "hdr of a pair": bytes(_nifti_header(False)).replace(b"n+1\0", b"ni1\0"),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ["x.nrrd", "x.nhdr", "x.mha", "x.nii", "x.nii.gz", "X.NRRD"])
def test_no_header_leads_to_another_file(beside: Path, attack: str, name: str) -> None:
    (beside / name).write_bytes(ATTACKS[attack] + (bytes(512) if "gzip" not in attack else b""))
    assert _read(beside / name), "it was read"


@pytest.mark.parametrize(
    "fields",
    [
        {"space directions": "(1e308,0,0) (0,1e308,0) (0,0,1e308)"},
        {"space directions": "(1e200,1e200,0) (0,1,0) (0,0,1)"},
        {"space origin": "(1e308,0,0)"},
    ],
    ids=str,
)
def test_geometry_beyond_all_bounds_is_refused(tmp_path: Path, fields: dict[str, str]) -> None:
    lines = [line.split(": ") for line in NRRD.decode().splitlines() if ": " in line]
    header = "".join(f"{key}: {value}\n" for key, value in (dict(lines) | fields).items())
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004\n" + header.encode() + b"\n" + bytes(512))
    for read in (read_grid, read_volume):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ImageError, match=r"affine|axes"):
                read(tmp_path / "a.nrrd")


def as_text(content: bytes) -> bytes:
    return NRRD.replace(b"encoding: raw", b"encoding: ascii") + content


def test_long_words_of_a_text_take_no_memory(tmp_path: Path) -> None:
    """One word of 100,000 digits among 512 would make an array of 51 MB, and among a million one of 100 GB."""
    (tmp_path / "a.nrrd").write_bytes(as_text(b"1 " * 511 + b"0" * 100_000))
    tracemalloc.start()
    with pytest.raises(ImageError, match="a number of more than 400 characters"):
        read_voxels(tmp_path / "a.nrrd")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


@pytest.mark.parametrize("blank", [b" ", b"\n", b" " * 100_000, b"\t\r\n"], ids=["blank", "line", "many", "tab"])
def test_text_is_read_block_by_block(tmp_path: Path, blank: bytes) -> None:
    numbers = np.arange(512) % 256
    text = blank.join(str(number).encode() for number in numbers)
    (tmp_path / "a.nrrd").write_bytes(as_text(blank + text))
    np.testing.assert_array_equal(read_voxels(tmp_path / "a.nrrd")[1].ravel(order="F"), numbers)
    (tmp_path / "a.nrrd").write_bytes(as_text(text + blank + b"7"))
    with pytest.raises(ImageError, match="more than its 512 numbers"):
        read_voxels(tmp_path / "a.nrrd")
    (tmp_path / "a.nrrd").write_bytes(as_text(blank.join(text.split()[:-1])))
    with pytest.raises(ImageError, match=r"511 of 512 numbers|promises"):
        read_voxels(tmp_path / "a.nrrd")


def test_voxels_that_lie_far_behind_are_not_unpacked_for(tmp_path: Path) -> None:
    """Zeros pack a thousandfold: a file of some MB would be unpacked for minutes."""
    content = _nifti_header(False)
    content[108:112] = struct.pack("<f", 2.0**29)  # vox_offset
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(ImageError, match="voxels from byte 536870912 on"):
        read_header(tmp_path / "a.nii.gz")


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (b"endian: little", b"endian: middle", "has the endian 'middle'; valid: little, big"),
        (b"(1,0,0) (0,1,0) (0,0,1)", b"(1,0,0) (0,1,0)", "2 space directions; valid: 3"),
        (b"origin: (0,0,0)", b"origin: (0,0)", "space origin has 2 numbers; valid: 3"),
    ],
)
def test_sentence_says_which_field_is_wrong(tmp_path: Path, field: bytes, value: bytes, sentence: str) -> None:
    header = NRRD.replace(b"type: uint8", b"type: uint16").replace(field, value)
    (tmp_path / "a.nrrd").write_bytes(header + bytes(1024))
    with pytest.raises(ImageError, match=sentence):
        read_voxels(tmp_path / "a.nrrd")


@pytest.mark.parametrize("word", ["99999999999999999999", "-1", "256", "1e999", "nan", "rm", "0x1", "1.5"])
def test_text_that_is_no_number_of_its_type_is_refused(tmp_path: Path, word: str) -> None:
    content = NRRD.replace(b"encoding: raw", b"encoding: ascii") + (f"{word} " * 512).encode()
    (tmp_path / "a.nrrd").write_bytes(content)
    with pytest.raises(ImageError, match="damaged"):
        read_voxels(tmp_path / "a.nrrd")
