"""Files and DICOM series side by side: what is an image, what its label is, also after a restart."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_series import SeriesIdentity, write_series
from torso_phantom import grid_affine

from lib.configs.preset import Preset
from lib.datastore.records import Submission
from lib.datastore.series import SeriesDatastore, open_datastore
from lib.dicom.files import find_dicom
from lib.dicom.series import Series, read_series
from lib.dicom.volumes import VolumeCache
from lib.errors import NotFoundError, ParameterError, UpstreamError
from tests.dicom.conftest import edit
from tests.tiny import tiny_preset, write_nifti

SHAPE = (24, 19, 11)


@pytest.fixture
def series(tmp_path: Path) -> Series:
    """An MR series in the folder ``studies``, with a NIfTI file beside it."""
    voxels = np.random.default_rng(1).integers(0, 900, SHAPE)
    affine = grid_affine(SHAPE, (0.8, 0.9, 2.5), "LPS", (17, -9, 23))
    folder = tmp_path / "studies" / "patient" / "series"
    write_series(folder, voxels, affine, SeriesIdentity("SYNTH-3", "MR", "T1"))
    write_nifti(tmp_path / "studies" / "file.nii.gz", voxels.astype(np.int16))
    return read_series(find_dicom(folder))


@pytest.fixture
def opened(tmp_path: Path, series: Series, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SeriesDatastore]]:
    # a watcher of the folder would have its own say in the tests that move it
    monkeypatch.setattr("lib.datastore.series.settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD", False)
    stores: list[SeriesDatastore] = []

    def start(modalities: tuple[str, ...] = ("MR",), presets: tuple[Preset, ...] = ()) -> SeriesDatastore:
        stores.append(open_datastore(str(tmp_path / "studies"), modalities, presets))
        return stores[-1]

    yield start
    for store in stores:
        store.close()


def save(store: SeriesDatastore, image: str, folder: Path) -> None:
    file = write_nifti(folder / "label.nii.gz", np.ones(SHAPE, np.uint8))
    store.save_version(file, Submission(image_id=image, tag="final", user="anna"))


def test_series_is_an_image_beside_the_files(opened: Callable[..., SeriesDatastore], series: Series) -> None:
    store = opened()
    assert store.list_images() == ["file", series.uid]
    assert [store.is_series(image) for image in ("file", series.uid, "nothing")] == [False, True, False]
    assert store.has_image(series.uid)
    assert not store.has_image("1.2.3")
    info = store.get_image_info(series.uid)
    assert (info["PatientID"], info["Modality"], info["SeriesInstanceUID"]) == ("SYNTH-3", "MR", series.uid)
    assert store.status()["total"] == 2


def test_series_of_another_modality_is_none(opened: Callable[..., SeriesDatastore]) -> None:
    assert opened(("CT",)).list_images() == ["file"]


def test_volume_is_the_series_and_is_made_once(opened: Callable[..., SeriesDatastore], series: Series) -> None:
    store = opened()
    file = Path(store.get_image_uri(series.uid))
    image = nib.load(file)
    np.testing.assert_array_equal(np.asarray(image.dataobj), series.read_voxels())
    np.testing.assert_allclose(image.affine, series.affine_ras, atol=1e-5)
    assert image.get_data_dtype() == np.int16
    made = file.stat().st_mtime_ns
    assert Path(store.get_image_uri(series.uid)).stat().st_mtime_ns == made
    for frame in series.frames:
        edit(frame.file, RescaleSlope=0.5, RescaleIntercept=3)
    store.source.index.scan()  # type: ignore[attr-defined]
    changed = nib.load(store.get_image_uri(series.uid))
    np.testing.assert_array_equal(np.asarray(changed.dataobj), series.read_voxels() * 0.5 + 3)


def test_label_of_a_series_is_there_after_a_restart(
    opened: Callable[..., SeriesDatastore], series: Series, tmp_path: Path
) -> None:
    first = opened()
    save(first, series.uid, tmp_path)
    first.update_image_info(series.uid, {"strategy": {"random": {"ts": 7}}})
    first.close()
    again = opened()
    assert again.get_labeled_images() == [series.uid]
    assert again.get_unlabeled_images() == ["file"]
    assert again.status()["completed"] == 1
    assert again.get_image_info(series.uid)["strategy"]["random"]["ts"] == 7
    (pair,) = again.datalist()
    assert Path(pair["image"]).name == f"{series.uid}.nii"
    assert np.asarray(nib.load(pair["label"]).dataobj).all()
    again.refresh()
    assert again.get_labeled_images() == [series.uid], "a look at the folder takes nothing away"


class _Watched(SeriesDatastore):
    """Notes which labels of a series a client would see at each file that a look at the folder comes to."""

    seen: list[dict[str, object]]

    def refusal(self, file: Path) -> str | None:
        for uid in self.source.series() if hasattr(self, "seen") else ():
            self.seen.append(self.get_labels_by_image_id(uid))
        return super().refusal(file)


def test_label_of_a_series_is_there_while_the_folder_is_looked_through(
    opened: Callable[..., SeriesDatastore], series: Series, tmp_path: Path
) -> None:
    """A label that had just been saved was answered with 404 for that long."""
    store = _Watched(tmp_path / "studies", opened().source, auto_reload=False)
    save(store, series.uid, tmp_path)
    store.seen = []
    store.refresh()
    store.close()
    assert store.seen and all("final" in labels for labels in store.seen)


def test_series_that_is_gone_is_no_image_and_its_label_is_kept(
    opened: Callable[..., SeriesDatastore], series: Series, tmp_path: Path
) -> None:
    store = opened()
    save(store, series.uid, tmp_path)
    folder = series.frames[0].file.parent
    shutil.move(folder, tmp_path / "away")
    store.source.index.scan()  # type: ignore[attr-defined]
    assert store.list_images() == ["file"]
    assert not store.has_image(series.uid)
    assert store.get_labeled_images() == []
    assert store.datalist() == []
    with pytest.raises(NotFoundError):
        store.get_image_uri(series.uid)
    shutil.move(tmp_path / "away", folder)
    store.source.index.scan()  # type: ignore[attr-defined]
    assert store.get_labeled_images() == [series.uid]


def test_labelled_series_that_has_lost_a_slice_is_left_out_of_the_training(
    opened: Callable[..., SeriesDatastore], series: Series, tmp_path: Path
) -> None:
    store = opened()
    save(store, series.uid, tmp_path)
    save(store, "file", tmp_path)
    assert len(store.datalist()) == 2
    series.frames[4].file.unlink()
    store.source.index.scan()  # type: ignore[attr-defined]
    assert [Path(pair["image"]).name for pair in store.datalist()] == ["file.nii.gz"]


def _put(folder: Path, uid: str, voxels: np.ndarray, affine: np.ndarray) -> Path:
    """Put a label beside the series by hand, long enough ago to have settled."""
    file = write_nifti(folder / "studies" / "labels" / "final" / f"{uid}.nii.gz", voxels, affine)
    os.utime(file, (1e9, 1e9))
    return file


def test_label_put_beside_a_series_by_hand_is_checked_as_those_of_files_are(
    tmp_path: Path, opened: Callable[..., SeriesDatastore], series: Series
) -> None:
    (tmp_path / "studies" / "labels" / "final").mkdir(parents=True)
    store = opened(presets=(tiny_preset(),))
    assert store.get_labeled_images() == []
    right = np.zeros(SHAPE, np.uint8)
    right[4:9, 4:9, 3:6] = 2
    wrong = {
        "the label has shape (23, 19, 11); valid: its image's (24, 19, 11)": (right[:-1], series.affine_ras),
        "the label lies up to 17 mm away": (right, series.affine_ras + _moved(17.0)),
        "values that are not finite numbers": (np.where(right, np.nan, 0).astype(np.float32), series.affine_ras),
        "the label has the value": (right.astype(np.int16) * -1, series.affine_ras),
    }
    for reason, (voxels, affine) in wrong.items():
        _put(tmp_path, series.uid, voxels, affine)
        store.refresh()
        assert store.get_labeled_images() == [], reason
        assert not store.history.versions(series.uid, "final")
        (problem,) = store.label_problems()
        assert reason in problem.reason and problem.file == f"labels/final/{series.uid}.nii.gz"
    _put(tmp_path, series.uid, right, series.affine_ras)
    store.refresh()
    assert store.get_labeled_images() == [series.uid]
    assert store.label_problems() == []
    kept = nib.load(store.history.latest(series.uid, "final").file)
    np.testing.assert_array_equal(np.asarray(kept.dataobj), right)


def test_label_that_lay_beside_a_series_before_the_start_is_taken_in(
    tmp_path: Path, opened: Callable[..., SeriesDatastore], series: Series
) -> None:
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[4:9, 4:9, 3:6] = 1
    (tmp_path / "studies" / "labels" / "final").mkdir(parents=True)
    _put(tmp_path, series.uid, voxels, series.affine_ras)
    store = opened(presets=(tiny_preset(),))
    store.series()
    store.close()  # does what has been asked for
    assert store.get_labeled_images() == [series.uid]


def _moved(millimetres: float) -> np.ndarray:
    change = np.zeros((4, 4))
    change[0, 3] = millimetres
    return change


def test_series_is_not_removed_as_a_file_is(opened: Callable[..., SeriesDatastore], series: Series) -> None:
    store = opened()
    with pytest.raises(ParameterError, match="remove a DICOM series in its folder or PACS"):
        store.remove_image(series.uid)
    store.remove_image("file")
    assert store.list_images() == [series.uid]


def test_what_was_left_out_of_a_series_is_told(opened: Callable[..., SeriesDatastore], series: Series) -> None:
    store = opened()
    shutil.copy(series.frames[0].file, series.frames[0].file.with_name("scout.dcm"))
    edit(
        series.frames[0].file.with_name("scout.dcm"),
        SOPInstanceUID="1.2.3",
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
    )
    store.source.index.scan()  # type: ignore[attr-defined]
    store.get_image_uri(series.uid)
    assert store.get_image_info(series.uid)["notes"] == ["instance 1.2.3 left out, which is a localizer"]


def test_pacs_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.datastore.series.settings.MONAI_LABEL_DICOMWEB_CACHE_PATH", str(tmp_path))
    store = open_datastore("http://127.0.0.1:9/dicom-web", ["MR"])
    try:
        assert isinstance(store.volumes, VolumeCache)
        with pytest.raises(UpstreamError, match="does not answer as expected"):
            store.list_images()
    finally:
        store.close()
