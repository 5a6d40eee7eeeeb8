"""Two servers on the same studies and the same models: every label is kept, and trained on once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import yaml
from synthetic_hippocampus import SyntheticCase, draw_cases

from tests.integration.server import Server, wait_until
from tests.integration.test_retraining import small_preset, submit

MODEL = "small"
BATCH, BATCHES = 4, 3
SECONDS = 300

pytestmark = pytest.mark.slow


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    """Two servers with a policy that trains after four labels."""
    preset = tmp_path / "small.yaml"
    preset.write_text(yaml.safe_dump(small_preset()))
    (tmp_path / "one" / "studies").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "studies").symlink_to(tmp_path / "one" / "studies")  # the same by another path
    conf = {
        "preset": str(preset), "model_dir": str(tmp_path / "models"), "retrain": "auto", "retrain_after": str(BATCH),
        "retrain_quiet_seconds": "1", "retrain_floor": "0", "retrain_recipe": "max_epochs=1,crops_per_case=1",
        "subject_separator": "-",
    }  # fmt: skip
    servers = Server(tmp_path / "one", conf), Server(tmp_path / "two", conf)
    yield servers
    for server in servers:
        if server.process is not None:
            server.stop()
            assert "Traceback" not in server.log.read_text(errors="replace")


def settled(servers: tuple[Server, Server], labels: int) -> bool:
    """Whether both know of all labels, and neither trains nor would."""
    told = [server.get("/retrain/").json()[MODEL] for server in servers]
    return all(one["labels"] == labels and not one["new_labels"] and not one["running"] for one in told)


def test_labels_sent_to_both_are_all_kept_and_each_is_trained_on_once(
    pair: tuple[Server, Server], tmp_path: Path
) -> None:
    bodies: dict[str, SyntheticCase] = {f"s{n:02d}-a": c for n, c in enumerate(draw_cases(BATCH * BATCHES, seed=3))}
    for name, case in bodies.items():
        nib.save(nib.Nifti1Image(case.image, case.affine_ras), tmp_path / "one" / "studies" / f"{name}.nii.gz")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Server.start, pair))
        for first in range(0, len(bodies), BATCH):
            names = list(bodies)[first : first + BATCH]
            folders = [tmp_path / f"sent-{name}" for name in names]
            for folder in folders:
                folder.mkdir()
            sent = [
                pool.submit(submit, pair[n % 2], name, bodies[name].label, bodies[name].affine_ras, folders[n])
                for n, name in enumerate(names)
            ]
            for one in sent:
                one.result()
            wait_until(lambda first=first: settled(pair, first + BATCH), SECONDS)
    for server in pair:
        assert len(server.get("/datastore/?output=train").json()) == len(bodies)
        assert {len(server.get(f"/datastore/label/versions?image={name}").json()) for name in bodies} == {1}
    versions = pair[0].get(f"/model/versions/{MODEL}").json()["versions"]
    trained: list[dict[str, Any]] = [
        pair[1].get(f"/model/versions/{MODEL}/{version['version']}").json()["label_digests"] for version in versions
    ]
    new = [set(here.items()) - set(before.items()) for before, here in zip([{}, *trained], trained, strict=False)]
    print(f"{len(trained)} runs; labels new in each: {[len(one) for one in new]}")
    assert len(trained) == BATCHES and [len(one) for one in new] == [BATCH] * BATCHES
    assert set(trained[-1]) == set(bodies)
    runs = pair[0].get(f"/runs/{MODEL}").json()
    assert [run["status"] for run in runs] == ["DONE"] * BATCHES


def test_button_of_one_is_refused_while_the_other_trains(pair: tuple[Server, Server], tmp_path: Path) -> None:
    case = next(iter(draw_cases(1, seed=4)))
    nib.save(nib.Nifti1Image(case.image, case.affine_ras), tmp_path / "one" / "studies" / "s00-a.nii.gz")
    for server in pair:
        server.start()
    submit(pair[0], "s00-a", case.label, case.affine_ras, tmp_path)
    pair[0].post(f"/train/{MODEL}", json={"max_epochs": 10_000}).raise_for_status()
    for path in (f"/train/{MODEL}", f"/train/{MODEL}?enqueue=true", "/train/", f"/retrain/{MODEL}"):
        refused = pair[1].post(path, json={"max_epochs": 1})
        assert refused.status_code == 409 and "another server trains 'small'" in refused.json()["detail"], path
    pair[0].delete("/train/").raise_for_status()
    wait_until(lambda: not pair[0].children())
    pair[1].post(f"/train/{MODEL}", json={"max_epochs": 1}).raise_for_status()
    assert pair[1].wait_for("/train/")["status"] == "DONE"
