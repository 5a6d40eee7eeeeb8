"""A server over a folder of studies in this process: its parts put together as at a start, and all its routes.

No port is opened, and nothing runs in the background: no prefetch, scoring, retraining and no look at the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
from fastapi import APIRouter
from monailabel.utils.sessions import Sessions
from synthetic_hippocampus import SyntheticCase

from lib.activelearning.pool_knowledge import PoolKnowledge
from lib.activelearning.score_store import ScoreStore
from lib.activelearning.task import make_strategies
from lib.configs.catalogue import load_preset
from lib.configs.settings import Settings
from lib.datastore.series import open_datastore
from lib.infers.cache import ResultCache
from lib.infers.devices.lanes import Lanes
from lib.infers.task import UnetrInferTask
from lib.models.weights import WeightsLocator
from lib.server.app import ROUTERS
from lib.server.services import Services
from tests.server.in_process import InProcess

MODEL = "hippocampus_mr"
SHIPPED = Path(__file__).resolve().parents[2] / "model" / MODEL


class Clinic(InProcess):
    """Routes over ``studies``, which serve the shipped weights of ``hippocampus_mr``.

    Args:
        folder: an empty one; the studies are its folder ``studies``.
        settings: as of ``--conf``.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        router = APIRouter()
        for one in ROUTERS:
            router.include_router(one)
        super().__init__(router, {})
        self.folder, self.studies, self._settings = folder, folder / "studies", settings
        self.studies.mkdir()

    def open(self) -> Clinic:
        """Put the parts together around what the folder of studies has now."""
        preset = load_preset(MODEL)
        weights = self.folder / MODEL
        weights.mkdir()
        for file in SHIPPED.glob("shipped*"):
            shutil.copy(file, weights)
        locator, settings = WeightsLocator(weights), Settings(**self._settings)
        store, lanes, results = open_datastore(str(self.studies), ["MR"], [preset]), Lanes.of("cpu"), ResultCache(16)
        knowledge = {MODEL: PoolKnowledge(preset, locator, ScoreStore(weights))}
        app = SimpleNamespace(
            settings=settings,
            datastore=lambda: store,
            studies=str(self.studies),
            presets={MODEL: preset},
            models={MODEL: UnetrInferTask(preset, locator, cache=results, lanes=lanes)},
            trainers={},
            lanes=lanes,
            results=results,
            knowledge_by_preset=knowledge,
            strategies=make_strategies(knowledge, settings.cold_start_labels, settings.strategy),
            sessions=lambda: Sessions(str(self.folder / "sessions")),
        )
        self.store = store
        self.app.state.services = Services.of(app)  # type: ignore[arg-type]
        self.app.state.retrainer = SimpleNamespace(words=dict, notices=dict)
        return self

    def get(self, path: str, **options: Any) -> Any:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> Any:
        return self.request("POST", path, **options)

    def put(self, path: str, **options: Any) -> Any:
        return self.request("PUT", path, **options)


def put_cases(studies: Path, cases: Mapping[str, SyntheticCase]) -> None:
    """Write cases as NIfTI."""
    for name, case in cases.items():
        nib.save(nib.Nifti1Image(case.image, case.affine_ras), studies / f"{name}.nii.gz")


def encode(voxels: np.ndarray, affine: np.ndarray, folder: Path) -> bytes:
    """The bytes of a NIfTI file."""
    path = folder / "encoded.nii.gz"
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path.read_bytes()
