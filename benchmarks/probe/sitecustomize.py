"""Python runs this at its start where this folder is on its path: a benchmark's server then says what it holds.

``MEMORY_PROBE`` names a socket. Each connection to it is answered, once garbage is collected and freed memory given
back, with JSON: bytes that malloc has handed out, pages that are not of files, and how many small Python objects.
"""

import os
import sys

FIELDS = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


def _listen(path: str) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(_measure())


def _measure() -> bytes:
    import ctypes
    import gc
    import json

    class Info(ctypes.Structure):
        """``struct mallinfo2`` of glibc, of all of its regions."""

        _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]

    glibc = ctypes.CDLL(None)
    glibc.mallinfo2.restype = Info
    gc.collect()
    glibc.malloc_trim(0)
    info = glibc.mallinfo2()
    with open("/proc/self/status", encoding="ascii") as file:
        anonymous_kib = next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
    held = {"malloc": info.uordblks + info.hblkhd, "anonymous": anonymous_kib * 1024}
    return json.dumps(held | {"objects": sys.getallocatedblocks()}).encode()


if "MEMORY_PROBE" in os.environ and "start_server" in sys.orig_argv:
    import threading

    threading.Thread(target=_listen, args=(os.environ["MEMORY_PROBE"],), daemon=True, name="memory probe").start()
