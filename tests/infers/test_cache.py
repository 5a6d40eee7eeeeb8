"""Masks that are ready: found by what they depend on, bounded, and gone with the weights that made them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lib.errors import ImageError
from lib.infers.cache import CachedMask, CacheKey, Checksums, ResultCache

KEY = CacheKey("image", "tiny", ("v1",), ("cpu", None))


def mask(seed: int = 0, edge: int = 40) -> CachedMask:
    """One that does not pack well."""
    labels = np.random.default_rng(seed).integers(0, 255, (edge, edge, edge), dtype=np.uint8)
    return CachedMask(labels, np.eye(4), {"seed": seed})


@pytest.mark.parametrize("order", ["C", "F", "neither"])
def test_mask_comes_back_as_it_was(order: str) -> None:
    cache, labels = ResultCache(1), np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    labels = {"C": labels, "F": np.asfortranarray(labels), "neither": labels.transpose(1, 0, 2)}[order]
    cache.put(KEY, CachedMask(labels, 2 * np.eye(4), {"model": "x"}))
    kept = cache.get(KEY)
    assert kept is not None
    np.testing.assert_array_equal(kept.labels, labels)
    assert kept.labels.flags.fnc == labels.flags.fnc, "it is not turned in memory"
    np.testing.assert_array_equal(kept.affine_ras, 2 * np.eye(4))
    assert kept.payload == {"model": "x"}


@pytest.mark.parametrize(
    "other",
    [
        CacheKey("other", "tiny", ("v1",), ("cpu", None)),
        CacheKey("image", "huge", ("v1",), ("cpu", None)),
        CacheKey("image", "tiny", ("v1",), ("cpu", True)),
    ],
)
def test_other_image_preset_or_options_is_another_mask(other: CacheKey) -> None:
    cache = ResultCache(1)
    cache.put(KEY, mask(edge=4))
    assert cache.get(other) is None
    assert KEY in cache


def test_new_weights_empty_what_the_old_ones_said_of_that_preset_only() -> None:
    cache, elsewhere = ResultCache(1), CacheKey("image", "huge", ("v1",), ())
    for key in (KEY, CacheKey("second", "tiny", ("v1",), ("cpu", None)), elsewhere):
        cache.put(key, mask(edge=4))
    assert cache.get(CacheKey("image", "tiny", ("v2",), ("cpu", None))) is None
    assert len(cache) == 1 and elsewhere in cache


def test_memory_is_bounded_and_those_used_longest_ago_leave() -> None:
    keys = [CacheKey(str(i), "tiny", ("v1",), ()) for i in range(30)]
    one = mask().size_bytes
    cache = ResultCache(1)
    for number, key in enumerate(keys):
        cache.put(key, mask(number))
        cache.get(keys[0])  # used all the time
        assert cache.size_bytes <= 1 << 20
    assert len(cache) == (1 << 20) // one
    assert keys[0] in cache and keys[-1] in cache and keys[1] not in cache


def test_mask_that_does_not_fit_leaves_the_others_alone() -> None:
    cache = ResultCache(1)
    cache.put(KEY, mask(edge=4))
    big = CacheKey("big", "tiny", ("v1",), ())
    cache.put(big, mask(edge=120))
    assert big not in cache and KEY in cache


def test_without_memory_nothing_is_kept() -> None:
    cache = ResultCache(0)
    cache.put(KEY, mask(edge=2))
    assert cache.get(KEY) is None and len(cache) == 0 and cache.size_bytes == 0


def test_checksum_follows_content_and_is_remembered(tmp_path: Path) -> None:
    a, b, checksums = tmp_path / "a.nii", tmp_path / "b.nii", Checksums()
    a.write_bytes(b"voxels")
    b.write_bytes(b"voxels")
    first = checksums.of(a)
    assert first == checksums.of(b)
    a.write_bytes(b"others")
    os.utime(a, ns=(1, 1))
    assert checksums.of(a) != first
    before = b.stat().st_mtime_ns
    b.write_bytes(b"VOXELS")
    os.utime(b, ns=(before, before))
    assert checksums.of(b) == first, "a file of the same size and time is not read again"


def test_checksum_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    for name, content in (("one", b"1"), ("two", b"2")):
        (tmp_path / name).write_bytes(content)
    checksums = Checksums()
    before = checksums.of(tmp_path)
    (tmp_path / "two").write_bytes(b"22")
    assert checksums.of(tmp_path) != before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs on this system")
def test_checksum_of_a_fifo_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.nii.gz")
    with pytest.raises(ImageError, match=r"fifo.nii.gz' is no regular file, but a FIFO"):
        Checksums().of(tmp_path / "fifo.nii.gz")
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "one").write_bytes(b"1")
    before = Checksums().of(folder)
    os.mkfifo(folder / "fifo")
    (folder / "empty").touch()
    assert Checksums().of(folder) == before, "of a DICOM folder, only files with content count"


def test_checksum_of_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.nii' cannot be read: No such file"):
        Checksums().of(tmp_path / "none.nii")
