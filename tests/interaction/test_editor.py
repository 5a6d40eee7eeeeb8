"""The editor network: how it begins, and what holds whatever it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lib.errors import CheckpointError
from lib.interaction.annotator import Correction, spoil, touch_up
from lib.interaction.editing import Scene, edit_clicks
from lib.interaction.editor import CHANNELS, Editor, SharedEditor, build_editor, prompt_map, start_from
from lib.interaction.prompts import Box, make_prompts
from lib.interaction.training import EditorTraining, Material, draw
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import Volume
from tests.tiny import axis_affine, boxes, oblique_affine, tiny_preset

CPU = torch.device("cpu")


class Contrary(nn.Module):
    """A network that says something else at every voxel, whatever it is shown."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        logits = 20 * torch.randn((given.shape[0], 2, *given.shape[2:]), generator=torch.Generator().manual_seed(1))
        return logits - 9 * given[:, 2:3] + 9 * given[:, 3:4]


def scene_of(affine: np.ndarray, seed: int = 0) -> tuple[Scene, np.ndarray]:
    image, truth = boxes((30, 28, 26), seed)
    return Scene(preprocess_volume(Volume(image, affine), tiny_preset()), truth.copy(), affine), truth


def test_new_channels_at_zero_leave_the_presets_features_as_they_are() -> None:
    torch.manual_seed(0)
    tiny = tiny_preset()
    preset = tiny.model_copy(update={"network": tiny.network.model_copy(update={"feature_size": 8})})
    own, editor = build_unetr(preset).eval(), build_editor(preset).eval()
    left = start_from(editor, own.state_dict())
    assert left and all(name.startswith("out.") for name in left)
    image = torch.randn(1, 1, *preset.roi_size)
    prompts = torch.rand(1, CHANNELS - 1, *preset.roi_size)
    seen: list[torch.Tensor] = []
    for network in (own, editor):
        network.out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))  # type: ignore[union-attr]
    with torch.inference_mode():
        own(image)
        editor(torch.cat([image, prompts], dim=1))
    torch.testing.assert_close(seen[0], seen[1])


def test_untrained_editor_gives_the_mask_back() -> None:
    preset = tiny_preset()
    editor = Editor(build_editor(preset), preset, CPU)
    image, truth = boxes((30, 28, 26))
    points = np.array([[3, 4, 5], [25, 20, 20]])
    found = editor.probability(image, truth == 1, points, points[:0])
    np.testing.assert_array_equal(found > 0.5, truth == 1)


@pytest.mark.parametrize("affine", [np.eye(4), axis_affine("SLA", (0.8, 1.2, 1.0)), oblique_affine("LPS")])
def test_clicks_are_obeyed_whatever_the_network_says(affine: np.ndarray) -> None:
    editor, random = Editor(Contrary(), tiny_preset(), CPU), np.random.default_rng(3)
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
    edited = edit_clicks(scene, make_prompts({2: [(12, 12, 12)]}, box=box), Editor(Contrary(), tiny_preset(), CPU))
    places = np.argwhere(edited.labels != truth)
    assert len(places) > 1 and places[:, 0].min() >= 10 and places[:, 0].max() < 14


def test_nothing_changes_outside_of_the_widest_window() -> None:
    preset = tiny_preset()
    image, mask = np.zeros((160, 40, 40), np.float32), np.zeros((160, 40, 40), bool)
    found = Editor(Contrary(), preset, CPU).probability(image, mask, np.array([[5, 5, 5]]), np.zeros((0, 3), int))
    assert found[: preset.roi_size[0]].any() and not found[2 * preset.roi_size[0] :].any()


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


def test_training_repeats_resumes_and_its_weights_are_an_editor(tmp_path: Path) -> None:
    preset = tiny_preset()
    image, truth = boxes((30, 28, 26))
    material = {"tiny": [Material(image, truth), Material(image, truth, np.roll(truth, 1, axis=0))]}
    losses = []
    for folder in ("a", "b"):
        training = EditorTraining(preset, material, tmp_path / folder, batch=1)
        training.run(5, most_steps=3)
        losses.append(training.losses)
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-2)  # sums in bf16 are not quite alike
    again = EditorTraining(preset, material, tmp_path / "a", batch=1)
    assert again.steps == 3
    again.run(5, most_steps=4)
    assert again.steps == 4 and len(again.losses) == 1
    editor = SharedEditor(tmp_path / "a" / "shipped.pt").on(CPU)
    assert editor.window == preset.roi_size


def test_training_draws_windows_with_clicks_on_what_is_wrong() -> None:
    image, truth = boxes((30, 28, 26))
    random = np.random.default_rng(0)
    for _ in range(10):
        one = draw(Material(image, truth), (24, 32, 24), random)
        assert one.image.shape == one.truth.shape == one.mask.shape == (24, 32, 24)
        one.click(one.mask, 4)
        assert all(one.truth[c.point] == c.value for c in one.clicks)


def test_spoiled_masks_are_wrong_in_part_and_repeat_for_a_seed() -> None:
    truth = boxes((30, 28, 26))[1] > 0
    spoiled = [spoil(truth, np.random.default_rng(seed)) for seed in range(6)]
    np.testing.assert_array_equal(spoiled[2], spoil(truth, np.random.default_rng(2)))
    overlaps = [2 * (s & truth).sum() / (s.sum() + truth.sum()) for s in spoiled]
    assert all(0.2 < overlap <= 1 for overlap in overlaps) and min(overlaps) < 0.95


def test_touching_up_mends_around_the_click_and_breaks_nothing() -> None:
    truth, labels = np.zeros((20, 20, 20), np.uint8), np.zeros((20, 20, 20), np.uint8)
    truth[5:15, 5:15, 5:15], labels[5:15, 5:15, 5:7] = 1, 1
    mended = touch_up(labels, truth, Correction(1, (10, 10, 11)))
    assert mended[10, 10, 11] == 1
    assert (mended != labels).sum() > 20 and (mended != truth).sum() < (labels != truth).sum()
