"""Finds the images of the studies by their ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from monailabel.interfaces.datastore import Datastore

from lib.errors import NotFoundError
from lib.server.http.names import check_image_known, find_image


@dataclass(frozen=True)
class Images:
    """Finds images; a file may also be named by the UIDs of the series that presents it.

    Args:
        datastore: the datastore.
        studies: the folder of the studies, or the address of a DICOMweb server.
        roots: folders whose files may be named by path.
        case_of: returns the case that a series or study UID presents; None if it presents none.
    """

    datastore: Datastore
    studies: str
    roots: tuple[Path, ...]
    case_of: Callable[[str], str | None]

    def check(self, image_id: str) -> str:
        """The id of an image in the studies.

        Raises:
            NotFoundError: if there is none.
        """
        return check_image_known(self.datastore, self.case_of(image_id) or image_id)

    def known_id(self, image_id: str) -> str:
        """Like :meth:`check`; a path below ``roots`` is returned unchanged."""
        try:
            return self.check(image_id)
        except NotFoundError:
            return image_id

    def file(self, image_id: str) -> Path:
        """The file or folder of an image.

        Raises:
            NotFoundError, ForbiddenError: see :func:`lib.server.http.names.find_image`.
        """
        return find_image(self.datastore, self.case_of(image_id) or image_id, self.studies, self.roots)
