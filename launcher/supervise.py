"""Supervises the running server."""

from __future__ import annotations

import argparse
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence

from launcher.processes import WINDOWS, as_exit_code, own_process_group, stop_requests_set, stop_tree


def supervise(command: Sequence[str], environment: Mapping[str, str], options: argparse.Namespace) -> int:
    """Run the server until it ends or this process is asked to stop; returns the exit code."""
    # the server stops at the end of its standard input, and so when this program ends for any reason
    watched = {**environment, "UNETR_ENDS_WITH_INPUT": "1"}
    server = subprocess.Popen(command, env=watched, stdin=subprocess.PIPE, **own_process_group())
    stopped = threading.Event()
    with stop_requests_set(stopped):
        if wait_until_ready(server, options, stopped):
            print(next_steps(options), flush=True)
        while not stopped.is_set() and server.poll() is None:
            stopped.wait(0.2)
        if stopped.is_set():
            print("stopping the server", flush=True)
        code = stop_tree(server)
    if server.stdin is not None:
        server.stdin.close()
    ended_on_request = stopped.is_set() and (WINDOWS or code in (0, -signal.SIGTERM, -signal.SIGINT))
    return 0 if ended_on_request else as_exit_code(code)


def wait_until_ready(server: subprocess.Popen[bytes], options: argparse.Namespace, stopped: threading.Event) -> bool:
    """Wait until the server responds; False if it ends first or this process is asked to stop."""
    started = time.monotonic()
    reported = 0
    while server.poll() is None and not stopped.is_set():
        if answers(server_url(options) + "/info/"):
            return True
        stopped.wait(0.5)
        waited = time.monotonic() - started
        if waited >= reported + 15:
            reported += 15
            print(f"the server is starting ({waited:.0f} s)", flush=True)
    if not stopped.is_set():
        print("run.py: the server ended while it started; the reason stands above", file=sys.stderr)
    return False


def answers(url: str) -> bool:
    """Whether a server responds at the URL, with any status."""
    context = ssl.create_default_context()
    context.check_hostname = False  # this is the local server, usually with a self-signed certificate
    context.verify_mode = ssl.CERT_NONE
    handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)]
    try:
        urllib.request.build_opener(*handlers).open(url, timeout=30).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False
    return True


def server_url(options: argparse.Namespace) -> str:
    """The URL of the server for clients on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    scheme = "https" if options.ssl_keyfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{options.port}"


def next_steps(options: argparse.Namespace) -> str:
    """Five lines with the next steps in 3D Slicer and in OHIF."""
    url = server_url(options)
    return "\n".join(
        (
            f"Ready at {url} - stop with Ctrl-C.",
            "3D Slicer:  in View > Extensions Manager install MONAILabel, restart, open Active Learning > MONAI Label,",
            f"            enter {url} as MONAI Label server, and press the green refresh arrow;",
            "            press Next Sample to load a case, then Run under Auto Segmentation.",
            f"OHIF:       open {url}/ohif/ in a browser, choose a study and MONAI Label; Run, correct, Submit.",
        )
    )
