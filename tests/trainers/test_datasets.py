"""Datasets of every kind give the same cases, within their bounds, and notice a new label."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, PersistentDataset, SmartCacheDataset
from monai.transforms import Compose

from lib.cases.labelled import Case, read_case
from lib.configs.preset import Preset
from lib.errors import ParameterError
from lib.trainers import datasets
from lib.trainers.datasets import (
    DATASET_KINDS,
    LOADER_KINDS,
    SeededItems,
    build_crops,
    build_dataset,
    build_loader,
)
from lib.trainers.parallel import ResumableSampler
from lib.transforms.augment import build_changes, build_cropping
from lib.transforms.preprocess import IMAGE, LABEL, preprocess_volume
from lib.transforms.volume import Volume, read_volume
from tests.tiny import boxes, preset_data, tiny_preset, write_nifti

MakeCases = Callable[..., tuple[Case, ...]]


class CountingReader:
    """Reads cases, and keeps their ids in order."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def __call__(self, case: Case, preset: Preset) -> tuple[Volume, np.ndarray]:
        self.ids.append(case.case_id)
        return read_case(case, preset)


@pytest.mark.parametrize("kind", DATASET_KINDS)
def test_dataset_of_every_kind_gives_what_inference_sees(make_cases: MakeCases, tmp_path: Path, kind: str) -> None:
    cases, preset = make_cases(3), tiny_preset(spacing_mm=[1.2, 0.9, 1.0])
    dataset = build_dataset(cases, preset, kind, tmp_path / "cache", cache_bytes=10**6)
    for case, item in zip(cases, dataset, strict=True):
        expected = preprocess_volume(read_volume(case.image), preset).as_tensor()
        torch.testing.assert_close(item[IMAGE], expected, rtol=0, atol=0)
        assert (item[IMAGE].dtype, item[LABEL].dtype) == (torch.float32, torch.uint8)
        assert item[LABEL].unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", DATASET_KINDS)
def test_dataset_for_training_draws_new_crops_each_time(make_cases: MakeCases, tmp_path: Path, kind: str) -> None:
    dataset = build_crops(make_cases(1, (40, 40, 40)), tiny_preset(), kind, tmp_path, 3)
    first = dataset[0]
    dataset.epoch += 1
    second = dataset[0]
    assert [tuple(crop[IMAGE].shape) for crop in first] == [(1, 16, 16, 16)] * 3
    assert not torch.equal(first[0][IMAGE], second[0][IMAGE])


def test_persistent_dataset_reads_a_case_once(make_cases: MakeCases, tmp_path: Path) -> None:
    cases, read = make_cases(2), CountingReader()
    for _ in range(2):  # another run finds what this one left
        dataset = build_dataset(cases, tiny_preset(), "PersistentDataset", tmp_path / "cache", read=read)
        _ = [dataset[i] for i in (0, 1, 0, 1)]
    assert sorted(read.ids) == ["case_001", "case_002"]


def test_persistent_dataset_notices_a_changed_label(make_cases: MakeCases, tmp_path: Path) -> None:
    (case,) = make_cases(1)

    def voxels() -> int:
        dataset = build_dataset([case], tiny_preset(), "PersistentDataset", tmp_path / "cache")
        return int((dataset[0][LABEL] > 0).sum())

    assert voxels() == 1000
    corrected = boxes(seed=1)[1]
    corrected[0] = 1
    write_nifti(case.label, corrected)
    assert voxels() == int((corrected > 0).sum())


def test_persistent_dataset_mends_a_broken_file(make_cases: MakeCases, tmp_path: Path) -> None:
    read = CountingReader()
    dataset = build_dataset(make_cases(1), tiny_preset(), "PersistentDataset", tmp_path / "cache", read=read)
    whole = dataset[0][IMAGE].clone()
    (file,) = (tmp_path / "cache").rglob("*.pt")
    file.write_bytes(b"not a case")
    with pytest.warns(UserWarning, match="Corrupt cache file"):
        torch.testing.assert_close(dataset[0][IMAGE], whole, rtol=0, atol=0)
    torch.testing.assert_close(dataset[0][IMAGE], whole, rtol=0, atol=0)
    assert len(read.ids) == 2


def test_persistent_dataset_of_another_spacing_has_a_cache_of_its_own(make_cases: MakeCases, tmp_path: Path) -> None:
    cases = make_cases(1)
    first = build_dataset(cases, tiny_preset(), "PersistentDataset", tmp_path)[0]
    second = build_dataset(cases, tiny_preset(spacing_mm=[0.5, 1, 1]), "PersistentDataset", tmp_path)[0]
    assert second[IMAGE].shape[1] > first[IMAGE].shape[1]


