"""Run a server that listens on every interface in a network of its own, reached through a socket on the loopback.

    unshare --map-root-user --net python loopback.py DESCRIPTOR PORT COMMAND...

DESCRIPTOR is a listening socket of the caller, on 127.0.0.1 of the caller's network; each connection to it is passed on
to PORT inside. (Debian's Orthanc 1.10.1 ignores ``HttpBindAddresses``.)
"""

from __future__ import annotations

import contextlib
import fcntl
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

SET_FLAGS, UP_AND_RUNNING = 0x8914, 0x41
"""SIOCSIFFLAGS; IFF_UP and IFF_RUNNING (Linux, netdevice(7))."""
BLOCK_BYTES = 65536


def main() -> None:
    """Start the command and pass connections on until it ends."""
    descriptor, port, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SET_FLAGS, struct.pack("16sH14x", b"lo", UP_AND_RUNNING))
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    listener = socket.socket(fileno=descriptor)
    threading.Thread(target=accept, args=(listener, port), daemon=True).start()
    sys.exit(process.wait())


def accept(listener: socket.socket, port: int) -> None:
    """Pass each connection on, once the server inside listens."""
    while True:
        outside, _ = listener.accept()
        threading.Thread(target=serve, args=(outside, port), daemon=True).start()


def serve(outside: socket.socket, port: int) -> None:
    """Connect inside, and copy both ways until one side ends."""
    with outside, connect(port) as inside:
        back = threading.Thread(target=copy, args=(inside, outside), daemon=True)
        back.start()
        copy(outside, inside)
        back.join()


def connect(port: int) -> socket.socket:
    """A connection to the server inside, which may be starting still."""
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.05)


def copy(source: socket.socket, target: socket.socket) -> None:
    """Copy until the source ends, and say so to the target."""
    with contextlib.suppress(OSError):
        while block := source.recv(BLOCK_BYTES):
            target.sendall(block)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main()
