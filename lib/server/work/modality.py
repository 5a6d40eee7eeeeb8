"""Which models are meant for an image: those of its modality, as far as that is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monailabel.interfaces.datastore import Datastore

from lib.configs.preset import Preset
from lib.datastore.series import SeriesDatastore

ANY = "OT"
"""The modality (DICOM PS3.3, C.7.3.1.1.1: other) of a preset that is for images of every kind."""


def modality_of(datastore: Datastore, image_id: str) -> str:
    """The modality of a DICOM series; "" for a file, which does not say."""
    info = datastore.series().get(image_id) if isinstance(datastore, SeriesDatastore) else None
    return info.attributes["Modality"] if info is not None else ""


def fits(preset: Preset, modality: str) -> bool:
    """Whether a preset is meant for images of a modality."""
    return not modality or preset.modality in (ANY, modality)


def models_for(presets: Mapping[str, Preset], modalities: Iterable[str]) -> list[str]:
    """The models that are meant for images of one of the modalities."""
    wanted = list(modalities)
    return [name for name, preset in presets.items() if any(fits(preset, modality) for modality in wanted)]


def warnings_for(presets: Mapping[str, Preset], datastore: Datastore, model: str, image_id: str | None) -> list[str]:
    """What a user should know of a model's answer for an image; nothing for an image that it is meant for."""
    preset, modality = presets.get(model), modality_of(datastore, image_id) if image_id else ""
    resampled = []
    if image_id and modality and isinstance(datastore, SeriesDatastore):
        resampled = [f"series {image_id}: {note}" for note in datastore.volumes.notes(image_id) if "resampled" in note]
    if preset is None or fits(preset, modality):
        return resampled
    return [
        *resampled,
        f"model {model} is made for {preset.modality} images, and this one is {modality}: do not trust its mask",
    ]
