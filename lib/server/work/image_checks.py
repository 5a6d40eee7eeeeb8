"""Determines which images are excluded from the pool because they cannot be segmented, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from lib.activelearning.pool_knowledge import PoolKnowledge
from lib.activelearning.score_store import CaseScoreRecord
from lib.configs.preset import Preset
from lib.datastore.images.checks import ImageCheck
from lib.datastore.store import VersionedDatastore
from lib.errors import ImageError, MemoryBudgetError, OtherModalityError
from lib.transforms.inputs import read_input
from lib.transforms.intensity_range import check_modality, range_warning
from lib.transforms.volume import check_segmentable, reading_warning

logger = logging.getLogger("unetr.server")


@dataclass(frozen=True)
class ImageInspector:
    """Reads images like an inference does, and stores their problems.

    Args:
        store: the studies, with the stored checks.
        presets: the served presets, by name.
        pool_knowledge: stored scores of the images, by preset.
        image_file: returns the file or folder of an image, or raises ``NotFoundError`` or ``UpstreamError``.
    """

    store: VersionedDatastore
    presets: Mapping[str, Preset]
    pool_knowledge: Mapping[str, PoolKnowledge]
    image_file: Callable[[str], Path]

    def check(self, image_id: str, preset: Preset) -> ImageCheck:
        """The problem of an image, which is read now unless this was done since its last change.

        Raises:
            NotFoundError, UpstreamError: if it is unavailable.
        """
        stamp = self.store.stamp(image_id)
        known = self.store.checks.find(image_id, preset.name, stamp)
        if known is not None:
            return known
        problem, warning, elsewhere = "", "", False
        try:
            warning = inspect(self.image_file(image_id), preset, [other.modality for other in self.presets.values()])
        except MemoryBudgetError as error:  # not stored, since there may be more memory the next time
            logger.warning("image %s is not taken for %s: %s", image_id, preset.name, error)
            return ImageCheck(image_id, preset.name, stamp, str(error))
        except ImageError as error:
            problem, elsewhere = str(error), isinstance(error, OtherModalityError)
            logger.warning("image %s is left out of the pool of %s: %s", image_id, preset.name, problem)
        check = ImageCheck(image_id, preset.name, stamp, problem, warning, elsewhere)
        self.store.checks.keep(check)
        return check

    def left_out(self, model: str) -> dict[str, ImageCheck]:
        """The images that a model's network cannot segment, as far as they have been read, including by the scoring.

        An image that has changed since is in the pool again, and is read again.
        """
        knowledge = self.pool_knowledge.get(model)
        if knowledge is not None:
            for image_id, record in knowledge.score_records()[1].items():
                if record.problem and self.store.has_image(image_id):
                    self._take_over(image_id, model, record)
        checks = {}
        for check in self.store.checks.remarkable():
            if check.preset == model and check.problem and self.store.has_image(check.image_id):
                if self.store.stamp(check.image_id) == check.stamp:
                    checks[check.image_id] = check
                else:
                    self.forget(check.image_id)
        return checks

    def broken(self) -> dict[str, ImageCheck]:
        """The images that are excluded because of a problem, and not because of their modality."""
        checks = (check for model in self.presets for check in self.left_out(model).values())
        return {check.image_id: check for check in checks if not check.elsewhere}

    def warned(self) -> list[ImageCheck]:
        """The images with unusual intensities that can be segmented."""
        checks = self.store.checks.remarkable()
        return [check for check in checks if not check.problem and self.store.has_image(check.image_id)]

    def forget(self, image_id: str) -> None:
        """Delete the checks of an image, so that it is read again by the next check."""
        self.store.checks.forget(image_id)
        for knowledge in self.pool_knowledge.values():
            knowledge.store.forget(image_id)

    def _take_over(self, image_id: str, model: str, record: CaseScoreRecord) -> None:
        """Store the problem that the scoring found, unless the server has read the image itself."""
        known = [check for check in self.store.checks.of_image(image_id) if check.preset == model]
        if not known:
            stamp = self.store.stamp(image_id)
            self.store.checks.keep(ImageCheck(image_id, model, stamp, record.problem, elsewhere=record.elsewhere))


def inspect(path: Path, preset: Preset, served_modalities: Collection[str]) -> str:
    """Read an image like an inference does; returns a warning on its intensities.

    Raises:
        ImageError: if a preset's network cannot segment it, or if a preset of another modality fits it better.
    """
    volume = read_input(path, preset)
    check_segmentable(volume, preset, path.name)
    check_modality(volume.voxels, preset, served_modalities, path.name)
    return range_warning(volume.voxels, preset.modality)


def inspect_for_any(path: Path, presets: list[Preset]) -> list[str]:
    """Read an uploaded image; returns a warning, for the presets that can segment it.

    Raises:
        ImageError: if none of them can segment it.
    """
    problems, warnings, readings = [], [], []
    plain = None
    for preset in presets:
        try:
            volume = plain if plain is not None and not preset.channels else read_input(path, preset)
            plain = plain if preset.channels else volume
            check_segmentable(volume, preset, path.name)
            warnings.append(range_warning(volume.voxels, preset.modality))
            readings.append(reading_warning(volume.grid))
        except ImageError as error:
            problems.append(error)
    if problems and len(problems) == len(presets):
        raise problems[0]
    return ([] if "" in warnings else warnings[:1]) + [reading for reading in readings[:1] if reading]
