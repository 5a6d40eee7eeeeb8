"""Which labels of the studies count for a preset, and which of its labels they leave open."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.cases.labelled import Case
from lib.configs.catalogue import load_preset
from lib.datastore.records import Submission
from lib.datastore.store import VersionedDatastore
from lib.models.weights import WeightsLocator
from lib.trainers.submitted import submitted_labels, undrawn_as_missing
from lib.trainers.task import UnetrTrainTask
from tests.tiny import boxes, tiny_preset, write_nifti

TINY = tiny_preset()  # Left Box (alias box_left) 1, core 2
NAMES = [{"name": "Left Box", "idx": 1}, {"name": "core", "idx": 2}]
Studies = Callable[[dict[str, dict[str, Any] | None]], VersionedDatastore]


@pytest.fixture
def studies(tmp_path: Path) -> Iterator[Studies]:
    """A folder as MONAI Label's own server left it: ``studies({case id: what it knew of the label})``."""
    opened: list[VersionedDatastore] = []

    def make(known: dict[str, dict[str, Any] | None]) -> VersionedDatastore:
        objects = {}
        for number, (name, info) in enumerate(known.items()):
            image, label = boxes(seed=number)
            write_nifti(tmp_path / f"{name}.nii.gz", image)
            write_nifti(tmp_path / "labels" / "final" / f"{name}.nii.gz", label)
            labels = {} if info is None else {"final": {"ext": ".nii.gz", "info": info}}
            objects[name] = {"image": {"ext": ".nii.gz", "info": {"ts": 1}}, "labels": labels}
        data = {"name": "x", "description": "", "images_dir": ".", "labels_dir": "labels", "objects": objects}
        (tmp_path / "datastore_v2.json").write_text(json.dumps(data))
        opened.append(VersionedDatastore(str(tmp_path), extensions=["*.nii.gz"], auto_reload=False))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def test_labels_of_a_server_with_other_task_names_count_by_their_names(studies: Studies, tmp_path: Path) -> None:
    swapped = [{"name": "core", "idx": 1}, {"name": "box_left", "idx": 2}, {"name": "background", "idx": 3}]
    strange = [{"name": "tumour", "idx": 1}, {"name": "cyst", "idx": 2}]
    other = [{"name": "spleen", "idx": 1}, {"name": "liver", "idx": 2}]
    store = studies(
        {
            "stock": {"model": "segmentation", "label_info": NAMES},
            "swapped": {"model": "deepedit", "label_info": swapped},
            "own": {"model": "tiny", "label_info": NAMES},
            "strange": {"model": "segmentation", "label_info": strange},
            "other": {"model": "abdomen_ct", "label_info": other},
            "unnamed": {"model": "segmentation"},
            "unnamed_ct": {"model": "abdomen_ct"},
            "by_hand": None,
        }
    )
    found = submitted_labels(store, TINY, ["tiny"])
    cases = {case.case_id: case for case in found.cases}
    assert sorted(cases) == ["by_hand", "own", "stock", "swapped", "unnamed"]
    assert cases["swapped"].values == {1: 2, 2: 1}
    assert {name: text.removeprefix(f"label of {name!r} was saved for ") for name, text in found.left_out.items()} == {
        "strange": "the task 'segmentation' and has 'tumour', 'cyst'; valid: Left Box, core",
        "other": "the task 'abdomen_ct' and has 'spleen', 'liver'; valid: Left Box, core",
        "unnamed_ct": "the task 'abdomen_ct', and nothing names its values",
    }
    several = submitted_labels(store, TINY, ["tiny", "abdomen_ct"])
    assert {case.case_id for case in several.cases} == {"own", "stock", "swapped"}
    assert "other" not in several.left_out, "it is for another task of this server"
    assert several.left_out["by_hand"] == (
        "label of 'by_hand' came without a task, nothing names its values, and this server has several tasks: tiny, "
        "abdomen_ct"
    )
    task = UnetrTrainTask(tiny_preset(), WeightsLocator(tmp_path / "model" / "tiny"), "cpu", served=["tiny"])
    stats = task({"max_epochs": 1, "max_steps": 1, "multi_gpu": False, "val_split": 0, "dataset": "Dataset"}, store)
    assert sorted(stats["split"]["train"]) == sorted(cases)
    assert set(stats["left_out"]) == {"strange", "other", "unnamed_ct"}


