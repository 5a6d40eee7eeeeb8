"""Validates names from clients: image ids, label tags and file names, none of which may lead out of the studies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from lib.datastore.series import SeriesDatastore
from lib.errors import NotFoundError, ParameterError
from lib.server.http.errors import ForbiddenError

_NEW_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_TAG = re.compile(r"[a-z0-9_-]{1,32}")
_DEVICE_NAMES = frozenset({"con", "prn", "aux", "nul", *(f"{n}{i}" for n in ("com", "lpt") for i in range(1, 10))})
_EXTENSIONS_INSIDE = re.compile(r"\.(nii|nrrd|json|lock)(\.|$)")
LISTED_IDS = 5


def check_new_id(text: str) -> str:
    """Validate the id of a new image.

    Raises:
        ParameterError: unless it is a valid file name on every operating system.
    """
    reserved = text.split(".")[0].lower() in _DEVICE_NAMES
    if not _NEW_ID.fullmatch(text) or text.endswith(".") or reserved or _EXTENSIONS_INSIDE.search(text):
        valid = "1 to 128 letters, digits, '.', '_' or '-', not beginning with '.', and no file extension"
        raise ParameterError("image", text[:200], valid)
    return text


def safe_new_id(text: str) -> str:
    """An id for a new image from a client's name for it, such as 3D Slicer's name of a DICOM series.

    Characters that are not valid in file names everywhere become ``_``; a name that leads to another folder is refused.

    >>> safe_new_id("3: AX T1 POST")
    '3_AX_T1_POST'

    Raises:
        ParameterError: see :func:`check_new_id`.
    """
    if re.search(r"[/\\]", text) or text.startswith(".") or not text.isprintable():
        return check_new_id(text)
    return check_new_id(re.sub(r"[^A-Za-z0-9._-]+", "_", text))


def check_tag(text: str | None) -> str:
    """Validate the tag of a label; ``final`` by default.

    Raises:
        ParameterError: unless it is a valid folder name.
    """
    tag = text or DefaultLabelTag.FINAL.value
    if not _TAG.fullmatch(tag) or tag in _DEVICE_NAMES:
        valid = "final, original, or 1 to 32 lower-case letters, digits, '_' or '-', and no name of a device"
        raise ParameterError("tag", tag[:200], valid)
    return tag


def safe_file_name(sent: str | None, otherwise: str) -> str:
    """The last part of a file name from a client (3D Slicer sends the full local path), without unsafe characters.

    >>> safe_file_name("C:\\\\scans\\\\brain 1.nii.gz", "image.nii.gz")
    'brain_1.nii.gz'
    """
    last = re.split(r"[/\\]", sent or "")[-1]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", last).lstrip(".")
    return name[-100:].lstrip(".") or otherwise


def as_attachment(name: str) -> dict[str, str]:
    """The header with the file name of a download; a file may have any name (RFC 6266, RFC 8187).

    >>> as_attachment("liver.nii.gz")
    {'Content-Disposition': 'attachment; filename="liver.nii.gz"'}
    """
    plain = quote(name)
    kept = f'filename="{name}"' if plain == name else f"filename*=utf-8''{plain}"
    return {"Content-Disposition": f"attachment; {kept}"}


def check_image_known(datastore: Datastore, image_id: str) -> str:
    """The id of an image that exists in the datastore.

    A client that has uploaded ``3: AX T1 POST`` may continue to use that name, as 3D Slicer does.

    Returns:
        The id in the datastore.

    Raises:
        NotFoundError: if there is no such image.
        ParameterError: if it is a series of a case that another series represents.
        ForbiddenError: if its file is not used because it is a link out of the studies or not a regular file.
    """
    if _has(datastore, image_id):
        return image_id
    if isinstance(datastore, SeriesDatastore) and (why := datastore.why_left_out(image_id)) is not None:
        raise ForbiddenError(f"image {image_id!r} {why}")
    if (
        isinstance(datastore, SeriesDatastore)
        and (channel_of_case := datastore.series_cases().channel_of(image_id)) is not None
    ):
        case, channel = channel_of_case
        raise ParameterError("image", image_id, f"{case}, the case of which this series is the channel {channel!r}")
    try:
        safe = safe_new_id(image_id)
    except ParameterError:
        safe = image_id
    if safe == image_id or not _has(datastore, safe):
        raise NotFoundError("image", image_id[:200])
    return safe


def _has(datastore: Datastore, image_id: str) -> bool:
    if isinstance(datastore, SeriesDatastore):
        return datastore.has_image(image_id)  # at once, however many there are
    return image_id in datastore.list_images()


def find_image(datastore: Datastore, image_id: str, studies: str, roots: tuple[Path, ...]) -> Path:
    """The file or folder of an image.

    Args:
        datastore: the datastore.
        image_id: its id; or a path, if an administrator allowed its folder.
        studies: the studies folder, or a server's address.
        roots: other folders that an administrator allowed.

    Raises:
        NotFoundError: if there is none with this id, or if its file no longer exists.
        ForbiddenError: if it is a link out of the studies.
    """
    allowed = [root.resolve() for root in roots]
    if allowed and _is_path_inside(image_id, allowed):
        return Path(image_id)
    image_id = check_image_known(datastore, image_id)
    file = Path(datastore.get_image_uri(image_id))
    if not file.exists():
        raise NotFoundError("image file of", image_id)
    if isinstance(datastore, SeriesDatastore) and datastore.is_series(image_id):
        return file  # created by this server in its own folder
    if isinstance(datastore, SeriesDatastore) and image_id in datastore.channels:
        for one in datastore.channels.files(image_id):
            check_inside(one, [Path(studies).resolve(), *allowed], f"image {image_id!r}")
        return file
    return check_inside(file, [Path(studies).resolve(), *allowed], f"image {image_id!r}")


def check_inside(file: Path, folders: list[Path], what: str) -> Path:
    """Refuse a file outside of ``folders``, to which a link leads.

    Raises:
        ForbiddenError: naming the file, but not the target of the link.
    """
    if not any(file.resolve().is_relative_to(folder) for folder in folders):
        raise ForbiddenError(
            f"{what} lies outside the studies folder; an administrator can allow its folder (image_roots)"
        )
    return file


def find_label(datastore: Datastore, label_id: str, tag: str) -> Path:
    """The file of an image's label.

    Raises:
        NotFoundError: if there is none.
        ForbiddenError: if it is a link out of the studies.
    """
    uri: Any = datastore.get_label_uri(label_id, tag) if tag in datastore.get_labels_by_image_id(label_id) else ""
    if not uri or not Path(uri).is_file():
        raise NotFoundError(f"label {tag!r} of image", label_id[:200])
    file = Path(uri)
    # it may have become a link since the folders were scanned
    if isinstance(datastore, SeriesDatastore) and (why := datastore.refusal(file)) is not None:
        raise ForbiddenError(f"label {tag!r} of image {label_id[:200]!r} {why}")
    return file


def _is_path_inside(text: str, folders: list[Path]) -> bool:
    if "\0" in text:
        return False
    path = Path(text)
    return path.is_absolute() and path.exists() and any(path.resolve().is_relative_to(folder) for folder in folders)
