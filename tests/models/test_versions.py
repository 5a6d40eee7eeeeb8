"""Versions: whole or absent, never changed, and a pointer that always names one that loads."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.errors import CheckpointError, NotFoundError, StorageError, TrainingError
from lib.infers.model_cache import ModelCache
from lib.models.versions import VersionStore, check_details
from lib.models.weights import WeightsLocator
from lib.networks.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from lib.storage.files import sha256_of
from lib.trainers.judging.champion import read_served
from tests.tiny import tiny_preset

PRESET = tiny_preset()


def _weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(build_unetr(PRESET).state_dict())


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    """A store with shipped weights."""
    folder = tmp_path / "tiny"
    write_checkpoint(folder / "shipped.pt", Checkpoint(_weights(0), PRESET, {"version": "shipped"}))
    (folder / "shipped.json").write_text(json.dumps({"sha256": sha256_of(folder / "shipped.pt")}), encoding="utf-8")
    return VersionStore(folder)


def _names(store: VersionStore) -> list[str]:
    return [version.name for version in store.list()]


def _publish(store: VersionStore, seed: int = 1, **details: Any) -> str:
    return store.publish(_weights(seed), PRESET, details).name


def _live(store: VersionStore) -> str:
    live = store.live()
    return live.name if live else ""


def test_published_version_is_kept_whole_and_served(store: VersionStore) -> None:
    details = {"parent": "shipped", "reason": "better", "dice": math.nan}
    version = store.publish(_weights(1), PRESET, details, {"report.html": lambda name: f"<p>é {name}"})
    assert (version.name, version.status, version.parent, version.number) == ("v0001", "published", "shipped", 1)
    assert _live(store) == "v0001"
    assert sorted(path.name for path in version.folder.iterdir()) == ["report.html", "version.json", "weights.pt"]
    said = json.loads((version.folder / "version.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert said == dict(version.details)
    assert (version.folder / "report.html").read_text(encoding="utf-8") == "<p>é v0001"
    assert (said["sha256"], said["dice"], said["labels"]) == (
        sha256_of(version.weights), None, {"Left Box": 1, "core": 2},
    )  # fmt: skip
    checkpoint = read_checkpoint(version.weights)
    assert (checkpoint.info["version"], checkpoint.preset) == ("v0001", PRESET)
    torch.testing.assert_close(checkpoint.model, _weights(1), rtol=0, atol=0)
    assert {path.stat().st_mode & 0o222 for path in version.folder.iterdir()} == {0}, "nobody writes to it again"


def test_rejected_version_is_kept_and_not_served(store: VersionStore) -> None:
    _publish(store)
    rejected = store.reject(_weights(2), PRESET, {"reason": "worse"})
    assert (rejected.name, rejected.status, _live(store)) == ("v0002", "rejected", "v0001")
    with pytest.raises(TrainingError, match="'v0002' was rejected and is not served, unless with rejected=true: worse"):
        store.rollback("v0002")
    assert _live(store) == "v0001"
    assert store.rollback("v0002", rejected=True).status == "rejected"
    assert _live(store) == "v0002", "somebody answers for it"


def test_rollback_serves_any_version_that_was_good(store: VersionStore) -> None:
    cache = ModelCache(PRESET, WeightsLocator(store.folder), "fp32")
    for seed in (1, 2, 3):
        _publish(store, seed)
    for name in ("v0001", "v0003", "shipped", "v0002"):
        assert store.rollback(name).name == name
        assert cache.get(torch.device("cpu")).version == name
    with pytest.raises(NotFoundError, match=r"no version 'v0009'; known: shipped, v0001, v0002, v0003"):
        store.rollback("v0009")
    with pytest.raises(NotFoundError):
        store.rollback("../../etc")


def test_rollback_to_damaged_weights_is_refused(store: VersionStore) -> None:
    _publish(store)
    _publish(store, 2)
    weights = store.folder / "v0001" / "weights.pt"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="'v0001' are damaged: their SHA-256 is another one"):
        store.rollback("v0001")
    assert _live(store) == "v0002"


RECORD = {"status": "published", "sha256": "x", "created": "2026-11-25T15:00:34+00:00"}
DAMAGED = {
    "held_out": [], "held_out_before": {"mean_dice": [2]}, "label_digests": {"case": 5}, "split": "x", "created": 5,
    "parent": 7,
}  # fmt: skip


def test_record_with_what_others_rely_on_is_taken_as_it_is() -> None:
    scores = {"mean_dice": 0.8, "dice": {"a": 1, "b": None}, "per_case": {"x": 0.5}, "cases": 3}
    details = RECORD | {"held_out": scores, "held_out_before": None, "label_digests": {}, "more": [1]}
    assert check_details(details) == details


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"status": 1}', '{"status": "published", "sha256": "x"}'),
        *(json.dumps(RECORD | {key: value}) for key, value in DAMAGED.items()),
        json.dumps(RECORD | {"created": "0001-01-01T00:00:00"}),
        json.dumps(RECORD | {"held_out": {"mean_dice": "0.9"}}),
        json.dumps(RECORD | {"held_out": {"mean_dice": 0.9, "dice": [1]}}),
        json.dumps(RECORD | {"held_out": {"mean_dice": 0.9, "dice": {"a": "x"}}}),
        json.dumps(RECORD | {"held_out": {"mean_dice": 0.9, "per_case": 7}}),
        json.dumps(RECORD)[:-1] + ', "held_out": {"mean_dice": 1e999}}',
        json.dumps(RECORD)[:-1] + ', "reason": "\\ud800"}',
        json.dumps(RECORD | {"split": {"train": 5}}),
        json.dumps(RECORD | {"never_learnt": 5}),
    ],
)
def test_version_whose_record_is_damaged_is_listed_as_damaged_beside_the_others(
    store: VersionStore, content: str
) -> None:
    _publish(store)
    _publish(store, 2, parent="v0001")
    record = store.folder / "v0002" / "version.json"
    record.chmod(0o644)
    record.write_text(content)
    assert [(v.name, v.status) for v in store.list()] == [
        ("shipped", "shipped"), ("v0001", "published"), ("v0002", "damaged"),
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"'v0002' is damaged and is not served: version\.json cannot be read"):
        store.rollback("v0002")
    assert store.prune(1) == ()
    assert _publish(store, 3) == "v0003"
    assert store.rollback("v0001").name == "v0001"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"held_out": 5}', '{"held_out": {"dice": []}}', '{"cross_validated": {"mean_dice": "x"}}']
)
def test_shipped_weights_whose_record_is_damaged_are_listed_as_damaged_and_served(
    store: VersionStore, content: str
) -> None:
    (store.folder / "shipped.json").write_text(content)
    _publish(store, parent="shipped")
    assert [(v.name, v.status) for v in store.list()] == [("shipped", "damaged"), ("v0001", "published")]
    assert "shipped.json cannot be read" in store.get("shipped").damage
    assert store.withdraw() == ""
    served = WeightsLocator(store.folder).find()
    assert served is not None and served.version == "shipped"
    assert read_served(WeightsLocator(store.folder), PRESET)[0] is not None


def test_withdrawing_serves_the_parent_and_ends_at_what_the_preset_starts_with(store: VersionStore) -> None:
    _publish(store, 1, parent="shipped")
    _publish(store, 2, parent="v0001")
    assert [store.withdraw(), store.withdraw()] == ["v0001", "shipped"]
    with pytest.raises(TrainingError, match="not published ones, and stay"):
        store.withdraw()
    _publish(store, 3, parent="pretrained")
    assert store.withdraw() == ""
    assert store.live() is None
    assert _names(store) == ["shipped", "v0001", "v0002", "v0003"], "nothing was removed"


def test_pruning_spares_the_live_version_its_parent_and_the_newest(store: VersionStore) -> None:
    for number in range(1, 7):
        _publish(store, number, parent=f"v{number - 1:04d}" if number > 1 else "shipped")
    for number in range(3):
        store.reject(_weights(10 + number), PRESET, {"reason": str(number)})
    store.rollback("v0003")
    assert store.prune(1) == ("v0001", "v0004", "v0005", "v0007", "v0008")
    assert _names(store) == ["shipped", "v0002", "v0003", "v0006", "v0009"]
    assert store.prune(1) == ()
    assert _publish(store) == "v0010", "no name is given twice"


def test_versions_sort_by_number_beyond_four_digits(store: VersionStore) -> None:
    _publish(store)
    (store.folder / "v0001").rename(store.folder / "v9999")
    assert _publish(store) == "v10000"
    assert _names(store) == ["shipped", "v9999", "v10000"]


def test_full_disk_leaves_the_live_version_and_no_left_over(
    store: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(store)

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        with pytest.raises(StorageError, match="the disk is full; make room"):
            _publish(store, 2)
    assert _live(store) == "v0001"
    assert sorted(path.name for path in store.folder.iterdir()) == ["live.json", "shipped.json", "shipped.pt", "v0001"]


def _publish_without_end(folder: Path) -> None:
    store, seed = VersionStore(folder), 0
    while True:
        seed += 1
        _publish(store, seed, parent=_live(store))
        store.prune(2)


def test_publisher_killed_at_any_moment_leaves_a_live_version_that_loads(store: VersionStore) -> None:
    context = multiprocessing.get_context("fork")
    cache = ModelCache(PRESET, WeightsLocator(store.folder), "fp32")
    _publish(store)
    for turn in range(12):
        process = context.Process(target=_publish_without_end, args=(store.folder,), daemon=True)
        process.start()
        deadline = time.monotonic() + 0.15 + 0.017 * turn
        while time.monotonic() < deadline:
            cache.get(torch.device("cpu"))  # a reader beside the writer never sees half a file
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        live = store.live()
        assert live is not None
        assert sha256_of(live.weights) == live.details["sha256"]
        assert cache.get(torch.device("cpu")).version == live.name
    _publish(store)
    assert not list(store.folder.glob(".staging-*")), "what was left over is cleared by the next one"
