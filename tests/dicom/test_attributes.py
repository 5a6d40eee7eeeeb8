"""Attributes as DICOM JSON."""

from __future__ import annotations

from typing import Any

from pydicom import config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from lib.dicom.attributes import to_json


class Watching(DataElement):
    """A value that notes how strictly the process reads while it is converted."""

    def to_json_dict(self, *arguments: Any, **options: Any) -> Any:
        modes.append(config.settings.reading_validation_mode)
        return super().to_json_dict(*arguments, **options)


class Unfit(DataElement):
    """A value that cannot be converted."""

    def to_json_dict(self, *arguments: Any, **options: Any) -> Any:
        raise OverflowError("too long")


modes: list[int] = []


def test_how_strictly_other_threads_read_is_not_touched() -> None:
    """pydicom keeps it for the process: two threads that changed it at once left it changed, and files were refused."""
    instance = Dataset()
    instance.add(Watching(0x00100020, "LO", "P1"))
    modes.clear()
    assert to_json(instance) == {"00100020": {"vr": "LO", "Value": ["P1"]}}
    assert modes == [config.WARN], "as pydicom reads by default"


def test_value_that_json_cannot_hold_is_left_out_alone() -> None:
    instance = Dataset()
    instance.add(Unfit(0x00080060, "CS", "MR"))
    instance.PatientID = "P1"
    assert to_json(instance) == {"00100020": {"vr": "LO", "Value": ["P1"]}}
