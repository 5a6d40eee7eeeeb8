"""What is refused is kept with the reason, up to a limit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lib.datastore.quarantine import Quarantine
from lib.errors import NotFoundError


def sent(folder: Path, content: bytes = b"bytes", name: str = "label.nii.gz") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_bytes_and_reason_are_kept_side_by_side(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine")
    assert quarantine.all() == [] and quarantine.count() == 0
    kept = quarantine.keep(sent(tmp_path), "it is wrong", {"user": "anna", "image_id": "a"})
    assert kept.file.read_bytes() == b"bytes" and kept.file.name.endswith(".nii.gz")
    told = json.loads(kept.file.with_name(f"{kept.name}.json").read_text())
    assert (told["reason"], told["user"], told["file"]) == ("it is wrong", "anna", kept.file.name)
    assert quarantine.get(kept.name) == kept
    assert quarantine.all() == [kept]
    assert kept.describe()["size"] == 5


def test_newest_are_told_without_reading_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quarantine = Quarantine(tmp_path / "quarantine")
    assert quarantine.newest(2) == []
    damaged, *kept = (quarantine.keep(sent(tmp_path), f"reason {number}", {}) for number in range(3))
    damaged.file.with_name(f"{damaged.name}.json").write_text("{")
    assert quarantine.newest(2) == kept[::-1]
    assert not caplog.records, "a record that is not read is not said to be damaged"
    assert quarantine.newest(3) == quarantine.all() == kept[::-1]
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("name", ["nope", "../index", "20260101-000000-000000-00000000", ""])
def test_unknown_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFoundError):
        Quarantine(tmp_path).get(name)


def test_oldest_go_first_when_there_is_too_much(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine", limit_mib=1)
    for number in range(5):
        newest = quarantine.keep(sent(tmp_path, bytes([number]) * 400_000), f"reason {number}", {})
    assert sum(path.stat().st_size for path in quarantine.folder.iterdir()) < 2**20
    assert newest in quarantine.all()
    assert 1 <= quarantine.count() <= 3


def test_strange_file_names_do_no_harm(tmp_path: Path) -> None:
    kept = Quarantine(tmp_path / "quarantine").keep(sent(tmp_path, name="x.n;i$i"), "wrong", {})
    assert kept.file.parent == tmp_path / "quarantine" and "$" not in kept.file.name


@pytest.mark.skipif(os.name == "nt", reason="needs links of POSIX")
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_link_in_the_place_of_a_refused_file_is_not_read(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    quarantine = Quarantine(tmp_path / "quarantine")
    kept = quarantine.keep(sent(tmp_path), "it is wrong", {})
    assert quarantine.content(kept.name).read_bytes() == b"bytes"
    kept.file.unlink()
    with pytest.raises(NotFoundError, match=kept.name):
        quarantine.content(kept.name)
    link(sent(tmp_path, b"a secret", "secret"), kept.file)
    with pytest.raises(NotFoundError, match=kept.name):
        quarantine.content(kept.name)
