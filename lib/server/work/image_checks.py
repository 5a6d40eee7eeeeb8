"""Which images are left out of the pool since they cannot be segmented, and why."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from lib.activelearning.score_store import CaseScoreRecord
from lib.configs.preset import Preset
from lib.datastore.images.checks import ImageCheck
from lib.errors import ImageError, OtherModalityError
from lib.server.services import Services
from lib.transforms.inputs import read_input
from lib.transforms.intensity_range import check_modality, range_warning
from lib.transforms.volume import check_segmentable, reading_warning

logger = logging.getLogger("unetr.server")


def check_image(parts: Services, image_id: str, preset: Preset) -> ImageCheck:
    """What is wrong with an image, read now unless that was done since it changed.

    Raises:
        NotFoundError, UpstreamError: when it cannot be had.
    """
    stamp = parts.store.stamp(image_id)
    known = parts.store.checks.find(image_id, preset.name, stamp)
    if known is not None:
        return known
    problem, warning, elsewhere = "", "", False
    try:
        warning = inspect(parts.image_file(image_id), preset, [other.modality for other in parts.presets.values()])
    except ImageError as error:
        problem, elsewhere = str(error), isinstance(error, OtherModalityError)
        logger.warning("image %s is left out of the pool of %s: %s", image_id, preset.name, problem)
    check = ImageCheck(image_id, preset.name, stamp, problem, warning, elsewhere)
    parts.store.checks.keep(check)
    return check


def inspect(path: Path, preset: Preset, served_modalities: Collection[str]) -> str:
    """Read an image as an inference would; returns what is odd about its intensities.

    Raises:
        ImageError: when a preset's network cannot segment it, or a preset of another modality fits it better.
    """
    volume = read_input(path, preset)
    check_segmentable(volume, preset, path.name)
    check_modality(volume.voxels, preset, served_modalities, path.name)
    return range_warning(volume.voxels, preset.modality)


def inspect_for_any(path: Path, presets: list[Preset]) -> list[str]:
    """Read an image that is sent; returns what is odd about it, for the presets that can segment it.

    Raises:
        ImageError: when none of them can.
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


def left_out(parts: Services, model: str) -> dict[str, ImageCheck]:
    """The images that a model's network cannot segment, as far as anybody has looked, the scoring included.

    An image that has changed since is in the pool again, and is looked at anew.
    """
    store, knowledge = parts.store, parts.instance.knowledge_by_preset.get(model)
    if knowledge is not None:
        for image_id, record in knowledge.score_records()[1].items():
            if record.problem and store.has_image(image_id):
                _take_over(parts, image_id, model, record)
    found = {}
    for check in store.checks.remarkable():
        if check.preset == model and check.problem and store.has_image(check.image_id):
            if store.stamp(check.image_id) == check.stamp:
                found[check.image_id] = check
            else:
                forget(parts, check.image_id)
    return found


def broken(parts: Services) -> dict[str, ImageCheck]:
    """The images that are left out of a pool for what is wrong with them, and not for their modality."""
    checks = (check for model in parts.presets for check in left_out(parts, model).values())
    return {check.image_id: check for check in checks if not check.elsewhere}


def warned(parts: Services) -> list[ImageCheck]:
    """The images that look odd, but can be segmented."""
    store = parts.store
    return [c for c in store.checks.remarkable() if not c.problem and store.has_image(c.image_id)]


def forget(parts: Services, image_id: str) -> None:
    """Have an image looked at anew, by whoever looks first."""
    parts.store.checks.forget(image_id)
    for knowledge in parts.instance.knowledge_by_preset.values():
        knowledge.store.forget(image_id)


def _take_over(parts: Services, image_id: str, model: str, record: CaseScoreRecord) -> None:
    """Remember what the scoring found, unless the server has looked itself."""
    store = parts.store
    known = [check for check in store.checks.of_image(image_id) if check.preset == model]
    if not known:
        stamp = store.stamp(image_id)
        store.checks.keep(ImageCheck(image_id, model, stamp, record.problem, elsewhere=record.elsewhere))
