"""Segmenting a folder: what is found, skipped, reported and kept."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_series import SeriesIdentity, write_series
from pydicom import dcmread

from lib.cluster.cli import main
from lib.cluster.engine import LocalEngine, Recipe
from lib.cluster.model import Model, ModelFile
from lib.cluster.results import CaseResult, ResultFolder, measure_ml
from lib.cluster.source import Fetched, FolderSource, Shard, find_images
from lib.cluster.worker import Case, Outcome, SegmentingWorker, segment_cases
from lib.configs.catalogue import write_preset
from lib.errors import ConfigError, UpstreamError
from lib.infers.segmenter import Segmenter
from lib.models.weights import WeightsLocator
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from lib.transforms.volume import read_volume
from tests.tiny import boxes, tiny_preset, write_nifti

PRESET = tiny_preset()
WEIGHTS = ("tiny", "a" * 64)


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_unetr(PRESET)


@pytest.fixture
def model() -> Model:
    return Model(Segmenter(_network(), PRESET, torch.device("cpu"), "fp32"), "tiny", "shipped", WEIGHTS[1])


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    for seed in (1, 2):
        write_nifti(tmp_path / "studies" / f"case{seed}.nii.gz", boxes(seed=seed)[0])
    return tmp_path / "studies"


def _run(studies: Path, model: Model, results: ResultFolder, **options: Any) -> Outcome:
    source = FolderSource(studies)
    recipe = Recipe(model.weights_sha256, lambda device: SegmentingWorker(source, model))
    weights = (model.name, model.weights_sha256)
    return segment_cases(source.cases(), results, LocalEngine(["cpu"]), lambda: recipe, weights, **options)


def test_masks_are_those_of_the_segmenter(studies: Path, tmp_path: Path, model: Model) -> None:
    outcome = _run(studies, model, ResultFolder(tmp_path / "out"))
    assert sorted(outcome.done) == ["case1", "case2"] and not outcome.failed
    for case, result in outcome.done.items():
        volume = read_volume(studies / f"{case}.nii.gz")
        expected = model.segmenter.segment(volume).labels
        kept = nib.load(tmp_path / "out" / result.mask)
        assert np.array_equal(np.asarray(kept.dataobj), expected)
        assert np.allclose(kept.affine, volume.affine_ras)
        assert result.volumes_ml == measure_ml(expected, volume.affine_ras, PRESET)
        assert (result.version, result.engine) == ("shipped", "pytorch")


def test_finished_cases_are_skipped_until_image_or_weights_change(studies: Path, tmp_path: Path, model: Model) -> None:
    results = ResultFolder(tmp_path / "out")
    _run(studies, model, results)
    assert sorted(_run(studies, model, results).skipped) == ["case1", "case2"]
    write_nifti(studies / "case2.nii.gz", boxes(seed=5)[0])
    assert list(_run(studies, model, results).done) == ["case2"]
    other = Model(model.segmenter, "tiny", "v0001", "b" * 64)
    again = _run(studies, other, results)
    assert {result.version for result in again.done.values()} == {"v0001"} and len(again.done) == 2


def test_case_whose_mask_is_gone_is_computed_again(studies: Path, tmp_path: Path, model: Model) -> None:
    results = ResultFolder(tmp_path / "out")
    _run(studies, model, results)
    (tmp_path / "out" / "case1.nii.gz").unlink()
    assert list(_run(studies, model, results).done) == ["case1"]


def test_broken_case_is_reported_and_the_others_go_on(studies: Path, tmp_path: Path, model: Model) -> None:
    (studies / "case0.nii.gz").write_bytes(b"no image")
    seen: list[str] = []
    outcome = _run(studies, model, ResultFolder(tmp_path / "out"), on_case=seen.append)
    assert list(outcome.failed) == ["case0"] and "case0" in outcome.failed["case0"]
    assert sorted(outcome.done) == ["case1", "case2"] and seen == ["case0", "case1", "case2"]
    assert not (tmp_path / "out" / "case0.nii.gz").exists()


def test_mask_that_was_not_taken_is_sent_by_the_next_run_and_only_then(
    studies: Path, tmp_path: Path, model: Model
) -> None:
    results, sent = ResultFolder(tmp_path / "out"), []

    def send(result: CaseResult, mask: Path) -> str:
        if result.sent_to == "the server":
            return result.sent_to
        sent.append(result.case)
        if result.case == "case1" and sent.count("case1") == 1:
            raise UpstreamError("the server is away")
        assert mask.read_bytes()
        return "the server"

    first = _run(studies, model, results, send=send)
    assert list(first.done) == ["case2"] and "the server is away" in first.failed["case1"]
    second = _run(studies, model, results, send=send)
    assert sorted(second.skipped) == ["case1", "case2"] and not second.failed
    assert sorted(_run(studies, model, results, send=send).skipped) == ["case1", "case2"]
    assert sent == ["case1", "case2", "case1"]


def test_server_that_is_away_for_a_moment_costs_no_case(tmp_path: Path, model: Model, studies: Path) -> None:
    class Away(FolderSource):
        failures = 2

        def fetch(self, case: str, folder: Path) -> Fetched:
            if self.failures:
                self.failures -= 1
                raise UpstreamError("the server does not answer")
            return super().fetch(case, folder)

    source = Away(studies)
    assert SegmentingWorker(source, model, (0.0, 0.0)).read(Case("case1")).case == "case1"
    source.failures = 2
    with pytest.raises(UpstreamError):
        SegmentingWorker(source, model, (0.0,)).read(Case("case1"))


def test_weights_that_travel_as_bytes_are_the_same_model(tmp_path: Path, model: Model, studies: Path) -> None:
    folder = tmp_path / "model" / "tiny"
    folder.mkdir(parents=True)
    write_checkpoint(folder / "shipped.pt", Checkpoint(_network().state_dict(), PRESET, {}))
    packed = ModelFile.find(PRESET, WeightsLocator(folder), compiles=False, precision="fp32").packed()
    (folder / "shipped.pt").unlink()
    loaded = pickle.loads(pickle.dumps(packed)).load("cpu")
    volume = read_volume(studies / "case1.nii.gz")
    assert np.array_equal(loaded.segmenter.segment(volume).labels, model.segmenter.segment(volume).labels)
    assert loaded.weights_sha256 == packed.sha256 and loaded.version == "shipped"


def test_shards_hold_each_case_once() -> None:
    names = [f"case{number}" for number in range(400)]
    shards = [[name for name in names if name in Shard(number, 8)] for number in range(1, 9)]
    assert sorted(name for shard in shards for name in shard) == sorted(names)
    assert min(map(len, shards)) > 25


@pytest.mark.parametrize("text", ["0/8", "9/8", "2", "a/b", "1/0", "-1/8", ""])
def test_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="K from 1 to N"):
        Shard.parse(text)


def test_volume_is_in_millilitres() -> None:
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[:2] = 1
    assert measure_ml(labels, np.diag([2.0, -5.0, 10.0, 1.0]), PRESET) == {"Left Box": 3.2, "core": 0.0}


def test_two_images_of_one_id_are_broken_and_the_others_remain(studies: Path) -> None:
    write_nifti(studies / "case1.nii", boxes()[0])
    found = find_images(studies)
    assert list(found.images) == ["case2"]
    assert found.broken == {
        "case1.nii": "'case1.nii.gz' would have the same id 'case1'; rename one of them",
        "case1.nii.gz": "'case1.nii' would have the same id 'case1'; rename one of them",
    }


def _write_dicom(folder: Path, modality: str = "CT") -> None:
    write_series(folder, boxes()[0].astype(np.int16), np.eye(4), SeriesIdentity("SYNTH-1", modality, "series"))


def test_only_folders_that_hold_dicom_images_are_cases(studies: Path, caplog: pytest.LogCaptureFixture) -> None:
    (studies / "references").mkdir()
    write_nifti(studies / "references" / "case1.nii.gz", boxes()[0])
    for name in ("dicom/P1/series", "dicom/P2/series", "plain", "labels/series"):
        _write_dicom(studies / name)
    (studies / "dicom" / "P1" / "loop").symlink_to(studies / "dicom")
    _write_dicom(studies / "plain" / "nested")
    found = find_images(studies)
    assert sorted(found.images) == ["case1", "case2", "dicom_P1_series", "dicom_P2_series", "plain", "plain_nested"]
    assert found.left_out == ["references"] and not found.broken
    assert [record.getMessage() for record in caplog.records] == ["left out, without a DICOM image: references/"]
    assert read_volume(found.images["dicom_P1_series"]).voxels.shape == boxes()[0].shape


def test_folder_of_dicom_segmentations_and__no_case(studies: Path) -> None:
    _write_dicom(studies / "segmentations")
    for file in (studies / "segmentations").iterdir():
        instance = dcmread(file)
        instance.Modality = "SEG"
        instance.save_as(file)
    assert sorted(find_images(studies).images) == ["case1", "case2"]


def test_command_writes_a_summary_and_says_by_its_code_how_it_went(
    studies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_preset(tmp_path / "tiny.yaml", PRESET)
    (tmp_path / "model" / "tiny").mkdir(parents=True)
    write_checkpoint(tmp_path / "model" / "tiny" / "shipped.pt", Checkpoint(_network().state_dict(), PRESET, {}))
    places = ["--model-dir", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--devices", "cpu,cpu"]
    command = ["--studies", str(studies), "--model", str(tmp_path / "tiny.yaml"), *places]
    assert main(command) == 0
    command += ["--engine", "pytorch"]  # there is nothing left to compute
    (studies / "references").mkdir()
    assert main(command) == 0
    (studies / "bad.nii.gz").write_bytes(b"no image")
    for suffix in (".nii", ".nii.gz"):
        write_nifti(studies / f"twice{suffix}", boxes()[0])
    assert main(command) == 1
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (found["finished_now"], found["finished_before"]) == (0, 2)
    assert sorted(found["failed"]) == ["bad", "twice.nii", "twice.nii.gz"]
    assert "0 finished, 2 finished before, 3 failed" in capsys.readouterr().out
    assert main([*command, "--shard", "3/2"]) == 2
    assert main([*command, "--save-labels", "original"]) == 2
    assert main([*command, "--devices", "cuda:7"]) == 2
    assert main(["--studies", "http://anna:secret@127.0.0.1/dicom", *command[2:]]) == 2
    assert main(["--studies", "ftp://127.0.0.1/dicom", *command[2:]]) == 2
    told = capsys.readouterr().err
    assert "secret" not in told and "to a running server" in told and "valid: a folder, or an address" in told


def test_what_cannot_be_a_case_is_reported_and_the_others_remain(studies: Path) -> None:
    os.mkfifo(studies / "pipe.nii.gz")
    (studies / "nowhere.nii.gz").symlink_to(studies / "none")
    (studies / "itself.nii.gz").symlink_to(studies / "itself.nii.gz")
    image = (studies / "case1.nii.gz").read_bytes()
    for name in ("Müller Größe.nii.gz", "two\nlines.nii.gz", f"{'n' * 220}.nii.gz"):
        (studies / name).write_bytes(image)
    (studies / os.fsdecode(b"\xff.nii.gz")).write_bytes(image)
    found = find_images(studies)
    assert sorted(found.images) == ["Müller Größe", "case1", "case2"]
    no_files = [name for name, reason in found.broken.items() if reason.startswith("it is no file")]
    assert sorted(no_files) == ["itself.nii.gz", "nowhere.nii.gz", "pipe.nii.gz"]
    assert found.broken["two\nlines.nii.gz"].endswith("such as a line break; rename it")
    assert found.broken[f"{'n' * 220}.nii.gz"] == "its name is longer than 200 bytes; rename it"
    assert found.broken["\\udcff.nii.gz"] == "its name is not UTF-8; rename it"


def test_masks_are_never_written_over_the_images(
    studies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(studies)
    before = {path.name: path.read_bytes() for path in studies.iterdir()}
    for out in (studies, tmp_path / "link", studies / ".." / "studies"):
        assert main(["--studies", str(studies), "--model", "hippocampus_mr", "--out", str(out)]) == 2
        assert "is the folder of the images" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in studies.iterdir()} == before


@pytest.mark.parametrize("threads", ["0", "-2", "many", "1e3"])
def test_number_of_threads_that_is_none_is_refused(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--studies", "s", "--model", "m", "--out", "o", f"--threads={threads}"])
    assert "valid: a number from 1 to 1024" in capsys.readouterr().err


def test_half_written_masks_of_a_worker_that_was_killed_go_and_those_of_others_stay(tmp_path: Path) -> None:
    ResultFolder(tmp_path)
    old, new = tmp_path / ".a.nii.gz.1.2.tmp", tmp_path / "records" / ".b.json.1.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    ResultFolder(tmp_path)
    assert not old.exists() and new.exists()
