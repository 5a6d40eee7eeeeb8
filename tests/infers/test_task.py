"""MONAI Label's inference task: parameters refused by name, an answer that clients can read."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.configs.preset import Preset
from lib.errors import ImageError, ModelNotReadyError, ParameterError
from lib.infers.cache import ResultCache
from lib.infers.devices.schedule import Forecast
from lib.infers.network_images import NetworkImages
from lib.infers.plan import Plan, Planner
from lib.infers.request import InferRequest
from lib.infers.task import UnetrInferTask
from lib.models.calibration import Calibration, calibration_file, foreground_uncertainty
from lib.models.weights import WeightsLocator
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from lib.transforms.inputs import read_input
from lib.transforms.volume import Volume
from tests.tiny import boxes, oblique_affine, tiny_preset, write_nifti


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UnetrInferTask:
    """A task with random weights; its results go to the test's folder."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "results"))
    preset = tiny_preset()
    torch.manual_seed(0)
    checkpoint = Checkpoint(dict(build_unetr(preset).state_dict()), preset, {"version": "shipped"})
    write_checkpoint(tmp_path / "model" / "shipped.pt", checkpoint)
    return UnetrInferTask(preset, WeightsLocator(tmp_path / "model"), "cpu", "fp32")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_nifti(tmp_path / "scan.nii.gz", boxes()[0], oblique_affine("LPS"))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"image": None}, "'image' is None; valid: an image id or a file"),
        ({"image": ""}, "'image' is ''"),
        ({"image": ["a"]}, r"'image' is \['a'\]"),
        ({"device": "cuda:99"}, "'device' is 'cuda:99'; valid: cpu"),
        ({"device": ["tpu"]}, "'device' is 'tpu'"),
        ({"result_extension": ".jpg"}, r"'result_extension' is '.jpg'; valid: .nrrd"),
        ({"result_extension": [".nrrd"]}, "'result_extension' is"),
        ({"result_dtype": "complex64"}, "'result_dtype' is 'complex64'; valid: uint8"),
        ({"result_compress": "maybe"}, "'result_compress' is 'maybe'; valid: true, false"),
        ({"result_compress": 2}, "'result_compress' is 2; valid: true, false"),
        ({"largest_component": "some"}, "'largest_component' is 'some'; valid: true, false"),
    ],
)
def test_bad_parameter_is_refused_by_name(
    task: UnetrInferTask, image: Path, tmp_path: Path, parameters: dict[str, Any], message: str
) -> None:
    request = {"image": str(image)} | parameters
    with pytest.raises(ParameterError, match=message):
        task.parse(request)
    with pytest.raises(ParameterError, match=message):
        task(request)
    assert not list((tmp_path / "results").iterdir()), "nothing is written"


@pytest.mark.parametrize(
    ("name", "extension"),
    [("a.nii.gz", ".nii.gz"), ("a.NII", ".nii"), ("a.seg.nrrd", ".nrrd"), ("a.mha", ".nii.gz"), ("series", ".nii.gz")],
)
def test_result_is_of_the_images_kind_where_none_is_asked_for(name: str, extension: str) -> None:
    assert InferRequest.parse({"image": name}, torch.device("cpu")).extension == extension


@pytest.mark.parametrize(("value", "expected"), [(True, True), ("TRUE", True), ("0", False), (False, False)])
def test_request_flags_are_cast(value: object, expected: bool) -> None:
    request = {"image": "a.nii", "largest_component": value, "result_compress": value}
    parsed = InferRequest.parse(request, torch.device("cpu"))
    assert (parsed.largest_component, parsed.compress) == (expected, expected)


def test_request_as_slicer_sends_it_is_understood() -> None:
    request = {
        "image": "a.nii.gz",
        "client_id": "user-xyz",
        "result_extension": ".nrrd",
        "result_dtype": "uint8",
        "session_id": "",
        "model": "tiny",
        "device": ["cpu", "cuda"],
    }
    parsed = InferRequest.parse(request, torch.device("cpu"))
    assert (parsed.extension, parsed.dtype, parsed.device.type) == (".nrrd", "uint8", "cpu")


