from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import doctor
from lib.configs.catalogue import load_preset
from lib.models.weights import WeightsLocator
from lib.storage.files import sha256_of
from tests.forks import run_code
from tests.tiny import boxes, write_nifti


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "shipped.pt"
    path.write_bytes(b"weights" * 1000)
    side_car = {"sha256": sha256_of(path), "held_out": {"mean_dice": 0.8812}}
    path.with_suffix(".json").write_text(json.dumps(side_car))
    return path


def test_warning_without_advice_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="without advice"):
        doctor.Finding("warn", "something is odd")


def test_line_holds_state_text_and_advice() -> None:
    assert str(doctor.Finding("FAIL", "it broke", "mend it")) == "FAIL  it broke; mend it"


def test_ray_without_authentication_is_a_warning_and_with_its_token_none(tmp_path: Path) -> None:
    assert doctor.check_cluster(False, {}, tmp_path).state == "ok"
    open_to_all = doctor.check_cluster(True, {}, tmp_path)
    assert open_to_all.state == "warn" and "can run any program" in open_to_all.text
    asked = {"RAY_AUTH_MODE": "token"}
    assert "there is none in" in doctor.check_cluster(True, asked, tmp_path).text
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert doctor.check_cluster(True, asked, tmp_path).state == doctor.check_cluster(True, {}, tmp_path).state == "ok"
    told = doctor.check_cluster(True, asked, tmp_path).text
    assert str(tmp_path / ".ray" / "auth_token") in told and "can run any program" in told and "secret" not in told
    assert doctor.check_cluster(True, {"RAY_AUTH_MODE": "disabled"}, tmp_path).state == "warn"
    assert doctor.check_cluster(True, asked | {"RAY_AUTH_TOKEN": "x"}, tmp_path / "elsewhere").state == "ok"
    (tmp_path / ".ray" / "auth_token").write_text("\n")
    assert "there is none in" in doctor.check_cluster(True, asked, tmp_path).text, "Ray takes no empty file"


def test_weights_are_named_with_the_dice_that_their_side_car_states(weights: Path) -> None:
    finding = doctor.check_weights("task", WeightsLocator(weights.parent))
    assert finding.state == "ok"
    assert "shipped weights" in finding.text and "mean Dice 0.881" in finding.text


def test_weights_that_were_changed_are_a_failure(weights: Path) -> None:
    weights.write_bytes(b"other")
    assert doctor.check_weights("task", WeightsLocator(weights.parent)).state == "FAIL"


def test_weights_without_side_car_are_a_warning(weights: Path) -> None:
    weights.with_suffix(".json").unlink()
    assert doctor.check_weights("task", WeightsLocator(weights.parent)).state == "warn"


def test_preset_without_weights_says_how_to_get_some(tmp_path: Path) -> None:
    finding = doctor.check_weights("task", WeightsLocator(tmp_path))
    assert finding.state == "warn" and "pretrained" in finding.advice


def test_module_that_is_missing_is_a_failure() -> None:
    assert doctor.check_module("json").state == "ok"
    finding = doctor.check_module("no_such_module_here")
    assert finding.state == "FAIL" and "no_such_module_here" in finding.text


def test_versions_are_compared_without_their_build_variant() -> None:
    version = torch.__version__.split("+")[0]
    assert doctor.check_versions(f"torch=={version}\n").state == "ok"
    finding = doctor.check_versions("torch==0.1\nno-such-package==1.0\n")
    assert finding.state == "warn"
    assert "tested: 0.1" in finding.text and "no-such-package not installed" in finding.text


def test_pins_for_another_python_are_left_out() -> None:
    text = 'a==1; python_version >= "3.10"\nb==2; python_version < "3.10"\n-r c.txt\n# d==4\ne==5\n'
    assert list(doctor.pinned(text)) == [("a", "1"), ("e", "5")]


@pytest.mark.parametrize(("free_gib", "state"), [(1.0, "warn"), (64.0, "ok")])
def test_short_memory_and_disk_are_warned_about(free_gib: float, state: str) -> None:
    assert doctor.check_memory(free_gib).state == state
    assert doctor.check_disk(free_gib).state == state


def test_driver_beside_a_cpu_build_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.check_torch(lambda _: None).state == "ok"
    finding = doctor.check_torch(lambda _: "/usr/bin/nvidia-smi")
    assert finding.state == "warn" and "README" in finding.advice


