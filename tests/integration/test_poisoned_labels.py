"""Wrong labels of real hippocampi, submitted and trained on over REST: the shipped weights stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lib.cases.split import shipped_split
from tests.integration.server import REPOSITORY, Server

SHIPPED = REPOSITORY / "model" / "hippocampus_mr"
NAMES = ["anterior", "posterior"]
RECIPE = {"max_epochs": 4, "dataset": "CacheDataset", "multi_gpu": False, "seed": 1}
Poison = Callable[[np.ndarray], np.ndarray]


def _shift(voxels: int) -> Poison:
    return lambda label: np.roll(label, voxels, axis=0)


def _shift_posterior(label: np.ndarray) -> np.ndarray:
    moved = np.roll(label == 2, 6, axis=0)
    return np.where(moved, 2, np.where(label == 1, 1, 0)).astype(np.uint8)


def _exchange(label: np.ndarray) -> np.ndarray:
    return np.array([0, 2, 1], dtype=np.uint8)[label]


def _empty_posterior(label: np.ndarray) -> np.ndarray:
    return np.where(label == 1, 1, 0).astype(np.uint8)


@pytest.fixture
def hippocampi(shared_data: Path) -> Iterator[dict[str, Path]]:
    """Six cases that the shipped weights have never seen, and their labels."""
    data, split = shared_data / "hippocampus_mr", shipped_split(SHIPPED)
    if not data.is_dir() or split is None:
        pytest.skip("needs hippocampus_mr in the folder of real data")
    yield {name: data / "images" / f"{name}.nii.gz" for name in split.validation[::7][:6]}


@pytest.fixture
def server(hippocampi: dict[str, Path], tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server", {"models": "hippocampus_mr"})
    shutil.copytree(SHIPPED, server.models / "hippocampus_mr")
    for image in hippocampi.values():
        shutil.copy(image, server.studies)
    yield server.start()
    server.stop()


def submit(server: Server, name: str, label: np.ndarray, affine: np.ndarray, folder: Path, **said: Any) -> Any:
    """As 3D Slicer's client, with what else is said of the label."""
    path = folder / "label.nii.gz"
    nib.save(nib.Nifti1Image(label, affine), path)
    info = [{"name": label_name, "idx": index} for index, label_name in enumerate(NAMES, start=1)]
    params = {"label_info": info, "model": "hippocampus_mr", "client_id": "tester"} | said
    files = {"params": (None, json.dumps(params)), "label": ("label.nii.gz", path.read_bytes())}
    return server.put("/datastore/label", params={"image": name, "tag": "final"}, files=files)


def train(server: Server) -> dict[str, Any]:
    """Figures of a training that the button starts."""
    assert server.post("/train/hippocampus_mr", json=RECIPE).status_code == 200
    ended = server.wait_for("/train/", 400)
    assert ended["status"] == "DONE", ended["details"]
    stats: dict[str, Any] = server.get("/info/").json()["train_stats"]["hippocampus_mr"]
    return stats


@pytest.mark.slow
@pytest.mark.parametrize(
    ("poison", "said", "reason"),
    [
        (_shift(6), {}, "contradict 3 of 3 new labels"),
        (_shift(3), {}, "too low for a batch"),
        (_shift_posterior, {}, "rejected: "),
        (_exchange, {}, "rejected: "),
        (_empty_posterior, {"complete": True}, ""),
    ],
    ids=["shifted", "shifted a little", "one shifted", "exchanged", "one emptied"],
)
def test_wrong_batch_is_never_served(
    server: Server, hippocampi: dict[str, Path], tmp_path: Path, poison: Poison, said: dict[str, Any], reason: str
) -> None:
    for name, image in hippocampi.items():
        label = nib.load(image.parents[1] / "labels" / image.name)
        voxels = poison(np.asarray(label.dataobj).astype(np.uint8))
        answer = submit(server, name, voxels, label.affine, tmp_path, **said)
        assert answer.status_code == 200, answer.text
    stats = train(server)
    assert stats["status"] in ("rejected", "unproven")
    assert reason in stats["decision"], stats["decision"]
    listed = server.get("/model/versions/hippocampus_mr").json()
    assert (listed["live"], listed["serving"]) == (None, "shipped")


@pytest.mark.slow
def test_label_of_nan_is_refused_and_never_trained_on(
    server: Server, hippocampi: dict[str, Path], tmp_path: Path
) -> None:
    name, image = next(iter(hippocampi.items()))
    label = nib.load(image.parents[1] / "labels" / image.name)
    voxels = np.asarray(label.dataobj).astype(np.float32)
    voxels[voxels == 2] = np.nan
    refused = submit(server, name, voxels, label.affine, tmp_path)
    assert refused.status_code == 422 and "not finite" in refused.json()["detail"], refused.text
    assert server.get("/datastore/").json()["completed"] == 0
