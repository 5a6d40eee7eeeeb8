"""Repairs the label history after a crash, a full disk or manual changes, and describes the repairs as sentences.

The files take precedence over the index. All repairs run while nobody else writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lib.datastore.index import VersionIndex
from lib.datastore.quarantine import Quarantine
from lib.datastore.records import (
    FINAL,
    LABEL_SUFFIXES,
    VERSIONS_A_FOLDER,
    LabelVersion,
    from_side_car,
    parse_stem,
    suffix_of,
    to_record,
)
from lib.storage.files import remove_left_over, sha256_of, write_durably
from lib.storage.json_files import as_json, read_json

MOST_SENTENCES_OF_A_KIND = 10


@dataclass
class _VersionFiles:
    """The files of a version."""

    stem: Path
    label: Path | None = None
    side_car: Path | None = None


@dataclass(frozen=True)
class _Store:
    """The store to repair, and whether changes on disk are allowed."""

    versions: Path
    labels: Path
    index: VersionIndex
    quarantine: Quarantine
    read_only: bool


def repair(
    versions: Path, labels: Path, index: VersionIndex, quarantine: Quarantine, read_only: bool = False
) -> list[str]:
    """Make the index agree with the files.

    Args:
        versions: folder of the versions.
        labels: folder of the published labels, which may contain incomplete copies.
        index: the index, which is adapted to the files.
        quarantine: receives files that are not versions but may be somebody's work.
        read_only: whether to change nothing on disk.

    Returns:
        A sentence for each repair.
    """
    done = [] if read_only else _clear_left_over(versions, labels)
    store, on_disk, indexed = _Store(versions, labels, index, quarantine, read_only), _scan(versions), index.records()
    with index.transaction():
        for sequence in sorted(on_disk.keys() | indexed.keys()):
            sentence = _settle(store, sequence, on_disk.get(sequence), indexed.get(sequence))
            done += [sentence] if sentence else []
    return shorten(done)


def _clear_left_over(versions: Path, labels: Path) -> list[str]:
    folders = [versions, *_folders_in(versions), *_folders_in(versions.parent / "sent"), *_folders_in(labels)]
    removed = [path for folder in folders for path in remove_left_over(folder)]
    return [f"{len(removed)} half-written temporary files were removed"] if removed else []


def _folders_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _scan(folder: Path) -> dict[int, _VersionFiles]:
    """The files below a folder that have names of versions. Links are ignored, since this project creates none."""
    versions: dict[int, _VersionFiles] = {}
    for shard in sorted(path for path in _folders_in(folder) if not path.is_symlink()):
        for path in shard.iterdir():
            if path.is_symlink():
                continue
            suffix = next((s for s in (*LABEL_SUFFIXES, ".json") if path.name.endswith(s)), None)
            stem = path.name.removesuffix(suffix) if suffix else ""
            parsed = parse_stem(stem)
            if parsed is None:
                continue
            version = versions.setdefault(parsed[0], _VersionFiles(shard / stem))
            if suffix == ".json":
                version.side_car = path
            else:
                version.label = path
    return versions


def _settle(store: _Store, sequence: int, files: _VersionFiles | None, indexed: Mapping[str, Any] | None) -> str:
    """Repair one version; returns a sentence, or an empty text if it was intact."""
    removal = indexed is not None and indexed.get("removal", False)
    if files is not None and files.label is not None:
        if indexed is None:
            return _take_in(store, files, files.label)
        if files.side_car is None and not store.read_only:
            write_durably(_side_car(files), as_json(indexed))
            return f"the lost side-car of version {sequence} was written again"
        return ""
    if indexed is not None and not removal:
        if _put_back(store, indexed, files):
            return f"the lost file of version {sequence} was written again from its copy in labels/{indexed['tag']}"
        store.index.drop(sequence)
        return f"version {sequence} is gone: somebody removed its file ({indexed['file']})"
    return _take_in_removal(store, files, files.side_car) if indexed is None and files and files.side_car else ""


def _put_back(store: _Store, record: Mapping[str, Any], files: _VersionFiles | None) -> bool:
    """Restore a lost version from the copy in ``labels/<tag>``, if the copy is unchanged."""
    suffix = suffix_of(Path(record["file"]))
    copy = store.labels / record["tag"] / f"{record['image_id']}{suffix}"
    if store.read_only or not copy.is_file() or sha256_of(copy) != record["sha256"]:
        return False
    folder = store.versions / f"{record['sequence'] // VERSIONS_A_FOLDER:05d}"
    folder.mkdir(exist_ok=True)
    if files is None or files.side_car is None:
        write_durably(folder / f"{Path(record['file']).name.removesuffix(suffix)}.json", as_json(record))
    write_durably(folder / record["file"], copy.read_bytes())
    return True


def _take_in(store: _Store, files: _VersionFiles, label: Path) -> str:
    """Add a version to the index that exists only on disk."""
    version, problem = _read_side_car(files, label)
    if version is None:
        return _recover(store, files, label, problem)
    if version.size != label.stat().st_size:
        return _quarantine(store, files, label, f"it has {label.stat().st_size} bytes instead of {version.size}")
    store.index.insert(to_record(version))
    return f"version {version.version_id} of {version.image_id!r} was taken into the index"


def _read_side_car(files: _VersionFiles, label: Path) -> tuple[LabelVersion | None, str]:
    if files.side_car is None:
        return None, "its side-car was lost"
    try:
        version = from_side_car(files.side_car)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"its side-car was damaged ({error})"
    named = parse_stem(files.stem.name)
    matches = version.file.name == label.name and named is not None and named[0] == version.sequence
    return (version, "") if matches else (None, "its side-car was another version's")


def _recover(store: _Store, files: _VersionFiles, label: Path, problem: str) -> str:
    """Recover a label without a usable side-car: its name identifies it, and all other information is lost."""
    sequence, tag, image_id = parse_stem(files.stem.name) or (0, "", "")
    if not image_id:
        return _quarantine(store, files, label, f"{problem}, and its name does not say which image it belongs to")
    digest, status = sha256_of(label), label.stat()
    saved_at = datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat(timespec="milliseconds")
    version = LabelVersion(
        image_id=image_id, tag=tag or FINAL, source="recovered", notes=(problem,), sequence=sequence,
        version_id=f"{sequence:08d}-{digest[:8]}", file=label, size=status.st_size, sha256=digest, saved_at=saved_at,
    )  # fmt: skip
    if not store.read_only:
        if files.side_car is not None:
            store.quarantine.keep(files.side_car, problem, {"image_id": image_id, "version": version.version_id})
        write_durably(_side_car(files), as_json(to_record(version)))
    store.index.insert(to_record(version))
    return f"version {version.version_id} of {image_id!r} was recovered: {problem}"


def _take_in_removal(store: _Store, files: _VersionFiles, side_car: Path) -> str:
    """Handle a side-car without a label, which is a removal, or a save that did not get as far as its label."""
    try:
        record: Mapping[str, Any] = read_json(side_car)
        if record.get("removal"):
            from_side_car(side_car)
            store.index.insert(record)
            return f"the removal {record['version_id']} of {record['image_id']!r} was taken into the index"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    if not store.read_only:
        side_car.unlink()
    return f"a save of {files.stem.name!r} that was not finished was cleared away"


def _quarantine(store: _Store, files: _VersionFiles, label: Path, problem: str) -> str:
    if not store.read_only:
        store.quarantine.keep(label, problem, {"version": files.stem.name})
        label.unlink()
        if files.side_car is not None:
            files.side_car.unlink()
    return f"version {files.stem.name!r} was put into quarantine: {problem}"


def _side_car(files: _VersionFiles) -> Path:
    return files.stem.with_name(files.stem.name + ".json")


def shorten(sentences: list[str]) -> list[str]:
    """The first ten sentences, and the number of further ones."""
    kept = sentences[:MOST_SENTENCES_OF_A_KIND]
    more = len(sentences) - len(kept)
    return [*kept, f"... and {more} more"] if more else kept
