"""Clicks and scribbles as MONAI Label's tasks: announced, answered, and kept with their prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.errors import LabelError, MemoryBudgetError, ParameterError
from lib.infers.cache import ResultCache
from lib.infers.network_images import NetworkImages
from lib.infers.plan import Planner
from lib.infers.task import UnetrInferTask
from lib.interaction.editing import Scene, edit_clicks
from lib.interaction.editor import EditorDesign, EditorWeights, SharedEditor, build_editor, write_editor
from lib.interaction.prompts import make_prompts
from lib.interaction.served import ServedEditor
from lib.interaction.task import ClickTask, ScribbleTask, make_interactive_tasks
from lib.models.weights import WeightsLocator
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from lib.transforms.inputs import read_input
from lib.transforms.preprocess import preprocess_volume
from tests.tiny import axis_affine, boxes, tiny_preset, write_nifti

SMALL = EditorDesign((4, 8, 8), (16, 16, 16))
AFFINE = axis_affine("LPS", (0.9, 1.1, 1.0))


def tasks_of(folder: Path) -> tuple[UnetrInferTask, ClickTask, ScribbleTask]:
    images, cache = NetworkImages(64), ResultCache(64)
    automatic = UnetrInferTask(tiny_preset(), WeightsLocator(folder), "cpu", "fp32", cache, images=images)
    made = make_interactive_tasks({"tiny": automatic}, images, cache, "cpu")
    assert list(made) == ["tiny_edit", "tiny_scribbles"]
    return automatic, made["tiny_edit"], made["tiny_scribbles"]  # type: ignore[return-value]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "results").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "results"))
    return tmp_path


@pytest.fixture
def image(folder: Path) -> Path:
    return write_nifti(folder / "scan.nii.gz", boxes()[0], AFFINE)


def ask(task: Any, image: Path, label_file: Path | None = None, **params: Any) -> tuple[np.ndarray, dict[str, Any]]:
    request = task.parse({"image": str(image), "result_extension": ".nii.gz", **params})
    file, answer = task.segment(replace(request, label_file=label_file))
    picture = nib.load(file)
    np.testing.assert_allclose(picture.affine, AFFINE, atol=1e-6)
    return np.asarray(picture.dataobj), answer


def test_tasks_are_announced_so_that_viewers_show_their_buttons(folder: Path) -> None:
    _, clicks, scribbles = tasks_of(folder / "none")
    assert clicks.is_valid() and scribbles.is_valid()
    assert clicks.info()["type"] == "deepedit" and scribbles.info()["type"] == "scribbles"
    assert list(clicks.info()["labels"].items()) == [("Left Box", 1), ("core", 2), ("background", 255)]


def test_answer_holds_only_what_was_clicked(folder: Path, image: Path) -> None:
    torch.manual_seed(0)
    preset = tiny_preset()
    write_checkpoint(folder / "model" / "shipped.pt", Checkpoint(dict(build_unetr(preset).state_dict()), preset))
    automatic, clicks, _ = tasks_of(folder / "model")
    before, _ = ask(automatic, image)
    point = [3, 4, 5]
    mask, answer = ask(clicks, image, core=[point], **{"Left Box": [], "background": []})
    assert answer["label_names"] == {"core": 2} and set(np.unique(mask)) == {0, 2} and mask[3, 4, 5] == 2
    assert answer["interaction"] == {"start": "automatic", "prompts": 1}
    whole, _ = ask(clicks, image, core=[point], all_labels=True)
    assert ((whole == before) | (whole == 2)).all()
    np.testing.assert_array_equal(whole == 2, mask == 2)
    unprompted, answer = ask(clicks, image)
    np.testing.assert_array_equal(unprompted, before)
    assert answer["label_names"] == {"Left Box": 1, "core": 2}


def test_click_on_an_automatic_mask_is_answered_from_the_networks_logit_margins(folder: Path, image: Path) -> None:
    torch.manual_seed(0)
    preset = tiny_preset()
    write_checkpoint(folder / "model" / "shipped.pt", Checkpoint(dict(build_unetr(preset).state_dict()), preset))
    automatic, clicks, _ = tasks_of(folder / "model")
    before, _ = ask(automatic, image)
    margins = automatic.margins_of(automatic.parse({"image": str(image)}))
    assert margins is not None
    volume = read_input(image, preset)
    scene = Scene(preprocess_volume(volume, preset), before.astype(np.uint8), volume.affine_ras, margins=margins)
    point = next(tuple(int(v) for v in p) for p in np.argwhere(before == 2)[::7] if min(p) >= 3)
    expected = edit_clicks(scene, make_prompts({}, [point])).labels
    answered, _ = ask(clicks, image, background=[list(point)], all_labels=True)
    np.testing.assert_array_equal(answered, expected)
    file = write_nifti(folder / "sent.nii.gz", before.astype(np.uint8), AFFINE)
    sent, _ = ask(clicks, image, label_file=file, background=[list(point)], all_labels=True)
    scene.margins = None
    np.testing.assert_array_equal(sent, edit_clicks(scene, make_prompts({}, [point])).labels)
    assert (sent != answered).any(), "a mask that a viewer sends is corrected by growth"
    _, elsewhere, _ = tasks_of(folder / "model")
    np.testing.assert_array_equal(ask(elsewhere, image, background=[list(point)], all_labels=True)[0], answered)


def test_same_clicks_come_from_the_cache_and_others_do_not(folder: Path, image: Path) -> None:
    _, clicks, _ = tasks_of(folder / "none")
    request = {"image": str(image), "core": [[8, 8, 8]]}
    assert clicks.recall(clicks.parse(request)) is None and not clicks.is_kept(clicks.parse(request))
    first, _ = ask(clicks, image, core=[[8, 8, 8]])
    again = clicks.recall(clicks.parse(request | {"result_extension": ".nii"}))
    assert again is not None and again[1]["cache"]["hit"]
    np.testing.assert_array_equal(nib.load(again[0]).dataobj, first)
    assert clicks.recall(clicks.parse(request | {"core": [[8, 8, 9]]})) is None
    assert clicks.recall(clicks.parse(request | {"background": [[1, 1, 1]]})) is None


def test_answers_of_other_editor_weights_are_not_taken_from_the_cache(folder: Path, image: Path) -> None:
    images, cache, request = NetworkImages(64), ResultCache(64), {"image": str(image), "core": [[8, 8, 8]]}
    automatic = UnetrInferTask(tiny_preset(), WeightsLocator(folder / "none"), "cpu", "fp32", cache, images=images)
    kept = []
    for seed in range(2):
        torch.manual_seed(seed)
        weights = EditorWeights(build_editor(SMALL).state_dict(), SMALL)
        write_editor(folder / f"{seed}.pt", weights)
        editor = ServedEditor("tiny", folder / "none", SharedEditor(folder / f"{seed}.pt"))
        clicks = ClickTask(automatic, images, cache, device="cpu", editor=editor)
        kept.append(clicks.is_kept(clicks.parse(request)))
        clicks(request)
        assert clicks.is_kept(clicks.parse(request))
    assert kept == [False, False]


def test_click_that_does_not_fit_into_memory_is_refused_before_it_starts(folder: Path, image: Path) -> None:
    images, cache = NetworkImages(64), ResultCache(64)
    automatic = UnetrInferTask(tiny_preset(), WeightsLocator(folder / "none"), "cpu", "fp32", cache, images=images)
    write_editor(folder / "editor.pt", EditorWeights(build_editor(SMALL).state_dict(), SMALL))
    editor = ServedEditor("tiny", folder / "none", SharedEditor(folder / "editor.pt"))
    clicks = ClickTask(automatic, images, cache, device="cpu", editor=editor, planner=Planner(budget=1))
    with pytest.raises(MemoryBudgetError, match=r"a click on .scan\.nii\.gz. needs"):
        clicks({"image": str(image), "core": [[8, 8, 8]]})


def test_mask_starts_from_what_the_viewer_sends(folder: Path, image: Path) -> None:
    _, clicks, _ = tasks_of(folder / "none")
    drawn = np.zeros((20, 18, 16), np.uint8)
    drawn[2:6, 2:6, 2:6] = 2
    file = write_nifti(folder / "drawn.nii.gz", drawn, AFFINE)
    info = [{"name": "core", "id": 1}, {"name": "Left Box", "id": 2}]
    mask, answer = ask(clicks, image, label_file=file, label_info=info, core=[[15, 15, 13]], all_labels=True)
    assert answer["interaction"]["start"] == "label"
    assert (mask[2:6, 2:6, 2:6] == 1).all(), "its values are read by name"
    with pytest.raises(LabelError, match="has shape"):
        ask(clicks, image, label_file=write_nifti(folder / "small.nii.gz", drawn[1:], AFFINE), core=[[1, 1, 1]])
    with pytest.raises(LabelError, match="has the value 9"):
        ask(clicks, image, label_file=write_nifti(folder / "nine.nii.gz", drawn // 2 * 9, AFFINE))


def test_scribbles_change_the_chosen_structure_alone(folder: Path, image: Path) -> None:
    _, _, scribbles = tasks_of(folder / "none")
    drawing = np.zeros((20, 18, 16), np.uint8)
    drawing[2:6, 2:6, 2:6], drawing[10:13, 9, 9], drawing[2, 15, 2:6], drawing[4, 4, 4] = 2, 3, 4, 4
    file = write_nifti(folder / "drawing.nii.gz", drawing, AFFINE)
    names = ("core", "Left Box", "foreground_scribbles", "background_scribbles")
    info = [{"name": name, "id": number} for number, name in enumerate(names, 1)]
    request = {"label_info": info, "roi": [], "selected_label_name": "Left Box"}
    mask, answer = ask(scribbles, image, file, **request)
    assert answer["label_names"] == {"Left Box": 1} and set(np.unique(mask)) == {0, 1}
    assert (mask[10:13, 9, 9] == 1).all() and (mask[drawing == 4] == 0).all() and mask[2, 2, 2] == 1
    boxed, _ = ask(scribbles, image, file, **request | {"roi": [0, 7, 17, 0, 0, 15]})
    assert (boxed[8:] == 0).all()
    for wrong in ({"selected_label_name": "foreground_scribbles"}, {"label_info": "x"}, {"selected_label_name": None}):
        with pytest.raises(ParameterError):
            scribbles.parse({"image": str(image)} | request | wrong)
    with pytest.raises(LabelError, match="part 'label' is missing"):
        scribbles({"image": str(image), **request})


def test_corrections_say_where_itk_and_nibabel_read_the_image_differently(folder: Path, image: Path) -> None:
    _, clicks, _ = tasks_of(folder / "none")
    assert ask(clicks, image, core=[[8, 8, 8]])[1]["warnings"] == []
    differs = nib.Nifti1Image(boxes()[0], AFFINE + np.diag([0, 0, 0.5, 0]))
    differs.set_qform(AFFINE, 1)
    differs.header["pixdim"][1:4] = (0.9, 1.1, 1.0)
    nib.save(differs, folder / "differs.nii.gz")
    request = {"core": [[8, 8, 8]]}
    (warning,) = ask(clicks, folder / "differs.nii.gz", **request)[1]["warnings"]
    assert "nibabel place the image up to 7.5 mm apart" in warning
    again = clicks.recall(clicks.parse({"image": str(folder / "differs.nii.gz"), **request}))
    assert again is not None and again[1]["warnings"] == [warning]