def test_organ_that_nobody_drew_is_missing_and_not_background(studies: Studies, tmp_path: Path) -> None:
    """By Slicer's way, where the empty segment is named too, and in a folder that MONAI Label's own server wrote."""
    store = studies(
        {
            "stock": {"model": "segmentation", "label_info": NAMES},
            "by_hand": None,
            "slicer": None,
            "said": None,
            "in_part": None,
        }
    )
    only_box = {name: _without_core(store, name) for name in ("stock", "by_hand", "slicer", "said", "in_part")}
    store.close()
    again = VersionedDatastore(str(tmp_path), extensions=["*.nii.gz"], auto_reload=False)
    try:
        _save(again, only_box["slicer"], label_map={"Left Box": 1}, missing_labels=("core",))
        _save(again, only_box["said"], label_map={"Left Box": 1, "core": 2}, info={"complete": True})
        _save(again, only_box["in_part"], label_map={"Left Box": 1, "core": 2}, missing_labels=("Left Box",))
        task = UnetrTrainTask(tiny_preset(), WeightsLocator(tmp_path / "model" / "tiny"), "cpu")
        stats = task({"max_epochs": 1, "max_steps": 1, "multi_gpu": False, "val_split": 0, "dataset": "Dataset"}, again)
    finally:
        again.close()
    assert stats["missing_labels"] == {
        "stock": ["core"], "by_hand": ["core"], "slicer": ["core"],
    }, "and nothing is missing where somebody said that there is no core"  # fmt: skip
    assert stats["left_out"] == {"in_part": "label of 'in_part' speaks of none of the labels"}


def test_label_whose_file_is_of_the_future_is_taken_in(studies: Studies, tmp_path: Path) -> None:
    """Copied from a machine whose clock is ahead, or written before this one's was turned back."""
    store = studies({"a": None})
    image, label = boxes(seed=5)
    write_nifti(tmp_path / "b.nii.gz", image)
    late = write_nifti(tmp_path / "labels" / "final" / "b.nii.gz", label)
    os.utime(late, (time.time() + 86_400,) * 2)
    store.refresh()
    assert {case.case_id for case in submitted_labels(store, TINY, ["tiny"]).cases} == {"a", "b"}


def test_undrawn_labels_join_those_that_are_said_to_be_missing() -> None:
    case = Case("a", Path("a"), Path("b"), missing=(2,))
    assert undrawn_as_missing(case, np.array([0, 2], np.uint8), TINY).missing == (1, 2)
    assert undrawn_as_missing(case, np.array([0, 1, 2], np.uint8), TINY).missing == (2,)


def test_every_label_of_the_abdomen_is_missing_but_the_corrected_one() -> None:
    preset = load_preset("abdomen_ct")
    spleen = np.zeros((4, 4, 4), np.uint8)
    spleen[1:3, 1:3, 1:3] = preset.label_indices["spleen"]
    case = undrawn_as_missing(Case("a", Path("a"), Path("b")), spleen, preset)
    assert set(case.missing) == set(preset.label_indices.values()) - {preset.label_indices["spleen"]}


def _without_core(store: VersionedDatastore, name: str) -> tuple[str, Path]:
    path = Path(store.get_label_uri(name, "final"))
    label = boxes(seed=["stock", "by_hand", "slicer", "said", "in_part"].index(name))[1]
    path.chmod(0o644)
    return name, write_nifti(path, np.where(label == 2, 0, label).astype(np.uint8))


def _save(store: VersionedDatastore, drawn: tuple[str, Path], **said: Any) -> None:
    store.save_version(drawn[1], Submission(image_id=drawn[0], preset="tiny", **said))


@pytest.mark.skipif(os.name == "nt", reason="needs links of POSIX")
def test_version_that_became_a_link_is_not_trained_on(studies: Studies, tmp_path: Path) -> None:
    known = {"model": "tiny", "label_info": NAMES}
    store = studies({"case_001": dict(known), "case_002": dict(known)})
    elsewhere = write_nifti(tmp_path / "elsewhere.nii.gz", boxes(seed=9)[1])
    version = store.history.latest("case_001")
    assert version is not None
    version.file.unlink()
    version.file.symlink_to(elsewhere)
    found = submitted_labels(store, TINY, ["tiny"])
    assert [case.case_id for case in found.cases] == ["case_002"]
    assert found.left_out == {"case_001": "label of 'case_001' is not what was saved"}