def test_persistent_dataset_leaves_a_full_disk_alone(
    make_cases: MakeCases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 2))
    read = CountingReader()
    dataset = build_dataset(make_cases(3), tiny_preset(), "PersistentDataset", tmp_path / "cache", read=read)
    seen = [float(dataset[i][IMAGE].sum()) for i in (0, 1, 2, 0, 1, 2)]
    assert seen[:3] == seen[3:]
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 1, "one case fits, and then no more"
    assert read.ids.count("case_001") == 1
    assert read.ids.count("case_002") == read.ids.count("case_003") == 2


def _memory_for(cases: int) -> int:
    """As many bytes as caching this many tiny cases of 20x18x16 takes, and half a case more."""
    return int((cases + 0.5) * 20 * 18 * 16 * (4 + 1))


def test_cache_dataset_keeps_as_many_cases_as_fit(make_cases: MakeCases, tmp_path: Path) -> None:
    read = CountingReader()
    dataset = build_dataset(make_cases(4), tiny_preset(), "CacheDataset", tmp_path, _memory_for(2), read)
    assert isinstance(dataset, CacheDataset)
    assert dataset.cache_num == 2
    read.ids.clear()
    _ = [dataset[i] for i in range(4)]
    assert read.ids == ["case_003", "case_004"], "the two that are kept are not read again"


