#!/usr/bin/env python3
"""Python for the processes that a forked server starts: a module becomes a fork of the starter as the server is one.

    forked_python.py [-u] -m MODULE ARGUMENTS...
    forked_python.py --fork [-u] -c CODE

With ``--fork`` code becomes a fork too, as pytest-xdist's processes are. It hands its standard streams to the fork,
passes a request to end on, and ends as the fork does; when it is killed, the starter kills the fork. Whatever else is
asked of it is left to the Python of the tests.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def main(arguments: list[str]) -> int:
    """Returns the exit code of the fork."""
    kinds = {"-m": "module"} | ({"-c": "code"} if arguments[:1] == ["--fork"] else {})
    plain = arguments[arguments[:1] == ["--fork"] :]
    arguments = plain[plain[:1] == ["-u"] :]
    if not arguments or arguments[0] not in kinds:
        os.execv(os.environ["TEST_PYTHON"], [os.environ["TEST_PYTHON"], *plain])
    asked = {kinds[arguments[0]]: arguments[1], "argv": arguments[2:]}
    asked |= {"cwd": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.connect(os.environ["TEST_STARTER"])
        socket.send_fds(link, [json.dumps(asked).encode()], [0, 1, 2])
        process = int(link.recv(64))
        signal.signal(signal.SIGTERM, lambda *_: os.kill(process, signal.SIGTERM))
        code = int(link.recv(64) or -signal.SIGKILL)  # the starter may be gone
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
