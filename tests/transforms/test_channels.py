"""Cases of several sequences: found by name, read on one grid, refused where a sequence is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.cases.labelled import ReadCased, find_channel_cases
from lib.configs.catalogue import read_preset, write_preset
from lib.configs.preset import Preset
from lib.errors import CheckpointError, ConfigError, ImageError, TrainingError
from lib.infers.segmenter import Segmenter
from lib.models.weights import preset_for
from lib.networks.checkpoint import Checkpoint, read_checkpoint
from lib.networks.unetr import build_unetr
from lib.trainers.cli import main
from lib.transforms.augment import RandDropChannelsd
from lib.transforms.channel_search import find_channel_sources
from lib.transforms.channels import read_channels
from lib.transforms.preprocess import IMAGE, preprocess_volume
from lib.transforms.volume import check_segmentable, read_volume
from tests.tiny import boxes, tiny_preset, write_nifti

SHAPE = (20, 18, 16)


def _preset(**second: object) -> Preset:
    return tiny_preset(channels=[{"name": "t1", "aliases": ["t1 native"]}, {"name": "flair"} | second])


def _noise(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def test_the_example_of_the_docs_is_a_preset_of_four_channels_and_three_labels(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "several-sequences.md"
    file = tmp_path / "brats_mr.yaml"
    file.write_text(page.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    preset = read_preset(file)
    assert [channel.name for channel in preset.channels] == ["flair", "t1", "t1ce", "t2"]
    assert (preset.in_channels, preset.out_channels, preset.display_channel) == (4, 4, 0)


def test_split_and_train_take_cases_of_two_sequences(tmp_path: Path) -> None:
    for case in ("a", "b", "c"):
        image, label = boxes(seed=ord(case))
        write_nifti(tmp_path / "images" / f"{case}_0000.nii.gz", image)
        write_nifti(tmp_path / "images" / f"{case}_0001.nii.gz", image)
        write_nifti(tmp_path / "labels" / f"{case}.nii.gz", label)
    write_preset(tmp_path / "two.yaml", _preset())
    data = ["--preset", str(tmp_path / "two.yaml"), "--images", str(tmp_path / "images")]
    data += ["--labels", str(tmp_path / "labels"), "--split", str(tmp_path / "split.json")]
    split = ["--out", str(tmp_path / "split.json"), "--validation-share", "0.4"]
    assert main(["split", *data, *split]) == 0
    more = ["--out", str(tmp_path / "two.pt"), "--run-dir", str(tmp_path / "run"), "--max-steps", "1"]
    assert main(["train", *data, *more, "--device", "cpu"]) == 0
    kept = read_checkpoint(tmp_path / "two.pt").preset
    assert kept is not None
    assert [channel.name for channel in kept.channels] == ["t1", "flair"]


def _write_suffixed(folder: Path) -> None:
    for case in ("a", "b"):
        write_nifti(folder / f"{case}_0000.nii.gz", _noise(1))
    write_nifti(folder / "a_0001.nii.gz", _noise(2))


def test_suffixed_files_are_the_channels_in_the_presets_order(tmp_path: Path) -> None:
    _write_suffixed(tmp_path)
    a, b = find_channel_sources(tmp_path, _preset())
    assert {name: path.name for name, path in a.files.items()} == {"t1": "a_0000.nii.gz", "flair": "a_0001.nii.gz"}
    assert (a.case_id, a.missing, b.case_id, b.missing) == ("a", (), "b", ("flair",))
    with pytest.raises(ImageError, match="case 'b' lacks the channels flair"):
        read_channels(b, _preset())


def test_an_optional_channel_that_is_missing_is_zeros_for_the_network(tmp_path: Path) -> None:
    _write_suffixed(tmp_path)
    preset = _preset(optional=True, intensity={"kind": "window", "lower": -100, "upper": 100})
    case = find_channel_sources(tmp_path, preset)[1]
    seen = preprocess_volume(read_channels(case, preset), preset)
    assert case.missing == ()
    assert seen.shape == (2, *SHAPE)
    assert seen[0].std() == pytest.approx(1, abs=0.01)
    assert not seen[1].any()


def test_a_4d_file_has_the_channels_on_its_last_axis(tmp_path: Path) -> None:
    voxels = np.stack([_noise(1), _noise(2)], axis=-1)
    write_nifti(tmp_path / "scan.nii.gz", voxels)
    write_nifti(tmp_path / "single.nii.gz", _noise(3))
    (tmp_path / "damaged.nii.gz").write_bytes(b"no image")
    preset = _preset(display=True)
    (case,) = find_channel_sources(tmp_path, preset)
    volume = read_channels(case, preset)
    np.testing.assert_array_equal(volume.channels[0], voxels[..., 0])
    np.testing.assert_array_equal(volume.voxels, voxels[..., 1])


def test_a_folder_holds_files_named_by_channel_or_alias(tmp_path: Path) -> None:
    preset = tiny_preset(channels=[{"name": "t1"}, {"name": "t1 contrast", "aliases": ["T1ce"]}])
    write_nifti(tmp_path / "p1" / "p1_T1.nii.gz", _noise(1))
    write_nifti(tmp_path / "p1" / "p1_t1ce.nii.gz", _noise(2))
    write_nifti(tmp_path / "p2" / "x-T1-Contrast.nii", _noise(2))
    p1, p2 = find_channel_sources(tmp_path, preset)
    assert {name: path.name for name, path in p1.files.items()} == {
        "t1": "p1_T1.nii.gz",
        "t1 contrast": "p1_t1ce.nii.gz",
    }
    assert p2.missing == ("t1",)
    shutil.copy(tmp_path / "p1" / "p1_T1.nii.gz", tmp_path / "p1" / "again_T1.nii.gz")
    again, _ = find_channel_sources(tmp_path, preset)
    with pytest.raises(ImageError, match="case 'p1' has two files for the channel 't1'"):
        read_channels(again, preset)


def test_other_channels_are_brought_onto_the_display_grid(tmp_path: Path) -> None:
    x, y, z = np.meshgrid(*(np.arange(size, dtype=np.float32) for size in (10, 9, 8)), indexing="ij")
    write_nifti(tmp_path / "a_0000.nii.gz", _noise(1))
    write_nifti(tmp_path / "a_0001.nii.gz", x + 10 * y + 100 * z, np.diag([2.0, 2.0, 2.0, 1.0]))
    (case,) = find_channel_sources(tmp_path, _preset())
    flair = read_channels(case, _preset()).channels[1]
    assert flair.shape == SHAPE
    assert flair[4, 6, 10] == pytest.approx(2 + 30 + 500)
    assert flair[5, 6, 10] == pytest.approx(2.5 + 30 + 500)


def test_cases_are_paired_with_labels_and_a_lacking_one_is_named(tmp_path: Path) -> None:
    _write_suffixed(tmp_path / "images")
    label = (_noise(1) > 120).astype(np.uint8)
    for case in ("a", "b"):
        write_nifti(tmp_path / "labels" / f"{case}.nii.gz", label)
    preset = _preset()
    (case,) = find_channel_cases(tmp_path / "images", tmp_path / "labels", preset)
    read = ReadCased(preset)(case.as_item())
    assert (case.case_id, read[IMAGE].shape) == ("a", (2, *SHAPE))
    (tmp_path / "images" / "a_0001.nii.gz").unlink()
    with pytest.raises(TrainingError, match="a lacks flair; b lacks flair"):
        find_channel_cases(tmp_path / "images", tmp_path / "labels", preset)


def test_the_network_takes_all_channels(tmp_path: Path) -> None:
    _write_suffixed(tmp_path)
    preset = _preset()
    volume = read_channels(find_channel_sources(tmp_path, preset)[0], preset)
    torch.manual_seed(0)
    network = build_unetr(preset)
    found = Segmenter(network, preset, torch.device("cpu"), "fp32").segment(volume)
    assert found.labels.shape == SHAPE
    assert network.encoder1.layer.conv1.conv.in_channels == 2


def test_one_image_is_refused_by_a_network_of_two_channels(tmp_path: Path) -> None:
    volume = read_volume(write_nifti(tmp_path / "a.nii.gz", _noise(1)))
    with pytest.raises(ImageError, match="image 'a' was read with 0 channels; 'tiny' needs the channels: t1, flair"):
        check_segmentable(volume, _preset(), "a")


def test_weights_refuse_channels_of_another_order() -> None:
    trained, other = _preset(), tiny_preset(channels=[{"name": "flair"}, {"name": "t1"}])
    assert preset_for(Checkpoint({}, trained), trained).in_channels == 2
    with pytest.raises(
        CheckpointError, match="the weights take t1, flair as channels, in this order, but 'tiny' has f"
    ):
        preset_for(Checkpoint({}, trained), other)
    with pytest.raises(CheckpointError, match="has one image"):
        preset_for(Checkpoint({}, trained), tiny_preset())


def test_only_optional_channels_are_dropped() -> None:
    drop = RandDropChannelsd(IMAGE, [1], probability=0.5).set_random_state(seed=0)
    sums = np.array([drop({IMAGE: torch.ones(2, 2, 2, 2)})[IMAGE].sum(dim=(1, 2, 3)).tolist() for _ in range(200)])
    assert (sums[:, 0] == 8).all()
    assert 70 < (sums[:, 1] == 0).sum() < 130


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        ([{"name": "t1"}, {"name": "T1"}], "share the name 't1'"),
        ([{"name": "t1", "display": True}, {"name": "t2", "display": True}], "t1, t2 are all display"),
        ([{"name": "t1", "optional": True}, {"name": "t2"}], "'t1' is shown and optional"),
    ],
)
def test_channels_that_contradict_each_other_are_refused(channels: list[dict[str, object]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_preset(channels=channels)
