"""The series of a DICOM study as channels of one case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from dicom_series import SeriesIdentity, write_series

from lib.configs.preset import Channel, Preset
from lib.datastore.images.channel_series import is_channel
from lib.datastore.series import SeriesDatastore, open_datastore
from lib.dicom.sources import SeriesInfo
from lib.errors import ConfigError, ImageError, ParameterError
from lib.server.http.names import check_image_known
from lib.transforms.inputs import read_input
from tests.dicom.conftest import edit
from tests.tiny import tiny_preset

FINE, COARSE = np.eye(4), np.diag([2.0, 2.0, 2.0, 1.0])
TWO = tiny_preset(channels=[{"name": "t1"}, {"name": "flair", "display": True}])
Open = Callable[..., SeriesDatastore]


def _write(folder: Path, description: str, voxels: np.ndarray, affine: np.ndarray, patient: str = "SYNTH-1") -> None:
    write_series(folder, voxels, affine, SeriesIdentity(patient, "MR", description))


def _ramp(shape: tuple[int, int, int], step: int) -> np.ndarray:
    x, y, z = np.meshgrid(*(step * np.arange(size) for size in shape), indexing="ij")
    return x + 20 * y + 400 * z


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Two series of one study on different grids, and a study that has T1 alone."""
    _write(tmp_path / "studies" / "p1" / "t1", "AX T1 native", _ramp((12, 11, 10), 2), COARSE)
    _write(tmp_path / "studies" / "p1" / "flair", "Sag FLAIR 3D", _ramp((20, 18, 16), 1), FINE)
    _write(tmp_path / "studies" / "p2" / "t1", "AX T1", _ramp((20, 18, 16), 1), FINE, "SYNTH-2")
    return tmp_path / "studies"


@pytest.fixture
def open_store(studies: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setattr("lib.datastore.series.settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD", False)
    stores: list[SeriesDatastore] = []

    def start(*presets: Preset) -> SeriesDatastore:
        stores.append(open_datastore(str(studies), ["MR"], presets or [TWO]))
        return stores[-1]

    yield start
    for store in stores:
        store.close()


def _uids(store: SeriesDatastore) -> dict[str, str]:
    return {info.attributes["SeriesDescription"]: uid for uid, info in store.series().items()}


def test_two_series_on_different_grids_are_one_case_on_the_grid_that_is_shown(open_store: Open) -> None:
    store = open_store()
    uids = _uids(store)
    shown, t1, other = uids["Sag FLAIR 3D"], uids["AX T1 native"], uids["AX T1"]
    assert sorted(store.list_images()) == sorted([shown, other])
    assert (store.has_image(shown), store.has_image(t1)) == (True, False)
    volume = read_input(Path(store.get_image_uri(shown)), TWO)
    assert volume.notes == ("channel t1 was resampled onto the grid of flair",)
    np.testing.assert_allclose(sorted(volume.spacing_mm), [1, 1, 1])
    both = volume.channels[0] > 0  # both ramps say where a voxel lies, and so they agree where both are
    assert both.mean() > 0.8
    np.testing.assert_allclose(volume.channels[0][both], volume.channels[1][both], atol=1e-2)
    with pytest.raises(ImageError, match=f"image '{other}' lacks other sequences"):
        read_input(Path(store.get_image_uri(other)), TWO)
    with pytest.raises(ParameterError, match=f"valid: {shown}, the case of which this series is the channel 't1'"):
        check_image_known(store, t1)


def test_another_frame_of_reference_is_told_and_two_series_of_a_channel_are_refused(
    studies: Path, open_store: Open
) -> None:
    store = open_store()
    for file in (studies / "p1" / "t1").iterdir():
        edit(file, FrameOfReferenceUID="1.2.3")
    store.source.index.scan()  # type: ignore[attr-defined]
    shown = _uids(store)["Sag FLAIR 3D"]
    words = "channel t1 has another frame of reference than flair: whether they lie on each other is not known"
    assert read_input(Path(store.get_image_uri(shown)), TWO).notes[0] == words
    _write(studies / "p1" / "again", "COR T1", _ramp((12, 11, 10), 2) + 3, COARSE)
    store.source.index.scan()  # type: ignore[attr-defined]
    with pytest.raises(ImageError, match=r"has several series for the channel 't1': '.*T1.*' .* and '.*T1.*'"):
        read_input(Path(store.get_image_uri(shown)), TWO)


def test_rules_choose_among_series_of_the_same_name(studies: Path, open_store: Open) -> None:
    _write(studies / "p1" / "again", "AX T1 native 2", _ramp((20, 18, 16), 1) + 3, FINE)
    for file in (studies / "p1" / "again").iterdir():
        edit(file, EchoTime=9, ContrastBolusAgent="Gd")
    rules = {"SeriesDescription": "*t1*", "EchoTime": "8..10", "ContrastBolusAgent": "*"}
    preset = tiny_preset(channels=[{"name": "t1", "series": rules}, {"name": "flair", "display": True}])
    store = open_store(preset)
    volume = read_input(Path(store.get_image_uri(_uids(store)["Sag FLAIR 3D"])), preset)
    assert volume.notes == ()
    np.testing.assert_array_equal(volume.channels[0], volume.channels[1] + 3)


@pytest.mark.parametrize(
    ("rules", "fits"),
    [
        ({"EchoTime": "80..120"}, True),
        ({"EchoTime": "..80"}, False),
        ({"EchoTime": "90.."}, True),
        ({"EchoTime": "90.5"}, True),
        ({"SeriesDescription": "ax*"}, True),
        ({"SeriesDescription": "flair"}, False),
        ({"ScanningSequence": "IR", "Modality": "MR"}, True),
        ({"ScanningSequence": "GR"}, False),
        ({"ContrastBolusAgent": "*"}, False),
    ],
)
def test_rule_fits(rules: dict[str, str], fits: bool) -> None:
    matched = {"SeriesDescription": ("AX FLAIR",), "ScanningSequence": ("SE", "IR"), "Modality": ("MR",)}
    info = SeriesInfo("1", "2", {}, {}, matched | {"EchoTime": ("90.5",)})
    assert is_channel(info, Channel(name="flair", series=rules)) is fits


def test_a_rule_of_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'channels.0.series.PatientName'; valid: .*SeriesDescription"):
        tiny_preset(channels=[{"name": "t1", "series": {"PatientName": "*"}}, {"name": "flair"}])
