"""The command that writes sample studies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from generate import StudyPlan, is_complete_nifti, main
from pydicom import dcmread
from synthetic_hippocampus import draw_case
from torso_phantom import ORGANS

SCRIPT = Path(__file__).resolve().parents[2] / "sample-data" / "generate.py"


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_nifti_studies_lie_flat_and_references_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "studies"), "--count", "2", "--seed", "3"]) == 0
    names = [f"synthetic_hippocampus_000{number}.nii.gz" for number in (0, 1)]
    assert files_in(tmp_path / "studies") == [*(f"references/{name}" for name in names), *names]
    case = draw_case(1, seed=3)
    image, label = (nib.load(tmp_path / "studies" / part / names[1]) for part in ("", "references"))
    np.testing.assert_array_equal(np.asarray(image.dataobj), case.image)
    np.testing.assert_array_equal(np.asarray(label.dataobj), case.label)
    np.testing.assert_allclose(image.affine, case.affine_ras, atol=1e-5)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert capsys.readouterr().out.count("\n") == 1


def test_second_run_leaves_complete_files_and_mends_broken_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--count", "3"]
    assert main(arguments) == 0
    first, second, third = sorted(tmp_path.glob("*.nii.gz"))
    times, content = first.stat().st_mtime_ns, second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    third.unlink()
    assert main(arguments) == 0
    assert first.stat().st_mtime_ns == times
    assert second.read_bytes() == content and third.is_file()
    assert "(1 were there)" in capsys.readouterr().out


def test_missing_reference_is_made_again(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--count", "1"])
    reference = tmp_path / "references" / "synthetic_hippocampus_0000.nii.gz"
    content = reference.read_bytes()
    reference.unlink()
    main(["--out", str(tmp_path), "--count", "1"])
    assert reference.read_bytes() == content


def test_study_of_another_seed_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path), "--count", "1"])
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    assert main(["--out", str(tmp_path), "--count", "1", "--seed", "1"]) == 2
    assert "seed 0 case 0', not 'synthetic hippocampus seed 1 case 0'" in capsys.readouterr().err
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before


def test_dicom_and_both_formats(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--count", "1", "--references", str(tmp_path / "truth")]
    assert main([*arguments, "--format", "dicom", "--plane", "coronal"]) == 0
    assert list(tmp_path.glob("*.nii.gz")) == []
    assert files_in(tmp_path / "truth") == ["synthetic_hippocampus_0000.nii.gz"]
    slices = sorted((tmp_path / "dicom" / "SYNTH-MR-0000").glob("*.dcm"))
    assert len(slices) == draw_case(0).image.shape[1]
    first = dcmread(slices[0])
    assert (first.Modality, first.PatientID) == ("MR", "SYNTH-MR-0000")
    assert main([*arguments, "--format", "both"]) == 0
    assert (tmp_path / "synthetic_hippocampus_0000.nii.gz").is_file()
    slices[2].unlink()
    assert main([*arguments, "--format", "both"]) == 2


def test_torso_of_a_shape(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--what", "torso", "--count", "2", "--format", "both"]
    assert main([*arguments, "--shape", "64", "48", "50"]) == 0
    images = [nib.load(tmp_path / f"synthetic_torso_000{number}.nii.gz") for number in (0, 1)]
    assert images[0].shape == (64, 48, 50) and images[0].get_data_dtype() == np.int16
    assert nib.aff2axcodes(images[0].affine) == ("L", "P", "S")
    label = np.asarray(nib.load(tmp_path / "references" / "synthetic_torso_0000.nii.gz").dataobj)
    assert set(np.unique(label)) == {0, *ORGANS.values()}
    assert (np.asarray(images[0].dataobj) != np.asarray(images[1].dataobj)).any()
    assert dcmread(tmp_path / "dicom" / "SYNTH-CT-0000" / "0001.dcm").Modality == "CT"
    assert main([*arguments, "--shape", "32", "32", "32"]) == 2, "another shape is another study"


def test_abdomen_is_written_and_shares_no_patient_with_a_torso(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--what", "abdomen", "--count", "1"]) == 0
    image, label = (
        nib.load(folder / "synthetic_abdomen_0000.nii.gz") for folder in (tmp_path, tmp_path / "references")
    )
    assert image.shape == label.shape == (256, 192, 104)
    assert set(np.unique(np.asarray(label.dataobj))) == {0, *ORGANS.values()}
    patients = {StudyPlan(what, 0, 0).identity.patient_id for what in ("abdomen", "hippocampus", "torso")}
    assert len(patients) == 3, "each has a DICOM folder of its own"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "-1"], "-1 must be 0 or more"),
        (["--count", "x"], "invalid"),
        (["--format", "png"], "invalid choice"),
        (["--what", "knee"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "x"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "64", "64", "50"], "--shape is for --what torso"),
        (["--what", "torso", "--shape", "64", "64", "4"], "must be at least 8 along each axis"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "x"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_folder_that_cannot_be_made_ends_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["--out", str(tmp_path / "file"), "--count", "1"]) == 1
    assert "error: cannot write" in capsys.readouterr().err


def test_broken_files_are_not_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    assert not is_complete_nifti(path)
    for content in (b"", b"\x1f\x8b", b"no gzip at all"):
        path.write_bytes(content)
        assert not is_complete_nifti(path)


def test_command_runs_from_anywhere_without_torch(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import generate; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    command = [sys.executable, str(SCRIPT), "--out", "here", "--count", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 synthetic hippocampus studies in here") and done.stderr == ""
    assert (tmp_path / "here" / "synthetic_hippocampus_0000.nii.gz").is_file()
