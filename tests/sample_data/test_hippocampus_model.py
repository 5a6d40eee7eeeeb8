"""The fitted model's file, and the parts of the fit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fit_hippocampus_model import (
    GRID,
    SPECTRUM_BOX,
    complete_missing,
    describe,
    main,
    power_octant,
    radial_profile,
)
from registration import demons, invert
from scipy import ndimage
from statistical_model import check_shares, principal_modes, write_side_car
from synthetic_hippocampus import MODEL_FILE, load_model, warp


def test_model_file_is_small_and_holds_no_objects() -> None:
    assert MODEL_FILE.stat().st_size <= 4_000_000
    with np.load(MODEL_FILE, allow_pickle=False) as stored:
        assert all(np.isfinite(stored[name]).all() for name in stored.files)


def test_side_car_says_what_the_file_is_and_whose_data(tmp_path: Path) -> None:
    side_car = json.loads(MODEL_FILE.with_suffix(".json").read_text(encoding="utf-8"))
    assert side_car["sha256"] == hashlib.sha256(MODEL_FILE.read_bytes()).hexdigest()
    assert side_car["licence"] == "CC-BY-SA 4.0" and "Task04" in side_car["source"]
    assert side_car["cases"] == int(load_model().cases[0])
    copy = tmp_path / MODEL_FILE.name
    copy.write_bytes(MODEL_FILE.read_bytes())
    write_side_car(copy, describe(side_car["cases"]))
    assert json.loads(copy.with_suffix(".json").read_text(encoding="utf-8")) == side_car


def test_model_holds_statistics_and_no_case() -> None:
    model = load_model()
    cases = int(model.cases[0])
    assert max(len(model.image_modes), len(model.shape_modes_mm)) < cases / 4
    with np.load(MODEL_FILE, allow_pickle=False) as stored:
        assert all(cases not in stored[name].shape for name in stored.files)


def test_model_modes_are_of_unit_length_and_in_order() -> None:
    model = load_model()
    lengths = np.linalg.norm(model.shape_modes_mm.reshape(len(model.shape_modes_mm), -1), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=0.02)  # they are kept as 8-bit numbers
    for deviations in (model.shape_deviations, model.appearance_deviations):
        assert (np.diff(deviations) <= 0).all() and deviations[-1] > 0


def test_model_with_another_number_of_deviations_is_refused() -> None:
    model = load_model()
    with pytest.raises(ValueError, match="28 modes have 27 deviations"):
        replace(model, shape_deviations=model.shape_deviations[:-1])


def test_principal_modes_of_two_known_directions() -> None:
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.standard_normal((50, 2)))[0].T
    coefficients = random.standard_normal((4000, 2)) * [5, 2]
    values = (coefficients @ directions).astype(np.float32)[:400]
    modes, deviations = principal_modes(values - values.mean(axis=0), 2)
    np.testing.assert_allclose(np.abs(np.sum(modes * directions, axis=1)), 1, atol=0.02)
    np.testing.assert_allclose(deviations, (5, 2), rtol=0.1)
    assert all(mode[np.abs(mode).argmax()] > 0 for mode in modes), "signs are chosen by a rule"


def test_missing_values_are_completed_from_what_the_cases_share() -> None:
    random = np.random.default_rng(1)
    basis = random.standard_normal((2, 60))
    true = (random.standard_normal((80, 2)) @ basis + 3).astype(np.float32)
    true += 0.01 * random.standard_normal(true.shape).astype(np.float32)
    known = random.random(true.shape) > 0.2
    values = np.where(known, true, np.float32(99))
    complete_missing(values, known, rounds=20, modes=2)
    np.testing.assert_array_equal(values[known], true[known])
    assert np.abs(values - true)[~known].max() < 0.3


def test_mode_that_is_one_case_is_refused() -> None:
    random = np.random.default_rng(2)
    ordinary = random.standard_normal((50, 30)).astype(np.float32)
    check_shares(ordinary, principal_modes(ordinary, 3)[0])
    ordinary[7] *= 40
    with pytest.raises(ValueError, match=r"one case makes up (0\.9\d|1\.00) of mode 0"):
        check_shares(ordinary, principal_modes(ordinary, 3)[0])


def test_power_of_white_noise_is_its_variance_at_every_frequency() -> None:
    noises = [np.random.default_rng(seed).normal(0, 2, GRID).astype(np.float32) for seed in range(40)]
    power = np.mean([power_octant(noise) for noise in noises], axis=0)
    assert power.shape == tuple(size // 2 + 1 for size in SPECTRUM_BOX)
    # the lowest frequencies are a handful of values, whose mean is still uncertain
    np.testing.assert_allclose(radial_profile(power)[3:], 4, rtol=0.1)


def test_registration_finds_a_shift_and_its_inverse_undoes_it() -> None:
    place = np.indices((24, 24, 24), dtype=np.float32)
    fixed, moving = (
        np.exp(-np.square(place - np.array(centre)[:, None, None, None]).sum(axis=0) / 40).astype(np.float32)
        for centre in ((12, 12, 12), (14, 11, 12))
    )
    field = demons(fixed, moving, iterations=60, smoothing=1.5)
    bright = fixed > 0.6
    # the field's smoothness takes a part of any shift
    np.testing.assert_allclose(field[:, bright].mean(axis=1), (2, -1, 0), atol=0.35)
    assert np.abs(warp(moving, field) - fixed).max() < 0.1
    back = np.stack([warp(part, field) for part in invert(field)]) + field
    assert np.abs(back[:, ndimage.binary_erosion(bright)]).max() < 0.15


def test_fit_without_enough_cases_ends_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "model.npz")]) == 2
    assert "has 0 labelled cases; needed: 29" in capsys.readouterr().err
    assert not (tmp_path / "model.npz").exists()
