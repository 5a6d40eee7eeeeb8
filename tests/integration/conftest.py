"""One real server for most tests: synthetic hippocampus studies, the shipped weights, and an untrained preset."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from synthetic_hippocampus import SyntheticCase, draw_cases

from lib.infers.costs import COSTS_FILE
from tests.integration.server import MEASURED_COSTS, REPOSITORY, Server
from tests.tiny import preset_data

CASES = 5


@pytest.fixture(scope="session")
def cases() -> dict[str, SyntheticCase]:
    """The studies' cases, by id."""
    return {f"case_{number}": case for number, case in enumerate(draw_cases(CASES, seed=7))}


def prepare(server: Server, cases: dict[str, SyntheticCase]) -> Server:
    """Put the studies and the shipped weights where a server finds them."""
    for name, case in cases.items():
        nib.save(nib.Nifti1Image(case.image, case.affine_ras), server.studies / f"{name}.nii.gz")
    shipped = REPOSITORY / "model" / "hippocampus_mr"
    target = server.models / "hippocampus_mr"
    target.mkdir()
    for name in ("shipped.pt", "shipped.json", "shipped.calibration.json"):
        shutil.copy(shipped / name, target)
    if MEASURED_COSTS:
        (server.models / COSTS_FILE).write_text(json.dumps(MEASURED_COSTS))
    return server


def encode(voxels: np.ndarray, affine: np.ndarray, folder: Path) -> bytes:
    """The bytes of a NIfTI file."""
    path = folder / "encoded.nii.gz"
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path.read_bytes()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, SyntheticCase]) -> Iterator[Server]:
    """A server with ``hippocampus_mr`` and the untrained preset ``tiny``."""
    folder = tmp_path_factory.mktemp("server")
    preset = folder / "tiny.yaml"
    preset.write_text(yaml.safe_dump(preset_data()))
    conf = {"models": "hippocampus_mr", "preset": str(preset), "upload_limit_mib": "16", "unpacked_limit_mib": "64"}
    server = prepare(Server(folder, conf), cases).start()
    yield server
    assert server.stop() in (0, -15)
    left = [path.name for path in server.temporary.iterdir() if path.name.startswith(("unetr-", "mask-", "tmp"))]
    assert left == [], "temporary files were left behind"
