"""The history of labels: nothing is lost, nothing is overwritten, and what a crash leaves is put right."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lib.datastore.history import LabelHistory
from lib.datastore.records import LabelVersion, Submission, to_record
from lib.errors import ConflictError, NotFoundError, StorageError
from lib.storage.files import sha256_of

Open = Callable[[], LabelHistory]


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Open]:
    """Opens the history of ``tmp_path`` anew, as after a restart."""
    opened: list[LabelHistory] = []

    def open_again() -> LabelHistory:
        for history in opened:
            history.close()
        opened[:] = [LabelHistory(tmp_path / "history", tmp_path / "labels")]
        return opened[0]

    yield open_again
    for history in opened:
        history.close()


def mask(folder: Path, content: bytes) -> Path:
    path = folder / "sent.nii.gz"
    path.write_bytes(content)
    return path


def save(history: LabelHistory, image: str, content: bytes, **fields: object) -> LabelVersion:
    return history.append(mask(history.folder.parent, content), Submission(image_id=image, **fields))  # type: ignore[arg-type]


def published(history: LabelHistory, image: str, tag: str = "final") -> bytes:
    return (history.published.folder / tag / f"{image}.nii.gz").read_bytes()


def test_newest_thousand_versions_follow_every_change_and_are_read_once(reopen: Open) -> None:
    history = reopen()
    assert history.lately() == []
    first = save(history, "a", b"one", info={"sent": "along"})
    assert history.lately() == [replace(first, info={})]
    record = to_record(first)
    for number in range(2, 1005):
        name = f"{number:08d}-{first.version_id[-8:]}"
        history.index.insert(record | {"sequence": number, "version_id": name, "image_id": f"image {number}"})
    history.remove("image 1004", "final")
    assert [version.sequence for version in history.lately()] == list(range(6, 1005))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        seen = history.lately()
        assert tracemalloc.get_traced_memory()[1] - before < 100 * 2**10
    finally:
        tracemalloc.stop()
    newest = save(history, "b", b"two")
    assert history.lately() == [*seen[1:], newest]


def test_versions_are_kept_and_the_newest_is_published(reopen: Open) -> None:
    history = reopen()
    first = save(history, "a", b"one", user="anna", client_id="slicer", model_version="v3", voxels_changed=17)
    other = save(history, "b", b"two")
    second = save(history, "a", b"three", label_map={"liver": 6}, missing_labels=("spleen",))
    assert [v.sequence for v in (first, other, second)] == [1, 2, 3]
    assert history.versions("a") == [first, second]
    assert history.latest("a") == second and history.latest("c") is None
    assert history.all_latest() == [other, second]
    assert history.since(1) == [other, second]
    assert history.get(first.version_id).file.read_bytes() == b"one"
    assert published(history, "a") == b"three"
    assert first.sha256 == sha256_of(first.file) and first.saved_at.endswith("+00:00")
    side_car = json.loads(first.file.with_name("00000001.final.a.json").read_text())
    assert (side_car["user"], side_car["model_version"], side_car["voxels_changed"]) == ("anna", "v3", 17)
    history = reopen()
    assert history.versions("a") == [first, second] and history.repairs == []
    with pytest.raises(NotFoundError):
        history.get("00000009-00000000")


def test_tags_are_apart(reopen: Open) -> None:
    history = reopen()
    save(history, "a", b"drawn")
    save(history, "a", b"predicted", tag="original")
    assert (published(history, "a"), published(history, "a", "original")) == (b"drawn", b"predicted")
    assert len(history.versions("a")) == len(history.versions("a", "original")) == 1


def test_restore_makes_a_copy_the_newest(reopen: Open) -> None:
    history = reopen()
    old = save(history, "a", b"good", user="anna", label_map={"liver": 1}, missing_labels=("spleen",))
    save(history, "a", b"bad")
    restored = history.restore(old.version_id, "rita")
    assert (restored.restored_from, restored.user, restored.sequence) == (old.version_id, "rita", 3)
    assert (restored.label_map, restored.missing_labels) == ({"liver": 1}, ("spleen",))
    assert published(history, "a") == b"good"
    assert len(history.versions("a")) == 3


def test_damaged_version_is_not_restored(reopen: Open) -> None:
    history = reopen()
    old = save(history, "a", b"good")
    save(history, "a", b"better")
    old.file.write_bytes(b"g00d")
    with pytest.raises(StorageError, match="not what was saved"):
        history.restore(old.version_id, "rita")
    assert published(history, "a") == b"better"


def test_removal_stays_removed_and_can_be_undone(reopen: Open) -> None:
    history = reopen()
    version = save(history, "a", b"one")
    history.remove("a", "final", "root")
    assert history.latest("a") is None and history.all_latest() == []
    assert history.versions("a") == [version]
    (history.folder / "index.sqlite").unlink()
    history = reopen()
    assert history.latest("a") is None and not (history.published.folder / "final" / "a.nii.gz").exists()
    assert history.restore(version.version_id, "rita").sequence == 3
    assert published(history, "a") == b"one"


def damage_truncate(index: Path) -> None:
    os.truncate(index, index.stat().st_size // 2)


def damage_overwrite(index: Path) -> None:
    index.write_bytes(b"this is no database" * 400)


def damage_middle(index: Path) -> None:
    content = bytearray(index.read_bytes())
    content[4096:12288] = os.urandom(8192)
    index.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [Path.unlink, damage_truncate, damage_overwrite, damage_middle, lambda index: os.truncate(index, 0)]
)
def test_index_is_made_anew_from_the_files(reopen: Open, damage: Callable[[Path], None]) -> None:
    history = reopen()
    saved = [save(history, f"case_{n % 7}", f"mask {n}".encode(), user=f"user {n}") for n in range(40)]
    history.remove("case_0", "final")
    history.close()
    damage(history.folder / "index.sqlite")
    history = reopen()
    assert history.repairs, "nothing was said"
    assert history.since(0) == saved
    assert history.latest("case_0") is None
    assert published(history, "case_4") == b"mask 39"
    assert reopen().repairs == []


def test_lost_side_car_is_written_again(reopen: Open) -> None:
    history = reopen()
    version = save(history, "a", b"one", user="anna")
    side_car = version.file.with_name("00000001.final.a.json")
    side_car.unlink()
    assert "side-car" in reopen().repairs[0]
    assert json.loads(side_car.read_text())["user"] == "anna"


@pytest.mark.parametrize(
    "field",
    [{"label_map": "x"}, {"label_map": {"a": "b"}}, {"info": []}, {"notes": [1]}, {"saved_at": 5}, {"size": None}],
    ids=str,
)
def test_version_with_side_car_of_wrong_types_is_recovered_without_the_index(
    reopen: Open, field: dict[str, object]
) -> None:
    history = reopen()
    version = save(history, "a", b"one", user="anna")
    side_car = version.file.with_name("00000001.final.a.json")
    side_car.write_text(json.dumps(json.loads(side_car.read_text()) | field))
    (history.folder / "index.sqlite").unlink()
    found = reopen().latest("a")
    assert found is not None and (found.sha256, found.source) == (version.sha256, "recovered")
    assert found.describe()["label_map"] == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"sequence": 1}', b"\xff\xfe\x00", b"[" * 100_000])
def test_version_with_damaged_side_car_is_recovered_without_the_index(reopen: Open, content: bytes) -> None:
    history = reopen()
    version = save(history, "case.7", b"one", user="anna")
    version.file.with_name("00000001.final.case.7.json").write_bytes(content)
    (history.folder / "index.sqlite").unlink()
    history = reopen()
    found = history.latest("case.7")
    assert found is not None and found.file.read_bytes() == b"one"
    assert (found.version_id, found.source) == (version.version_id, "recovered")
    assert "damaged" in history.repairs[0]
    assert reopen().repairs == []


def test_unfinished_saves_are_cleared_away(reopen: Open) -> None:
    history = reopen()
    save(history, "a", b"one")
    shard = history.shard(1)
    shutil.copy(shard / "00000001.final.a.json", shard / "00000002.final.a.json")
    left = history.published.folder / "final" / ".99999999-abc.part"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    said = reopen().repairs
    assert any("not finished" in line for line in said) and any("half-written" in line for line in said)
    assert not left.exists() and sorted(p.name for p in shard.iterdir()) == [
        "00000001.final.a.json", "00000001.final.a.nii.gz",
    ]  # fmt: skip


def test_version_of_another_size_goes_into_quarantine(reopen: Open) -> None:
    history = reopen()
    version = save(history, "a", b"whole label")
    version.file.write_bytes(b"half")
    (history.folder / "index.sqlite").unlink()
    history = reopen()
    assert history.latest("a") is None
    refused = history.quarantine.all()[0]
    assert refused.file.read_bytes() == b"half" and "4 bytes instead of 11" in refused.reason


def test_lost_version_is_said(reopen: Open) -> None:
    history = reopen()
    save(history, "a", b"one")
    version = save(history, "a", b"two")
    version.file.unlink()
    history = reopen()
    assert "lost file of version 2 was written again" in history.repairs[0]
    assert version.file.read_bytes() == published(history, "a") == b"two"
    version.file.unlink()
    (history.published.folder / "final" / "a.nii.gz").unlink()
    history = reopen()
    assert "version 2 is gone" in history.repairs[0]
    assert published(history, "a") == b"one"
    assert [v.sequence for v in history.versions("a")] == [1]


def test_published_label_that_was_removed_or_changed_by_hand(reopen: Open) -> None:
    history = reopen()
    save(history, "a", b"one")
    save(history, "b", b"two")
    final = history.published.folder / "final"
    (final / "a.nii.gz").unlink()
    (final / "b.nii.gz").write_bytes(b"edited by a tool")
    history = reopen()
    assert published(history, "a") == b"one"
    assert [v.source for v in history.versions("b")] == ["", "folder"]
    assert history.versions("b")[0].file.read_bytes() == b"two"
    assert published(history, "b") == b"edited by a tool"


def test_files_that_the_index_was_not_told_of_are_not_overwritten(reopen: Open) -> None:
    history = reopen()
    stray = history.shard(1)
    stray.mkdir()
    (stray / "00000001.final.a.nii.gz").write_bytes(b"another process's")
    assert save(history, "a", b"mine").sequence == 2
    assert (stray / "00000001.final.a.nii.gz").read_bytes() == b"another process's"


def test_failing_disk_changes_nothing(reopen: Open) -> None:
    """SQLite may have no more pages than it has, and the version's record needs one."""
    history = reopen()
    kept = save(history, "a", b"good")
    before = {p: p.read_bytes() for p in history.folder.parent.rglob("*") if p.is_file() and "sqlite" not in p.name}

    history.index._db.execute("PRAGMA max_page_count = 1")  # no fewer than there are
    with pytest.raises(StorageError, match="the label of 'a' was not kept: database or disk is full"):
        save(history, "a", b"next", user="anna" * 5000)
    history.index._db.execute("PRAGMA max_page_count = 1000000")
    after = {p: p.read_bytes() for p in history.folder.parent.rglob("*") if p.is_file() and "sqlite" not in p.name}
    sent = history.folder.parent / "sent.nii.gz"
    assert {p: c for p, c in after.items() if p != sent} == {p: c for p, c in before.items() if p != sent}
    assert history.latest("a") == kept
    assert save(history, "a", b"next").sequence == 2


