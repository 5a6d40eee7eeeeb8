from __future__ import annotations

from pathlib import Path

import pytest

from launcher.checks import TEST_PROCESSES, count_test_processes, files_in_memory
from launcher.environment import set_up
from tests.run.conftest import RecordedProject

CLOSING_LINE = "==== 12 passed in 3.45s ===="


def test_all_checks_run_and_the_last_line_is_pytests(
    project: RecordedProject, capsys: pytest.CaptureFixture[str]
) -> None:
    project.answer("-m ruff check", 1, "Found 2 errors.")
    project.answer("-m pytest", 0, f"tests/a.py ....\n{CLOSING_LINE}\n")
    assert project.run("test", "--", "-k", "geometry") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == CLOSING_LINE
    assert [line for line in lines if line.startswith("FAIL")] == ["FAIL  ruff check (exit code 1)"]
    assert [line for line in lines if line.startswith("ok")] == ["ok    ruff format", "ok    mypy", "ok    pytest"]
    assert project.calls[-1] == ["-m", "pytest", *TEST_PROCESSES, "-k", "geometry"]


def test_more_processes_than_cores_run_tests_but_not_many() -> None:
    assert [count_test_processes(cores) for cores in (1, 2, 4, 64)] == [1, 3, 4, 4]


def test_all_green_is_exit_code_0(project: RecordedProject) -> None:
    assert project.run("test") == 0


def test_failed_tests_are_exit_code_1(project: RecordedProject) -> None:
    project.answer("-m pytest", 1, "==== 1 failed in 1.00s ====")
    assert project.run("test") == 1


def test_files_of_tests_are_in_memory_while_there_is_room_for_them(tmp_path: Path) -> None:
    with files_in_memory(tmp_path, needed=1) as variables:
        root = Path(variables["PYTEST_DEBUG_TEMPROOT"])
        assert root.parent == tmp_path
        (root / "pytest-of-anna").mkdir()
    assert not root.exists()
    for folder, needed in ((tmp_path, 2**62), (tmp_path / "none", 1)):
        with files_in_memory(folder, needed) as variables:
            assert variables == {}


def test_doctor_works_before_the_install(project: RecordedProject, capsys: pytest.CaptureFixture[str]) -> None:
    project.python.unlink()
    assert project.run("doctor", "--port", "0") == 0
    assert "no virtual environment yet" in capsys.readouterr().out


def test_doctor_says_when_the_environment_is_out_of_date(
    project: RecordedProject, capsys: pytest.CaptureFixture[str]
) -> None:
    project.run("doctor", "--port", "0")
    assert "not up to date" in capsys.readouterr().out
    set_up(project, dev=False)
    project.run("doctor", "--port", "0")
    assert "is up to date" in capsys.readouterr().out
    assert project.calls[-1] == ["-m", "lib.doctor"]


def test_doctor_passes_a_failure_of_the_installed_part_on(project: RecordedProject) -> None:
    project.answer("lib.doctor", 1, "FAIL  monailabel cannot be imported")
    assert project.run("doctor", "--port", "0") == 1
