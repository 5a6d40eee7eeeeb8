"""The stored scores of a preset's cases, and the version that computed them, for selections."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lib.activelearning.score_store import UNTRAINED, CaseScoreRecord, ScoreStore
from lib.activelearning.selection import Candidate, Pool
from lib.configs.preset import Preset
from lib.errors import CheckpointError
from lib.models.weights import WeightsFile, WeightsLocator

logger = logging.getLogger("unetr.scoring")


@dataclass(frozen=True)
class PoolKnowledge:
    """The scores of a preset's cases.

    Attributes:
        preset: the task.
        locator: finds its weights.
        store: the store of the scores.
    """

    preset: Preset
    locator: WeightsLocator
    store: ScoreStore

    def version(self) -> str:
        """The key of the live version, under which its scores are stored."""
        try:
            return version_key(self.locator.find())
        except CheckpointError as error:
            logger.warning("the next case is chosen without the model of %r: %s", self.preset.name, error)
            return UNTRAINED

    def score_records(self) -> tuple[str, Mapping[str, CaseScoreRecord]]:
        """Scores of the live version, or of its predecessor as long as the live version has scored no case.

        Returns:
            The version that computed the scores, and the record of each image.
        """
        current = self.version()
        records = self.store.score_records(current)
        if any(not record.problem for record in records.values()):
            return current, records
        before = self.store.latest()
        return (before, self.store.score_records(before)) if before is not None else (current, records)

    def pool(self, unlabelled: Iterable[str], labelled: Iterable[str]) -> tuple[Pool, str]:
        """The pool of these cases, and the version that computed its scores."""
        version, records = self.score_records()
        candidates = [_candidate(image, records.get(image)) for image in unlabelled]
        vectors = [
            v for i in labelled if (record := records.get(i)) is not None and (v := record.scores.embedding) is not None
        ]
        return Pool(candidates, np.array(vectors) if vectors else None), version


def version_key(file: WeightsFile | None) -> str:
    """The key under which a version's scores are stored; it changes with the weights.

    The key of a published version is its name. Other weights files can be replaced, so their key contains a stamp.
    """
    if file is None:
        return UNTRAINED
    if file.origin == "published":
        return file.version
    return f"{file.version}-{hashlib.sha256(repr(file.stamp).encode()).hexdigest()[:8]}"


def version_name(key: str) -> str:
    """The name of a version for users.

    >>> version_name("shipped-1a2b3c4d"), version_name("v0007")
    ('shipped', 'v0007')
    """
    return key.partition("-")[0]


def _candidate(image: str, record: CaseScoreRecord | None) -> Candidate:
    if record is None:
        return Candidate(image)
    return Candidate(image, record.scores.values, record.scores.embedding, record.scores.foreground_voxels)
