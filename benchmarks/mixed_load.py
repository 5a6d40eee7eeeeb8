"""How long mixed requests take, what they cost, and whether the server's memory stays where it is.

    python benchmarks/mixed_load.py [--clients 20] [--minutes 1] [--pause 0] [--only KIND ...] [--out FILE]
    python benchmarks/mixed_load.py --each 20     # each kind alone, 20 times, by one client: CPU time of a request
    python benchmarks/mixed_load.py --grow 300    # each kind alone, 300 times, by four clients: what stays in memory
    python benchmarks/mixed_load.py --soak        # an hour of 6 clients that pause; exit status 1 where memory grows

A server with shipped weights, files and DICOM series gets what annotators, viewers and monitors send, in random order:
pages, pictures, listings, Next Sample, labels, sessions, uploads, DICOMweb, wrong requests, and inferences. Prints a
table by kind of request and for everything but inferences, the CPU time of the server's process a request, the growth
of its memory (a line through what follows the first quarter, so that caches have filled), and the files that it has
left in its temporary folder. Writes JSON. What one kind leaves in memory is measured inside of the server's process
(``benchmarks/probe``), after a warm-up of all kinds and once garbage is collected and freed memory given back.

A soak sends garbage, damaged labels and downloads that are broken off besides, and gives the caches of pictures and
masks little room, which is filled before the time begins. It fails where the memory grows by more than 30 MiB after the
first quarter, a temporary file stays, or a request fails.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from measuring import REPOSITORY, show, write_json
from mixed_requests import HOSTILE, INFERENCES, MIX, MODEL, Client, Kind

sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "sample-data", "tests/integration")]

from dicom_series import SeriesIdentity, write_series  # noqa: E402
from server import Server, wait_until  # noqa: E402
from server_load import prepare  # noqa: E402
from synthetic_hippocampus import SyntheticCase, draw_cases  # noqa: E402

CASES = 24
SERIES = 3
SECONDS_BETWEEN_LOOKS = 2.0
MOST_GROWTH_MIB = 30.0
SHARE_TO_WARM_UP = 0.25
SOAK_CACHES = {"picture_cache_mib": "8", "result_cache_mib": "2"}
KEPT = {"infer": 100, "click": 150, "dicom": 100, "case": 50, "slice": 200, "thumbnail": 100}
"""Kinds of which something is kept, and how many it takes until nothing more is: rare ones would fill their caches for
an hour."""
SECONDS_TO_CLEAN_UP = 20
PROBE = REPOSITORY / "benchmarks" / "probe"
CLIENTS_THAT_GROW = 4
REQUESTS_TO_WARM_UP = 1500
SECONDS_TO_SETTLE = 6.0
KIB = 2**10
COLUMNS = ("request", "count", "busy", "failed", "p50 ms", "p95 ms", "p99 ms", "max ms")


@dataclass
class Watched:
    """The server's process while it was loaded.

    Attributes:
        memory: seconds since the start, and MiB in use without pages of files.
        cpu_seconds: CPU time that it took.
        open_files: at the start and at the end.
        threads: at the start and at the end.
        left: files in its temporary folder when nobody asked for anything any more.
    """

    memory: list[tuple[float, float]] = field(default_factory=list)
    cpu_seconds: float = 0.0
    open_files: tuple[int, int] = (0, 0)
    threads: tuple[int, int] = (0, 0)
    left: list[str] = field(default_factory=list)

    @property
    def growth_mib(self) -> float:
        """By how much a straight line through what follows the warm-up rises."""
        later = [point for point in self.memory if point[0] >= self.memory[-1][0] * SHARE_TO_WARM_UP]
        if len(later) < 2:
            return 0.0
        seconds, mib = np.array(later).T
        return float(np.polyfit(seconds, mib, 1)[0] * (seconds[-1] - seconds[0]))

    def by_minute(self) -> list[float]:
        """Mean MiB of each minute."""
        minutes: dict[int, list[float]] = defaultdict(list)
        for seconds, mib in self.memory:
            minutes[int(seconds // 60)].append(mib)
        return [round(float(np.mean(values)), 1) for values in minutes.values()]


def main() -> int:
    """Load a server, and say how it did."""
    options = parse()
    every = MIX | HOSTILE
    drawn = options.only or (every if options.soak or options.grow else MIX)
    mix = {name: every[name] for name in drawn if name not in options.without}
    conf = (SOAK_CACHES if options.soak else {}) | dict(pair.split("=", 1) for pair in options.conf)
    left: list[str] = []
    if options.each:
        with loaded_server(conf, left) as (server, cases):
            show(("request", "count", "CPU ms", "p50 ms"), each_alone(server, cases, mix, options.each))
        return 0
    if options.grow:
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe"
            with loaded_server(SOAK_CACHES | conf, left, probe) as (server, cases):
                columns = ("request", "count", "malloc KiB", "anonymous KiB", "Python objects", "objects a request")
                show(columns, growth_of_each(server, cases, mix, options.grow, probe))
        return 0
    with loaded_server(conf, left) as (server, cases):
        if options.soak:
            fill_caches(server, cases)
        kinds, watched = load(server, cases, mix, options.clients, options.minutes * 60, options.pause)
    rows = [row(name, kinds[name]) for name in mix]
    others = row("all but inference", joined(kinds[name] for name in mix if name not in INFERENCES))
    show(COLUMNS, [list(line.values()) for line in (*rows, others)])
    for name, kind in kinds.items():
        for failure, count in kind.failures.most_common(5):
            print(f"{name}: {count} times {failure}")
    tell(watched, sum(len(kind.milliseconds) for kind in kinds.values()), options.minutes)
    print(f"temporary files after its end: {left or 'none'}")
    write_json(
        options.out,
        {"clients": options.clients, "minutes": options.minutes, "pause": options.pause, "rows": [*rows, others],
         "memory": watched.memory, "growth_mib": watched.growth_mib, "cpu_seconds": watched.cpu_seconds},
    )  # fmt: skip
    failed = sum(sum(kind.failures.values()) for kind in kinds.values())
    grew = watched.growth_mib > MOST_GROWTH_MIB
    return int(options.soak and bool(grew or watched.left or left or failed))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--soak", action="store_true", help="an hour of few clients, to see whether memory grows")
    parser.add_argument("--each", type=int, default=0, metavar="N", help="each kind of request alone, N times")
    parser.add_argument("--grow", type=int, default=0, metavar="N", help="what each kind alone, N times, leaves")
    parser.add_argument("--clients", type=int, help="20, or 6 in a soak")
    parser.add_argument("--minutes", type=float, help="1, or 60 in a soak")
    parser.add_argument("--pause", type=float, help="mean seconds that a client thinks between requests (0, or 0.5)")
    parser.add_argument("--only", nargs="+", choices=MIX | HOSTILE, help="only these kinds of requests")
    parser.add_argument("--without", nargs="+", choices=MIX | HOSTILE, default=[], help="all but these")
    parser.add_argument("--conf", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the server")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "mixed_load.json")
    options = parser.parse_args()
    for name, usual, in_soak in (("clients", 20, 6), ("minutes", 1.0, 60.0), ("pause", 0.0, 0.5)):
        if getattr(options, name) is None:
            setattr(options, name, in_soak if options.soak else usual)
    return options


@contextmanager
def loaded_server(
    conf: Mapping[str, str], left: list[str], probe: Path | None = None
) -> Iterator[tuple[Server, list[SyntheticCase]]]:
    """A server with files and DICOM series, which ends afterwards; what it then leaves is added to ``left``.

    Args:
        conf: its settings.
        left: names of temporary files.
        probe: a socket on which it is to say what it holds.
    """
    with tempfile.TemporaryDirectory() as folder:
        cases = list(draw_cases(CASES, seed=3))
        probing = {"MEMORY_PROBE": str(probe), "PYTHONPATH": f"{PROBE}:{REPOSITORY}"} if probe else {}
        server = Server(Path(folder), {"models": MODEL, **conf}, environment=probing, forked=probe is None)
        prepare(server, cases)
        for number, case in enumerate(cases[:SERIES]):
            identity = SeriesIdentity(f"SYNTH-{number}", "MR", "T1")
            write_series(server.studies / f"series_{number}", case.image, case.affine_ras, identity)
        server.start()
        try:
            yield server, cases
        finally:
            server.stop()
            left += sorted(path.name for path in server.temporary.iterdir())


def load(
    server: Server, cases: list[SyntheticCase], mix: Mapping[str, float], clients: int, seconds: float, pause: float
) -> tuple[dict[str, Kind], Watched]:
    """Run all clients for a while; returns what they saw, and what became of the server's process."""
    kinds: dict[str, Kind] = defaultdict(Kind)
    for name in mix:
        kinds[name] = Kind()
    workers = [Client(server, cases, number, kinds) for number in range(clients)]
    start = time.monotonic()
    threads = [threading.Thread(target=worker.work, args=(mix, start + seconds, pause)) for worker in workers]
    assert server.process is not None
    process, watched = psutil.Process(server.process.pid), Watched()
    before, opened, running = cpu_seconds(process), process.num_fds(), process.num_threads()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        watched.memory.append((round(time.monotonic() - start, 1), memory_mib(process)))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    watched.cpu_seconds = cpu_seconds(process) - before
    watched.open_files, watched.threads = (opened, process.num_fds()), (running, process.num_threads())
    watched.left = left_in(server)
    return kinds, watched


