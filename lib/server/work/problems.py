"""What is wrong with a running server, in sentences for whoever watches over it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from monailabel.interfaces.datastore import Datastore

from lib.datastore.repair import shorten
from lib.datastore.series import SeriesDatastore
from lib.datastore.store import VersionedDatastore
from lib.infers.devices.lanes import Lanes
from lib.server.tasks import TasksByName
from lib.storage.disk import MIB
from lib.storage.full_disk import storage_problem
from lib.trainers.task import UnetrTrainTask


def device_problems(lanes: Lanes) -> list[str]:
    """A sentence for each device that is out, where no other is left."""
    return [] if lanes.any_works else lanes.problems()


def device_warnings(lanes: Lanes) -> list[str]:
    """A sentence for each device that is out beside others that work."""
    return lanes.problems() if lanes.any_works else []


def weights_warnings(trainers: TasksByName[UnetrTrainTask]) -> list[str]:
    """A sentence for each model that is served by another version than its live one."""
    states = {name: task.serving() for name, task in trainers.items()}
    return [f"model {name!r}: {problem}" for name, (serving, problem) in states.items() if serving and problem]


def left_out_warnings(store: VersionedDatastore, named: bool = True) -> list[str]:
    """A sentence for each of the first files of the studies that are not taken in, and how many more there are.

    Args:
        store: the studies.
        named: whether the files are named.
    """
    left_out = store.left_out()
    if left_out and not named:
        return [f"{len(left_out)} files of the studies are left out; their names are for those who may see the studies"]
    return shorten([f"{name!r} is left out: it {why}" for name, why in sorted(left_out.items())])


def disk_problems(folder: Path | None, wanted_mib: int) -> list[str]:
    """What is wrong with the studies folder, on whose disk so much is to be free; nothing where there is no folder."""
    if folder is None:
        return []
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
    except OSError as error:
        problem = storage_problem(error) or error.strerror or error
        return [f"the studies folder cannot be written to: {problem}"]
    free_mib = shutil.disk_usage(folder).free // MIB
    return [f"{free_mib} MiB of disk are free; valid: at least {wanted_mib} MiB"] if free_mib < wanted_mib else []


def store_problems(store: VersionedDatastore) -> list[str]:
    """What cannot be served since the studies folder cannot be written to."""
    if not store.history.read_only:
        return []
    return [
        "the studies folder cannot be written to: images are segmented and labels shown as they are; labels and images "
        "that are sent are refused (507), and who works on which case is forgotten at the next start"
    ]


def source_problems(store: Datastore) -> list[str]:
    """What is wrong with where the series come from: a PACS that does not answer, an index that stands still."""
    problem = store.source.problem() if isinstance(store, SeriesDatastore) else ""
    return [problem] if problem else []


def studies_folder(studies: str) -> Path | None:
    """The studies folder; None where the studies are a server."""
    return None if studies.startswith(("http://", "https://")) else Path(studies)
