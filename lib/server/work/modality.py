"""Determines which models are suitable for an image by its modality, as far as known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monailabel.interfaces.datastore import Datastore

from lib.configs.preset import Preset
from lib.datastore.series import SeriesDatastore

ANY = "OT"
"""The modality (DICOM PS3.3, C.7.3.1.1.1: other) of a preset for images of every kind."""


def modality_of(datastore: Datastore, image_id: str) -> str:
    """The modality of a DICOM series; "" for a file, which has none."""
    info = datastore.series().get(image_id) if isinstance(datastore, SeriesDatastore) else None
    return info.attributes["Modality"] if info is not None else ""


def fits(preset: Preset, modality: str) -> bool:
    """Whether a preset is suitable for images of a modality."""
    return not modality or preset.modality in (ANY, modality)


def models_for(presets: Mapping[str, Preset], modalities: Iterable[str]) -> list[str]:
    """The models for images of one of the modalities."""
    wanted = list(modalities)
    return [name for name, preset in presets.items() if any(fits(preset, modality) for modality in wanted)]


def warnings_for(presets: Mapping[str, Preset], datastore: Datastore, model: str, image_id: str | None) -> list[str]:
    """Warnings for the user of a model's mask of an image; none if the modality is suitable."""
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
