"""Cases of several sequences in the datastore: each listed once, shown by one channel, read with all of them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lib.configs.preset import Preset
from lib.datastore.label_files.found_labels import find_problems
from lib.datastore.store import VersionedDatastore
from lib.doctor import check_images
from lib.errors import ImageError
from lib.infers.cache import Checksums
from lib.transforms.inputs import read_input
from lib.transforms.volume import read_volume
from tests.tiny import tiny_preset, write_nifti

SHAPE = (20, 18, 16)
TWO = tiny_preset(channels=[{"name": "t1"}, {"name": "flair", "display": True}])
Open = Callable[..., VersionedDatastore]


def _noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Open]:
    opened: list[VersionedDatastore] = []

    def open_again(*presets: Preset) -> VersionedDatastore:
        for store in opened:
            store.close()
        opened[:] = [VersionedDatastore(str(tmp_path / "studies"), presets, extensions=["*.nii.gz", "*.nrrd"])]
        return opened[0]

    yield open_again
    for store in opened:
        store.close()


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Three complete cases, one in each form, and what is none."""
    folder = tmp_path / "studies"
    write_nifti(folder / "a_0000.nii.gz", _noise(1))
    write_nifti(folder / "a_0001.nii.gz", _noise(2))
    write_nifti(folder / "b" / "b-T1.nii.gz", _noise(3))
    write_nifti(folder / "b" / "b-FLAIR.nii.gz", _noise(4))
    write_nifti(folder / "b" / "b-seg.nii.gz", _noise(5))
    write_nifti(folder / "c.nii.gz", np.stack([_noise(6), _noise(7)], axis=-1))
    write_nifti(folder / "only_flair_0001.nii.gz", _noise(8))
    write_nifti(folder / "only_t1_0000.nii.gz", _noise(9))
    write_nifti(folder / "single.nii.gz", _noise(10))
    (folder / "damaged.nii.gz").write_bytes(b"no image")
    return folder


def test_each_case_is_listed_once_and_shown_by_its_display_channel(studies: Path, open_store: Open) -> None:
    store = open_store(TWO)
    assert sorted(store.list_images()) == ["a", "b", "c", "damaged", "only_flair", "single"]
    for case_id, seed in (("a", 2), ("b", 4), ("c", 7)):
        shown = Path(store.get_image_uri(case_id))
        assert shown.name == f"{case_id}.nii.gz" == Path(store.get_image_info(case_id)["path"]).name
        np.testing.assert_allclose(read_volume(shown).voxels, _noise(seed), rtol=1e-6)
        volume = read_input(shown, TWO)
        np.testing.assert_allclose(volume.channels[0], _noise(seed - 1), rtol=1e-6)
        np.testing.assert_allclose(volume.channels[1], _noise(seed), rtol=1e-6)
    assert [(p.name, p.reason) for p in store.problems] == [
        (
            "only_t1",
            "lacks the channel flair, which is shown and labelled; there is only_t1_0000.nii.gz",
        )
    ]


def test_what_a_case_lacks_is_said_when_it_is_read(studies: Path, open_store: Open) -> None:
    store = open_store(TWO)
    with pytest.raises(ImageError, match="case 'only_flair' lacks the channels t1"):
        read_input(Path(store.get_image_uri("only_flair")), TWO)
    with pytest.raises(ImageError, match="image 'single' lacks other sequences; 'tiny' needs the channels t1, flair"):
        read_input(Path(store.get_image_uri("single")), TWO)


def test_a_preset_without_channels_beside_it_reads_the_channel_that_is_shown(studies: Path, open_store: Open) -> None:
    store = open_store(tiny_preset(name="one"), TWO)
    assert sorted(store.list_images()) == ["a", "b", "c", "damaged", "only_flair", "single"]
    np.testing.assert_array_equal(read_input(Path(store.get_image_uri("a")), tiny_preset()).voxels, _noise(2))


def test_without_such_a_preset_the_files_are_images(studies: Path, open_store: Open) -> None:
    listed = sorted(open_store(tiny_preset()).list_images())
    assert listed == ["a_0000", "a_0001", "c", "damaged", "only_flair_0001", "only_t1_0000", "single"]


