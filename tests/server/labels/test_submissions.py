"""Which task a submitted label is for, and how long it keeps others from being read."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lib.datastore.effort import EffortCounter
from lib.datastore.label_files.segment_header import Segment
from lib.datastore.leases import Leases
from lib.datastore.records import FINAL
from lib.server.http.auth import Role, User
from lib.server.http.metrics import Metrics
from lib.server.labels.submissions import Submissions, choose_preset, names_in
from lib.server.readers import Readers
from tests.segment_files import write_segments
from tests.tiny import boxes, preset_data, tiny_preset, write_nifti

PRESET = tiny_preset()
VOXELS = boxes()[1]


def test_names_of_the_header_choose_the_task(tmp_path: Path) -> None:
    other = tiny_preset(name="other", labels=[{"index": 1, "name": "nucleus"}, *preset_data()["labels"][1:]])
    sent = write_segments(tmp_path / "sent.seg.nrrd", [VOXELS], [Segment("nucleus", 1), Segment("background", 2)])
    assert choose_preset({"tiny": PRESET, "other": other}, {}, None, names_in(sent)) is other


def test_model_that_takes_clicks_names_its_preset() -> None:
    """Also where two presets have the same labels, so that names alone would choose the first."""
    presets = {"tiny": PRESET, "other": tiny_preset(name="other")}
    models = {"tiny": "tiny", "other": "other", "other_edit": "other", "other_scribbles": "other"}
    for model in ("other", "other_edit", "other_scribbles"):
        assert choose_preset(presets, {"model": model}, None, ["core"], models).name == "other"
    assert choose_preset(presets, {"model": "unknown"}, None, ["core"], models).name == "tiny"


def test_label_that_waits_for_the_disk_does_not_keep_another_from_being_read(tmp_path: Path) -> None:
    """Two could be at work at all: behind two labels on a slow disk, every upload and session waited."""
    image, label = (write_nifti(tmp_path / f"{n}.nii.gz", v) for n, v in zip(("image", "label"), boxes(), strict=True))
    both_wait = threading.Barrier(2, timeout=60)

    def save_version(*_: Any) -> Any:
        both_wait.wait()
        return SimpleNamespace(tag=FINAL, image_id="case", version_id="1")

    store: Any = SimpleNamespace(
        predictions=SimpleNamespace(find=lambda *_: None),
        effort=EffortCounter(),
        leases=Leases(),
        save_version=save_version,
    )
    one_reader = Readers(at_once=1, threads=2)
    submissions = Submissions(store, {"tiny": PRESET}, lambda _: image, Metrics(), 100, readers=one_reader)
    user, info = (
        User("anna", Role.ANNOTATOR),
        {"label_info": [{"name": "Left Box", "idx": 1}, {"name": "core", "idx": 2}]},
    )
    with ThreadPoolExecutor(2) as clients:
        sent = [clients.submit(submissions.submit, "case", label, FINAL, info, user, "rest") for _ in range(2)]
        assert [one.result().version_id for one in sent] == ["1", "1"]
