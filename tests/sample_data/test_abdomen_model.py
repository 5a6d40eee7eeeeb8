"""The fitted model of abdominal CT: its file, the parts of the fit, and what is drawn from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fit_abdomen_model import ReadCase, align, describe, draw_guides, find_body, finer_field, main
from registration import invert
from statistical_model import write_side_car
from synthetic_abdomen import GRID, MODEL_FILE, draw_abdomen, load_model
from torso_phantom import ORGANS, TorsoCase


@pytest.fixture(scope="module")
def drawn() -> TorsoCase:
    return draw_abdomen(0)


def test_model_file_is_small_and_holds_no_objects() -> None:
    assert MODEL_FILE.stat().st_size <= 5_000_000
    with np.load(MODEL_FILE, allow_pickle=False) as stored:
        assert all(np.isfinite(stored[name]).all() for name in stored.files)
        assert all(24 not in stored[name].shape[:1] for name in stored.files), "statistics, and no case"


def test_side_car_says_what_the_file_is_and_whose_data(tmp_path: Path) -> None:
    side_car = json.loads(MODEL_FILE.with_suffix(".json").read_text(encoding="utf-8"))
    assert side_car["sha256"] == hashlib.sha256(MODEL_FILE.read_bytes()).hexdigest()
    assert side_car["licence"].startswith("CC BY 4.0") and "syn3193805" in side_car["source"]
    assert side_car["cases"] == int(load_model().cases[0]) == 24
    copy = tmp_path / MODEL_FILE.name
    copy.write_bytes(MODEL_FILE.read_bytes())
    write_side_car(copy, describe(24))
    assert json.loads(copy.with_suffix(".json").read_text(encoding="utf-8")) == side_car


def test_model_with_another_number_of_deviations_is_refused() -> None:
    model = load_model()
    with pytest.raises(ValueError, match="4 modes have 3 deviations"):
        replace(model, shape_deviations=model.shape_deviations[:-1])


def test_case_is_the_same_however_often_it_is_drawn_and_another_is_not(drawn: TorsoCase) -> None:
    again, other = draw_abdomen(0), draw_abdomen(1)
    np.testing.assert_array_equal(again.image_hu, drawn.image_hu)
    np.testing.assert_array_equal(again.label, drawn.label)
    liver = [case.label == ORGANS["liver"] for case in (drawn, other)]
    both = 2 * np.count_nonzero(liver[0] & liver[1]) / sum(np.count_nonzero(one) for one in liver)
    assert 0.5 < both < 0.98, "another shape, and not another place"


@pytest.mark.parametrize(("index", "seed"), [(-1, 0), (0, -1)])
def test_negative_number_is_refused(index: int, seed: int) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        draw_abdomen(index, seed)


def test_organs_have_the_volumes_and_the_places_of_people(drawn: TorsoCase) -> None:
    voxel_ml = abs(np.linalg.det(drawn.affine_ras[:3, :3])) / 1000
    volumes = {name: np.count_nonzero(drawn.label == number) * voxel_ml for name, number in ORGANS.items()}
    least_and_most = {"liver": (900, 2300), "spleen": (80, 450), "right_kidney": (80, 280), "left_kidney": (80, 280),
                      "pancreas": (30, 150), "aorta": (30, 160), "left_adrenal_gland": (1, 12)}  # fmt: skip
    assert all(low < volumes[name] < high for name, (low, high) in least_and_most.items()), volumes
    assert min(volumes.values()) > 0.5, "every organ is there"
    assert nib.aff2axcodes(drawn.affine_ras) == ("R", "A", "S")
    centres = {name: np.argwhere(drawn.label == number).mean(axis=0) for name, number in ORGANS.items()}
    assert centres["liver"][0] > centres["stomach"][0] > centres["spleen"][0], "right is where the liver is"
    assert centres["right_kidney"][0] > centres["inferior_vena_cava"][0] > centres["aorta"][0]
    assert centres["left_kidney"][1] < centres["pancreas"][1] and centres["left_kidney"][2] < centres["spleen"][2]


def test_intensities_are_those_of_tissue(drawn: TorsoCase) -> None:
    image = drawn.image_hu
    assert image.dtype == np.int16 and image.min() >= -1000
    assert np.median(image[0]) < -950, "air beside the body"
    assert 60 < np.median(image[drawn.label == ORGANS["liver"]]) < 140
    inside = image[(image > -900) & (drawn.label == 0)]
    shares = [((inside > low) & (inside < high)).mean() for low, high in ((-140, -60), (0, 100), (200, 1000))]
    assert 0.2 < shares[0] < 0.6 and 0.25 < shares[1] < 0.7 and 0.01 < shares[2] < 0.1, "fat, soft tissue and bone"


def test_body_has_its_lungs_and_no_table() -> None:
    image = np.full((60, 50, 6), -125, dtype=np.float32)
    image[10:50, 15:40] = 40
    image[20:30, 22:32] = -125  # a lung
    image[5:55, 5:8] = 30  # a table below
    body = find_body(image)
    assert body[25, 27].all() and body[12, 20].all()
    assert not body[:, 5:8].any() and not body[:8].any()


def test_cases_of_other_sizes_and_places_are_aligned() -> None:
    """Two boxes of organs, one of them larger by half along one axis and elsewhere, lie on each other afterwards."""
    lattice = [np.array([x, y, z]) for x in (20, 40, 60) for y in (25, 50) for z in (20, 40, 60)]
    places = dict(zip(ORGANS.values(), lattice, strict=False))
    cases = []
    for scale, move in ((np.array([1, 1, 1]), 0), (np.array([1.5, 1, 1]), 8)):
        shape = tuple((np.array([90, 80, 80]) * scale).astype(int) + 12)
        label, body = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=bool)
        low, high = (
            (np.array([10, 15, 0]) * scale + move).astype(int),
            (np.array([75, 70, 80]) * scale + move).astype(int),
        )
        body[low[0] : high[0], low[1] : high[1]] = True
        for number, place in places.items():
            label[tuple(slice(int(c) - 2, int(c) + 3) for c in place * scale + move)] = number
        centres = {n: np.argwhere(label == n).mean(axis=0) * 3.0 for n in places}
        outline = np.array([[low[0], high[0] - 1], [low[1], high[1] - 1]]) * 3.0
        cases.append(ReadCase(np.where(body, 40, -125).astype(np.float32), label, body, centres, outline))
    first, second = align(cases)
    assert first.label.shape == GRID
    for number in places:
        centres = [np.argwhere(case.label == number).mean(axis=0) for case in (first, second)]
        np.testing.assert_allclose(centres[0], centres[1], atol=0.7)
    both = first.known & second.known
    assert not first.known.all(), "the scans end within the grid"
    assert np.count_nonzero(first.body & second.body & both) / np.count_nonzero(first.body & both) > 0.98
    guides = draw_guides([first, second])
    assert guides[0].shape == tuple(size // 2 for size in GRID)


def test_field_of_a_coarse_grid_moves_a_fine_one_as_far() -> None:
    field = np.full((3, *(size // 2 for size in GRID)), 0.5, dtype=np.float32)
    finer = finer_field(field)
    assert finer.shape == (3, *GRID)
    np.testing.assert_allclose(finer, 1.0)  # half a voxel of 6 mm is one of 3 mm
    np.testing.assert_allclose(invert(field[:, :16, :16, :16])[:, 8, 8, 8], -0.5, atol=0.05)


def test_too_few_cases_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels").mkdir()
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "x.npz")]) == 2
    assert "has 0 cases; needed: 16" in capsys.readouterr().err
