"""The images of the studies, found by the ids that clients name."""

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
        datastore: where they are.
        studies: the folder of the studies, or the address of a DICOMweb server.
        roots: folders whose files may be named by their paths.
        case_of: the case that a series or study presents, by its UID; None where it presents none.
    """

    datastore: Datastore
    studies: str
    roots: tuple[Path, ...]
    case_of: Callable[[str], str | None]

    def check(self, image_id: str) -> str:
        """The id by which the studies have an image.

        Raises:
            NotFoundError: when there is none.
        """
        return check_image_known(self.datastore, self.case_of(image_id) or image_id)

    def known_id(self, image_id: str) -> str:
        """The same, and a path below ``roots`` as it is."""
        try:
            return self.check(image_id)
        except NotFoundError:
            return image_id

    def file(self, image_id: str) -> Path:
        """The file or folder of an image.

        Raises:
            NotFoundError, ForbiddenError: as :func:`lib.server.http.names.find_image`.
        """
        return find_image(self.datastore, self.case_of(image_id) or image_id, self.studies, self.roots)
