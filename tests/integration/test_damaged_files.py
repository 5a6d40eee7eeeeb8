"""What a server keeps beside weights and runs is damaged under it, and before its start: shown, and the rest works."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import requests
import torch
import yaml
from synthetic_hippocampus import SyntheticCase

from lib.configs.preset import parse_preset
from lib.models.versions import VersionStore
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from tests.integration.conftest import encode
from tests.integration.server import Server, wait_until
from tests.integration.test_retraining import NAMES, small_preset

MODEL = "small"
PRESET = parse_preset(small_preset(), source="test")
QUICK = {"max_epochs": 1, "crops_per_case": 1, "dataset": "Dataset", "seed": 1}
VERSIONS = f"/model/versions/{MODEL}"
PAGES = (
    "/", "/page/models", "/page/job", "/retrain/", "/info/", "/readyz", "/metrics", "/healthz", f"/runs/{MODEL}",
    f"/runs/{MODEL}/old", VERSIONS, f"{VERSIONS}/shipped", f"{VERSIONS}/v0001", f"{VERSIONS}/v0002",
)  # fmt: skip
RECORD = {"status": "published", "sha256": "0" * 64, "created": "2026-11-25T15:00:34+00:00", "parent": "shipped"}
DAMAGED = {
    "empty": b"",
    "half": b'{"status": "published", "sha',
    "a list": b"[[1]]",
    "binary": b"\x00\xff" * 500,
    "infinity": json.dumps(RECORD)[:-1].encode() + b', "reason": 1e999, "epoch": 1e999, "train": [NaN]}',
    "surrogates": json.dumps(RECORD)[:-1].encode() + b', "reason": "\\ud800", "plan": "\\udfff"}',
    "other types": json.dumps(
        RECORD | {"held_out": 5, "split": {"train": 5}, "train": [[]], "validation": 1, "epoch": "x", "total_epochs": 0}
    ).encode(),
    "deep": b'{"a": ' * 5000 + b"1" + b"}" * 5000,
}  # fmt: skip
RECORDS = ("v0001/version.json", "v0002/version.json", "shipped.json", "live.json", "v0002/calibration.json")
RUNS = ("runs/stats.json", "runs/split.json", "split.json", "runs/old/job.json", "runs/old/progress.json",
        "runs/old/cases.json", "runs/old/report.json", "runs/old/curve.csv")  # fmt: skip


def weights(seed: int, **changes: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(build_unetr(parse_preset(small_preset() | changes, source="test")).state_dict())


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, SyntheticCase]) -> Iterator[Server]:
    """A server whose second version is live, with a run that has ended."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "small.yaml").write_text(yaml.safe_dump(small_preset()))
    server = Server(folder / "server", {"preset": str(folder / "small.yaml")})
    for name, case in cases.items():
        nib.save(nib.Nifti1Image(case.image, case.affine_ras), server.studies / f"{name}.nii.gz")
    store = VersionStore(server.models / MODEL)
    write_checkpoint(store.folder / "shipped.pt", Checkpoint(weights(0), PRESET, {"version": "shipped"}))
    scores = {"held_out": {"mean_dice": 0.5, "dice": {"anterior": 0.5}, "per_case": {"case_0": 0.5}}}
    store.publish(weights(1), PRESET, {"parent": "shipped", "reason": "first"} | scores)
    store.publish(weights(2), PRESET, {"parent": "v0001", "reason": "second"} | scores)
    run = store.folder / "runs" / "old"
    run.mkdir(parents=True)
    job = {"id": "old", "status": "DONE", "request": {"model": MODEL}, "start_ts": "2026-11-25T15:00:34"}
    progress = {"epoch": 1, "max_epochs": 1, "step": 5, "total_steps": 5, "dice": {"anterior": 0.5}}
    (run / "job.json").write_text(json.dumps(job))
    (run / "progress.json").write_text(json.dumps(progress))
    (run / "cases.json").write_text(json.dumps({"train": [], "validation": [], "test": [], "labels": {}}))
    server.start()
    for name in list(cases)[:2]:
        label = encode(cases[name].label, cases[name].affine_ras, folder)
        info = {"label_info": [{"name": n, "idx": i} for i, n in enumerate(NAMES, start=1)]}
        files = {"params": (None, json.dumps(info)), "label": ("x.nii.gz", label)}
        assert server.put(f"/datastore/label?image={name}", files=files).status_code == 200
    yield server
    server.stop()
    assert "Traceback" not in server.log.read_text(errors="replace")


@pytest.fixture
def damage(clinic: Server) -> Iterator[Callable[[str, bytes], None]]:
    """``damage(file, content)``: replaces a file of the model's folder until the test has ended."""
    before: dict[Path, bytes | None] = {}

    def replace(name: str, content: bytes) -> None:
        file = clinic.models / MODEL / name
        before.setdefault(file, file.read_bytes() if file.exists() else None)
        file.unlink(missing_ok=True)
        file.write_bytes(content)

    yield replace
    for file, content in before.items():
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)


def served(server: Server) -> str:
    answer = server.post(f"/infer/{MODEL}?image=case_0&output=json")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"]["version"])


