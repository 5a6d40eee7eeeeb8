"""The shipped weights do on real cases what their side-car promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lib.cases.labelled import find_cases
from lib.cases.split import read_split
from lib.configs.catalogue import load_preset
from lib.infers.segmenter import Segmenter
from lib.models.weights import WeightsLocator, preset_for
from lib.networks.checkpoint import read_checkpoint
from lib.storage.files import sha256_of
from lib.trainers.judging.evaluate import evaluate
from lib.trainers.judging.masks import CaseMasks

FOLDER = Path(__file__).resolve().parents[2] / "model" / "hippocampus_mr"
SIDE_CAR = json.loads((FOLDER / "shipped.json").read_text(encoding="utf-8"))


def test_side_car_belongs_to_the_weights() -> None:
    weights = FOLDER / "shipped.pt"
    assert SIDE_CAR["sha256"] == sha256_of(weights)
    assert SIDE_CAR["bytes"] == weights.stat().st_size <= 16_000_000
    assert SIDE_CAR["labels"] == load_preset("hippocampus_mr").label_indices
    assert SIDE_CAR["data"]["licence"], "the data's licence is told"
    assert SIDE_CAR["held_out"]["mean_dice"] >= 0.885
    assert max(SIDE_CAR["held_out"]["hd95_mm"].values()) <= 1.5
    assert sorted(SIDE_CAR["held_out"]["per_case"]) == list(read_split(FOLDER / "split.json").validation)


def test_shipped_weights_keep_their_promise_on_held_out_cases(shared_data: Path) -> None:
    data = shared_data / "hippocampus_mr"
    if not data.is_dir():
        pytest.skip("needs hippocampus_mr in the folder of real data")
    file = WeightsLocator(FOLDER).find()
    assert file is not None
    if file.origin != "shipped":
        pytest.skip("other weights are published in this folder")
    promised = SIDE_CAR["held_out"]["per_case"]
    cases = [case for case in find_cases(data / "images", data / "labels") if case.case_id in promised][::5]
    checkpoint = read_checkpoint(file.path)
    preset = preset_for(checkpoint, load_preset("hippocampus_mr"))
    segmenter = Segmenter.from_checkpoint(checkpoint, preset, torch.device("cpu"))
    found = evaluate(CaseMasks(segmenter), cases).summary()["per_case"]
    assert isinstance(found, dict)
    assert found == pytest.approx({name: promised[name] for name in found}, abs=0.03)
    assert len(found) >= 8
