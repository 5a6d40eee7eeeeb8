"""Which weights are used, and that new ones are noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lib.configs.preset import Preset
from lib.errors import CheckpointError, ModelNotReadyError
from lib.infers.model_cache import ModelCache
from lib.models.weights import LIVE_FILE, WeightsLocator, preset_for, read_live
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from lib.storage.files import sha256_of
from tests.tiny import tiny_preset

CPU = torch.device("cpu")


def _write(path: Path, preset: Preset | None = None, seed: int = 0, **info: str) -> Path:
    preset = preset or tiny_preset()
    torch.manual_seed(seed)
    write_checkpoint(path, Checkpoint(dict(build_unetr(preset).state_dict()), preset, info))
    return path


def _serve(folder: Path, version: object) -> None:
    (folder / LIVE_FILE).write_text(json.dumps({"version": version}), encoding="utf-8")


def test_locator_takes_the_live_version_then_pretrained_then_shipped(tmp_path: Path) -> None:
    folder, own = tmp_path / "model", tmp_path / "own.pt"
    for path in (folder / "v0001" / "weights.pt", folder / "v0002" / "weights.pt", folder / "shipped.pt", own):
        _write(path)
    found = []
    for version, pretrained in (("v0001", own), ("v0002", None), ("shipped", own), (None, own), (None, None)):
        (folder / LIVE_FILE).unlink(missing_ok=True)
        if version:
            _serve(folder, version)
        file = WeightsLocator(folder, str(pretrained) if pretrained else None).find()
        assert file is not None
        found.append((file.origin, file.version, file.path.relative_to(tmp_path).as_posix()))
    assert found == [
        ("published", "v0001", "model/v0001/weights.pt"),
        ("published", "v0002", "model/v0002/weights.pt"),
        ("shipped", "shipped", "model/shipped.pt"),
        ("pretrained", "pretrained", "own.pt"),
        ("shipped", "shipped", "model/shipped.pt"),
    ]


@pytest.mark.parametrize("version", ["../evil", "v1", 3, None, "v0001/../../x"])
def test_live_pointer_that_is_none_is_refused(tmp_path: Path, version: object) -> None:
    _serve(tmp_path, version)
    with pytest.raises(CheckpointError, match=r"live\.json names the version .*; valid: shipped, v0001"):
        read_live(tmp_path)


def _keep(folder: Path, name: str, seed: int = 0, **details: object) -> Path:
    """A version as training leaves it."""
    weights = _write(folder / name / "weights.pt", seed=seed, version=name)
    (folder / name / "version.json").write_text(
        json.dumps({"status": "published", "sha256": sha256_of(weights)} | details), encoding="utf-8"
    )
    return weights


def test_damaged_live_weights_are_replaced_by_their_parents_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path / "shipped.pt", version="shipped")
    _keep(tmp_path, "v0001", 1, parent="shipped")
    _keep(tmp_path, "v0002", 2, parent="v0001", status="rejected")
    live = _keep(tmp_path, "v0003", 3, parent="v0001")
    _serve(tmp_path, "v0003")
    locator = WeightsLocator(tmp_path)
    cache = ModelCache(tiny_preset(), locator, "fp32")
    assert (cache.get(CPU).version, locator.problem) == ("v0003", "")
    live.write_bytes(live.read_bytes()[:-1] + b"?")
    assert cache.get(CPU).describe() == {"preset": "tiny", "version": "v0001", "origin": "published"}
    assert locator.problem == "the weights of version 'v0003' are damaged: their SHA-256 is another one"
    cache.get(CPU)
    assert caplog.text.count(f"{locator.problem}; served instead: v0001") == 1
    (tmp_path / "v0001" / "weights.pt").unlink()
    assert cache.get(CPU).version == "shipped"
    assert locator.problem.endswith("; the weights of version 'v0001' are not there")
    _keep(tmp_path, "v0003", 3, parent="v0001")
    assert cache.get(CPU).version == "v0003"
    assert locator.problem == "", "it is whole again"


def test_damaged_weights_without_any_before_them_are_refused(tmp_path: Path) -> None:
    _keep(tmp_path, "v0001", parent="").write_bytes(b"half")
    _serve(tmp_path, "v0001")
    with pytest.raises(CheckpointError, match="version 'v0001' are damaged"):
        WeightsLocator(tmp_path).find()


def test_version_whose_record_is_damaged_too_is_followed_by_the_published_one_before(tmp_path: Path) -> None:
    _keep(tmp_path, "v0001", parent="")
    _keep(tmp_path, "v0002", status="rejected")
    _keep(tmp_path, "v0003", status="rejected")
    _serve(tmp_path, "v0003")
    (tmp_path / "v0003" / "version.json").write_text("{")
    locator = WeightsLocator(tmp_path)
    whole = locator.find()
    assert whole is not None and whole.version == "v0003", "its weights can still be read"
    (tmp_path / "v0003" / "weights.pt").write_bytes(b"half")
    found = locator.find()
    assert found is not None and found.version == "v0001"


def test_live_pointer_that_is_damaged_or_names_nothing_is_told_and_others_are_served(tmp_path: Path) -> None:
    _write(tmp_path / "shipped.pt")
    _serve(tmp_path, "v0007")
    locator = WeightsLocator(tmp_path)
    found = locator.find()
    assert found is not None and found.origin == "shipped"
    assert locator.problem == "the weights of version 'v0007' are not there"
    _keep(tmp_path, "v0001")
    (tmp_path / LIVE_FILE).write_text("{", encoding="utf-8")
    found = locator.find()
    assert found is not None and found.version == "v0001"
    assert "live.json cannot be used" in locator.problem
    assert locator.is_known()


def test_locator_of_an_empty_folder_knows_none(tmp_path: Path) -> None:
    locator = WeightsLocator(tmp_path / "none")
    assert locator.find() is None
    assert not locator.is_known()
    assert not (tmp_path / "none").exists(), "looking makes no folder"


def test_locator_with_missing_pretrained_weights_says_so_instead_of_taking_others(tmp_path: Path) -> None:
    _write(tmp_path / "shipped.pt")
    with pytest.raises(CheckpointError, match="--conf pretrained: there is no file"):
        WeightsLocator(tmp_path, str(tmp_path / "none.pt")).find()


def test_locator_downloads_an_address_once(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    source = (tmp_path / "served" / "x.pt").resolve()
    source.write_bytes(b"weights")
    calls = []

    def download(url: str, target: str, progress: bool) -> None:
        calls.append(url)
        Path(target).write_bytes(source.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "download_url_to_file", download)
        locator = WeightsLocator(tmp_path / "model", "https://host.example/x.pt?token=1")
        first, second = locator.find(), locator.find()
    assert first is not None and second is not None
    assert first.path == second.path
    assert first.path.parent == tmp_path / "model"
    assert first.path.read_bytes() == b"weights"
    assert calls == ["https://host.example/x.pt?token=1"]


def test_locator_with_an_address_that_cannot_be_reached_says_so(tmp_path: Path) -> None:
    locator = WeightsLocator(tmp_path, "http://127.0.0.1:1/x.pt")
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        locator.find()
    assert locator.is_known(), "known by its address; asking costs no download"


def test_cache_loads_once_and_again_when_the_pointer_moves(tmp_path: Path) -> None:
    cache = ModelCache(tiny_preset(), WeightsLocator(tmp_path), "fp32")
    _write(tmp_path / "shipped.pt", seed=1, version="shipped")
    first = cache.get(CPU)
    assert cache.get(CPU) is first
    assert first.describe() == {"preset": "tiny", "version": "shipped", "origin": "shipped"}
    for number in (1, 2):
        name = f"v{number:04d}"
        _write(tmp_path / name / "weights.pt", seed=number, version=name)
        assert cache.get(CPU).version != name, "it is there, but not live"
        _serve(tmp_path, name)
        assert cache.get(CPU).describe() == {"preset": "tiny", "version": name, "origin": "published"}
    _serve(tmp_path, "shipped")
    assert cache.get(CPU).origin == "shipped"


def test_cache_notices_that_a_file_of_ones_own_has_changed(tmp_path: Path) -> None:
    own = _write(tmp_path / "own.pt", seed=2, version="a")
    cache = ModelCache(tiny_preset(), WeightsLocator(tmp_path / "model", str(own)), "fp32")
    assert cache.get(CPU).version == "a"
    _write(own, seed=3, version="b")
    stamp = own.stat().st_mtime_ns + 1_000_000
    os.utime(own, ns=(stamp, stamp))
    assert cache.get(CPU).version == "b"


def test_cache_without_weights_says_what_to_do(tmp_path: Path) -> None:
    cache = ModelCache(tiny_preset(), WeightsLocator(tmp_path))
    with pytest.raises(ModelNotReadyError, match="'tiny' has no trained weights yet; train it"):
        cache.get(CPU)


def test_cache_with_a_damaged_file_says_so_and_serves_once_it_is_whole(tmp_path: Path) -> None:
    cache = ModelCache(tiny_preset(), WeightsLocator(tmp_path), "fp32")
    (tmp_path / "shipped.pt").write_bytes(b"half of a file")
    with pytest.raises(CheckpointError, match=r"'shipped\.pt' is damaged"):
        cache.get(CPU)
    _write(tmp_path / "shipped.pt")
    assert cache.get(CPU).origin == "shipped"


def test_cache_with_weights_of_another_network_names_the_keys(tmp_path: Path) -> None:
    torch.save(build_unetr(tiny_preset(roi_size=[32, 16, 16])).state_dict(), tmp_path / "own.pt")
    cache = ModelCache(tiny_preset(), WeightsLocator(tmp_path, str(tmp_path / "own.pt")))
    with pytest.raises(CheckpointError, match="position_embeddings"):
        cache.get(CPU)


def test_bare_weights_of_others_run_with_the_configured_preset(tmp_path: Path) -> None:
    torch.save({"state_dict": build_unetr(tiny_preset()).state_dict()}, tmp_path / "own.pt")
    model = ModelCache(tiny_preset(), WeightsLocator(tmp_path, str(tmp_path / "own.pt"))).get(CPU)
    assert model.preset == tiny_preset()
    assert (model.origin, model.version) == ("pretrained", "pretrained")


def test_preset_for_runs_weights_as_they_were_trained_and_serves_them_as_configured() -> None:
    trained = tiny_preset(name="old", spacing_mm=[2, 2, 2], inference={"overlap": 0.5})
    labels = [{"index": 1, "name": "Left Box", "color": [1, 2, 3]}, {"index": 2, "name": "core", "aliases": ["c"]}]
    configured = tiny_preset(
        labels=labels,
        roi_size=[32, 32, 32],
        intensity={"kind": "window", "lower": 0, "upper": 1},
        inference={"overlap": 0.1, "largest_component": True},
    )
    served = preset_for(Checkpoint({}, trained), configured)
    assert (served.spacing_mm, served.roi_size, served.intensity) == (
        trained.spacing_mm,
        trained.roi_size,
        trained.intensity,
    )
    assert served.name == "tiny"
    assert served.labels == configured.labels
    assert served.inference == configured.inference


@pytest.mark.parametrize(
    ("trained", "configured", "served"),
    [
        ({"core": 0.2, "Left Box": 0.5}, {"core": 0.03}, {"core": 0.2}),
        ({"core": 0.01}, {"core": 0.03}, {"core": 0.03}),
        ({}, {"core": 0.03}, {"core": 0.03}),
        ({"core": 0.2}, {}, {}),
    ],
)
def test_limits_of_certainty_are_never_stricter_than_the_weights_can_meet(
    trained: dict[str, float], configured: dict[str, float], served: dict[str, float]
) -> None:
    of_weights, wanted = (tiny_preset(inference={"component_entropy": given}) for given in (trained, configured))
    assert dict(preset_for(Checkpoint({}, of_weights), wanted).inference.component_entropy) == served


@pytest.mark.parametrize(
    "labels",
    [
        [{"index": 1, "name": "core"}, {"index": 2, "name": "Left Box"}],  # the same names in another order
        [{"index": 1, "name": "Left Box"}],
    ],
)
def test_preset_for_weights_of_other_labels_is_refused_with_both_lists(labels: list[dict[str, object]]) -> None:
    trained = Checkpoint({}, tiny_preset(labels=labels))
    with pytest.raises(
        CheckpointError, match=r"the weights segment \{.*\}, but 'tiny' has \{'Left Box': 1, 'core': 2\}"
    ):
        preset_for(trained, tiny_preset())
