"""A project folder whose ``.venv`` holds a stand-in for Python: what run.py starts is recorded."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.command_line import main
from launcher.processes import WINDOWS
from launcher.project import Project

STAND_IN = """\
import json, os, subprocess, sys
arguments = sys.argv[1:]
if arguments[:1] == ["-c"]:
    sys.exit(subprocess.call([{python!r}, *arguments]))
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
answers = json.load(open({answers!r}))
for key, (code, output) in answers.items():
    if key in " ".join(arguments):
        print(output)
        sys.exit(code)
"""


@dataclass(frozen=True)
class RecordedProject(Project):
    """The folder, and what has been started in it."""

    def run(self, *arguments: str) -> int:
        """Exit code of ``run.py`` with these arguments in this folder."""
        return main(self, arguments)

    def answer(self, key: str, code: int, output: str) -> None:
        """Let each command line with ``key`` in it print this and end with this code."""
        path = self.root / "answers.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: (code, output)}))

    @property
    def calls(self) -> list[list[str]]:
        """Arguments of each start of the virtual environment's Python, but for ``-c``."""
        path = self.root / "calls.txt"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def installs(self) -> list[list[str]]:
        """The ``pip install`` calls among them."""
        return [call for call in self.calls if call[:3] == ["-m", "pip", "install"]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordedProject:
    """An installed-looking project in a folder with spaces in its name; run.py works on it."""
    if WINDOWS:
        pytest.skip("the stand-in for Python is a POSIX script")
    root = tmp_path / "a folder with spaces"
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (root / "answers.json").write_text("{}")
    text = STAND_IN.format(python=sys.executable, calls=str(root / "calls.txt"), answers=str(root / "answers.json"))
    (root / "stand_in.py").write_text(text)
    # a shell in between, since a first line of #! cannot name an interpreter whose path has a space in it
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{root}/stand_in.py' \"$@\"\n")
    python.chmod(0o755)
    # should a test ever reach a real pip, it finds nothing to install
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("requirements.txt", "constraints.txt", "requirements-dev.txt"):
        (root / name).write_text(f"# {name}\n")
    for name in list(os.environ):
        if name.startswith("MONAI_LABEL_"):
            monkeypatch.delenv(name)
    return RecordedProject(root)
