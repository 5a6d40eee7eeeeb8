"""Temporary files of a server that was killed go with the next start; those of one that runs stay."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lib.server.work.temporary import own_temporary_folder, remove_left_behind, remove_log_configuration

HOLDER = """
import sys, tempfile
from lib.server.work.temporary import own_temporary_folder
with own_temporary_folder() as folder:
    open(folder / "upload.nii.gz", "w").close()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_folder_is_gone_after_a_stop_and_where_temporary_files_go_before(base: Path) -> None:
    with own_temporary_folder() as folder:
        assert folder.parent == base
        with tempfile.NamedTemporaryFile() as file:
            assert Path(file.name).parent == folder
    assert list(base.iterdir()) == [] and tempfile.gettempdir() == str(base)


def test_folder_of_a_killed_server_goes_and_that_of_a_running_one_stays(base: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdin is not None
    folder = Path(holder.stdout.readline().strip())
    assert remove_left_behind(base) == [] and (folder / "upload.nii.gz").exists()
    holder.kill()
    holder.wait()
    with own_temporary_folder() as own:
        assert list(base.iterdir()) == [own]
    holder.stdin.close()
    holder.stdout.close()


def test_other_folders_are_left_alone(base: Path) -> None:
    (base / "unetr-server-just-made").mkdir()
    (base / "unetr-other").mkdir()
    assert remove_left_behind(base) == []


def test_logging_configuration_that_monai_label_made_is_removed_and_a_users_stays(base: Path) -> None:
    made, kept = base / "tmpabcd1234.json", base / "logging.json"
    made.touch()
    kept.touch()
    assert not remove_log_configuration(str(made), ["start_server", "--log_config", str(made)])
    assert not remove_log_configuration(str(kept), ["start_server"])
    assert not remove_log_configuration(None, ["start_server"])
    assert remove_log_configuration(str(made), ["start_server"])
    assert list(base.iterdir()) == [kept]
