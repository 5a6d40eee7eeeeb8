"""The pretraining loop: from images to the weights of an encoder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, EnsureTyped, Transform
from monai.utils import set_determinism
from torch import nn

from lib.configs.preset import Preset
from lib.errors import ImageError, TrainingError
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.layouts import StateDict
from lib.networks.masked_autoencoder import MaskedAutoencoder
from lib.networks.unetr import build_unetr, load_encoder
from lib.trainers.datasets import BoundedPersistentDataset, preprocessing_digest
from lib.trainers.optimization import build_optimizer, build_schedule
from lib.trainers.pause import wait_while_paused
from lib.trainers.resume import fingerprint, read_state, write_state
from lib.transforms.channels import files_of
from lib.transforms.inputs import read_input
from lib.transforms.preprocess import IMAGE, build_preprocessing, volume_tensor
from lib.transforms.volume import NIFTI_SUFFIXES, NRRD_SUFFIXES, check_segmentable

logger = logging.getLogger("unetr.pretrain")

ENCODER_FILE = "encoder.pt"
"""Name of the pretrained encoder in a preset's folder."""

RECIPE = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.05, "warmup_fraction": 0.1}
"""Settings that differ from the preset's own; from He et al., with a learning rate for small batches."""


@dataclass(frozen=True)
class PretrainingPlan:
    """The parameters of a pretraining run.

    Attributes:
        preset: the preset, whose encoder, window and preprocessing are used.
        images: image files; labels are not used.
        run_dir: folder of the state and of preprocessed images.
        device: device on which it computes.
        steps: number of steps.
        batch_size: windows of a step, each from another image if there are enough.
        resume: whether to resume from the state of a run with the same images and length.
        state_seconds: interval between two stored states.
        pause_file: file that pauses the run while the server touches it.
    """

    preset: Preset
    images: tuple[Path, ...]
    run_dir: Path
    device: torch.device
    steps: int
    batch_size: int = 8
    resume: bool = False
    state_seconds: float = 30.0
    pause_file: Path | None = None

    def __post_init__(self) -> None:
        if not self.images:
            raise TrainingError("there is no image to learn from")
        if self.steps < 1 or self.batch_size < 1:
            raise TrainingError(f"steps {self.steps}, batch size {self.batch_size}; valid: from 1")


@dataclass(frozen=True)
class Pretrained:
    """Weights of the encoder with the UNETR's names, and the loss of each step."""

    encoder: StateDict
    losses: tuple[float, ...]


def pretrain(plan: PretrainingPlan, on_step: Callable[[int, float], None] | None = None) -> Pretrained:
    """Run a pretraining.

    The windows of a step and their masked patches depend only on the seed and the step, so that an interrupted run
    yields the same result. It computes in fp32, because MONAI's autoencoder does not support autocast.

    Args:
        plan: the parameters.
        on_step: called after each step with its number and loss; an exception from it ends the run.

    Raises:
        ImageError: if an image cannot be read.
    """
    recipe = plan.preset.training.model_copy(update=RECIPE)
    set_determinism(recipe.seed)
    network = MaskedAutoencoder(plan.preset).to(plan.device).train()
    optimizer = build_optimizer(network, recipe)
    moving: dict[str, Any] = {
        "network": network,
        "optimizer": optimizer,
        "schedule": build_schedule(optimizer, recipe, plan.steps),
    }
    windows = _Windows(plan)
    losses = _restore(plan, moving)
    written = time.monotonic()
    while len(losses) < plan.steps:
        wait_while_paused(plan.pause_file)
        batch = windows.of_step(len(losses)).to(plan.device)
        torch.manual_seed(hash((recipe.seed, len(losses))) % 2**63)
        optimizer.zero_grad(set_to_none=True)
        loss = network(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.gradient_clip_norm)
        optimizer.step()
        moving["schedule"].step()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(len(losses), losses[-1])
        if time.monotonic() - written >= plan.state_seconds or len(losses) == plan.steps:
            write_state(plan.run_dir, _state(plan, moving, losses))
            written = time.monotonic()
    return Pretrained(network.encoder(), tuple(losses))


