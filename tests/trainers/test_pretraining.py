"""Pretraining: it learns, resumes bit for bit, and its encoder is one that every UNETR of the preset can start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lib.cases.labelled import Case
from lib.cases.split import Split, write_split
from lib.configs.preset import Preset
from lib.errors import CheckpointError, ParameterError, TrainingError
from lib.networks.checkpoint import read_checkpoint
from lib.networks.unetr import build_unetr, load_encoder
from lib.trainers.cli import main as cli
from lib.trainers.pretraining.__main__ import main
from lib.trainers.pretraining.loop import PretrainingPlan, pretrain, usable_images, write_encoder
from lib.trainers.pretraining.task import UnetrPretraining
from tests.tiny import QUIET_AUGMENTATION, preset_data, tiny_preset, write_nifti

MakeCases = Callable[..., tuple[Case, ...]]
FINE = {"patch_size": 8, "feature_size": 4, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4, "proj_type": "conv"}


def _plan(cases: tuple[Case, ...], folder: Path, preset: Preset, **changes: Any) -> PretrainingPlan:
    plan = PretrainingPlan(preset, tuple(case.image for case in cases), folder, torch.device("cpu"), 6, batch_size=2)
    return replace(plan, **changes)


@pytest.mark.parametrize("network", [FINE, preset_data()["network"]], ids=["patch 8", "patch 16"])
def test_encoder_fits_the_unetr_and_changes_what_it_says(
    network: dict[str, Any], make_cases: MakeCases, tmp_path: Path
) -> None:
    preset = tiny_preset(network=network, roi_size=[32, 16, 16])
    plan = _plan(make_cases(2), tmp_path / "run", preset, steps=2)
    result = pretrain(plan)
    assert len(result.losses) == 2 and all(0 < loss < 10 for loss in result.losses)
    write_encoder(tmp_path / "encoder.pt", plan, result)
    kept = read_checkpoint(tmp_path / "encoder.pt")
    assert kept.preset == preset and kept.info["images"] == 2 and kept.info["kind"] == "encoder"
    torch.manual_seed(0)
    unetr = build_unetr(preset)
    before = {key: value.clone() for key, value in unetr.state_dict().items()}
    load_encoder(unetr, kept.model)
    for key, value in unetr.state_dict().items():
        if key.startswith("vit.") and "norm_cross_attn" not in key:
            torch.testing.assert_close(value, result.encoder[key])
        elif not key.startswith("vit."):
            torch.testing.assert_close(value, before[key])
    assert not torch.equal(
        unetr.state_dict()["vit.blocks.3.mlp.linear1.weight"], before["vit.blocks.3.mlp.linear1.weight"]
    )


def test_two_sequences_make_an_encoder_of_two_channels(tmp_path: Path) -> None:
    preset = tiny_preset(network=FINE, roi_size=[32, 16, 16], channels=[{"name": "t1"}, {"name": "flair"}])
    voxels = np.random.default_rng(0).normal(100, 20, (32, 18, 16, 2)).astype(np.float32)
    images = (write_nifti(tmp_path / "stacked.nii.gz", voxels), write_nifti(tmp_path / "one.nii.gz", voxels[..., 0]))
    usable = usable_images(images, preset)
    assert [path.name for path in usable] == ["stacked.nii.gz"]
    result = pretrain(PretrainingPlan(preset, usable, tmp_path / "run", torch.device("cpu"), 2, batch_size=1))
    assert all(0 < loss < 10 for loss in result.losses)
    network = build_unetr(preset)
    load_encoder(network, result.encoder)
    (key,) = [key for key in result.encoder if key.endswith("patch_embeddings.weight")]
    assert result.encoder[key].shape == (48, 2, 8, 8, 8)
    torch.testing.assert_close(network.state_dict()[key], result.encoder[key])


def test_it_learns_to_draw_what_is_hidden(tmp_path: Path) -> None:
    """Waves that go on through all of an image can be drawn from a quarter of it."""
    random, files = np.random.default_rng(0), []
    x = np.indices((32, 16, 16))[0]
    for number in range(4):
        waves = np.sin(x / 2.0 + random.uniform(0, 6)) + 0.01 * random.normal(size=x.shape)
        files.append(write_nifti(tmp_path / f"{number}.nii.gz", waves.astype(np.float32)))
    recipe = {"precision": "fp32", "augmentation": QUIET_AUGMENTATION}
    preset = tiny_preset(network=FINE, roi_size=[32, 16, 16], training=recipe)
    losses = pretrain(PretrainingPlan(preset, tuple(files), tmp_path / "run", torch.device("cpu"), 80, 4)).losses
    # normalised patches have a variance of 1: that is what drawing nothing costs
    assert np.mean(losses[-10:]) < 0.8 < 1 < np.mean(losses[:5])


def test_run_that_was_killed_ends_as_one_that_was_not(make_cases: MakeCases, tmp_path: Path) -> None:
    cases, preset = make_cases(3), tiny_preset(network=FINE)
    whole = pretrain(_plan(cases, tmp_path / "whole", preset))

    def stop(step: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    plan = _plan(cases, tmp_path / "cut", preset, state_seconds=0.0, resume=True)
    with pytest.raises(KeyboardInterrupt):
        pretrain(plan, stop)
    steps: list[int] = []
    resumed = pretrain(plan, lambda step, loss: steps.append(step))
    assert steps[0] in (4, 5) and steps[-1] == 6
    assert resumed.losses == whole.losses
    assert all(torch.equal(value, whole.encoder[key]) for key, value in resumed.encoder.items())


def test_image_that_cannot_be_used_is_left_out_and_named(
    make_cases: MakeCases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_cases(1)[0].image
    (tmp_path / "bad.nii.gz").write_bytes(b"nothing")
    assert usable_images([good, tmp_path / "bad.nii.gz"], tiny_preset()) == (good,)
    assert "left out: image 'bad.nii.gz'" in caplog.text


def test_plan_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no image to learn from"):
        _plan((), tmp_path, tiny_preset())


def test_command_line_from_images_to_a_training_that_starts_from_them(
    make_cases: MakeCases, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [case.case_id for case in make_cases(5)]
    write_split(tmp_path / "split.json", Split(tuple(ids[:3]), tuple(ids[3:])), "test")
    preset, encoder = tmp_path / "tiny.yaml", tmp_path / "encoder.pt"
    preset.write_text(yaml.safe_dump(preset_data(network=FINE)), encoding="utf-8")
    images = ["--preset", str(preset), "--images", str(tmp_path / "images"), "--device", "cpu"]
    options = ["--leave-out", str(tmp_path / "split.json"), "--steps", "2", "--run-dir", str(tmp_path / "pretraining")]
    assert main([*images, *options, "--out", str(encoder)]) == 0
    assert capsys.readouterr().out.startswith("3 images, 2 steps, loss ")
    assert not (tmp_path / "pretraining" / "state.pt").exists()
    labels = ["--labels", str(tmp_path / "labels"), "--out", str(tmp_path / "x.pt"), "--run-dir", str(tmp_path / "run")]
    assert cli(["train", *images, *labels, "--encoder", str(encoder), "--max-steps", "1"]) == 0
    preset.write_text(yaml.safe_dump(preset_data(network=FINE | {"hidden_size": 96})), encoding="utf-8")
    capsys.readouterr()
    assert cli(["train", *images, *labels, "--encoder", str(encoder), "--max-steps", "1"]) == 2
    assert "of another shape: vit" in capsys.readouterr().err
    assert main([*images[:2], "--images", str(tmp_path / "none"), "--out", str(encoder)]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_encoder_of_another_network_is_refused(make_cases: MakeCases, tmp_path: Path) -> None:
    plan = _plan(make_cases(1), tmp_path / "run", tiny_preset(network=FINE), steps=1)
    with pytest.raises(CheckpointError, match="of another shape"):
        load_encoder(build_unetr(tiny_preset(network=FINE | {"mlp_dim": 32})), pretrain(plan).encoder)


class _Studies:
    """A datastore of images, as the task meets it."""

    def __init__(self, images: dict[str, Path]) -> None:
        self._images = images

    def list_images(self) -> list[str]:
        return list(self._images)

    def get_image_uri(self, image: str) -> str:
        return str(self._images[image])


def test_server_task_looks_at_all_but_held_out_images_and_keeps_the_encoder(
    make_cases: MakeCases, tmp_path: Path
) -> None:
    cases, folder = make_cases(4), tmp_path / "model"
    ids = [case.case_id for case in cases]
    write_split(folder / "split.json", Split(tuple(ids[:2]), tuple(ids[2:3])), "test")
    preset = tiny_preset(network=FINE)
    task = UnetrPretraining(preset, folder, "cpu")
    studies: Any = _Studies({case.case_id: case.image for case in cases})
    said = task({"method": "pretrain_tiny", "steps": 2}, studies)
    assert (said["images"], said["steps"]) == (3, 2) and said["loss"] > 0
    kept = read_checkpoint(folder / "encoder.pt")
    assert kept.preset == preset and kept.info["steps"] == 2
    assert not (folder / "pretraining" / "state.pt").exists()
    for bad in (0, True, "2", 1.5):
        with pytest.raises(ParameterError, match=r"'steps' is .*; valid: a whole number from 1"):
            task({"steps": bad}, studies)