def test_answer_is_a_mask_on_the_images_grid_and_what_is_in_it(task: UnetrInferTask, image: Path) -> None:
    file, answer = task({"image": str(image), "result_extension": ".nii.gz"})
    assert file is not None
    mask, scan = nib.load(file), nib.load(image)
    labels = np.asarray(mask.dataobj)
    assert mask.shape == scan.shape
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-6)

    assert answer["label_names"] == {"Left Box": 1, "core": 2}
    assert answer["label_colors"]["Left Box"] == [255, 128, 0]
    assert answer["model"] == {"preset": "tiny", "version": "shipped", "origin": "shipped"}
    for name, index in answer["label_names"].items():
        count = int((labels == index).sum())
        assert (name in answer["label_statistics"]) == (count > 0)
        if count:
            assert answer["label_statistics"][name]["voxels"] == count
            centroid = np.argwhere(labels == index).mean(axis=0)
            assert answer["centroids"][name] == [str(round(c)) for c in centroid.round(2)]
            expected = (scan.affine @ [*centroid, 1])[:3]
            np.testing.assert_allclose(answer["label_statistics"][name]["centroid_ras_mm"], expected, atol=0.01)
    assert answer["label_statistics"], "random weights find something"
    stages = ["read", "wait", "load", "plan", "preprocess", "network", "restore", "postprocess", "write", "measure"]
    assert set(answer["latencies_ms"]) == {*stages, "total"}
    assert answer["plan"]["windows"] >= 1
    assert "windows on cpu in float32" in answer["plan"]["text"]
    parts = sum(value for name, value in answer["latencies_ms"].items() if name != "total")
    assert parts <= answer["latencies_ms"]["total"] + 1
    assert set(answer["latencies"]) == {"pre", "infer", "invert", "post", "write", "total"}


def test_task_without_weights_is_not_offered_and_says_why(tmp_path: Path, image: Path) -> None:
    task = UnetrInferTask(tiny_preset(), WeightsLocator(tmp_path / "none"), "cpu")
    assert not task.is_valid()
    assert task.get_path() is None
    assert task.get_path(validate=False) == str(tmp_path / "none")
    with pytest.raises(ModelNotReadyError):
        task({"image": str(image)})


def test_task_with_weights_is_offered_with_its_labels(task: UnetrInferTask, tmp_path: Path) -> None:
    assert task.is_valid()
    assert task.get_path() == str(tmp_path / "model" / "shipped.pt")
    info = task.info()
    assert info["labels"] == {"Left Box": 1, "core": 2}
    assert info["type"] == "segmentation"
    assert info["dimension"] == 3
    assert info["config"]["largest_component"] is False


def test_image_that_cannot_be_read_leaves_no_file(task: UnetrInferTask, tmp_path: Path) -> None:
    (tmp_path / "bad.nii.gz").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"'bad\.nii\.gz' is damaged"):
        task({"image": str(tmp_path / "bad.nii.gz")})
    assert not list((tmp_path / "results").iterdir())


def test_second_answer_comes_from_the_cache_in_any_format(task: UnetrInferTask, image: Path, tmp_path: Path) -> None:
    cached = UnetrInferTask(task.preset, WeightsLocator(tmp_path / "model"), "cpu", "fp32", ResultCache(16))
    assert cached.recall(cached.parse({"image": str(image)})) is None and not cached.is_kept(
        cached.parse({"image": str(image)})
    )
    first, said = cached({"image": str(image), "result_extension": ".nii.gz"})
    assert said["cache"] == {"hit": False}
    assert cached.is_kept(cached.parse({"image": str(image), "result_extension": ".nrrd"}))
    kept = cached.kept(cached.parse({"image": str(image), "result_extension": ".nrrd"}))
    assert kept is not None and kept.payload["quality"] == said["quality"]
    np.testing.assert_array_equal(kept.labels, nib.load(first).dataobj)
    np.testing.assert_allclose(kept.affine_ras, nib.load(first).affine, atol=1e-6)
    assert cached.kept(cached.parse({"image": str(image), "largest_component": True})) is None
    second, again = cached({"image": str(image), "result_extension": ".nii", "result_dtype": "int16"})
    assert again["cache"] == {"hit": True, "computed_in_ms": said["latencies_ms"]["total"]}
    np.testing.assert_array_equal(nib.load(first).dataobj, nib.load(second).dataobj)
    np.testing.assert_allclose(nib.load(first).affine, nib.load(second).affine, atol=1e-6)
    assert nib.load(second).get_data_dtype() == np.int16
    same = ("label_names", "label_colors", "centroids", "label_statistics", "model", "quality")
    assert {key: again[key] for key in same} == {key: said[key] for key in same}
    assert again["latencies"]["infer"] == 0
    assert cached.recall(cached.parse({"image": str(image), "largest_component": True})) is None, (
        "another option, another mask"
    )


