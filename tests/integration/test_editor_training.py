"""A training is followed by one of the editor, which is judged by clicks, kept, served and withdrawn: over REST."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import pytest
import yaml

from tests.integration.server import Server
from tests.tiny import boxes, preset_data

CASES = 6


@pytest.fixture
def server(tmp_path: Path) -> Server:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump(preset_data()))
    conf = {"preset": str(preset), "editor_training": "on", "editor_training_minutes": "0.02", "retrain": "off"}
    return Server(tmp_path, conf)


def editor_in_use(server: Server) -> str:
    data = {"params": json.dumps({"core": [[8, 8, 8]]})}
    answer = server.post("/infer/tiny_edit", params={"image": "case_1", "output": "json"}, data=data)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"]["version"])


def test_editor_follows_the_training_and_is_served_judged_and_withdrawn(server: Server, tmp_path: Path) -> None:
    contents = {}
    for number in range(CASES):
        image, label = boxes((24, 22, 20), seed=number)
        nib.save(nib.Nifti1Image(image, None), server.studies / f"case_{number}.nii.gz")
        nib.save(nib.Nifti1Image(label, None), tmp_path / "label.nii.gz")
        contents[f"case_{number}"] = (tmp_path / "label.nii.gz").read_bytes()
    server.start()
    try:
        for name, content in contents.items():
            assert server.save_label(name, content, ["Left Box", "core"]).status_code == 200
        assert server.get("/model/versions/tiny_edit").json()["versions"] == []
        assert "tiny_edit" not in server.get("/page/models").text, "nothing is shown that there is not"
        server.post("/train/tiny", json={"max_epochs": 1, "dataset": "Dataset", "pretrained": False})
        ended = server.wait_for("/train/")
        assert ended["status"] == "DONE", "\n".join(ended["details"])

        (row,) = server.get("/model/versions/tiny_edit").json()["versions"]
        details = server.get("/model/versions/tiny_edit/v0001").json()
        compared = details["comparison"]
        gains = [new - old for new, old in zip(compared["challenger"], compared["champion"], strict=True)]
        better = min(gains) >= 0 and max(gains) > 0.001
        assert row["status"] == ("published" if better else "rejected") and compared["clicks"] == [0, 1, 3, 5, 10]
        assert server.get("/info/").json()["train_stats"]["tiny"]["editor"]["version"] == "v0001"
        split = server.get("/model/versions/tiny/v0001").json()["split"]
        assert details["split"] == {side: split[side] for side in ("train", "validation")}
        assert editor_in_use(server) == ("editor v0001" if better else "growth")

        assert server.post("/model/rollback/tiny_edit?version=v0001").status_code == (200 if better else 409)
        assert server.post("/model/rollback/tiny_edit?version=v0001&rejected=true").json() == {"live": "v0001"}
        assert editor_in_use(server) == "editor v0001"
        page = server.get("/page/models").text
        assert "tiny_edit" in page and "10 clicks" in page
        assert server.post("/model/rollback/tiny_edit").json() == {"live": None}
        assert editor_in_use(server) == "growth"
    finally:
        server.stop()
