from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lib.storage.admission import Admission

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs links and FIFOs of POSIX")


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    (tmp_path / "studies" / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "studies" / "own.nii").write_bytes(b"own")
    (tmp_path / "outside" / "secret.nii").write_bytes(b"secret")
    return tmp_path / "studies"


def test_own_file_and_links_inside_are_taken_in(studies: Path) -> None:
    (studies / "link.nii").symlink_to(studies / "own.nii")
    os.link(studies / "own.nii", studies / "sub" / "hard.nii")
    admission = Admission(studies)
    for name in ("own.nii", "link.nii", "sub/hard.nii"):
        assert admission.refusal(studies / name) is None


@pytest.mark.parametrize("kind", ["file", "folder", "chain", "hard"])
def test_link_out_of_the_folder_is_left_out_unless_allowed(studies: Path, tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "outside" / "secret.nii"
    file = studies / "linked.nii"
    if kind == "file":
        file.symlink_to(secret)
    elif kind == "folder":
        (studies / "way").symlink_to(secret.parent)
        file = studies / "way" / "secret.nii"
    elif kind == "chain":
        (studies / "first").symlink_to(secret)
        file.symlink_to(studies / "first")
    else:
        os.link(secret, file)
    assert "outside the studies folder" in str(Admission(studies).refusal(file))
    assert Admission(studies, [secret.parent]).refusal(file) is None


def test_hard_link_is_judged_again_when_its_other_name_goes(studies: Path, tmp_path: Path) -> None:
    os.link(tmp_path / "outside" / "secret.nii", studies / "x.nii")
    admission = Admission(studies)
    assert admission.refusal(studies / "x.nii") is not None
    (tmp_path / "outside" / "secret.nii").unlink()
    assert admission.refusal(studies / "x.nii") is None


def test_folder_that_becomes_a_link_is_noticed(studies: Path, tmp_path: Path) -> None:
    (studies / "sub" / "secret.nii").write_bytes(b"own")
    admission = Admission(studies)
    assert admission.refusal(studies / "sub" / "secret.nii") is None
    (studies / "sub" / "secret.nii").unlink()
    (studies / "sub").rmdir()
    (studies / "sub").symlink_to(tmp_path / "outside")
    assert admission.refusal(studies / "sub" / "secret.nii") is not None


def test_what_is_no_regular_file_is_left_out_without_being_opened(studies: Path) -> None:
    os.mkfifo(studies / "fifo.nii")
    (studies / "loop.nii").symlink_to(studies / "loop.nii")
    (studies / "gone.nii").symlink_to(studies / "nothing")
    (studies / "zero.nii").symlink_to("/dev/zero")
    admission = Admission(studies)
    assert admission.refusal(studies / "fifo.nii") == "is no regular file"
    for name in ("loop.nii", "gone.nii", "zero.nii", "sub"):
        assert admission.refusal(studies / name) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are bytes")
def test_name_that_is_not_utf8_is_left_out(studies: Path) -> None:
    name = os.fsdecode(b"M\xfcller.nii")
    (studies / name).write_bytes(b"x")
    assert "is not UTF-8" in str(Admission(studies).refusal(studies / name))
