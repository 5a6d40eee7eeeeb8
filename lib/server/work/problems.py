"""The problems of a running server as sentences, for monitoring."""

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
    """A sentence for each failed device, if no device works."""
    return [] if lanes.any_works else lanes.problems()


def device_warnings(lanes: Lanes) -> list[str]:
    """A sentence for each failed device, if others work."""
    return lanes.problems() if lanes.any_works else []


def weights_warnings(trainers: TasksByName[UnetrTrainTask]) -> list[str]:
    """A sentence for each model that uses another version than its live one."""
    states = {name: task.serving() for name, task in trainers.items()}
    return [f"model {name!r}: {problem}" for name, (serving, problem) in states.items() if serving and problem]


def left_out_warnings(store: VersionedDatastore, named: bool = True) -> list[str]:
    """A sentence for each unused folder and for each of the first unused files, and the number of further ones.

    Args:
        store: the studies.
        named: whether to include file names.
    """
    folders = shorten([f"{name!r} {why}" for name, why in sorted(store.folders_left_out().items())])
    left_out = store.left_out()
    if left_out and not named:
        names = "their names are for those who may see the studies"
        return [*folders, f"{len(left_out)} files of the studies are left out; {names}"]
    return folders + shorten([f"{name!r} is left out: it {why}" for name, why in sorted(left_out.items())])


def disk_problems(folder: Path | None, wanted_mib: int) -> list[str]:
    """The problems of the studies folder, on whose disk this much space must be free; none without a folder."""
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
    """What is unavailable because the studies folder is not writable."""
    if not store.history.read_only:
        return []
    return [
        "the studies folder cannot be written to: images are segmented and labels shown as they are; labels and images "
        "that are sent are refused (507), and who works on which case is forgotten at the next start"
    ]


def source_problems(store: Datastore) -> list[str]:
    """The problems of the source of series: a PACS that does not respond, or an index that makes no progress."""
    problem = store.source.problem() if isinstance(store, SeriesDatastore) else ""
    return [problem] if problem else []


def studies_folder(studies: str) -> Path | None:
    """The studies folder; None if the studies are on a server."""
    return None if studies.startswith(("http://", "https://")) else Path(studies)
