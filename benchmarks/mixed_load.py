"""How long mixed requests take, and whether the server's memory stays where it is.

    python benchmarks/mixed_load.py [--clients 20] [--minutes 1] [--pause 0] [--only KIND ...] [--out FILE]
    python benchmarks/mixed_load.py --minutes 60 --clients 12    # a soak: the last line must stay within 30 MiB

A server with shipped weights, files and DICOM series gets what annotators, viewers and monitors send, in random order:
pages, pictures, listings, Next Sample, labels, sessions, uploads, DICOMweb, wrong requests, and inferences. Prints a
table by kind of request and for everything but inferences, the growth of the server's memory (a line through its second
half, so that caches have filled), and the files that it has left in its temporary folder. Writes JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from measuring import REPOSITORY, show, write_json

sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "sample-data", "tests/integration")]

from dicom_series import SeriesIdentity, write_series  # noqa: E402
from server import Server  # noqa: E402
from server_load import prepare  # noqa: E402
from synthetic_hippocampus import SyntheticCase, draw_cases  # noqa: E402

MODEL = "hippocampus_mr"
CASES = 24
SERIES = 3
INFERENCES = ("infer", "click")
REFUSALS = {"wrong": (400, 404), "status": (404,), "archive": (404,)}
"""What a kind of request may be answered beside 200. A full queue (503) is counted apart."""
BOUNDARY = "mixed-load"
SECONDS_BETWEEN_LOOKS = 2.0


@dataclass
class Kind:
    """One kind of request: the times of its answers in milliseconds, and what was not as it should be."""

    milliseconds: list[float] = field(default_factory=list)
    busy: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class Client:
    """One connection that is kept, and what its requests are drawn from."""

    def __init__(self, server: Server, cases: list[SyntheticCase], number: int, kinds: Mapping[str, Kind]) -> None:
        self._address = f"127.0.0.1:{server.port}"
        self._http = http.client.HTTPConnection(self._address, timeout=120)
        self._random = random.Random(number)
        self._name = f"client-{number}"
        self._kinds = kinds
        self._images = [(server.studies / f"case_{n}.nii.gz").read_bytes() for n in range(len(cases))]
        self._labels = [(server.folder / f"label_{n}.nii.gz").read_bytes() for n in range(len(cases))]
        self._series = json.loads(self._send("GET", "/dicom-web/series")[1])
        self._count = 0

    def work(self, mix: Mapping[str, float], until: float, pause: float) -> None:
        """Send requests until the time is up."""
        names, weights = list(mix), list(mix.values())
        while time.monotonic() < until:
            name = self._random.choices(names, weights)[0]
            requests: dict[str, Callable[[], None]] = {
                "next": self._next, "label": self._label, "session": self._session, "upload": self._upload,
                "skip": self._skip, "infer": self._infer, "click": self._click, "dicom": self._dicom,
            }  # fmt: skip
            requests.get(name, lambda name=name: self._get(name))()  # type: ignore[misc]
            time.sleep(self._random.uniform(0, 2 * pause))

    def _get(self, name: str) -> None:
        case, cut = self._case(), self._random.randrange(30)
        pictures = f"/case/{case}/slice.png"
        plane = self._random.choice(("axial", "coronal", "sagittal"))
        section = self._random.choice(("pool", "next", "job", "models", "activity", "system"))
        paths = {
            "info": "/info/", "status": "/train/", "page": "/", "section": f"/page/{section}", "case": f"/case/{case}",
            "slice": f"{pictures}?plane={plane}&index={cut}", "thumbnail": f"/case/{case}/thumbnail.png",
            "listing": "/datastore/?output=all", "train list": "/datastore/?output=train", "ready": "/readyz",
            "metrics": "/metrics", "versions": f"/model/versions/{MODEL}", "image": f"/datastore/image?image={case}",
            "history": f"/datastore/label/versions?image={case}", "known": f"/datastore/image/info?image={case}",
            "leases": "/leases/", "runs": f"/runs/{MODEL}", "retrain": "/retrain/", "archive": "/datastore/dataset",
            "wrong": self._random.choice(("/case/nobody", "/datastore/image?image=..", f"{pictures}?plane=x")),
        }  # fmt: skip
        self._ask(name, "GET", paths[name])

    def _next(self) -> None:
        strategy = self._random.choice(("typical", "random", "first"))
        self._ask("next", "POST", f"/activelearning/{strategy}", {"client_id": self._name})

    def _label(self) -> None:
        number = self._random.randrange(len(self._labels))
        info = {"label_info": [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]}
        files = {"label": ("label.nii.gz", self._labels[number])}
        form = json.dumps(info | {"client_id": self._name})
        self._ask("label", "PUT", f"/datastore/label?image=case_{number}", form={"params": form}, files=files)

    def _session(self) -> None:
        files = {"files": ("image.nii.gz", self._random.choice(self._images))}
        status, content = self._ask("session", "PUT", "/session/", files=files)
        if status == 200:
            session = json.loads(content)["session_id"]
            self._ask("session", "GET", f"/session/{session}")
            self._ask("session", "DELETE", f"/session/{session}")

    def _upload(self) -> None:
        self._count += 1
        image, files = f"{self._name}-{self._count}", {"file": ("image.nii.gz", self._random.choice(self._images))}
        self._ask("upload", "PUT", f"/datastore/?image={image}", files=files)
        self._ask("upload", "DELETE", f"/datastore/?id={image}")

    def _skip(self) -> None:
        case = self._case()
        self._ask("skip", "PUT", f"/leases/skipped?image={case}", {"reason": "blurred", "client_id": self._name})
        self._ask("skip", "DELETE", f"/leases/skipped?image={case}")

    def _infer(self) -> None:
        wanted = {"client_id": self._name, "result_extension": ".nrrd", "result_dtype": "uint8"}
        self._ask("infer", "POST", f"/infer/{MODEL}?image={self._case()}", form={"params": json.dumps(wanted)})

    def _click(self) -> None:
        across, down = self._random.uniform(0.3, 0.7), self._random.uniform(0.3, 0.7)
        click = {"plane": "axial", "index": 15, "across": across, "down": down, "label": "anterior"}
        self._ask("click", "POST", f"/case/{self._case()}/clicks", {"clicks": [click]})

    def _dicom(self) -> None:
        series = self._random.choice(self._series)
        study, uid = (series[tag]["Value"][0] for tag in ("0020000D", "0020000E"))
        base = f"/dicom-web/studies/{study}/series/{uid}"
        _, content = self._ask("dicom", "GET", f"{base}/metadata")
        instance = self._random.choice(json.loads(content))["00080018"]["Value"][0]
        self._ask("dicom", "GET", f"{base}/instances/{instance}/frames/1")
        self._ask("dicom", "GET", f"{base}/instances/{instance}/rendered")
        self._ask("dicom", "GET", "/dicom-web/studies?limit=20")

    def _case(self) -> str:
        return f"case_{self._random.randrange(len(self._labels))}"

    def _ask(
        self,
        kind: str,
        method: str,
        path: str,
        body: object = None,
        form: Mapping[str, str] | None = None,
        files: Mapping[str, tuple[str, bytes]] | None = None,
    ) -> tuple[int, bytes]:
        """Send one request, and count it."""
        headers, content = encode(body, form or {}, files or {})
        start, of_kind = time.perf_counter(), self._kinds[kind]
        try:
            status, answer = self._send(method, path, content, headers)
        except (OSError, http.client.HTTPException) as error:
            of_kind.failures[type(error).__name__] += 1
            self._http.close()
            return 0, b""
        of_kind.milliseconds.append((time.perf_counter() - start) * 1000)
        if status == 503:
            of_kind.busy += 1
        elif status != 200 and status not in REFUSALS.get(kind, ()):
            of_kind.failures[f"{status} {answer[:100]!r}"] += 1
        return status, answer

    def _send(
        self, method: str, path: str, content: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        self._http.request(method, urllib.parse.quote(path, safe="/?&=%"), content, dict(headers or {}))
        response = self._http.getresponse()
        return response.status, response.read()


MIX: dict[str, float] = {
    "info": 10, "status": 10, "page": 3, "section": 8, "case": 3, "slice": 12, "thumbnail": 5, "listing": 3,
    "train list": 2, "ready": 2, "metrics": 2, "versions": 2, "image": 2, "history": 2, "known": 2, "leases": 2,
    "runs": 1, "retrain": 1, "archive": 0.3, "wrong": 3, "next": 4, "label": 4, "session": 1, "upload": 1, "skip": 2,
    "infer": 5, "click": 1, "dicom": 3,
}  # fmt: skip
"""How often each kind of request is drawn, against the others."""


def main() -> int:
    """Load a server, and say how it did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--pause", type=float, default=0.0, help="mean seconds that a client thinks between requests")
    parser.add_argument("--only", nargs="+", choices=MIX, help="only these kinds of requests")
    parser.add_argument("--without", nargs="+", choices=MIX, default=[], help="all but these")
    parser.add_argument("--conf", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the server")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "mixed_load.json")
    options = parser.parse_args()
    mix = {name: MIX[name] for name in options.only or MIX if name not in options.without}
    conf = dict(pair.split("=", 1) for pair in options.conf)
    with tempfile.TemporaryDirectory() as folder:
        cases = list(draw_cases(CASES, seed=3))
        server = prepare(Server(Path(folder), {"models": MODEL, **conf}), cases)
        for number, case in enumerate(cases[:SERIES]):
            identity = SeriesIdentity(f"SYNTH-{number}", "MR", "T1")
            write_series(server.studies / f"series_{number}", case.image, case.affine_ras, identity)
        server.start()
        try:
            kinds, memory = load(server, cases, mix, options.clients, options.minutes * 60, options.pause)
            left = sorted(path.name for path in server.temporary.rglob("*") if path.is_file() and path.name != "lock")
        finally:
            server.stop()
        remaining = sorted(path.name for path in server.temporary.iterdir())
    rows = [row(name, kinds[name]) for name in mix]
    others = row("all but inference", joined(kinds[name] for name in mix if name not in INFERENCES))
    columns = ("request", "count", "busy", "failed", "p50 ms", "p95 ms", "p99 ms", "max ms")
    show(columns, [list(line.values()) for line in (*rows, others)])
    for name, kind in kinds.items():
        for failure, count in kind.failures.most_common(5):
            print(f"{name}: {count} times {failure}")
    growth, seen = growth_mib(memory), [mib for _, mib in memory]
    print(f"memory: {seen[0]:.0f} MiB at first, {max(seen):.0f} at most, {seen[-1]:.0f} at last")
    print(f"memory grows by {growth:+.1f} MiB over the second half, {growth * 120 / options.minutes:+.0f} MiB an hour")
    print(f"temporary files while it ran: {left or 'none'}; after its end: {remaining or 'none'}")
    write_json(
        options.out,
        {"clients": options.clients, "minutes": options.minutes, "pause": options.pause, "rows": [*rows, others],
         "memory": memory, "growth_mib": growth},
    )  # fmt: skip
    return 0


def load(
    server: Server, cases: list[SyntheticCase], mix: Mapping[str, float], clients: int, seconds: float, pause: float
) -> tuple[dict[str, Kind], list[tuple[float, float]]]:
    """Run all clients for a while; returns what they saw, and the server's memory (seconds, MiB)."""
    kinds: dict[str, Kind] = defaultdict(Kind)
    for name in MIX:
        kinds[name] = Kind()
    workers = [Client(server, cases, number, kinds) for number in range(clients)]
    start = time.monotonic()
    threads = [threading.Thread(target=worker.work, args=(mix, start + seconds, pause)) for worker in workers]
    for thread in threads:
        thread.start()
    assert server.process is not None
    process, memory = psutil.Process(server.process.pid), []
    while any(thread.is_alive() for thread in threads):
        memory.append((round(time.monotonic() - start, 1), round(process.memory_info().rss / 2**20, 1)))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return kinds, memory


def encode(
    body: object, form: Mapping[str, str], files: Mapping[str, tuple[str, bytes]]
) -> tuple[dict[str, str], bytes | None]:
    """A request's headers and content: JSON, a form with files, or nothing."""
    if body is not None:
        return {"Content-Type": "application/json"}, json.dumps(body).encode()
    if not form and not files:
        return {}, None
    parts = [(f'name="{name}"', value.encode()) for name, value in form.items()]
    parts += [(f'name="{name}"; filename="{file}"', content) for name, (file, content) in files.items()]
    blocks = [
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"
        for head, content in parts
    ]
    content = b"".join(blocks) + f"--{BOUNDARY}--\r\n".encode()
    return {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}, content


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


def growth_mib(memory: list[tuple[float, float]]) -> float:
    """By how much a straight line through the second half of the run rises."""
    half = [point for point in memory if point[0] >= memory[-1][0] / 2]
    if len(half) < 2:
        return 0.0
    seconds, mib = np.array(half).T
    return float(np.polyfit(seconds, mib, 1)[0] * (seconds[-1] - seconds[0]))


if __name__ == "__main__":
    sys.exit(main())
