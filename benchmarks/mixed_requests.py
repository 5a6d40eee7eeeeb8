"""What clients of the mixed load send: each kind of request, how often it is drawn, and what it may be answered."""

from __future__ import annotations

import http.client
import json
import random
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from measuring import REPOSITORY

sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "sample-data", "tests/integration")]

from server import Server  # noqa: E402
from synthetic_hippocampus import SyntheticCase  # noqa: E402

MODEL = "hippocampus_mr"
INFERENCES = ("infer", "click")
REFUSALS = {
    "wrong": (400, 404), "status": (404,), "archive": (404,), "skip": (404,), "garbage": (400,), "damaged": (422,),
}  # fmt: skip
"""What a kind of request may be answered beside 200: another client may have taken a skipped case up again. A full
queue and weights that are being loaded (503) are counted apart."""
MUST_BE_REFUSED = ("garbage", "damaged")
BOUNDARY = "mixed-load"
GARBAGE_BYTES = 4 * 2**20
BYTES_BEFORE_LEAVING = 2**10


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
        while time.monotonic() < until:
            self.send_any(mix)
            time.sleep(self._random.uniform(0, 2 * pause))

    def send_any(self, mix: Mapping[str, float]) -> None:
        """Send the requests of a kind that is drawn."""
        self.send(self._random.choices(list(mix), list(mix.values()))[0])

    def send(self, name: str) -> None:
        """Send the requests of one kind once."""
        requests: dict[str, Callable[[], None]] = {
            "next": self._next, "label": self._label, "session": self._session, "upload": self._upload,
            "skip": self._skip, "infer": self._infer, "click": self._click, "dicom": self._dicom,
            "garbage": self._garbage, "damaged": self._damaged, "leaving": self._leave,
        }  # fmt: skip
        requests.get(name, lambda: self._get(name))()

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

    def _garbage(self) -> None:
        """A STOW of bytes that are no DICOM."""
        part = b"--" + BOUNDARY.encode() + b"\r\nContent-Type: application/dicom\r\n\r\n"
        content = part + self._random.randbytes(GARBAGE_BYTES) + f"\r\n--{BOUNDARY}--\r\n".encode()
        headers = {"Content-Type": f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'}
        self._count_answer("garbage", "POST", "/dicom-web/studies", content, headers)

    def _damaged(self) -> None:
        """A label that was cut off in transit."""
        number = self._random.randrange(len(self._labels))
        files = {"label": ("label.nii.gz", self._labels[number][:-200])}
        self._ask("damaged", "PUT", f"/datastore/label?image=case_{number}", files=files)

    def _leave(self) -> None:
        """Downloads that are broken off, on connections of their own."""
        for path in (f"/datastore/image?image={self._case()}", "/datastore/dataset?limit_cases=4"):
            leaving = http.client.HTTPConnection(self._address, timeout=120)
            start = time.perf_counter()
            leaving.request("GET", path)
            leaving.getresponse().read(BYTES_BEFORE_LEAVING)
            leaving.close()
            self._kinds["leaving"].milliseconds.append((time.perf_counter() - start) * 1000)

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
        """Send one request as JSON or as a form, and count it."""
        headers, content = encode(body, form or {}, files or {})
        return self._count_answer(kind, method, path, content, headers)

    def _count_answer(
        self, kind: str, method: str, path: str, content: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
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
        elif status not in REFUSALS.get(kind, ()) and (status != 200 or kind in MUST_BE_REFUSED):
            of_kind.failures[f"{status} {answer[:100]!r}"] += 1
        return status, answer

    def _send(
        self, method: str, path: str, content: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send a request; once more where the server has closed the kept connection, which was idle for too long."""
        try:
            return self._send_once(method, path, content, headers or {})
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self._http.close()
            return self._send_once(method, path, content, headers or {})

    def _send_once(
        self, method: str, path: str, content: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        self._http.request(method, urllib.parse.quote(path, safe="/?&=%"), content, dict(headers))
        response = self._http.getresponse()
        return response.status, response.read()


MIX: dict[str, float] = {
    "info": 10, "status": 10, "page": 3, "section": 8, "case": 3, "slice": 12, "thumbnail": 5, "listing": 3,
    "train list": 2, "ready": 2, "metrics": 2, "versions": 2, "image": 2, "history": 2, "known": 2, "leases": 2,
    "runs": 1, "retrain": 1, "archive": 0.3, "wrong": 3, "next": 4, "label": 4, "session": 1, "upload": 1, "skip": 2,
    "infer": 5, "click": 1, "dicom": 3,
}  # fmt: skip
"""How often each kind of request is drawn, against the others."""
HOSTILE: dict[str, float] = {"garbage": 1, "damaged": 1, "leaving": 1}
"""The same for what a soak sends besides."""


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
