"""The studies as a strategy may see them: without the cases that somebody works on or has skipped."""

from __future__ import annotations

from collections.abc import Set
from typing import Any


class OpenCases:
    """A datastore that hides some unlabelled images, and is the datastore itself in everything else.

    Args:
        datastore: any of MONAI Label's.
        closed: ids that are not to be chosen.
    """

    def __init__(self, datastore: Any, closed: Set[str]) -> None:
        self._datastore = datastore
        self._closed = closed

    def get_unlabeled_images(self, *args: Any, **options: Any) -> list[str]:
        """The unlabelled images that are open."""
        images = self._datastore.get_unlabeled_images(*args, **options)
        return [image for image in images if image not in self._closed]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._datastore, name)