def test_mask_of_an_image_that_is_replaced_meanwhile_is_not_kept_for_the_new_one(
    task: UnetrInferTask, image: Path, tmp_path: Path
) -> None:
    """The planner runs after the image was read and before it is segmented."""

    seeds = itertools.count(9)

    class Replacing(Planner):
        def plan(self, *arguments: Any, **options: Any) -> Plan:
            nib.save(nib.Nifti1Image(boxes(seed=next(seeds))[0], np.eye(4)), image)
            return super().plan(*arguments, **options)

    results = ResultCache(16)
    locator = WeightsLocator(tmp_path / "model")
    cached = UnetrInferTask(task.preset, locator, "cpu", "fp32", results, planner=Replacing())
    cached({"image": str(image)})
    assert len(results) == 0
    assert cached.recall(cached.parse({"image": str(image)})) is None
    cached.mask_of(cached.parse({"image": str(image)}))
    assert len(results) == 0


def test_cache_forgets_with_new_weights(task: UnetrInferTask, image: Path, tmp_path: Path) -> None:
    results = ResultCache(16)
    cached = UnetrInferTask(task.preset, WeightsLocator(tmp_path / "model"), "cpu", "fp32", results)
    cached({"image": str(image)})
    torch.manual_seed(1)
    other = Checkpoint(dict(build_unetr(task.preset).state_dict()), task.preset, {"version": "other"})
    write_checkpoint(tmp_path / "model" / "shipped.pt", other)
    _, said = cached({"image": str(image)})
    assert said["cache"] == {"hit": False} and said["model"]["version"] == "other"
    assert len(results) == 1


def test_uncertainty_map_lies_on_the_image(task: UnetrInferTask, image: Path) -> None:
    picture = nib.load(task.map_uncertainty(task.parse({"image": str(image)})))
    entropy, source = np.asarray(picture.dataobj), nib.load(image)
    assert entropy.shape == source.shape and entropy.dtype == np.float32
    np.testing.assert_allclose(picture.affine, source.affine, atol=1e-5)
    assert 0.5 < entropy.max() <= 1, "random weights are sure of nothing"


def test_quality_is_estimated_where_the_weights_are_calibrated(
    task: UnetrInferTask, image: Path, tmp_path: Path
) -> None:
    _, said = task({"image": str(image)})
    assert said["quality"] is None
    line = Calibration(0.95, -0.1, 0.04, 12)
    calibration_file(tmp_path / "model" / "shipped.pt").write_text(line.to_json(), encoding="utf-8")
    calibrated = UnetrInferTask(task.preset, WeightsLocator(tmp_path / "model"), "cpu", "fp32")
    _, said = calibrated({"image": str(image), "largest_component": False})
    entropy = np.asarray(nib.load(calibrated.map_uncertainty(calibrated.parse({"image": str(image)}))).dataobj)
    labels = np.asarray(nib.load(calibrated({"image": str(image)})[0]).dataobj)
    assert said["quality"] == line.estimate(foreground_uncertainty(entropy, labels))