def test_cache_of_another_format_is_not_read(
    make_cases: MakeCases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cases lack entries that a batch needs."""
    read, cases = CountingReader(), make_cases(1)
    with monkeypatch.context() as before:
        before.setattr(datasets, "ITEM_FORMAT", datasets.ITEM_FORMAT - 1)
        build_dataset(cases, tiny_preset(), "PersistentDataset", tmp_path, read=read)[0]
    for _ in range(2):
        build_dataset(cases, tiny_preset(), "PersistentDataset", tmp_path, read=read)[0]
    assert read.ids == ["case_001"] * 2


@pytest.mark.parametrize("kind", ["CacheDataset", "PersistentDataset"])
def test_case_in_the_cache_stays_as_it_is_whatever_is_drawn_from_it(
    make_cases: MakeCases, tmp_path: Path, kind: str
) -> None:
    chances = {f"{kind}_probability": 1 for kind in ("spatial", "elastic", "blur", "gamma", "intensity", "noise")}
    sizes = {"rotation_degrees": 10, "intensity_scale": 0.2, "intensity_shift": 0.2, "noise_std": 0.1}
    training = preset_data()["training"] | {"augmentation": chances | sizes}
    preset = tiny_preset(mirror_axes=[0], training=training)
    dataset = build_crops(make_cases(1, (16, 16, 16)), preset, kind, tmp_path, 2, _memory_for(2))
    before = {key: dataset.items[0][key].clone() for key in (IMAGE, LABEL)}
    for dataset.epoch in range(4):
        assert not torch.equal(dataset[0][0][IMAGE], before[IMAGE])
    for key, kept in before.items():
        torch.testing.assert_close(dataset.items[0][key], kept, rtol=0, atol=0)


def _changing_preset() -> Preset:
    chances = {f"{kind}_probability": 0.5 for kind in ("spatial", "elastic", "blur", "gamma", "intensity", "noise")}
    sizes = {"rotation_degrees": 10, "intensity_scale": 0.2, "intensity_shift": 0.2, "noise_std": 0.1}
    training = preset_data()["training"] | {"augmentation": chances | sizes}
    return tiny_preset(mirror_axes=[0, 1, 2], training=training)


def _batch(dataset: SeededItems) -> dict[str, torch.Tensor]:
    (batch,) = build_loader(dataset, "DataLoader", 2)
    return batch


def test_crops_changed_on_the_device_are_those_that_a_thread_would_have_changed(
    make_cases: MakeCases, tmp_path: Path
) -> None:
    cases, preset = make_cases(2, (30, 30, 30)), _changing_preset()
    at_once, later = (
        build_crops(cases, preset, "PersistentDataset", tmp_path, 4, changed_later=later) for later in (False, True)
    )
    plain, changed = _batch(later), later.change(_batch(later), torch.device("cpu"))
    for number, key in enumerate((IMAGE, LABEL)):
        torch.testing.assert_close(changed[number], _batch(at_once)[key], rtol=0, atol=0)
        assert not torch.equal(changed[number], plain[key])
    assert torch.equal(at_once.change(_batch(at_once), torch.device("cpu"))[0], changed[0]), "and not twice"
    assert changed[0].shape == (8, 1, 16, 16, 16) and changed[1].dtype == torch.uint8


class RunningOut(Compose):
    """Changes to crops, for the first of which there is no memory."""

    tried = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.tried += 1
        if self.tried == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(*arguments, **options)


def test_crops_are_changed_on_the_host_where_the_device_has_no_memory(make_cases: MakeCases, tmp_path: Path) -> None:
    preset = _changing_preset()
    crops = build_crops(make_cases(1, (30, 30, 30)), preset, "Dataset", tmp_path, 2, changed_later=True)
    (batch,) = build_loader(crops, "DataLoader", 1)
    expected, changes = crops.change(batch, torch.device("cpu")), RunningOut(build_changes(preset).transforms)
    full = SeededItems(crops.items, build_cropping(preset, 2), changes, preset.training.seed, changed_later=True)
    torch.testing.assert_close(full.change(batch, torch.device("cpu")), expected, rtol=0, atol=0)
    assert changes.tried == 3, "two crops, the first of them twice"


@pytest.mark.gpu
def test_crops_changed_on_a_gpu_are_those_of_the_cpu(make_cases: MakeCases, tmp_path: Path) -> None:
    preset = _changing_preset()
    silent = preset.training.augmentation.model_copy(update={"noise_probability": 0})  # drawn by the device
    preset = preset.model_copy(update={"training": preset.training.model_copy(update={"augmentation": silent})})
    crops = build_crops(make_cases(2, (30, 30, 30)), preset, "Dataset", tmp_path, 8, changed_later=True)
    batch = _batch(crops)
    here, there = (crops.change(batch, torch.device(device)) for device in ("cpu", "cuda"))
    assert there[0].device.type == there[1].device.type == "cuda"
    torch.testing.assert_close(there[0].cpu(), here[0], rtol=1e-3, atol=1e-3)
    assert (there[1].cpu() != here[1]).float().mean() < 1e-3, "but for ties"


def test_smart_cache_dataset_comes_round_to_every_case(make_cases: MakeCases, tmp_path: Path) -> None:
    read = CountingReader()
    dataset = build_dataset(make_cases(4), tiny_preset(), "SmartCacheDataset", tmp_path, _memory_for(2), read)
    assert isinstance(dataset, SmartCacheDataset)
    assert len(dataset) == 2
    dataset.start()
    for _ in range(4):
        dataset.update_cache()
    dataset.shutdown()
    assert set(read.ids) == {f"case_{i:03d}" for i in range(1, 5)}


def test_smart_cache_dataset_that_holds_everything_is_a_plain_cache(make_cases: MakeCases, tmp_path: Path) -> None:
    dataset = build_dataset(make_cases(2), tiny_preset(), "SmartCacheDataset", tmp_path, _memory_for(2))
    assert isinstance(dataset, CacheDataset)
    assert not isinstance(dataset, SmartCacheDataset)


def test_unknown_kinds_are_refused_with_the_known(make_cases: MakeCases, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="'dataset' is 'Zip'; valid: PersistentDataset, CacheDataset"):
        build_dataset(make_cases(1), tiny_preset(), "Zip", tmp_path)
    dataset = build_dataset(make_cases(1), tiny_preset(), "Dataset", tmp_path)
    with pytest.raises(ParameterError, match="'dataloader' is 'Fast'; valid: ThreadDataLoader, DataLoader"):
        build_loader(dataset, "Fast", 1)


@pytest.mark.parametrize("kind", LOADER_KINDS)
def test_loader_gives_the_same_batches_for_the_same_seed(make_cases: MakeCases, tmp_path: Path, kind: str) -> None:
    cases = make_cases(4, (24, 24, 24))

    changing = {"spatial_probability": 1, "rotation_degrees": 10, "noise_probability": 1, "elastic_probability": 0.5}

    def epochs(seed: int, order: tuple[int, ...] = (1, 2), threads: int = 1) -> dict[int, torch.Tensor]:
        preset = tiny_preset(training=preset_data()["training"] | {"seed": seed, "augmentation": changing})
        dataset = build_crops(cases, preset, "PersistentDataset", tmp_path, 2)
        sampler = ResumableSampler(dataset, seed)
        loader, drawn = build_loader(dataset, kind, 2, sampler, threads), {}
        for dataset.epoch in order:
            sampler.begin(dataset.epoch)
            drawn[dataset.epoch] = torch.cat([batch[IMAGE] for batch in loader])
        return drawn

    first = epochs(3)
    assert first[1].shape == (8, 1, 16, 16, 16)
    torch.testing.assert_close(epochs(3, threads=3), first, rtol=0, atol=0)
    assert not torch.equal(first[1], first[2])
    assert not torch.equal(epochs(4)[1], first[1])
    torch.testing.assert_close(epochs(3, (2,))[2], first[2], rtol=0, atol=0, msg="whatever was drawn before")


def test_sampler_begins_in_the_middle_of_an_epoch() -> None:
    sampler = ResumableSampler(list(range(7)), seed=5)  # type: ignore[arg-type]
    sampler.begin(2)
    whole = list(sampler)
    assert sorted(whole) == list(range(7))
    sampler.begin(2, skipped=4)
    assert list(sampler) == whole[4:]
    sampler.begin(3)
    assert list(sampler) != whole


def test_persistent_dataset_is_a_persistent_dataset(make_cases: MakeCases, tmp_path: Path) -> None:
    dataset = build_dataset(make_cases(1), tiny_preset(), "PersistentDataset", tmp_path)
    assert isinstance(dataset, PersistentDataset)
    assert np.isfinite(dataset[0][IMAGE].numpy()).all()
