from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.environment import requirements_digest, requirements_files, set_up
from launcher.errors import RunError
from launcher.install import explain_failure
from launcher.progress import InstallProgress, short_name
from tests.run.conftest import RecordedProject


def test_second_start_installs_nothing(project: RecordedProject) -> None:
    set_up(project, dev=False)
    assert len(project.installs) == 3
    set_up(project, dev=False)
    assert len(project.installs) == 3


def test_install_with_test_tools_serves_without_them_too(project: RecordedProject) -> None:
    set_up(project, dev=True)
    before = len(project.installs)
    set_up(project, dev=False)
    assert len(project.installs) == before


def test_engine_for_many_machines_is_installed_beside_the_test_tools_and_once(project: RecordedProject) -> None:
    (project.root / "requirements-cluster.txt").write_text("ray==2.60.0\n")
    set_up(project, dev=True)
    assert project.run("setup", "--cluster") == 0
    assert project.installs[-1][-1].endswith("requirements-cluster.txt")
    before = len(project.installs)
    assert project.run("setup", "--cluster") == 0
    set_up(project, dev=True)
    assert len(project.installs) == before


def test_changed_requirements_are_installed(project: RecordedProject) -> None:
    set_up(project, dev=False)
    with (project.root / "constraints.txt").open("a") as constraints:
        constraints.write("numpy==1.26.4\n")
    set_up(project, dev=False)
    assert len(project.installs) == 6


def test_line_ends_are_no_change(project: RecordedProject) -> None:
    before = requirements_digest(project, "dev", (3, 11))
    for path in requirements_files(project, "dev"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert requirements_digest(project, "dev", (3, 11)) == before
    assert requirements_digest(project, "dev", (3, 12)) != before


def test_failed_install_leaves_no_stamp_and_is_gone_on_with(
    project: RecordedProject, capsys: pytest.CaptureFixture[str]
) -> None:
    project.answer("requirements.txt", 1, "ERROR: Could not install packages: [Errno 28] No space left on device")
    assert project.run("setup") == 1
    error = capsys.readouterr().err
    assert "the disk is full" in error and "install.log" in error and len(error.splitlines()) == 1
    assert not project.stamp.exists()

    project.answer("requirements.txt", 0, "Successfully installed monailabel-0.8.5")
    assert project.run("setup") == 0
    assert "did not finish" in capsys.readouterr().out
    assert project.stamp.exists()


def test_failure_of_an_earlier_install_does_not_explain_this_one(project: RecordedProject) -> None:
    project.answer("requirements.txt", 1, "No space left on device")
    assert project.run("setup") == 1
    project.answer("requirements.txt", 1, "ERROR: the wheel is not a zip file")
    with pytest.raises(RunError, match="the wheel is not a zip file"):
        set_up(project, dev=False)


@pytest.mark.parametrize(
    ("printed", "sentence"),
    [
        ("Failed to establish a new connection: [Errno -3] Temporary failure in name resolution", "check the network"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for torch==2.13.0",
            "check the network",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0", "no release for this machine"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "PIP_CERT"),
        ("error: command 'gcc' failed: No such file or directory", "C++ compiler"),
        ("ERROR: something else", "ERROR: something else; delete the folder .venv"),
        ("", "pip gave no reason"),
    ],
)
def test_failure_is_explained(printed: str, sentence: str) -> None:
    assert sentence in explain_failure(printed)


def test_environment_whose_python_is_gone_is_made_anew(
    project: RecordedProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = project.python
    stand_in = project.root / "python for venv"
    stand_in.write_text(f'#!/bin/sh\necho "$@" > "{project.root}/made"\nmv "{project.root}/spare" "{python}"\n')
    stand_in.chmod(0o755)
    python.rename(project.root / "spare")
    monkeypatch.setattr(sys, "executable", str(stand_in))
    set_up(project, dev=False)
    assert (project.root / "made").read_text().strip() == f"-m venv --clear {project.venv}"
    assert len(project.installs) == 3


def test_missing_venv_module_is_named(project: RecordedProject, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = project.root / "python"
    stand_in.write_text("#!/bin/sh\necho 'Error: ensurepip is not available' >&2\nexit 1\n")
    stand_in.chmod(0o755)
    project.python.unlink()
    monkeypatch.setattr(sys, "executable", str(stand_in))
    with pytest.raises(RunError, match="python3-venv"):
        set_up(project, dev=False)


def test_progress_names_counts_and_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with InstallProgress("3/3 everything else", tmp_path) as progress:
        for line in (
            "Collecting numpy==1.26.4",
            "Processing /wheels/torch-2.13.0-cp311.whl",
            "Successfully installed a b",
        ):
            progress.read(line + "\n")
    assert capsys.readouterr().out.splitlines()[-1] == "3/3 everything else: 2 packages, 0:00, 2 packages installed"


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        ("scipy==1.17.1", "scipy"),
        ("/w/torch-2.13.0+cpu-cp311.whl", "torch"),
        (r"C:\w\pydicom-seg-0.4.1.whl", "pydicom-seg"),
    ],
)
def test_name_is_found_in_requirements_and_files(requirement: str, name: str) -> None:
    assert short_name(requirement) == name


def test_each_requirement_is_locked() -> None:
    root = Path(__file__).resolve().parents[2]
    locked = {line.split("==")[0] for line in (root / "constraints.txt").read_text().splitlines() if "==" in line}
    for path in sorted(root.glob("requirements*.txt")):
        asked = [line for line in path.read_text().splitlines() if line and line[0] not in "#-"]
        assert all("==" in line for line in asked)
        assert {line.split("==")[0].lower() for line in asked} <= locked