def test_two_presets_with_another_display_channel_read_on_the_grid_that_is_shown(
    studies: Path, open_store: Open
) -> None:
    coarse = np.diag([2.0, 2.0, 2.0, 1.0])
    write_nifti(studies / "a_0000.nii.gz", _noise(1)[::2, ::2, ::2], coarse)
    other = tiny_preset(name="other", channels=[{"name": "t1", "display": True}, {"name": "flair"}])
    store = open_store(TWO, other)
    shown = Path(store.get_image_uri("a"))
    for preset in (TWO, other):
        volume = read_input(shown, preset)
        assert [channel.shape for channel in volume.channels] == [SHAPE, SHAPE]
        np.testing.assert_array_equal(volume.channels[1], _noise(2))
        assert volume.notes == ("channel t1 was resampled onto the grid of flair",)


def test_stamp_and_checksum_change_with_any_channel(studies: Path, open_store: Open) -> None:
    store, checksums = open_store(TWO), Checksums()
    for case_id, file in (("a", "a_0000.nii.gz"), ("b", "b/b-T1.nii.gz"), ("c", "c.nii.gz")):
        before = store.stamp(case_id), checksums.of(Path(store.get_image_uri(case_id)))
        again = store.stamp(case_id), checksums.of(Path(store.get_image_uri(case_id)))
        assert before == again
        voxels = _noise(20) if case_id != "c" else np.stack([_noise(20), _noise(7)], axis=-1)
        write_nifti(studies / file, voxels)
        after = store.stamp(case_id), checksums.of(Path(store.get_image_uri(case_id)))
        assert before[0] != after[0] and before[1] != after[1]
        np.testing.assert_allclose(
            read_input(Path(store.get_image_uri(case_id)), TWO).channels[0], _noise(20), rtol=1e-6
        )


def test_labels_are_paired_with_what_is_shown_and_a_removed_case_leaves_nothing(
    studies: Path, open_store: Open, tmp_path: Path
) -> None:
    store = open_store(TWO)
    label = write_nifti(tmp_path / "label.nii.gz", (_noise(2) > 120).astype(np.uint8))
    for case_id in ("a", "c"):
        store.save_label(case_id, str(label), "final", {})
    pairs = {Path(pair["label"]).name: Path(pair["image"]) for pair in store.datalist()}
    assert {name: image.name for name, image in pairs.items()} == {"a.nii.gz": "a.nii.gz", "c.nii.gz": "c.nii.gz"}
    assert read_input(pairs["a.nii.gz"], TWO).channels[0].shape == SHAPE
    archive = Path(store.get_dataset_archive(None))
    with zipfile.ZipFile(archive) as packed:
        channels = {name for name in packed.namelist() if name.startswith("channels/")}
    archive.unlink()
    assert channels == {"channels/a/a_0000.nii.gz", "channels/a/a_0001.nii.gz", "channels/c/c.nii.gz"}
    for case_id in ("a", "b", "c"):
        store.remove_image(case_id)
    kept = {path.name for path in studies.iterdir() if path.suffix in (".gz", "")} - {"labels", "history"}
    assert kept == {".dicom", "b", "only_flair_0001.nii.gz", "only_t1_0000.nii.gz", "single.nii.gz", "damaged.nii.gz"}
    assert [path.name for path in (studies / "b").iterdir()] == ["b-seg.nii.gz"]
    assert list((studies / ".dicom" / "channels").iterdir()) == []


def test_the_doctor_holds_labels_against_the_channel_that_is_shown(studies: Path, tmp_path: Path) -> None:
    final = studies / "labels" / "final"
    for case_id, shape in (("a", SHAPE), ("b", (5, 5, 5)), ("c", SHAPE)):
        write_nifti(final / f"{case_id}.nii.gz", np.ones(shape, np.uint8))
    (tmp_path / "own").mkdir()
    problems = {problem.file: problem.reason for problem in find_problems(studies, [TWO], tmp_path / "own")}
    assert list(problems) == ["labels/final/b.nii.gz"] and "(5, 5, 5)" in problems["labels/final/b.nii.gz"]
    said = [str(finding) for finding in check_images(studies, [TWO])]
    assert any("case 'only_flair' lacks the channels t1" in line for line in said)
    assert not any("a_0000" in line or "b-T1" in line for line in said)


def test_a_file_that_comes_into_a_folder_completes_the_case(studies: Path, open_store: Open) -> None:
    store = open_store(TWO)
    write_nifti(studies / "n" / "n_t1.nii.gz", _noise(11))
    store.refresh()
    assert "n" not in store.list_images()
    write_nifti(studies / "n" / "n_flair.nii.gz", _noise(12))
    store.refresh()
    assert "n" in store.list_images()
    write_nifti(studies / "n" / "again_t1.nii.gz", _noise(13))
    store.refresh()
    with pytest.raises(ImageError, match="case 'n' has two files for the channel 't1'"):
        read_input(Path(store.get_image_uri("n")), TWO)
