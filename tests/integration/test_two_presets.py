"""A folder with MR and CT, served with a preset for each: everybody is handed cases of the right kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from synthetic_hippocampus import SyntheticCase
from torso_phantom import draw_torso, grid_affine, render

from tests.integration.conftest import encode, prepare
from tests.integration.server import Server

SHAPE = (64, 52, 40)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, SyntheticCase]) -> Iterator[Server]:
    """One MR and one CT, whose names put the CT first, and an image in which there is nothing."""
    one = dict([*cases.items()][:1])
    server = prepare(Server(tmp_path_factory.mktemp("mixed"), {"models": "hippocampus_mr,abdomen_ct"}), one)
    affine = grid_affine(SHAPE, (6.0, 6.0, 8.0))
    torso = render(draw_torso(3), SHAPE, affine)
    nib.save(nib.Nifti1Image(torso.image_hu, affine), server.studies / "a_torso.nii.gz")
    nib.save(nib.Nifti1Image(np.full(SHAPE, 7, dtype=np.int16), affine), server.studies / "z_constant.nii.gz")
    yield server.start()
    server.stop()


def test_next_sample_offers_each_image_for_the_preset_of_its_modality(mixed: Server) -> None:
    offered = [
        mixed.post("/activelearning/first", json={"client_id": name}).json() for name in ("anna", "bert", "carl")
    ]
    assert [(one.get("id"), one.get("model")) for one in offered] == [
        ("case_0", "hippocampus_mr"),
        ("a_torso", "abdomen_ct"),
        (None, None),
    ]
    left_out = mixed.get("/datastore/problems").json()["left_out"]
    assert sorted(left_out["hippocampus_mr"]) == ["a_torso", "z_constant"]
    assert "looks like CT, for which another preset is served" in str(left_out["hippocampus_mr"]["a_torso"])
    page = mixed.get("/").text
    listed = page[page.index('id="left-out"') :].partition("</ul>")[0]
    assert "z_constant" in listed and "a_torso" not in listed, (
        "the page lists what is wrong, not what is for another model"
    )


def test_merged_labels_name_the_background_last(mixed: Server) -> None:
    info = mixed.get("/info/").json()
    announced = [info["models"][f"{preset}_edit"]["labels"] for preset in ("hippocampus_mr", "abdomen_ct")]
    own = [name for labels in announced for name in labels if name != "background"]
    assert info["labels"] == [*own, "background"] and len(own) == 15


def test_next_sample_for_a_named_model_offers_no_image_of_another_modality(mixed: Server) -> None:
    answer = mixed.post("/activelearning/first", json={"client_id": "dora", "model": "hippocampus_mr"})
    assert answer.json() == {}


def test_training_all_models_trains_those_that_have_labels(
    mixed: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    label = encode(cases["case_0"].label, cases["case_0"].affine_ras, tmp_path)
    assert mixed.save_label("case_0", label, ["anterior", "posterior"]).status_code == 200
    answer = mixed.post("/train/", json={"max_epochs": 1, "max_steps": 1}).json()
    assert answer["abdomen_ct"] == {"result": None, "detail": "no label yet"}
    assert answer["hippocampus_mr"]["result"]["status"] in ("SUBMITTED", "RUNNING")
    ended = mixed.wait_for("/train/")
    assert ended["status"] == "DONE", "\n".join(ended["details"])
    assert len(mixed.get("/train/?all=true").json()) == 1


@pytest.mark.parametrize(("image", "modality"), [("a_torso", "CT"), ("case_0", "MR")])
def test_file_is_shown_to_viewers_with_the_modality_that_its_intensities_fit(
    mixed: Server, image: str, modality: str
) -> None:
    [found] = mixed.get(f"/dicom-web/studies?PatientID={image}").json()
    study = found["0020000D"]["Value"][0]
    instances = mixed.get(f"/dicom-web/studies/{study}/metadata").json()
    # A case with a label has that as a SEG beside its image.
    assert {instance["00080060"]["Value"][0] for instance in instances} - {"SEG"} == {modality}
    listed = mixed.get(f"/dicom-web/studies/{study}/series").json()
    assert [kind for series in listed if (kind := series["00080060"]["Value"][0]) != "SEG"] == [modality]
    page = {"Referer": f"{mixed.url}/ohif/monai-label?StudyInstanceUIDs={study}"}
    offered = mixed.get("/info/", headers=page).json()["models"]
    preset = {"CT": "abdomen_ct", "MR": "hippocampus_mr"}[modality]
    assert (
        {f"{preset}_edit", f"{preset}_scribbles"} <= offered.keys() <= {preset, f"{preset}_edit", f"{preset}_scribbles"}
    )
