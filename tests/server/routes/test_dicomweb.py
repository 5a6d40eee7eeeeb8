"""DICOMweb of a folder without a server: who may read and store what is presented, and what a restart leaves known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dicom_series import SeriesIdentity, write_series
from pydicom import dcmread

from lib.configs.catalogue import load_preset
from lib.datastore.series import SeriesDatastore, open_datastore
from lib.server.dependencies import get_presented, get_segmentations, get_store, get_studies
from lib.server.http.auth import Authenticator, Role, User
from lib.server.http.errors import ForbiddenError, UnauthorizedError
from lib.server.presented.cases import PresentedCases
from lib.server.routes.dicomweb import router
from tests.server.in_process import InProcess

PRESETS = {name: load_preset(name) for name in ("hippocampus_mr", "abdomen_ct")}
VALUES = np.random.default_rng(5).integers(0, 900, (12, 11, 10)).astype(np.int16)


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """A file, a CT in a file, a series, and a series with a slice that is there twice."""
    folder = tmp_path / "studies"
    folder.mkdir()
    nib.save(nib.Nifti1Image(VALUES, np.eye(4)), folder / "file.nii.gz")
    hounsfield = VALUES.astype(np.int16) - 1000
    nib.save(nib.Nifti1Image(hounsfield, np.eye(4)), folder / "ct.nii.gz")
    for name in ("plain", "doubled"):
        files = write_series(folder / name, VALUES, np.eye(4), SeriesIdentity(f"SYNTH-{name}", "MR", name))
        again = dcmread(files[4])
        again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
        if name == "doubled":
            again.save_as(folder / name / "again.dcm")
    return folder


@pytest.fixture
def open_studies(studies: Path) -> Callable[[], Any]:
    """Services over the studies, as after a start of the server."""

    def made() -> Any:
        store = open_datastore(str(studies), ["MR", "CT"], list(PRESETS.values()))
        assert isinstance(store, SeriesDatastore)
        index = store.source.index  # type: ignore[attr-defined]
        index.scan()
        file_of = lambda image: Path(store.get_image_uri(image))  # noqa: E731
        memory = store.volumes.folder.parent / "modalities.json"
        presented = PresentedCases(store, file_of, PRESETS, 2**20, index=index, memory=memory)
        return SimpleNamespace(store=store, presented=presented)

    return made


def addresses(parts: Any) -> list[str]:
    """Of the series of the four images and the regular one: metadata, an instance, a frame and a picture."""
    found = []
    for entry in [*parts.store.source.index.entries(), *parts.presented.entries()]:
        place = f"/dicom-web/studies/{entry.study}/series/{entry.series}"
        sop = entry.summary["00080018"]["Value"][0]
        ends = ("metadata", f"instances/{sop}", f"instances/{sop}/frames/1", f"instances/{sop}/rendered")
        found += [f"{place}/{end}" for end in ends]
    return found


class Provider(Authenticator):
    """Stands in for an OpenID provider, which knows a user who may look, and one with none of the roles."""

    def __init__(self) -> None:
        super().__init__(None, openid=True)

    def identify_token(self, token: str) -> User:
        if token == "uma":
            return User("uma", Role.USER)
        if token == "nora":
            raise ForbiddenError("user 'nora' has none of this server's roles")
        raise UnauthorizedError("the token is not valid")


def test_presented_series_need_the_same_rights_as_files(open_studies: Callable[[], Any]) -> None:
    parts = open_studies()
    services = {get_store: parts.store, get_studies: "", get_presented: parts.presented, get_segmentations: None}
    api = InProcess(router, services, Provider())
    reads = addresses(parts)
    assert len(reads) == 4 * 5
    known, unknown, without = ({"Authorization": f"Bearer {token}"} for token in ("uma", "wrong", "nora"))
    lists = ["/dicom-web/studies", "/dicom-web/series", "/proxy/dicom/qido/studies"]
    for address in [*reads, *lists]:
        assert api.request("GET", address).status_code == 401, address
        assert api.request("GET", address, headers=unknown).status_code == 401, address
        assert api.request("GET", address, headers=without).status_code == 403, address
        assert api.request("GET", address, headers=known).status_code == 200, address
    for study in {address.split("/series/")[0] for address in reads}:
        for place in (study, study.replace("/dicom-web", "/proxy/dicom/stow")):
            assert api.request("POST", place).status_code == 401, place
            assert api.request("POST", place, headers=known).status_code == 403, place


def test_modality_that_was_found_out_is_known_after_a_restart_and_not_of_another_file(
    open_studies: Callable[[], Any], studies: Path
) -> None:
    def listed(parts: Any) -> dict[str, str]:
        return {
            entry.summary["00100020"]["Value"][0]: entry.modality
            for entry in parts.presented.entries()
            if not entry.summary["00100020"]["Value"][0].startswith("SYNTH")
        }

    parts = open_studies()
    assert listed(parts) == {"file": "MR", "ct": "MR"}, "nothing has been opened yet"
    parts.presented.open("ct")
    assert listed(parts) == {"file": "MR", "ct": "CT"}
    again = open_studies()
    assert listed(again) == {"file": "MR", "ct": "CT"}
    nib.save(nib.Nifti1Image(VALUES, np.eye(4)), studies / "ct.nii.gz")
    assert again.presented.attributes("ct")["Modality"] == "MR", "another file may be of another modality"
    (studies / ".dicom" / "modalities.json").write_text("[1")
    assert listed(open_studies()) == {"file": "MR", "ct": "MR"}
