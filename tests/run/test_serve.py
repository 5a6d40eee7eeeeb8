from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.processes import as_exit_code
from launcher.serve import SAMPLE_COUNTS
from run import PROJECT
from tests.run.conftest import RecordedProject

SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/info/" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
SUPERVISOR = """
import os, sys
from launcher.command_line import parse_arguments
from launcher.supervise import supervise
options = parse_arguments(["--port", sys.argv[1]])
sys.exit(supervise([sys.executable, "-c", sys.argv[2], sys.argv[1]], os.environ, options))
"""


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def supervised(server: str, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SUPERVISOR, str(port), server]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT.root)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_port_in_use_is_refused_before_anything_starts(
    project: RecordedProject, busy_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project.run("serve", "--port", str(busy_port)) == 4
    assert f"port {busy_port} on 127.0.0.1 is in use" in capsys.readouterr().err
    assert project.calls == []


def test_impossible_port_is_refused(project: RecordedProject) -> None:
    assert project.run("--port", "70000") == 4


@pytest.mark.parametrize("option", ["ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "log_config"])
def test_file_that_is_not_there_is_named(
    project: RecordedProject, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert project.run("serve", "--port", str(free_port()), f"--{option}", "none.pem") == 2
    assert f"run.py: --{option}: there is no file 'none.pem'" in capsys.readouterr().err
    assert project.calls == []


def test_first_start_makes_samples_and_starts_the_server(project: RecordedProject) -> None:
    project.answer("lib.server", 5, "cannot start")
    assert project.run("serve", "--port", str(free_port())) == 5
    *samples, server = project.calls[-3:]
    folder = str(project.root / "studies" / "sample")
    for command, what in zip(samples, ("hippocampus", "abdomen"), strict=True):
        assert command[:5] == [str(project.root / "sample-data" / "generate.py"), "--out", folder, "--what", what]
        assert command[-2:] == ["--format", "both"], "DICOM too, for OHIF"
    assert server[:3] == ["-m", "lib.server", "start_server"]
    assert server[server.index("--studies") + 1] == folder
    assert server[server.index("--app") + 1] == str(project.root / "apps" / "unetr_radiology")


def test_samples_are_made_once_and_only_without_studies(project: RecordedProject) -> None:
    project.sample_studies.mkdir(parents=True)
    for number in range(sum(SAMPLE_COUNTS.values())):
        (project.sample_studies / f"{number}.nii.gz").touch()
        (project.sample_studies / "dicom" / str(number)).mkdir(parents=True)
    project.answer("lib.server", 5, "")
    assert project.run("serve", "--port", str(free_port())) == 5
    assert not any("generate.py" in word for call in project.calls for word in call)


def test_failed_samples_end_with_a_sentence(project: RecordedProject, capsys: pytest.CaptureFixture[str]) -> None:
    project.answer("generate.py", 1, "")
    assert project.run("serve", "--port", str(free_port())) == 1
    assert "--studies" in capsys.readouterr().err


def test_address_open_to_others_is_warned_about(project: RecordedProject, capsys: pytest.CaptureFixture[str]) -> None:
    project.answer("lib.server", 5, "")
    port = str(free_port())
    project.run("--port", port, "--studies", str(project.root))
    assert "WARNING" not in capsys.readouterr().out
    project.run("--port", port, "--studies", str(project.root), "--host", "0.0.0.0")
    assert "WARNING: 0.0.0.0 can be reached from other machines" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads process states from /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stop_request_ends_the_server_and_its_children(how: int) -> None:
    supervisor = supervised(SERVER, free_port())
    assert supervisor.stdout is not None
    lines: list[str] = []
    while not (lines and lines[-1].startswith("OHIF")):
        lines.append(supervisor.stdout.readline())
        assert lines[-1], f"the server did not become ready: {lines}"
    child = int(next(line for line in lines if line.startswith("child")).split()[1])
    assert is_running(child)
    supervisor.send_signal(how)
    rest = supervisor.stdout.read()
    assert supervisor.wait(30) == 0, rest
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)
    supervisor.stdout.close()


WATCHED = "from lib.server.work.parent import end_with_parent; end_with_parent()\n" + SERVER


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads process states from /proc")
def test_server_ends_when_run_py_is_killed() -> None:
    supervisor = supervised(
        WATCHED.replace("print(", "import os; print('server', os.getpid(), flush=True); print("), free_port()
    )
    assert supervisor.stdout is not None
    server, child = (int(supervisor.stdout.readline().split()[1]) for _ in range(2))
    assert is_running(server)
    supervisor.kill()
    deadline = time.monotonic() + 20
    while is_running(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(server)
    os.kill(child, signal.SIGKILL)
    supervisor.wait()
    supervisor.stdout.close()


def test_exit_code_of_a_server_that_ends_passes() -> None:
    supervisor = supervised("import sys; sys.exit(9)", free_port())
    out, _ = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 9
    assert "ended while it started" in out


def test_death_by_signal_is_shown_as_a_shell_does() -> None:
    assert as_exit_code(-9) == 137
    assert as_exit_code(3) == 3