def failing(server: Server) -> dict[str, str]:
    """What is not answered as it should be, of what a user looks at and does."""
    wait_until(lambda: server.get("/readyz").status_code == 200)  # weights are loaded in the background
    answers: dict[str, requests.Response] = {path: server.get(path) for path in PAGES}
    answers["inference"] = server.infer(MODEL, "case_0")
    answers["next sample"] = server.post("/activelearning/random", json={"client_id": "anna"})
    return {what: f"{a.status_code} {a.text[:300]}" for what, a in answers.items() if a.status_code != 200}


def listed(server: Server) -> dict[str, str]:
    versions = server.get(VERSIONS).json()["versions"]
    return {version["version"]: version["status"] for version in versions}


@pytest.mark.parametrize("name", [*RECORDS, *RUNS])
def test_damaged_record_is_shown_as_damaged_and_the_rest_works(
    clinic: Server, damage: Callable[[str, bytes], None], name: str
) -> None:
    for what, content in DAMAGED.items():
        damage(name, content)
        assert failing(clinic) == {}, what
        states = listed(clinic)
        version = Path(name).parent.name if name in RECORDS[:2] else "shipped" if name == "shipped.json" else ""
        wrong = {one for one, status in states.items() if status == "damaged"}
        assert wrong == ({version} if version else set()), (what, states)
        assert not version or "damaged" in clinic.get("/page/models").text
        if name == "live.json":
            assert "live.json cannot be used" in " ".join(clinic.get("/readyz").json()["warnings"])
        assert served(clinic) == "v0002", what


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_training_with_a_damaged_split_is_refused_in_words(
    clinic: Server, damage: Callable[[str, bytes], None], content: bytes
) -> None:
    for name in ("runs/split.json", "split.json"):
        damage(name, content)
        refused = clinic.post(f"/train/{MODEL}", json=QUICK)
        assert refused.status_code == 409 and "split.json' cannot be used" in refused.json()["detail"]


def broken(kind: str, whole: bytes, folder: Path) -> bytes:
    """Weights that are not what was kept any more."""
    if kind == "other architecture":
        changes = {"network": small_preset()["network"] | {"feature_size": 8}}
        write_checkpoint(folder / "other.pt", Checkpoint(weights(3, **changes), PRESET, {}))
        return (folder / "other.pt").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 64]) + whole[middle + 64 :]
    return {"truncated": whole[:middle], "flipped": flipped, "empty": b"", "garbage": b"no weights"}[kind]


def check_fallback(server: Server) -> None:
    """The parent is served, and the log, ``/readyz`` and the page say so."""
    assert served(server) == "v0001"
    (warning,) = server.get("/readyz").json()["warnings"]
    assert warning.startswith(f"model {MODEL!r}: the weights of version 'v0002' ")
    told = server.get(VERSIONS).json()
    assert (told["live"], told["serving"]) == ("v0002", "v0001") and "'v0002'" in told["problem"]
    assert "version &#39;v0002&#39;" in server.get("/page/models").text
    assert "served instead: v0001" in server.log.read_text(errors="replace")
    assert failing(server) == {}


@pytest.mark.parametrize("kind", ["truncated", "flipped", "empty", "garbage", "other architecture"])
def test_damaged_live_weights_fall_back_to_the_parent_loudly(
    clinic: Server, damage: Callable[[str, bytes], None], tmp_path: Path, kind: str
) -> None:
    assert served(clinic) == "v0002"
    damaged = broken(kind, (clinic.models / MODEL / "v0002" / "weights.pt").read_bytes(), tmp_path)
    damage("v0002/weights.pt", damaged)
    check_fallback(clinic)
    if kind != "flipped":  # nothing is left that tells a flipped bit then
        damage("v0002/version.json", b"{")
        damage("v0002/weights.pt", damaged)
        check_fallback(clinic)


def test_server_starts_with_everything_damaged(
    clinic: Server, damage: Callable[[str, bytes], None], tmp_path: Path
) -> None:
    whole = (clinic.models / MODEL / "v0002" / "weights.pt").read_bytes()
    for kind, what in (("truncated", "half"), ("flipped", "infinity"), ("other architecture", "surrogates")):
        clinic.stop()
        damage("v0002/weights.pt", broken(kind, whole, tmp_path))
        for name in (*RECORDS, *RUNS):
            if name not in ("v0002/version.json", "live.json"):
                damage(name, DAMAGED[what])
        clinic.start()
        check_fallback(clinic)
        assert listed(clinic) == {"shipped": "damaged", "v0001": "damaged", "v0002": "published"}
        assert clinic.post(f"/train/{MODEL}", json=QUICK).status_code == 409


@pytest.mark.slow
def test_training_goes_on_from_the_parent_of_damaged_weights(
    clinic: Server, damage: Callable[[str, bytes], None], tmp_path: Path
) -> None:
    damage(
        "v0002/weights.pt", broken("truncated", (clinic.models / MODEL / "v0002" / "weights.pt").read_bytes(), tmp_path)
    )
    damage("v0001/version.json", b"{")
    clinic.post(f"/train/{MODEL}", json=QUICK).raise_for_status()
    ended = clinic.wait_for("/train/")
    assert ended["status"] == "DONE", "\n".join(ended["details"])
    made = clinic.get(f"{VERSIONS}/v0003").json()
    assert (made["status"], made["parent"], made["started_from"]) == ("unproven", "v0001", "v0001")
