"""A view of the studies for strategies, without leased and skipped cases."""

from __future__ import annotations

from collections.abc import Set
from typing import Any


class OpenCases:
    """Wraps a datastore and hides some of its unlabelled images.

    Args:
        datastore: any datastore of MONAI Label.
        closed: ids that must not be chosen.
    """

    def __init__(self, datastore: Any, closed: Set[str]) -> None:
        self._datastore = datastore
        self._closed = closed

    def get_unlabeled_images(self, *args: Any, **options: Any) -> list[str]:
        """The unlabelled images that are not hidden."""
        images = self._datastore.get_unlabeled_images(*args, **options)
        return [image for image in images if image not in self._closed]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._datastore, name)