def test_next_image_is_read_while_one_is_computed(task: UnetrInferTask, image: Path, tmp_path: Path) -> None:
    """As in a batch inference with two workers: the first waits in its computation for the second to have read."""
    other = write_nifti(tmp_path / "other.nii.gz", boxes(seed=1)[0])
    both_read, reads = threading.Event(), list[str]()

    def read(path: Path, preset: Preset) -> Volume:
        volume = read_input(path, preset)
        reads.append(path.name)
        if len(reads) == 2:
            both_read.set()
        return volume

    class WaitingPlanner(Planner):
        """Makes the first request wait at the beginning of its computation."""

        def plan(self, *arguments: Any, **options: Any) -> Plan:
            assert both_read.wait(60), "nothing was read meanwhile"
            return super().plan(*arguments, **options)

    locator = WeightsLocator(tmp_path / "model")
    waiting = UnetrInferTask(task.preset, locator, "cpu", "fp32", planner=WaitingPlanner(), read=read)
    waiting.load()
    with ThreadPoolExecutor(2) as workers:
        answers = list(workers.map(lambda path: waiting({"image": str(path)})[0], (image, other)))
    assert sorted(reads) == ["other.nii.gz", "scan.nii.gz"]
    assert all(answer is not None and Path(answer).is_file() for answer in answers)


def test_choice_label_by_label_is_no_option_that_clients_send_back(tmp_path: Path) -> None:
    preset = tiny_preset(inference={"largest_component": ["core"]})
    task = UnetrInferTask(preset, WeightsLocator(tmp_path / "none"))
    assert "largest_component" not in task.info()["config"]


def test_answer_says_where_itk_and_nibabel_read_the_image_differently(
    task: UnetrInferTask, image: Path, tmp_path: Path
) -> None:
    assert task({"image": str(image)})[1]["warnings"] == []
    shifted = nib.load(image)
    shifted.set_qform(oblique_affine("LPS", origin=(-20.0, 12.25, 88.0)), 1)
    nib.save(shifted, tmp_path / "shifted.nii.gz")
    file, answer = task({"image": str(tmp_path / "shifted.nii.gz"), "result_extension": ".nii.gz"})
    (warning,) = answer["warnings"]
    assert "ITK (3D Slicer) and nibabel place the image up to 11.5 mm apart" in warning
    np.testing.assert_allclose(nib.load(file).affine[:3, 3], [-20.0, 12.25, 88.0], atol=1e-4)


def test_image_that_was_read_ahead_gives_the_same_mask_and_is_kept(
    task: UnetrInferTask, image: Path, tmp_path: Path
) -> None:
    plain = task.mask_of(task.parse({"image": str(image)}))
    results = ResultCache(16)
    cached = UnetrInferTask(task.preset, WeightsLocator(tmp_path / "model"), "cpu", "fp32", results)
    read = cached.read_ahead(cached.parse({"image": str(image)}))
    assert read is not None and read.volume.voxels.shape == (20, 18, 16)
    made = cached.mask_of(cached.parse({"image": str(image)}), read)
    np.testing.assert_array_equal(made.labels, plain.labels)
    assert cached.is_kept(cached.parse({"image": str(image)}))
    assert made.payload["latencies_ms"]["total"] >= made.payload["latencies_ms"]["network"] > 0
    assert cached.read_ahead(cached.parse({"image": str(image)})) is None, "its mask is there"


def test_margins_are_kept_with_the_mask_and_made_again_where_they_have_left(
    task: UnetrInferTask, image: Path, tmp_path: Path
) -> None:
    assert task.margins_of(task.parse({"image": str(image)})) is None, "nothing is kept for clicks"
    reads = list[str]()

    def read(path: Path, preset: Preset) -> Volume:
        reads.append(path.name)
        return read_input(path, preset)

    locator, images = WeightsLocator(tmp_path / "model"), NetworkImages(16)
    kept = UnetrInferTask(task.preset, locator, "cpu", "fp32", images=images, read=read)
    request = kept.parse({"image": str(image)})
    mask = kept.mask_of(request)
    margins = kept.margins_of(request)
    assert margins is not None and reads == ["scan.nii.gz"]
    assert margins.nbytes == 3 * margins.labels.size and set(np.unique(mask.labels)) <= set(np.unique(margins.labels))
    assert 0 < margins.margin.mean() < 50 and (margins.second != margins.labels).all(), (
        "random weights are sure of nothing"
    )
    other = UnetrInferTask(task.preset, locator, "cpu", "fp32", images=NetworkImages(16), read=read)
    again = other.margins_of(request)
    assert again is not None and len(reads) == 2
    np.testing.assert_array_equal(again.margin, margins.margin)
    np.testing.assert_array_equal(again.second, margins.second)
    small = UnetrInferTask(task.preset, locator, "cpu", "fp32", images=NetworkImages(0), read=read)
    small.mask_of(request)
    assert small.margins_of(request) is None, "what never fits is not computed at each click"


