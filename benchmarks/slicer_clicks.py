"""3D Slicer's part of a correction by clicks: its requests, by the real client module, and what it shows then.

What the Slicer module of MONAI Label 0.8.5 does with an answer is played here as far as masks are concerned: the
segments that come back replace those of the same name and take their voxels from the others, which stay as they are.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from monailabel.client import MONAILabelClient

from benchmarks.measuring import copy_model
from lib.configs.preset import Preset
from lib.imagefiles.geometry import set_affine
from lib.interaction.annotator import Correction
from lib.interaction.dialects import BACKGROUND
from lib.transforms.volume import Volume, read_volume

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "integration"))
from server import Server, wait_until  # noqa: E402

LabelArray = npt.NDArray[np.uint8]
OWN = "own"
SECONDS_TO_START = 600


class Slicer:
    """A viewer that clicks on the cases of a server.

    Args:
        url: of the server.
        preset: the task.
        folder: for the files of answers.
    """

    def __init__(self, url: str, preset: Preset, folder: Path) -> None:
        self._client = MONAILabelClient(url, str(folder), "benchmark")
        self._preset, self._folder = preset, folder
        self._models: dict[str, Any] = self._client.info()["models"]
        self.starts = set[str]()

    def segment(self, case_id: str) -> LabelArray:
        """The mask after **Run** under Auto Segmentation."""
        return self._ask(self._preset.name, case_id, {}, None)[0]

    def click(self, case_id: str, shown: LabelArray, clicks: Sequence[Correction], empty: Volume | None) -> LabelArray:
        """What is shown after **Update** under SmartEdit, with all clicks so far.

        Args:
            case_id: of the image.
            shown: what is shown before.
            clicks: in their order; the last one is on the label that is chosen.
            empty: the image, where a mask of nothing is to be corrected; it is sent unless the server has no other.
        """
        model = f"{self._preset.name}_edit"
        names = {value: name for name, value in self._preset.label_indices.items()} | {0: BACKGROUND}
        sent: dict[str, Any] = {name: [] for name in self._models[model]["labels"]}
        for click in clicks:
            sent[names[click.value]].append(list(click.point))
        sent["label"] = names[clicks[-1].value]
        drawn = None
        if empty is not None and self._preset.name in self._models:
            drawn = self._folder / "drawn.nii.gz"
            mask = nib.Nifti1Image(np.zeros(empty.voxels.shape, np.uint8), empty.affine_ras)
            set_affine(mask, empty.affine_ras)
            nib.save(mask, drawn)
        answered, said = self._ask(model, case_id, sent, drawn)
        self.starts.add(said["interaction"]["start"])
        after = shown.copy()
        for value in said["label_names"].values():
            after[after == value] = 0
            after[answered == value] = value
        return after

    def _ask(
        self, model: str, case_id: str, params: Mapping[str, Any], label: Path | None
    ) -> tuple[LabelArray, dict[str, Any]]:
        sent = {**params, "result_extension": ".nrrd", "result_dtype": "uint8"}
        file, said = self._client.infer(model, case_id, sent, None if label is None else str(label))
        mask = read_volume(Path(file)).voxels
        Path(file).unlink()
        return np.rint(mask).astype(np.uint8), said


@contextmanager
def own_server(
    preset: Preset, images: Mapping[str, Volume], without_weights: bool, weights: Path | None = None
) -> Iterator[str]:
    """The address of a server of the benchmark's own, whose studies are these images under their names.

    Args:
        preset: the task that it serves.
        images: by the names of their cases.
        without_weights: whether it has no weights, so that clicks draw from nothing.
        weights: of the preset; the shipped ones by default.
    """
    with tempfile.TemporaryDirectory() as name:
        models = Path(name) / "models"
        models.mkdir()
        if not without_weights:
            copy_model(preset.name, models, weights)
        server = Server(Path(name), {"models": preset.name, "model_dir": str(models)}, forked=False)
        for case_id, volume in images.items():
            image = nib.Nifti1Image(volume.voxels, volume.affine_ras)
            set_affine(image, volume.affine_ras)
            nib.save(image, server.studies / f"{case_id}.nii.gz")
        process = server.launch()
        try:
            wait_until(lambda: process.poll() is not None or server.answers(), SECONDS_TO_START)
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start:\n{server.log.read_text(errors='replace')[-4000:]}")
            yield server.url
        finally:
            server.stop()