def fill_caches(server: Server, cases: list[SyntheticCase]) -> None:
    """Ask for what is kept until there is no room for more."""
    client = Client(server, cases, 0, defaultdict(Kind))
    for name, times in KEPT.items():
        for _ in range(times):
            client.send(name)


def each_alone(
    server: Server, cases: list[SyntheticCase], mix: Mapping[str, float], times: int
) -> Iterator[tuple[str, int, float, float]]:
    """Each kind by one client, so that the CPU time of the server's process is that of its requests."""
    kinds: dict[str, Kind] = defaultdict(Kind)
    client = Client(server, cases, 0, kinds)
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    for name in mix:
        client.send(name)  # what the first of a kind has to read or compile is not counted
        kinds[name].milliseconds.clear()
        before = cpu_seconds(process)
        for _ in range(times):
            client.send(name)
        count = len(kinds[name].milliseconds)
        spent = (cpu_seconds(process) - before) / count * 1000
        yield name, count, round(spent, 1), round(float(np.median(kinds[name].milliseconds)), 1)


def growth_of_each(
    server: Server, cases: list[SyntheticCase], mix: Mapping[str, float], times: int, probe: Path
) -> Iterator[tuple[str, int, int, int, int, float]]:
    """What the requests of each kind leave in the memory of the server's process."""
    kinds: dict[str, Kind] = defaultdict(Kind)
    clients = [Client(server, cases, number, kinds) for number in range(CLIENTS_THAT_GROW)]
    everything = MIX | HOSTILE

    def each(send: Callable[[Client], None], requests: int) -> None:
        def work(client: Client) -> None:
            for _ in range(requests // len(clients)):
                send(client)

        threads = [threading.Thread(target=work, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(SECONDS_TO_SETTLE)

    fill_caches(server, cases)
    each(lambda client: client.send_any(everything), REQUESTS_TO_WARM_UP)
    for name in mix:
        # so that every thread has answered this kind
        each(lambda client, name=name: client.send(name), times // 4)  # type: ignore[misc]
        before = held_by(probe)
        each(lambda client, name=name: client.send(name), times)  # type: ignore[misc]
        after = held_by(probe)
        grown = {what: after[what] - before[what] for what in after}
        malloc, anonymous = (round(grown[what] / KIB) for what in ("malloc", "anonymous"))
        yield name, times, malloc, anonymous, grown["objects"], round(grown["objects"] / times, 1)
    for name, kind in kinds.items():
        for failure, count in kind.failures.most_common(5):
            print(f"{name}: {count} times {failure}")


def held_by(probe: Path) -> dict[str, int]:
    """What the server's process holds: bytes, and Python objects."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(probe))
        with connection.makefile() as answer:
            held: dict[str, int] = json.load(answer)
    return held


def memory_mib(process: psutil.Process) -> float:
    """What a process holds, without pages of files (on Linux): the system takes those back as it likes."""
    held = process.memory_info()
    return round((held.rss - getattr(held, "shared", 0)) / 2**20, 1)


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process so far, in its own code and in the system's."""
    times = process.cpu_times()
    return float(times.user + times.system)


def left_in(server: Server) -> list[str]:
    """The temporary files of a server that is asked for nothing, once it has had time to remove its last ones."""

    def names() -> list[str]:
        return sorted(path.name for path in server.temporary.rglob("*") if path.is_file() and path.name != "lock")

    try:
        wait_until(lambda: not names(), SECONDS_TO_CLEAN_UP)
    except TimeoutError:
        return names()
    return []


def tell(watched: Watched, requests: int, minutes: float) -> None:
    """Print what became of the server's process."""
    seen, growth = [mib for _, mib in watched.memory], watched.growth_mib
    an_hour = growth * 60 / (minutes * (1 - SHARE_TO_WARM_UP))
    print(f"CPU of the server: {watched.cpu_seconds:.1f} s, {watched.cpu_seconds / requests * 1000:.1f} ms a request")
    print(f"memory by minute in MiB: {' '.join(map(str, watched.by_minute()))}")
    print(f"memory: {seen[0]:.0f} MiB at first, {max(seen):.0f} at most, {seen[-1]:.0f} at last")
    print(f"memory grows by {growth:+.1f} MiB after the first quarter, {an_hour:+.0f} MiB an hour")
    print(f"open files: {watched.open_files[0]} at first, {watched.open_files[1]} at last; "
          f"threads: {watched.threads[0]}, {watched.threads[1]}")  # fmt: skip
    print(f"temporary files once it was quiet: {watched.left or 'none'}")


def joined(kinds: Any) -> Kind:
    """Several kinds as one."""
    every = Kind()
    for kind in kinds:
        every.milliseconds += kind.milliseconds
        every.busy += kind.busy
        every.failures += kind.failures
    return every


def row(name: str, kind: Kind) -> dict[str, Any]:
    """One line of the table."""
    times = kind.milliseconds or [float("nan")]
    p50, p95, p99, most = (round(float(np.percentile(times, share)), 1) for share in (50, 95, 99, 100))
    return {
        "request": name, "count": len(kind.milliseconds), "busy": kind.busy, "failed": sum(kind.failures.values()),
        "p50": p50, "p95": p95, "p99": p99, "max": most,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
