"""Which images Next Sample leaves out, read as an inference would read them."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lib.configs.preset import Preset
from lib.datastore.store import VersionedDatastore
from lib.server.work.image_checks import ImageInspector
from tests.tiny import boxes, write_nifti


@pytest.fixture
def inspector(tmp_path: Path, preset: Preset) -> Iterator[ImageInspector]:
    write_nifti(tmp_path / "whole.nii.gz", boxes()[0])
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((32767, 32767, 32767))
    (tmp_path / "vast.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(1000)))
    store = VersionedDatastore(str(tmp_path), extensions=["*.nii.gz"])
    yield ImageInspector(store, {preset.name: preset}, {}, lambda image: Path(store.get_image_uri(image)))
    store.close()


def test_image_that_memory_does_not_hold_is_left_out_as_long_as_that_is_so(
    inspector: ImageInspector, preset: Preset
) -> None:
    assert inspector.check("whole", preset).problem == ""
    assert "GiB are free" in inspector.check("vast", preset).problem
    assert inspector.left_out(preset.name) == {}, "the next time there may be more"
