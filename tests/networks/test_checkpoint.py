"""Checkpoints: whole or not at all, data and never code, and an error that names the keys."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.errors import CheckpointError, StorageError
from lib.networks.checkpoint import Checkpoint, load_weights, read_checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from lib.storage.files import sha256_of
from tests.tiny import preset_data, tiny_preset


class _Malicious:
    """What a pickle can do: run a command when it is read."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._target),)


def _state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(build_unetr(tiny_preset()).state_dict())


def test_round_trip_gives_back_weights_preset_and_info(tmp_path: Path) -> None:
    state, preset = _state(), tiny_preset(mirror_axes=[2])
    info = {"version": "published-3", "mean_dice": 0.87, "dice": {"a": 0.9, "b": None}, "cases": [1, 2]}
    write_checkpoint(tmp_path / "new" / "model.pt", Checkpoint(state, preset, info))
    found = read_checkpoint(tmp_path / "new" / "model.pt")
    assert found.preset == preset
    assert found.info == info
    assert list(found.model) == list(state)
    for key, value in state.items():
        torch.testing.assert_close(found.model[key], value, rtol=0, atol=0)


def test_half_precision_file_is_half_as_large_and_loads_to_three_digits(tmp_path: Path) -> None:
    state, preset = _state(), tiny_preset()
    write_checkpoint(tmp_path / "whole.pt", Checkpoint(state, preset))
    write_checkpoint(tmp_path / "half.pt", Checkpoint(state, preset), half=True)
    ratio = (tmp_path / "half.pt").stat().st_size / (tmp_path / "whole.pt").stat().st_size
    assert 0.45 < ratio < 0.65
    found = read_checkpoint(tmp_path / "half.pt").model
    assert {value.dtype for value in found.values()} == {torch.float16}
    network = build_unetr(preset)
    load_weights(network, found)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-3, atol=1e-6)


def test_half_precision_leaves_whole_numbers_as_they_are(tmp_path: Path) -> None:
    state = {"norm.num_batches_tracked": torch.tensor(70_000)}
    write_checkpoint(tmp_path / "x.pt", Checkpoint(state, tiny_preset()), half=True)
    assert read_checkpoint(tmp_path / "x.pt").model["norm.num_batches_tracked"].item() == 70_000


def test_write_without_a_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give the preset"):
        write_checkpoint(tmp_path / "x.pt", Checkpoint(_state()))
    assert not list(tmp_path.iterdir())


def test_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model.pt"
    write_checkpoint(target, Checkpoint(_state(), tiny_preset(), {"version": "old"}))
    before = target.read_bytes()

    def disk_full(data: object, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(StorageError, match="the disk is full; make room"):
        write_checkpoint(target, Checkpoint(_state(), tiny_preset(), {"version": "new"}))
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"model": {"a": torch.ones(1)}, "info": bad}])
def test_pickle_with_code_is_refused_and_never_run(tmp_path: Path, wrap: Any) -> None:
    proof = tmp_path / "code-was-run"
    torch.save(wrap(_Malicious(proof)), tmp_path / "zip.pt")
    torch.save(wrap(_Malicious(proof)), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(wrap(_Malicious(proof))))
    for name in ("zip.pt", "old.pt", "bare.pt"):
        with pytest.raises(CheckpointError, match=name) as refused:
            read_checkpoint(tmp_path / name)
        assert "weights_only=" not in str(refused.value), "nobody is advised to switch the check off"
    assert not proof.exists()


def test_pickle_with_code_is_refused_with_the_codes_name(tmp_path: Path) -> None:
    torch.save(_Malicious(tmp_path / "x"), tmp_path / "bad.pt")
    with pytest.raises(
        CheckpointError, match=r"holds code \(posix.mkdir|nt.mkdir\), which is never run; valid: tensors"
    ):
        read_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize("old_format", [False, True])
def test_damaged_file_is_a_checkpoint_error_wherever_it_is_cut(tmp_path: Path, old_format: bool) -> None:
    path = tmp_path / "model.pt"
    content = {"a": torch.ones(10), "b": torch.ones(4)}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"'model.pt'"):
            read_checkpoint(path)


def test_packed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(50_000_000, dtype=torch.uint8)}, tmp_path / "whole.pt")
    packed = zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, packed as bomb:
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry.filename))
    assert (tmp_path / "bomb.pt").stat().st_size < 200_000
    with pytest.raises(CheckpointError, match=r"'bomb\.pt' is a packed archive"):
        read_checkpoint(tmp_path / "bomb.pt")
    assert read_checkpoint(tmp_path / "whole.pt").model["a"].shape == (50_000_000,)


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], {}, {"model": {}}, {"a": 1}, {"state_dict": {"a": "b"}}])
def test_file_without_weights_says_where_they_may_be(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"'x.pt' holds no weights; valid: a state dict, bare or as model"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net", "network", None])
def test_weights_are_found_bare_or_under_a_usual_key(tmp_path: Path, key: str | None) -> None:
    state = {"a": torch.ones(2)}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt").model["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (preset_data(roi_size=[16, 16, 15]), "preset in checkpoint 'x.pt' cannot be used: .*'roi_size'"),
        (preset_data(from_the_future=1), "unknown key 'from_the_future'"),
        (None, "preset in checkpoint 'x.pt' cannot be used"),
    ],
)
def test_checkpoint_with_a_bad_preset_is_refused_in_words(tmp_path: Path, preset: object, message: str) -> None:
    torch.save({"format": "unetr_radiology/1", "preset": preset, "model": {"a": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "x.pt")


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'none.pt' cannot be read: No such file"):
        read_checkpoint(tmp_path / "none.pt")


def test_weights_of_another_network_are_refused_with_the_keys() -> None:
    state = _state()
    state["extra.weight"] = state.pop("out.conv.conv.bias")
    state["vit.norm.weight"] = torch.ones(96)
    with pytest.raises(CheckpointError) as refused:
        load_weights(build_unetr(tiny_preset()), state)
    assert str(refused.value) == (
        "the weights do not fit the network: 1 missing: out.conv.conv.bias; 1 left over: extra.weight; "
        "1 of another shape: vit.norm.weight (96,) instead of (48,)"
    )


def test_weights_of_a_larger_network_name_a_few_keys_and_count_the_rest() -> None:
    other = tiny_preset(network={"feature_size": 8, "hidden_size": 96, "mlp_dim": 64, "num_heads": 4})
    with pytest.raises(CheckpointError, match=r"\d+ of another shape: .* and \d+ more"):
        load_weights(build_unetr(tiny_preset()), build_unetr(other).state_dict())


def test_weights_that_do_not_fit_change_nothing() -> None:
    network = build_unetr(tiny_preset())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = {key: torch.zeros_like(value) for key, value in before.items()}
    del state["out.conv.conv.bias"]
    with pytest.raises(CheckpointError):
        load_weights(network, state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "x").write_bytes(content)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(content).hexdigest()
