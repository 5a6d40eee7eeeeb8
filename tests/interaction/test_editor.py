"""The editor network: how it begins, and what holds whatever it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lib.errors import CheckpointError
from lib.interaction.annotator import perturb_mask
from lib.interaction.editing import Scene, edit_clicks
from lib.interaction.editor import (
    Editor,
    EditorDesign,
    EditorWeights,
    SharedEditor,
    build_editor,
    prompt_map,
    read_editor,
    write_editor,
)
from lib.interaction.prompts import Box, make_prompts
from lib.interaction.sessions import Material, begin_session, region_alike
from lib.interaction.training import EditorTraining
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import Volume
from tests.tiny import axis_affine, boxes, oblique_affine, tiny_preset

CPU = torch.device("cpu")
SMALL = EditorDesign((4, 8, 8), (16, 16, 16))


class Contrary(nn.Module):
    """A network that says something else at every voxel, whatever it is shown."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        logits = 20 * torch.randn((given.shape[0], 1, *given.shape[2:]), generator=torch.Generator().manual_seed(1))
        return logits - 9 * given[:, 2:3] + 9 * given[:, 3:4]


def scene_of(affine: np.ndarray, seed: int = 0) -> tuple[Scene, np.ndarray]:
    image, truth = boxes((30, 28, 26), seed)
    return Scene(preprocess_volume(Volume(image, affine), tiny_preset()), truth.copy(), affine), truth


def test_a_negative_prompt_where_nothing_is_drawn_has_no_window() -> None:
    image, nothing = np.zeros((60, 20, 20), np.float32), np.zeros((60, 20, 20), bool)
    editor, beside = Editor(Contrary(), SMALL, CPU), np.array([[50, 10, 10]])
    assert not editor.probability(image, nothing, beside[:0], beside).any()
    drawn = nothing.copy()
    drawn[50, 10, 10] = True
    assert editor.probability(image, drawn, beside[:0], beside)[40:].any()


@pytest.mark.parametrize("affine", [np.eye(4), axis_affine("SLA", (0.8, 1.2, 1.0)), oblique_affine("LPS")])
def test_clicks_are_obeyed_whatever_the_network_says(affine: np.ndarray) -> None:
    editor, random = Editor(Contrary(), SMALL, CPU), np.random.default_rng(3)
    for seed in range(3):
        scene, truth = scene_of(affine, seed)
        points = [tuple(int(random.integers(0, s)) for s in truth.shape) for _ in range(6)]
        prompts = make_prompts({2: points[:3]}, points[3:])
        edited = edit_clicks(scene, prompts, editor)
        assert all(edited.labels[p] == 2 for p in points[:3]) and all(edited.labels[p] == 0 for p in points[3:])
        changed = edited.labels != truth
        assert set(np.unique(edited.labels[changed])) <= {0, *edited.values}
        assert set(np.unique(truth[changed & (edited.labels == 0)])) <= {*edited.values}
        np.testing.assert_array_equal(scene.labels, truth)
        np.testing.assert_array_equal(edit_clicks(scene, prompts, editor).labels, edited.labels)


def test_nothing_changes_outside_of_the_box_whatever_the_network_says() -> None:
    scene, truth = scene_of(np.eye(4))
    box = Box((10, 0, 0), (14, 28, 26))
    edited = edit_clicks(scene, make_prompts({2: [(12, 12, 12)]}, box=box), Editor(Contrary(), SMALL, CPU))
    places = np.argwhere(edited.labels != truth)
    assert len(places) > 1 and places[:, 0].min() >= 10 and places[:, 0].max() < 14


def test_nothing_changes_outside_of_the_widest_window() -> None:
    image, mask = np.zeros((160, 40, 40), np.float32), np.zeros((160, 40, 40), bool)
    found = Editor(Contrary(), SMALL, CPU).probability(image, mask, np.array([[5, 5, 5]]), np.zeros((0, 3), int))
    assert found[:16].any() and not found[32:].any()


def test_prompt_map_is_one_at_points_and_nothing_without() -> None:
    found = prompt_map(np.array([[1, 1, 1], [9, 9, 9]]), (4, 4, 4))
    assert found[1, 1, 1] == 1 and found.max() == 1 and found[1, 1, 3] == pytest.approx(np.exp(-2 / 3))
    assert not prompt_map(np.zeros((0, 3), int), (4, 4, 4)).any()


def test_editor_file_is_read_once_and_others_are_refused(tmp_path: Path) -> None:
    preset = tiny_preset()
    torch.manual_seed(0)
    assert SharedEditor.if_there(tmp_path / "none.pt") is None
    write_checkpoint(tmp_path / "unetr.pt", Checkpoint(dict(build_unetr(preset).state_dict()), preset))
    with pytest.raises(CheckpointError, match="holds no editor"):
        SharedEditor(tmp_path / "unetr.pt").on(CPU)