def write_encoder(path: Path, plan: PretrainingPlan, result: Pretrained) -> None:
    """Write an encoder for later trainings, after a check that it matches the preset's UNETR.

    Raises:
        CheckpointError: if it does not match the preset's UNETR.
    """
    load_encoder(build_unetr(plan.preset), result.encoder)
    info = {
        "kind": "encoder",
        "images": len(plan.images),
        "steps": len(result.losses),
        "loss": sum(result.losses[-20:]) / len(result.losses[-20:]),
    }
    write_checkpoint(path, Checkpoint(result.encoder, plan.preset, info))


def usable_images(paths: Sequence[Path], preset: Preset) -> tuple[Path, ...]:
    """The images that the preset accepts; the log states the problems of the others."""
    usable = []
    for path in paths:
        try:
            check_segmentable(read_input(path, preset), preset, path.name)
        except ImageError as error:
            logger.warning("left out: %s", error)
        else:
            usable.append(path)
    return tuple(usable)


def find_images(folder: Path) -> list[Path]:
    """Image files of a folder, sorted: NIfTI, NRRD and similar formats; labels are in other folders.

    Raises:
        TrainingError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise TrainingError(f"there is no folder {str(folder)!r}")
    return [path for path in sorted(folder.iterdir()) if path.name.endswith(NIFTI_SUFFIXES + NRRD_SUFFIXES)]


class _ReadImaged(Transform):
    """Reads the file of an item as ``image``, shape (channels, X, Y, Z)."""

    def __init__(self, preset: Preset) -> None:
        self._preset = preset

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        volume = read_input(Path(data["path"]), self._preset)
        check_segmentable(volume, self._preset, Path(data["path"]).name)
        return {IMAGE: volume_tensor(volume)}


class _Windows:
    """Random windows of the images, which are preprocessed once and cached on disk."""

    def __init__(self, plan: PretrainingPlan) -> None:
        preset = plan.preset
        chain = [_ReadImaged(preset), *build_preprocessing(preset).transforms]
        whole = Compose([*chain, EnsureTyped(IMAGE, dtype=torch.float32, track_meta=False)])
        # includes the files' sizes and times, so that the cache notices a replaced image
        items = [{"path": str(p), "stamp": [_stamp_of(file) for file in files_of(p)]} for p in plan.images]
        cache = plan.run_dir / "cache" / f"{preprocessing_digest(preset)}-images"
        self._images = BoundedPersistentDataset(items, whole, cache_dir=cache)
        self._count, self._batch = len(items), plan.batch_size
        self._roi, self._axes, self._seed = preset.roi_size, preset.mirror_axes, preset.training.seed

    def of_step(self, step: int) -> torch.Tensor:
        """The windows of a step, shape (batch, channels, *roi)."""
        random = np.random.default_rng([self._seed, step])
        chosen = random.choice(self._count, self._batch, replace=self._count < self._batch)
        return torch.stack([self._cut(self._images[int(index)][IMAGE], random) for index in chosen])

    def _cut(self, image: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        pairs = zip(image.shape[1:], self._roi, strict=True)
        starts = [int(random.integers(0, size - edge + 1)) for size, edge in pairs]
        box = [slice(None), *(slice(start, start + edge) for start, edge in zip(starts, self._roi, strict=True))]
        mirrored = [axis + 1 for axis in self._axes if random.random() < 0.5]
        return image[tuple(box)].flip(mirrored)


def _stamp_of(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _state(plan: PretrainingPlan, moving: Mapping[str, Any], losses: list[float]) -> dict[str, Any]:
    states = {name: part.state_dict() for name, part in moving.items()}
    return {"fingerprint": _fingerprint(plan), "losses": losses, **states}


def _restore(plan: PretrainingPlan, moving: Mapping[str, Any]) -> list[float]:
    """Restore network, optimiser and schedule from the state; returns the losses of the finished steps."""
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    state = read_state(plan.run_dir, _fingerprint(plan)) if plan.resume else None
    if state is None:
        return []
    for name, part in moving.items():
        part.load_state_dict(state[name])
    losses: list[float] = state["losses"]
    logger.info("resumed after step %d of %d", len(losses), plan.steps)
    return losses


def _fingerprint(plan: PretrainingPlan) -> str:
    return fingerprint(
        plan.preset, [path.name for path in plan.images], ["pretraining", str(plan.batch_size)], plan.steps
    )