def test_each_device_computes_or_is_named_with_its_reason() -> None:
    assert [str(finding) for finding in doctor.check_devices("cpu,cpu")] == [
        "ok    device cpu computes",
        "ok    device cpu#2 computes",
    ]

    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    (finding,) = doctor.check_devices("cpu", broken)
    assert finding.state == "FAIL"
    assert finding.text == "device cpu does not compute: CUDA error: no kernel image is available"


def test_whole_examination_runs_without_the_server_app(tmp_path: Path) -> None:
    code = (
        f"import os, sys; os.dup2(os.open({str(tmp_path / 'errors.txt')!r}, os.O_WRONLY | os.O_CREAT), 2);"
        "from lib import doctor; code = doctor.main();"
        "assert 'monailabel.app' not in sys.modules; sys.exit(code)"
    )
    lines = run_code(code, tmp_path).splitlines()
    assert all(line.startswith(("ok ", "warn ")) for line in lines)
    assert any("PyTorch" in line for line in lines) and any("preset hippocampus_mr" in line for line in lines)
    assert any(line.startswith("ok    device ") for line in lines)


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of what a window costs, which the first test of a plan measures."""
    return tmp_path_factory.mktemp("costs") / "costs.json"


def test_plan_of_an_image_is_told(tmp_path: Path, costs: Path, capsys: pytest.CaptureFixture) -> None:
    file = write_nifti(tmp_path / "scan.nii.gz", boxes((40, 50, 40))[0])
    costs.unlink(missing_ok=True)
    assert doctor.main(["--plan", "hippocampus_mr", "--image", str(file)], costs) == 0
    assert "ok    hippocampus_mr, scan.nii.gz: " in (line := capsys.readouterr().out)
    assert re.search(r"\d+ windows on (cpu|cuda).* in \w+ by \w+, \d at a time; stitched slab by slab on the", line)
    assert costs.is_file()


def test_plan_without_an_image_is_that_of_a_usual_one(costs: Path, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["--plan", "hippocampus_mr"], costs) == 0
    assert "ok    hippocampus_mr, a usual MR of (256, 256, 180) voxels: 324 windows on " in capsys.readouterr().out


def test_plan_of_a_training_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    costs = tmp_path / "costs.json"
    assert doctor.main(["--plan", "hippocampus_mr", "--train"], costs) == 0
    line = capsys.readouterr().out
    assert line.startswith("ok    training of hippocampus_mr: 2 crops a step on ") and "(measured; about" in line
    assert doctor.main(["--plan", "hippocampus_mr", "--train", "--memory-budget", "1MiB"], costs) == 1
    crop = "x".join(map(str, load_preset("hippocampus_mr").roi_size))
    assert f"(1 crop of {crop} at a time) needs " in capsys.readouterr().out
    assert doctor.main(["--plan", "hippocampus_mr", "--train", "--memory-budget", "much"], costs) == 1
    assert "memory_budget" in capsys.readouterr().out


def test_plan_of_nothing_is_a_failure_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["--plan", "hippocampus_mr", "--image", str(tmp_path / "none.nii")]) == 1
    assert "FAIL  image 'none.nii' does not exist" in capsys.readouterr().out
    assert doctor.main(["--plan", "no_such"]) == 1


def test_usual_volumes_take_no_memory() -> None:
    assert doctor.usual_volume(load_preset("abdomen_ct")).voxels.shape == (512, 512, 300)
    assert doctor.usual_volume(load_preset("hippocampus_mr")).voxels.strides == (0, 0, 4)


def test_labels_that_are_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.random.default_rng(0).random((20, 18, 16), dtype=np.float32)
    for place in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / place, image)
    write_nifti(tmp_path / "labels" / "final" / "a.nii.gz", np.ones((20, 18, 16), np.uint8))
    assert doctor.main(["--studies", str(tmp_path)]) == 0
    assert "no label in" in capsys.readouterr().out
    write_nifti(tmp_path / "labels" / "final" / "b.nii.gz", np.ones((20, 18, 15), np.uint8))
    assert doctor.main(["--studies", str(tmp_path), "--models", "hippocampus_mr"]) == 0
    said = capsys.readouterr().out
    assert "warn  labels/final/b.nii.gz is left out: the label has shape (20, 18, 15)" in said
    assert doctor.main(["--studies", str(tmp_path / "nowhere")]) == 1
