"""The shipped weights of ``abdomen_ct``: on the sample, at the ends of the HU range, and on a real CT."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from synthetic_abdomen import draw_abdomen
from torso_phantom import ORGANS, TorsoCase, draw_torso, grid_affine, render, spacing_for

from lib.configs.catalogue import load_preset
from lib.infers.segmenter import Segmenter
from lib.models.weights import WeightsLocator, preset_for
from lib.networks.checkpoint import read_checkpoint
from lib.storage.files import sha256_of
from lib.transforms.volume import Volume, read_volume
from tests.infers.body_parts import BODY_PARTS, lay_arms_beside

FOLDER = Path(__file__).resolve().parents[2] / "model" / "abdomen_ct"
SHAPE = (128, 128, 80)
FIRST_SLICE_OF_REFERENCE = 82
"""``example_ct_sm`` holds the last 30 slices of ``example_ct``; its own origin says otherwise."""


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    file = WeightsLocator(FOLDER).find()
    assert file is not None
    if file.origin != "shipped":
        pytest.skip("other weights are published in this folder")
    checkpoint = read_checkpoint(file.path)
    return Segmenter.from_checkpoint(checkpoint, preset_for(checkpoint, load_preset("abdomen_ct")), torch.device("cpu"))


@pytest.fixture(scope="module")
def torso() -> TorsoCase:
    return render(draw_torso(seed=1), SHAPE, grid_affine(SHAPE, spacing_for(SHAPE), "LPS"))


def dice(found: np.ndarray, reference: np.ndarray, organ: str) -> float:
    index = ORGANS[organ]
    both = np.count_nonzero((found == index) & (reference == index))
    return 2 * both / (np.count_nonzero(found == index) + np.count_nonzero(reference == index))


def test_side_car_belongs_to_the_weights() -> None:
    weights, side_car = FOLDER / "shipped.pt", json.loads((FOLDER / "shipped.json").read_text(encoding="utf-8"))
    assert side_car["sha256"] == sha256_of(weights)
    assert side_car["bytes"] == weights.stat().st_size <= 40_000_000
    assert side_car["labels"] == load_preset("abdomen_ct").label_indices == ORGANS
    assert side_car["data"]["licence"], "the data's licence is told"
    trained = read_checkpoint(weights).preset
    assert trained is not None
    same = {"spacing_mm", "roi_size", "axcodes", "intensity", "padding", "network"}
    assert trained.model_dump(include=same) == load_preset("abdomen_ct").model_dump(include=same)


def test_organs_of_the_sample_are_found(segmenter: Segmenter) -> None:
    """What ``run.py`` shows first."""
    sample = draw_abdomen(0)
    found = segmenter.segment(Volume(sample.image_hu.astype(np.float32), sample.affine_ras)).labels
    scores = {organ: dice(found, sample.label, organ) for organ in ORGANS}
    assert min(scores[organ] for organ in ("liver", "spleen", "right_kidney", "left_kidney", "aorta")) > 0.8, scores
    assert np.mean(list(scores.values())) > 0.7, scores


def test_ct_of_full_range_and_the_same_ct_clipped_give_the_same_mask(segmenter: Segmenter, torso: TorsoCase) -> None:
    """A part of the torso, of one window, with eleven of the organs, and air and bone."""
    part = torso.image_hu[36:92, 68:124, 20:56].astype(np.float32)
    assert part.min() < -900
    assert part.max() > 300
    whole, clipped = (
        segmenter.segment(Volume(voxels, torso.affine_ras)).labels for voxels in (part, part.clip(-125, 275))
    )
    assert len(np.unique(whole)) > 2, "there is something to tell apart"
    np.testing.assert_array_equal(clipped, whole)


def test_large_organs_of_a_ct_of_another_origin_are_found(segmenter: Segmenter, shared_data: Path) -> None:
    data = shared_data / "abdomen_ct"
    if not data.is_dir():
        pytest.skip("needs abdomen_ct in the folder of real data")
    label = nib.load(data / "example_seg.nii.gz")
    values, reference = np.asarray(label.dataobj), np.zeros(label.shape, dtype=np.uint8)
    for value, name in re.findall(r'Key="(\d+)".*?CDATA\[(\w+)\]', str(label.header.extensions[0].get_content())):
        if (known := segmenter.preset.find_label(name)) is not None:
            reference[values == int(value)] = known.index
    found = segmenter.segment(read_volume(data / "example_ct.nii.gz")).labels[..., FIRST_SLICE_OF_REFERENCE:]
    scores = {organ: dice(found, reference, organ) for organ in ("liver", "spleen", "left_kidney")}
    assert min(scores.values()) > 0.9, scores
    few_slices = segmenter.segment(read_volume(data / "example_ct_sm.nii.gz")).labels
    assert min(dice(few_slices, reference, organ) for organ in scores) > 0.9, "the same organs in 90 mm of the torso"
    present = [organ for organ, index in ORGANS.items() if (reference == index).any()]
    assert np.mean([dice(found, reference, organ) for organ in present]) > 0.8


def test_no_large_organ_is_invented_in_a_pelvis(segmenter: Segmenter, shared_data: Path) -> None:
    if not (shared_data / "abdomen_ct").is_dir():
        pytest.skip("needs abdomen_ct in the folder of real data")
    torso = read_volume(shared_data / "abdomen_ct" / "example_ct.nii.gz")
    below_the_organs = Volume(np.ascontiguousarray(torso.voxels[..., :45]), torso.affine_ras)
    computed = segmenter.compute(below_the_organs, largest_component=False)
    everything = segmenter.restore(computed).labels
    assert (everything == ORGANS["liver"]).sum() > 100, "the network itself invents some"
    found = segmenter.restore(replace(computed, largest_component=None)).labels
    for organ in ("spleen", "right_kidney", "left_kidney", "liver", "stomach", "aorta", "inferior_vena_cava"):
        assert not (found == ORGANS[organ]).any(), organ
    assert np.count_nonzero(found) < 100


@pytest.mark.parametrize("part", BODY_PARTS)
def test_no_organ_is_invented_in_another_part_of_the_body(segmenter: Segmenter, part: str) -> None:
    """Weights that had seen nothing but abdomens found 6.1 litres of liver in these legs, and 0.44 in this chest."""
    drawn = BODY_PARTS[part]()
    found = segmenter.segment(drawn).labels
    there = {"chest": {"aorta", "esophagus"}}.get(part, set())  # drawn, and organs of the preset
    voxel_ml = abs(np.linalg.det(drawn.affine_ras[:3, :3])) / 1000
    invented = {
        organ: round(float(np.count_nonzero(found == index) * voxel_ml), 1)
        for organ, index in ORGANS.items()
        if organ not in there
    }
    assert sum(invented.values()) < 5, invented


def test_arms_beside_a_body_change_little_of_its_organs(segmenter: Segmenter, shared_data: Path) -> None:
    if not (shared_data / "abdomen_ct").is_dir():
        pytest.skip("needs abdomen_ct in the folder of real data")
    torso, width = read_volume(shared_data / "abdomen_ct" / "example_ct.nii.gz"), 30
    alone = segmenter.segment(torso).labels
    with_arms = segmenter.segment(lay_arms_beside(torso, width)).labels
    assert not with_arms[:width].any() and not with_arms[-width:].any(), "nothing is found in the arms"
    same = {organ: dice(with_arms[width:-width], alone, organ) for organ in ("liver", "spleen", "left_kidney")}
    assert min(same.values()) > 0.9, same
