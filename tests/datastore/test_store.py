"""MONAI Label's datastore with a history: its own interface still holds, and nothing on disk can break it for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.exception import ImageNotFoundException

from lib.datastore.history import LabelHistory
from lib.datastore.open_cases import OpenCases
from lib.datastore.records import Submission
from lib.datastore.store import VersionedDatastore
from lib.errors import ImageError, StorageError
from lib.transforms.channels import ChannelSources, write_sources
from tests.tiny import write_nifti

Open = Callable[..., VersionedDatastore]
IMAGES = 4


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Open]:
    """Opens the store of ``tmp_path / "studies"`` anew, as after a restart."""
    opened: list[VersionedDatastore] = []
    for number in range(IMAGES):
        write_nifti(tmp_path / "studies" / f"case_{number}.nii.gz", np.ones((4, 4, 4), np.float32))

    def open_again(folder: Path = tmp_path / "studies") -> VersionedDatastore:
        for store in opened:
            store.close()
        opened[:] = [VersionedDatastore(str(folder), extensions=["*.nii.gz", "*.nrrd"])]
        return opened[0]

    yield open_again
    for store in opened:
        store.close()


def test_archive_holds_files_of_any_time_and_leaves_out_what_is_gone(reopen: Open, tmp_path: Path) -> None:
    """ZIP knows the years 1980 to 2107, and a label may be removed while the archive is written."""
    store = reopen()
    for number, seconds in enumerate((0, 2**33, 1_700_000_000)):
        store.save_label(f"case_{number}", str(label(tmp_path)), "final", {})
        os.utime(tmp_path / "studies" / f"case_{number}.nii.gz", (seconds, seconds))
    gone = store.get_label_uri("case_2", "final")
    listed = store.datalist

    def listed_before(full_path: bool = True) -> list[dict[str, Any]]:
        pairs = listed(full_path)
        Path(gone).unlink()
        return pairs

    store.datalist = listed_before  # type: ignore[method-assign]
    archive = store.get_dataset_archive(None)
    with zipfile.ZipFile(archive) as content:
        assert {name for name in content.namelist() if name.startswith("label/")} == {
            "label/case_0.nii.gz", "label/case_1.nii.gz"
        }  # fmt: skip
        assert "image/case_2.nii.gz" not in content.namelist()
        assert content.testzip() is None and content.getinfo("image/case_0.nii.gz").date_time[0] == 1980
    os.unlink(archive)


def label(folder: Path, value: int = 1) -> Path:
    return write_nifti(folder / f"label_{value}.nii.gz", np.full((4, 4, 4), value, np.uint8))


def test_interface_of_monai_label_holds(reopen: Open, tmp_path: Path) -> None:
    store = reopen()
    assert store.list_images() == [f"case_{n}" for n in range(IMAGES)]
    assert store.save_label("case_1", str(label(tmp_path)), "final", {"client_id": "slicer", "extra": [1]}) == "case_1"
    assert store.get_labeled_images() == ["case_1"] and "case_1" not in store.get_unlabeled_images()
    assert store.get_labels_by_image_id("case_1") == {"final": "case_1"}
    assert Path(store.get_label_uri("case_1", "final")).read_bytes() == label(tmp_path).read_bytes()
    info = store.get_label_info("case_1", "final")
    assert (info["client_id"], info["extra"], info["name"]) == ("slicer", [1], "case_1.nii.gz")
    assert [Path(pair["label"]).parent.name for pair in store.datalist()] == ["final"]
    assert store.status() == {"total": IMAGES, "completed": 1, "label_tags": {"final": 1}}
    with pytest.raises(ImageNotFoundException):
        store.save_label("nope", str(label(tmp_path)), "final", {})
    store.remove_label("case_1", "final")
    assert store.status()["completed"] == 0 and not store.get_label_uri("case_1", "final")
    assert len(store.history.versions("case_1")) == 1


def test_what_is_known_survives_a_restart_without_the_export(reopen: Open, tmp_path: Path) -> None:
    store = reopen()
    store.save_label("case_1", str(label(tmp_path)), "final", {"client_id": "slicer"})
    store.update_label_info("case_1", "final", {"checked": True})
    store.update_image_info("case_2", {"strategy": {"random": {"ts": 5}}})
    store.add_image("new", str(label(tmp_path)), {"user": "anna"})
    store.close()
    (tmp_path / "studies" / "datastore_v2.json").unlink()
    store = reopen()
    assert store.get_label_info("case_1", "final")["checked"] is True
    assert store.get_image_info("case_2")["strategy"] == {"random": {"ts": 5}}
    assert store.get_image_info("new")["user"] == "anna"


def test_what_was_added_to_a_label_is_about_that_version_alone(reopen: Open, tmp_path: Path) -> None:
    store = reopen()
    store.save_label("case_1", str(label(tmp_path)), "final", {})
    store.update_label_info("case_1", "final", {"checked": True})
    store.update_label_info("case_1", "final", {"by": "ben", "sequence": 10**6})
    store = reopen()
    told = store.get_label_info("case_1", "final")
    assert (told["checked"], told["by"], told["sequence"]) == (True, "ben", 1)
    store.save_label("case_1", str(label(tmp_path, 2)), "final", {})
    told = [store.get_label_info("case_1", "final"), reopen().get_label_info("case_1", "final")]
    assert [one["sequence"] for one in told] == [2, 2] and told[0]["sha256"] == told[1]["sha256"]
    assert not {"checked", "by"} & {*told[0], *told[1]}


def test_export_is_read_by_monai_labels_own_store(reopen: Open, tmp_path: Path) -> None:
    store = reopen()
    store.save_label("case_1", str(label(tmp_path)), "final", {"client_id": "slicer"})
    store.save_label("case_2", str(label(tmp_path)), "original", {})
    store.close()
    stock = LocalDatastore(str(tmp_path / "studies"), extensions=["*.nii.gz", "*.nrrd"])
    assert stock.status() == {"total": IMAGES, "completed": 1, "label_tags": {"final": 1, "original": 1}}
    assert stock.get_label_info("case_1", "final")["client_id"] == "slicer"


def test_labels_of_monai_labels_own_store_are_taken_in_with_their_names(reopen: Open, tmp_path: Path) -> None:
    stock = LocalDatastore(str(tmp_path / "studies"), extensions=["*.nii.gz", "*.nrrd"])
    names = [{"name": "core", "idx": 1}, {"name": "Left Box", "idx": 2}]
    stock.save_label("case_3", str(label(tmp_path)), "final", {"label_info": names})
    version = reopen().history.latest("case_3")
    assert version is not None
    assert (version.label_map, version.source) == ({"core": 1, "Left Box": 2}, "folder")


def test_folder_that_was_labelled_with_other_tools_is_taken_in_at_the_first_start(reopen: Open, tmp_path: Path) -> None:
    final = tmp_path / "studies" / "labels" / "final"
    for number in range(3):
        write_nifti(final / f"case_{number}.nii.gz", np.full((4, 4, 4), number, np.uint8))
    write_nifti(final / "of_no_image.nii.gz", np.ones((4, 4, 4), np.uint8))
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    store = reopen()
    versions = store.history.all_latest()
    assert [(v.sequence, v.image_id, v.source) for v in versions] == [(n + 1, f"case_{n}", "folder") for n in range(3)]
    assert all(version.file.read_bytes() == before[f"{version.image_id}.nii.gz"] for version in versions)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before
    assert store.save_version(label(tmp_path, 3), Submission(image_id="case_0")).sequence == 4
    store = reopen()
    assert (store.history.repairs, store.history.index.count()) == ([], 4)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"objects": 5}', b"\xff\xfe"])
def test_damaged_export_is_made_anew(reopen: Open, tmp_path: Path, content: bytes) -> None:
    store = reopen()
    store.save_label("case_1", str(label(tmp_path)), "final", {})
    store.close()
    export = tmp_path / "studies" / "datastore_v2.json"
    export.write_bytes(content)
    store = reopen()
    assert store.status()["completed"] == 1 and store.status()["total"] == IMAGES
    assert len(list(export.parent.glob("datastore_v2.json.damaged-*"))) == 1
    store.close()
    assert json.loads(export.read_bytes())["objects"].keys() == {f"case_{n}" for n in range(IMAGES)}


def test_versions_of_another_process_are_seen(reopen: Open, tmp_path: Path) -> None:
    store = reopen()
    other = LabelHistory(tmp_path / "studies" / "history", tmp_path / "studies" / "labels")
    other.append(label(tmp_path), Submission(image_id="case_0", tag="original"))
    store.save_label("case_1", str(label(tmp_path)), "original", {})
    other.append(label(tmp_path), Submission(image_id="case_2", tag="original"))
    store.follow_history()
    assert store.status()["label_tags"] == {"original": 3}
    other.remove("case_0", "original")
    other.close()
    store.follow_history()
    assert store.status()["label_tags"] == {"original": 2}


def test_label_of_another_kind_replaces_the_one_before(reopen: Open, tmp_path: Path) -> None:
    store = reopen()
    mask = tmp_path / "mask.nrrd"
    mask.write_bytes(b"nrrd")
    store.save_label("case_1", str(mask), "original", {})
    store.save_label("case_1", str(label(tmp_path)), "original", {})
    assert [p.name for p in (tmp_path / "studies" / "labels" / "original").iterdir()] == ["case_1.nii.gz"]


def test_open_cases_hide_what_is_closed(reopen: Open) -> None:
    store = reopen()
    seen = OpenCases(store, {"case_0", "case_2"})
    assert sorted(seen.get_unlabeled_images()) == ["case_1", "case_3"]
    assert seen.list_images() == store.list_images()


def mount(folder: Path, *arguments: str) -> None:
    """Mount a small file system, or skip."""
    folder.mkdir(exist_ok=True)
    ended = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip(f"cannot mount here: {ended.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.name == "nt":
        pytest.skip("needs mount")
    folder = tmp_path / "small"
    mount(folder, "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "labels" / "final").iterdir())}


def test_full_disk_keeps_all_that_was_acknowledged(small_disk: Path, reopen: Open, tmp_path: Path) -> None:
    for number in range(IMAGES):
        write_nifti(small_disk / f"case_{number}.nii.gz", np.ones((4, 4, 4), np.float32))
    store, random, kept = reopen(small_disk), np.random.default_rng(3), []
    sent = tmp_path / "sent.nii.gz"
    refusals = 0
    for number in range(200):
        sent.write_bytes(random.bytes(int(random.integers(1, 40_000))))
        try:
            kept.append((store.save_version(sent, Submission(image_id=f"case_{number % IMAGES}")), sent.read_bytes()))
        except StorageError as error:
            assert "no space left" in str(error) or "full" in str(error)
            refusals += 1
    assert refusals > 10 and len(kept) > 5
    for restarted in (False, True):
        store = reopen(small_disk) if restarted else store
        assert [v.version_id for v in store.history.since(0)] == [v.version_id for v, _ in kept]
        assert all(version.file.read_bytes() == content for version, content in kept)
        newest = {version.image_id: content for version, content in kept}
        assert contents(small_disk) == {f"{name}.nii.gz": content for name, content in newest.items()}


def test_read_only_folder_serves_what_is_there(small_disk: Path, reopen: Open, tmp_path: Path) -> None:
    write_nifti(small_disk / "case_0.nii.gz", np.ones((4, 4, 4), np.float32))
    store = reopen(small_disk)
    version = store.save_version(label(tmp_path), Submission(image_id="case_0"))
    store.close()
    mount(small_disk, "-o", "remount,ro")
    store = reopen(small_disk)
    assert any("labels can only be read" in line for line in store.history.repairs)
    assert store.history.latest("case_0") == version
    assert store.status() == {"total": 1, "completed": 1, "label_tags": {"final": 1}}
    for write in (
        lambda: store.save_version(label(tmp_path), Submission(image_id="case_0")),
        lambda: store.remove_label("case_0", "final"),
        lambda: store.add_image("new", str(label(tmp_path)), {}),
    ):
        with pytest.raises(StorageError):
            write()
    assert store.leases.take("case_0", "anna") is not None
    mount(small_disk, "-o", "remount,rw")
    assert reopen(small_disk).save_version(label(tmp_path), Submission(image_id="case_0")).sequence == 2


def test_failing_save_leaves_the_last_good_label(reopen: Open, tmp_path: Path, monkeypatch: Any) -> None:
    store = reopen()
    store.save_label("case_1", str(label(tmp_path)), "final", {})
    before = contents(tmp_path / "studies")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="no space left on device"):
            store.save_label("case_1", str(label(tmp_path, 2)), "final", {})
    assert contents(tmp_path / "studies") == before
    assert store.get_label_info("case_1", "final")["sequence"] == 1


@pytest.mark.skipif(os.name == "nt", reason="needs links and FIFOs of POSIX")
def test_what_is_not_the_studies_own_is_left_out_everywhere(reopen: Open, tmp_path: Path) -> None:
    studies, outside = tmp_path / "studies", label(tmp_path)
    (studies / "linked.nii.gz").symlink_to(outside)
    os.link(outside, studies / "hard.nii.gz")
    os.mkfifo(studies / "fifo.nii.gz")
    (studies / "labels" / "final").mkdir(parents=True)
    (studies / "labels" / "final" / "case_0.nii.gz").symlink_to(outside)
    os.link(outside, studies / "labels" / "final" / "case_1.nii.gz")
    (studies / "labels" / "final" / "case_2.nii.gz").write_bytes(outside.read_bytes())
    store = reopen()
    assert sorted(store.list_images()) == [f"case_{n}" for n in range(IMAGES)]
    assert store.get_labeled_images() == ["case_2"]
    assert store.history.versions("case_0") == store.history.versions("case_1") == []
    assert set(store.left_out()) == {
        "linked.nii.gz", "hard.nii.gz", "fifo.nii.gz",
        os.path.join("labels", "final", "case_0.nii.gz"), os.path.join("labels", "final", "case_1.nii.gz"),
    }  # fmt: skip
    assert "outside the studies folder" in str(store.why_left_out("linked"))
    (studies / "labels" / "final" / "case_2.nii.gz").unlink()
    (studies / "labels" / "final" / "case_2.nii.gz").symlink_to(outside)
    assert store.datalist() == [], "a file that became a link since the folders were looked at"
    for name in ("linked", "hard", "fifo"):
        (studies / f"{name}.nii.gz").unlink()
    store.refresh()
    assert store.why_left_out("linked") is None


def test_record_beside_an_image_brings_no_other_file_in(reopen: Open, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    store = reopen()
    for number in (0, 1):
        store.save_label(f"case_{number}", str(label(tmp_path)), "final", {})
    sources = ChannelSources("case_0", {"t1": tmp_path / "studies/case_0.nii.gz", "t2": secret})
    write_sources(tmp_path / "studies/case_0.nii.gz", {"any": sources}, "")
    with pytest.raises(ImageError, match="'case_0' names a file for another sequence that lies outside the studies"):
        store.get_image_uri("case_0")
    assert [Path(pair["image"]).name for pair in store.datalist()] == ["case_1.nii.gz"]
    with zipfile.ZipFile(store.get_dataset_archive(None)) as archive:
        assert {name.split("/")[-1] for name in archive.namelist()} == {"case_1.nii.gz", "metadata.json"}
        os.unlink(str(archive.filename))


@pytest.mark.parametrize(
    "text", ["[", "[]", '{"presets": []}', '{"presets": {"a": {"files": {"b": 5}}}}', '{"presets": {"a": 1}}']
)
def test_damaged_record_beside_an_image_is_none(reopen: Open, tmp_path: Path, text: str) -> None:
    (tmp_path / "studies/case_0.channels.json").write_text(text)
    assert Path(reopen().get_image_uri("case_0")).name == "case_0.nii.gz"


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are bytes")
def test_name_that_is_not_utf8_is_left_out_and_told(reopen: Open, tmp_path: Path) -> None:
    (tmp_path / "studies" / os.fsdecode(b"M\xfcller.nii.gz")).write_bytes(label(tmp_path).read_bytes())
    store = reopen()
    assert sorted(store.list_images()) == [f"case_{n}" for n in range(IMAGES)]
    assert list(store.left_out()) == ["M\\udcfcller.nii.gz"]
    json.dumps(store.json()).encode()