@pytest.mark.parametrize("source", ["rest", "dicom", "folder", "restore", "recovered"])
def test_prediction_never_replaces_what_a_person_drew(reopen: Open, source: str) -> None:
    history = reopen()
    save(history, "case", b"predicted", source="inference")
    save(history, "case", b"predicted again", source="inference")  # a newer prediction replaces an older one
    drawn = save(history, "case", b"drawn", source=source, user="anna")
    with pytest.raises(ConflictError, match=r"'final' of 'case' was submitted by 'anna' at .* does not replace it"):
        save(history, "case", b"predicted", source="inference")
    assert history.latest("case") == drawn and published(history, "case") == b"drawn"
    save(history, "case", b"of MONAI Label's own server", tag="original", source="folder")
    save(history, "case", b"predicted", tag="original", source="inference")
    history.remove("case", "final")
    save(history, "case", b"predicted", source="inference")
    assert published(history, "case") == b"predicted"


def test_file_that_came_is_kept_beside_the_one_that_was_made_of_it(reopen: Open, tmp_path: Path) -> None:
    history = reopen()
    came = tmp_path / "mine.seg.nrrd"
    came.write_bytes(b"as it came")
    version = history.append(mask(tmp_path, b"as it is kept"), Submission(image_id="case"), came)
    assert published(history, "case") == b"as it is kept"
    assert history.sent(version).read_bytes() == b"as it came" and version.sent_sha256 == sha256_of(came)
    (history.folder / "index.sqlite").unlink()
    again = reopen()
    found = again.latest("case")
    assert found == version and again.sent(found).read_bytes() == b"as it came"
    plain = save(again, "case", b"plain")
    assert again.sent(plain) == plain.file and plain.sent_file == ""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that nobody sent."""
    path = tmp_path / "secret.nii.gz"
    path.write_bytes(b"a secret")
    return path


@pytest.mark.skipif(os.name == "nt", reason="needs links of POSIX")
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_link_in_the_place_of_a_version_is_not_read(
    reopen: Open, outside: Path, link: Callable[[Path, Path], None]
) -> None:
    history = reopen()
    came = outside.with_name("came.nrrd")
    came.write_bytes(b"as it came")
    version = history.append(mask(outside.parent, b"one"), Submission(image_id="a"), came)
    assert history.mask(version).read_bytes() == b"one" and history.sent(version).read_bytes() == b"as it came"
    for file in (version.file, history.sent(version)):
        file.unlink()
        link(outside, file)
    for read in (history.mask, history.sent):
        with pytest.raises(NotFoundError, match=version.version_id):
            read(version)
    (history.published.folder / "final/a.nii.gz").unlink()
    history.publish_again("a", "final")
    assert not (history.published.folder / "final/a.nii.gz").exists()


def test_folder_in_the_place_of_a_label_holds_up_neither_the_start_nor_other_labels(reopen: Open) -> None:
    """It ended every refresh of the studies in a traceback, and kept the server from starting."""
    history = reopen()
    save(history, "a", b"one")
    save(history, "b", b"two")
    folder = history.published.folder / "final"
    for image in ("a", "b"):
        (folder / f"{image}.nii.gz").unlink()
    (folder / "a.nii.gz").mkdir()
    history = reopen()
    assert published(history, "b") == b"two"
    assert history.mask(history.versions("a")[0]).read_bytes() == b"one"
    (sentence,) = [sentence for sentence in history.repairs if "a.nii.gz" in sentence]
    assert "a folder lies where its file 'a.nii.gz' belongs" in sentence
    assert history.put_right() == [], "it is said once"
    with pytest.raises(StorageError, match="a folder lies where its file"):
        save(history, "a", b"three")
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    (folder / "a.nii.gz").rmdir()
    assert len(history.put_right()) == 1
    assert published(history, "a") == b"one"


@pytest.mark.skipif(os.name == "nt", reason="needs links of POSIX")
def test_link_to_the_content_that_was_kept_is_read(reopen: Open, tmp_path: Path) -> None:
    """As a backup by hard links makes them, or files that were moved to another disk."""
    history = reopen()
    version = save(history, "a", b"one")
    os.link(version.file, tmp_path / "backup")
    assert history.mask(version) == version.file
    shutil.move(version.file, tmp_path / "moved")
    version.file.symlink_to(tmp_path / "moved")
    assert history.mask(version).read_bytes() == b"one"


@pytest.mark.skipif(os.name == "nt", reason="needs links of POSIX")
def test_link_is_taken_for_a_version_at_no_start(reopen: Open, outside: Path) -> None:
    history = reopen()
    save(history, "a", b"one")
    (history.shard(1) / "00000007.final.a.nii.gz").symlink_to(outside)
    folder = outside.parent / "elsewhere"
    folder.mkdir()
    (folder / "00001001.final.a.nii.gz").write_bytes(b"a secret")
    (history.versions_folder / "00001").symlink_to(folder, target_is_directory=True)
    history = reopen()
    assert [version.sequence for version in history.versions("a")] == [1]
    assert history.quarantine.all() == []
