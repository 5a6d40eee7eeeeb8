"""Reads public data sets in their original layout: a task of the Medical Segmentation Decathlon, nnU-Net's folders, or
BTCV.

The Decathlon's folders (Antonelli et al. 2022, doi:10.1038/s41467-022-30695-9) list in ``dataset.json`` the label of
each image and the names of the label values; MONAI's data sets use the same layout. nnU-Net's folders (Isensee et al.
2021, doi:10.1038/s41592-020-01008-z) append the channel number to the image's file name, ``case_0000.nii.gz``, but not
to the label's. nnU-Net's first version still lists ``imagesTr/case.nii.gz`` in ``dataset.json``, its second version
lists no files. BTCV has the folders ``img`` and ``label`` with equal numbers, and the 13 label values of
``abdomen_ct``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.cases.labelled import Case, case_id
from lib.configs.preset import Preset, parse_preset
from lib.errors import ConfigError, TrainingError
from lib.storage.json_files import read_json
from lib.transforms.volume import NIFTI_SUFFIXES, NRRD_SUFFIXES

FIRST_CHANNEL = "_0000"


@dataclass(frozen=True)
class TaskFolder:
    """A public data set.

    Attributes:
        name: name in its description, or the name of its folder.
        licence: licence in its description; may be empty.
        modality: modality in its description; may be empty.
        labels: name to value in its masks, without background; empty if it does not describe them, in which case the
            preset's values apply.
        pairs: image and label of each training case.
    """

    name: str
    licence: str
    modality: str
    labels: Mapping[str, int]
    pairs: tuple[tuple[Path, Path], ...]

    def preset(self, base: Preset) -> Preset:
        """``base`` with the labels of this data set; labels that both have keep their colours, codes and aliases.

        Raises:
            ConfigError: if the images have another modality than the preset.
        """
        if self.modality and ("CT" in self.modality.upper()) != (base.modality == "CT"):
            raise ConfigError(f"{self.name!r} is {self.modality}, but preset {base.name!r} is for {base.modality}")
        known = [base.find_label(name) for name in self.labels]
        if not self.labels or [label.index for label in known if label] == list(self.labels.values()) == [
            label.index for label in base.labels
        ]:
            return base
        name = re.sub(r"[^A-Za-z0-9_\-]+", "_", self.name).strip("_")[:64] or base.name
        adapted = base.with_labels(list(self.labels)).model_dump() | {"name": name, "description": self.name}
        return parse_preset(adapted, source=f"data set {self.name!r}")

    def cases(self, preset: Preset) -> list[Case]:
        """The training cases, with values mapped to those of ``preset``, which :meth:`preset` made."""
        values = {value: label.index for name, value in self.labels.items() if (label := preset.find_label(name))}
        return [Case(_name_of(image, label), image, label, values or None) for image, label in self.pairs]


def read_task(folder: Path) -> TaskFolder:
    """Read the description of a data set's folder.

    Raises:
        TrainingError: if the folder is not a data set, naming what is missing.
    """
    described = sorted(folder.glob("dataset*.json"))
    data_set = _read_described(folder, described[0]) if described else _read_btcv(folder)
    lost = [path for pair in data_set.pairs for path in pair if not path.is_file()]
    if lost:
        raise TrainingError(f"{data_set.name!r} names {len(lost)} files that are not there, such as {str(lost[0])!r}")
    return data_set


def _read_described(folder: Path, file: Path) -> TaskFolder:
    try:
        data: dict[str, Any] = read_json(file)
        pairs = _listed(folder, data["training"]) if "training" in data else _of_nnunet(folder, data)
        labels = _labels_of(data["labels"])
        channels = list((data.get("modality") or data.get("channel_names") or {}).values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{str(file)!r} does not describe a data set: {type(error).__name__} {error}") from error
    if len(channels) > 1:
        raise TrainingError(f"{str(file)!r}: images of {len(channels)} channels ({', '.join(channels)}); valid: one")
    if not pairs or not labels:
        raise TrainingError(f"{str(file)!r} has {len(pairs)} training cases and {len(labels)} labels; valid: from 1")
    name, licence = str(data.get("name") or folder.name), str(data.get("licence") or data.get("license") or "")
    return TaskFolder(name, licence, str(channels[0]) if channels else "", labels, pairs)


def _listed(folder: Path, training: Sequence[Mapping[str, Any]]) -> tuple[tuple[Path, Path], ...]:
    """The pairs that ``dataset.json`` lists; for a missing image, its name with nnU-Net's channel number is tried."""
    pairs = []
    for item in training:
        image, label = folder / item["image"], folder / item["label"]
        suffix = next((end for end in NIFTI_SUFFIXES if image.name.lower().endswith(end)), image.suffix)
        with_channel = image.with_name(f"{image.name[: len(image.name) - len(suffix)]}{FIRST_CHANNEL}{suffix}")
        pairs.append((with_channel if not image.is_file() and with_channel.is_file() else image, label))
    return tuple(pairs)