def test_written_editor_is_read_back_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_editor(SMALL)
    write_editor(tmp_path / "shipped.pt", EditorWeights(network.state_dict(), SMALL, ("tiny",), {"steps": 3}))
    read = read_editor(tmp_path / "shipped.pt")
    assert read.design == SMALL and read.info == {"steps": 3}
    assert read.presets == ("tiny",)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(read.model[name], value.half().float())
    shared = SharedEditor(tmp_path / "shipped.pt")
    assert shared.on(CPU) is shared.on(CPU) and len(shared.sha256) == 64
    assert shared.serves("tiny") and not shared.serves("other")


def test_design_that_does_not_halve_its_window_is_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot see windows"):
        EditorDesign((4, 8, 16), (16, 18, 16))


def test_training_repeats_resumes_and_its_weights_are_an_editor(tmp_path: Path) -> None:
    image, truth = boxes((30, 28, 26))
    material = {"tiny": [Material(image, truth), Material(image, truth, (np.roll(truth, 1, axis=0),))]}
    losses = []
    for folder in ("a", "b"):
        training = EditorTraining(SMALL, material, tmp_path / folder, voxels=16**3)
        training.run(5, most_steps=3)
        losses.append(training.losses)
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-2)  # sums in bf16 are not quite alike
    again = EditorTraining(SMALL, material, tmp_path / "a", voxels=16**3)
    assert again.steps == 3
    again.run(5, most_steps=4)
    assert again.steps == 4 and len(again.losses) == 1
    assert SharedEditor(tmp_path / "a" / "shipped.pt").on(CPU).design == SMALL


def test_trained_editor_follows_a_click_into_a_box_that_it_was_not_told_of(tmp_path: Path) -> None:
    design = EditorDesign((8, 16, 16), (32, 32, 32))
    cases = [Material((image - 100) / 200, truth) for image, truth in (boxes((30, 28, 26), seed) for seed in range(4))]
    training = EditorTraining(design, {"tiny": cases}, tmp_path, voxels=32**3)
    training.run(5, most_steps=80)
    image, truth = boxes((30, 28, 26), 9)
    inside = np.argwhere(truth == 2).mean(axis=0).round().astype(int)[None]
    found = training.editor().probability((image - 100) / 200, np.zeros(truth.shape, bool), inside, inside[:0]) > 0.5
    core = truth == 2
    assert 2 * (found & core).sum() / (found.sum() + core.sum()) > 0.5


def test_sessions_correct_what_is_wrong_until_they_are_over() -> None:
    image, truth = boxes((30, 28, 26))
    random, sizes = np.random.default_rng(0), list[int]()
    for _ in range(10):
        session = begin_session(Material(image, truth), (24, 32, 24), random)
        assert session.image.shape == session.truth.shape == session.mask.shape == (24, 32, 24)
        while session.prompt(random):
            wrong = session.current != session.truth
            assert all(wrong[v.point] and session.truth[v.point] == v.value for v in session.made[-1])
            sizes.append(len(session.made[-1]))
            session.current = session.mask | session.truth if len(session.made) == 3 else session.current
        assert 0 < len(session.made) <= session.planned
        assert all(session.truth[c.point] == session.mask[c.point] == c.value for c in session.redundant)
        given = session.input()
        assert given.shape == (4, 24, 32, 24)
        assert all(given[2 if v.value else 3][v.point] == given[2:].max() for v in session.corrected)
    # about one prompt of five is a scribble, which has several voxels
    assert 0.05 < np.mean([size > 1 for size in sizes]) < 0.4


def test_regions_of_like_intensities_stay_in_one_part_of_the_image() -> None:
    random = np.random.default_rng(1)
    parts = np.arange(8).reshape(2, 2, 2).repeat(20, 0).repeat(20, 1).repeat(20, 2)
    odd = np.indices((2, 2, 2)).sum(axis=0).repeat(20, 0).repeat(20, 1).repeat(20, 2) % 2
    image = (odd + random.normal(0, 0.05, parts.shape)).astype(np.float32)
    found = [region for _ in range(10) if (region := region_alike(image, random)) is not None]
    assert len(found) > 3
    for region in found:
        assert np.bincount(parts[region]).max() > 0.9 * region.sum() and region.sum() >= 200


def test_spoiled_masks_are_wrong_in_part_and_repeat_for_a_seed() -> None:
    truth = boxes((30, 28, 26))[1] > 0
    spoiled = [perturb_mask(truth, np.random.default_rng(seed)) for seed in range(6)]
    np.testing.assert_array_equal(spoiled[2], perturb_mask(truth, np.random.default_rng(2)))
    overlaps = [2 * (s & truth).sum() / (s.sum() + truth.sum()) for s in spoiled]
    assert all(0.2 < overlap <= 1 for overlap in overlaps) and min(overlaps) < 0.95
