"""What a client was given is remembered, so that a correction can say what it changed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from lib.configs.preset import Preset
from lib.datastore.predictions import Predictions
from lib.infers.writer import write_mask
from tests.tiny import boxes, oblique_affine

LABEL = boxes()[1]


@pytest.fixture
def predictions(tmp_path: Path):
    kept = Predictions(tmp_path / "predictions")
    yield kept
    kept.close()


def give(
    predictions: Predictions, preset: Preset, client: str, extension: str = ".nrrd", dtype: str = "uint8", version="v1"
) -> None:
    file = write_mask(LABEL, oblique_affine(), preset, extension, dtype, False)
    predictions.remember(client, "a", preset.name, version, file.name, file.read_bytes())
    file.unlink()


@pytest.mark.parametrize("extension", [".nrrd", ".seg.nrrd", ".nii.gz", ".nii"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_voxels_changed_are_counted(
    predictions: Predictions, preset: Preset, tmp_path: Path, extension: str, dtype: str
) -> None:
    give(predictions, preset, "anna", extension, dtype)
    found = predictions.find("anna", "a")
    assert found is not None and (found.preset, found.model_version) == ("tiny", "v1")
    corrected = LABEL.copy()
    corrected[:2, :3, 0] = 3
    assert predictions.voxels_changed(found, LABEL, tmp_path) == 0
    assert predictions.voxels_changed(found, corrected, tmp_path) == 6
    assert predictions.voxels_changed(found, corrected[1:], tmp_path) is None
    assert not list(tmp_path.glob("prediction.*"))


def test_each_client_has_its_own_and_the_latest_counts(predictions: Predictions, preset: Preset) -> None:
    give(predictions, preset, "anna", version="v1")
    give(predictions, preset, "anna", version="v2")
    give(predictions, preset, "bert", version="v3")
    found = predictions.find("anna", "a")
    assert found is not None and found.model_version == "v2"
    assert predictions.find("anna", "b") is None and predictions.find("carl", "a") is None
    assert len(list(predictions.folder.glob("*.mask"))) == 2


def test_they_do_not_grow_without_bound(predictions: Predictions) -> None:
    predictions.limit_mib = 1
    noise = np.random.default_rng(1)
    for number in range(8):
        predictions.remember("anna", f"case_{number}", "tiny", "v1", "mask.nii.gz", noise.bytes(300_000))
    assert predictions.find("anna", "case_7") is not None
    assert predictions.find("anna", "case_0") is None
    assert sum(path.stat().st_size for path in predictions.folder.iterdir()) < 2**20


def test_damaged_ones_are_as_if_there_were_none(predictions: Predictions, preset: Preset, tmp_path: Path) -> None:
    give(predictions, preset, "anna")
    found = predictions.find("anna", "a")
    assert found is not None
    next(predictions.folder.glob("*.mask")).write_bytes(b"damaged")
    assert predictions.voxels_changed(found, LABEL, tmp_path) is None
    next(predictions.folder.glob("*.json")).write_bytes(b"damaged")
    assert predictions.find("anna", "a") is None


@pytest.mark.parametrize(
    "change", [{"preset": ["tiny"]}, {"extension": "/../x.nii"}, {"at": "now"}, {"client": None}, {"engine": {}}]
)
def test_prediction_of_wrong_types_is_none(
    predictions: Predictions, preset: Preset, tmp_path: Path, change: dict[str, object]
) -> None:
    give(predictions, preset, "anna")
    assert predictions.find("anna", "a") is not None
    side_car = next((tmp_path / "predictions").glob("*.json"))
    side_car.write_text(json.dumps(json.loads(side_car.read_text()) | change))
    assert predictions.find("anna", "a") is None


@pytest.mark.parametrize(
    "content", [b"", b"no gzip", gzip.compress(b"x" * 5000, mtime=0)[:-20] + b"\0" * 12, gzip.compress(b"x", mtime=0)]
)
def test_damaged_prediction_is_not_compared(
    predictions: Predictions, preset: Preset, tmp_path: Path, content: bytes
) -> None:
    give(predictions, preset, "anna")
    found = predictions.find("anna", "a")
    assert found is not None and predictions.voxels_changed(found, LABEL, tmp_path) == 0
    next((tmp_path / "predictions").glob("*.mask")).write_bytes(content)
    assert predictions.voxels_changed(found, LABEL, tmp_path) is None