def test_margins_of_other_weights_are_not_taken(task: UnetrInferTask, image: Path, tmp_path: Path) -> None:
    kept = UnetrInferTask(task.preset, WeightsLocator(tmp_path / "model"), "cpu", "fp32", images=NetworkImages(16))
    first = kept.margins_of(kept.parse({"image": str(image)}))
    torch.manual_seed(1)
    other = Checkpoint(dict(build_unetr(task.preset).state_dict()), task.preset, {"version": "other"})
    write_checkpoint(tmp_path / "model" / "shipped.pt", other)
    second = kept.margins_of(kept.parse({"image": str(image)}))
    assert first is not None and second is not None and (first.margin != second.margin).any()


def test_image_that_was_replaced_after_it_was_read_is_not_kept(
    task: UnetrInferTask, image: Path, tmp_path: Path
) -> None:
    results = ResultCache(16)
    cached = UnetrInferTask(task.preset, WeightsLocator(tmp_path / "model"), "cpu", "fp32", results)
    read = cached.read_ahead(cached.parse({"image": str(image)}))
    nib.save(nib.Nifti1Image(boxes(seed=5)[0], np.eye(4)), image)
    cached.mask_of(cached.parse({"image": str(image)}), read)
    assert len(results) == 0


def test_image_is_not_read_ahead_where_memory_is_short(task: UnetrInferTask, image: Path, tmp_path: Path) -> None:
    small = UnetrInferTask(task.preset, WeightsLocator(tmp_path / "model"), "cpu", planner=Planner(budget=1))
    assert small.read_ahead(small.parse({"image": str(image)})) is None


def test_request_names_its_weights_and_its_seconds_once_a_window_was_measured(
    task: UnetrInferTask, image: Path, tmp_path: Path
) -> None:
    request = {"image": str(image)}
    assert task.forecast(task.parse(request)) == Forecast((task.preset.name, task.weights_stamp()))
    answer = task.mask_of(task.parse(request)).payload
    known = task.forecast(task.parse(request))
    assert known.weights == (task.preset.name, task.weights_stamp())
    # the plan in the answer leaves out windows of air
    assert known.seconds is not None and known.seconds >= answer["plan"]["seconds"] - 0.005
    assert task.forecast(task.parse({"image": str(tmp_path / "none.nii.gz")})).seconds is None


def test_device_does_its_part_and_the_rest_needs_none(task: UnetrInferTask, image: Path, tmp_path: Path) -> None:
    file, whole = task({"image": str(image), "result_extension": ".nii.gz"})
    request = task.parse({"image": str(image), "result_extension": ".nii.gz"})
    cached = UnetrInferTask(task.preset, WeightsLocator(tmp_path / "model"), "cpu", "fp32", ResultCache(16))
    ahead = cached.read_ahead(request)
    begun = cached.begin(request, ahead)
    assert not cached.is_kept(request), "there is no mask yet"
    made, said = cached.complete(begun)
    assert Path(made).read_bytes() == Path(file).read_bytes()
    stages = said["latencies_ms"]
    assert stages.keys() == whole["latencies_ms"].keys()
    assert stages["total"] == pytest.approx(sum(stages.values()) - stages["total"], abs=0.2)
    assert cached.complete(cached.begin(request))[1]["cache"]["hit"] is True


def test_image_that_was_replaced_after_it_was_read_ahead_is_read_again(
    task: UnetrInferTask, image: Path, tmp_path: Path
) -> None:
    request = task.parse({"image": str(image)})
    ahead = task.read_ahead(request)
    nib.save(nib.Nifti1Image(boxes(seed=5)[0], np.eye(4)), image)
    begun = task.begin(request, ahead)
    assert begun.checksum == task.checksums.of(image) != ahead.checksum
    Path(task.complete(begun)[0]).unlink()