def _of_nnunet(folder: Path, data: Mapping[str, Any]) -> tuple[tuple[Path, Path], ...]:
    """The pairs of nnU-Net's second version: each label, and the image of the same name with the number of channel 0.

    An optional entry ``dataset`` in ``dataset.json`` gives the paths of files that lie in other folders.
    """
    if "dataset" in data:
        return tuple((folder / item["images"][0], folder / item["label"]) for item in data["dataset"].values())
    ending = str(data.get("file_ending") or ".nii.gz")
    if ending not in NIFTI_SUFFIXES + NRRD_SUFFIXES:
        raise ValueError(f"file_ending {ending!r}; valid: {', '.join(NIFTI_SUFFIXES + NRRD_SUFFIXES)}")
    labels = sorted(path for path in (folder / "labelsTr").glob(f"*{ending}") if not path.name.startswith("."))
    named = [(label, f"{label.name.removesuffix(ending)}{FIRST_CHANNEL}{ending}") for label in labels]
    return tuple((folder / "imagesTr" / image, label) for label, image in named)


def _name_of(image: Path, label: Path) -> str:
    """The name of a case: that of its image, without the channel number if the label's name has none."""
    without = case_id(image).removesuffix(FIRST_CHANNEL)
    return without if without == case_id(label) else case_id(image)


def _labels_of(described: Mapping[str, Any]) -> dict[str, int]:
    """Name to value, sorted by value: the Decathlon writes ``{"1": "liver"}``, nnU-Net ``{"liver": 1}``."""
    by_value = all(str(key).isdigit() for key in described)
    named = {str(v): int(k) for k, v in described.items()} if by_value else {k: int(v) for k, v in described.items()}
    return {name: value for name, value in sorted(named.items(), key=lambda item: item[1]) if value > 0}


def _read_btcv(folder: Path) -> TaskFolder:
    """Read ``img/img0001.nii.gz`` and ``label/label0001.nii.gz``, in the folder or in its subfolder ``Training``."""
    root = folder / "Training" if (folder / "Training").is_dir() else folder
    if not (root / "img").is_dir() or not (root / "label").is_dir():
        raise TrainingError(
            f"{str(folder)!r} is no data set; valid: with dataset.json (Decathlon), or with img and label (BTCV)"
        )
    labels = {number: path for path in _nifti(root / "label") if (number := _number(path))}
    pairs = [(path, labels[number]) for path in _nifti(root / "img") if (number := _number(path)) in labels]
    if not pairs:
        raise TrainingError(f"no image in {str(root / 'img')!r} has a label of the same number")
    return TaskFolder("BTCV", "", "CT", {}, tuple(pairs))


def _nifti(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name.endswith(NIFTI_SUFFIXES)]


def _number(path: Path) -> str:
    match = re.search(r"\d+", path.name)
    return match[0] if match else ""
