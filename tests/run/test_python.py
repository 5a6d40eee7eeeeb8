from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from launcher.command_line import main
from launcher.processes import WINDOWS
from launcher.pythons import python_version, run_with_supported_python
from run import PROJECT


def test_supported_python_goes_on() -> None:
    assert run_with_supported_python(PROJECT, []) is None


def test_unsupported_python_is_refused_with_what_would_be_valid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    monkeypatch.setenv("PATH", "")
    assert main(PROJECT, ["doctor"]) == 3
    error = capsys.readouterr().err
    assert "Python 3.13 is not supported" in error and "3.10, 3.11 or 3.12" in error


@pytest.mark.skipif(WINDOWS, reason="the stand-ins are POSIX scripts")
def test_unsupported_python_hands_over_to_a_supported_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken, working = tmp_path / "python3.11", tmp_path / "python3.12"
    broken.write_text("#!/bin/sh\nexit 127\n")
    working.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for stand_in in (broken, working):
        stand_in.chmod(0o755)

    def replace_process(_: str, command: list[str]) -> None:
        raise SystemExit(repr(command))  # like the real one, this never returns

    monkeypatch.setattr(os, "execvp", replace_process)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    with pytest.raises(SystemExit) as replaced:
        main(PROJECT, ["test", "--", "-x"])
    assert replaced.value.code == repr([str(working), str(PROJECT.root / "run.py"), "test", "--", "-x"])


def test_version_of_what_is_no_python_is_none() -> None:
    assert python_version(["no-such-python"]) is None
    assert python_version([sys.executable, "-c", "print('stub')"]) is None
    assert python_version([sys.executable]) == sys.version_info[:2]
