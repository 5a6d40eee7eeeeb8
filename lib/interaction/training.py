"""Trains the editor network by a simulated annotator, on the labelled cases of one or several presets.

    python -m lib.interaction.training --data hippocampus_mr=<folder> --data abdomen_ct=<folder> --out <folder>

Each folder of data holds ``images`` and ``labels``. Cases that ``model/<preset>/split.json`` holds out are left out,
and those that ``--without`` names. The run can be ended and taken up again: its state is in ``<out>/state.pt``.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lib.cases.labelled import Case, find_cases, read_case
from lib.cases.split import shipped_split
from lib.configs.catalogue import load_preset
from lib.configs.preset import Preset
from lib.errors import ParameterError
from lib.infers.segmenter import Segmenter
from lib.interaction.annotator import Correction, next_click, spoil, touch_up
from lib.interaction.editor import Editor, build_editor, editor_preset, stack_input, start_from, structure_logit
from lib.networks.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from lib.networks.precision import autocast, place_for_training, resolve_precision
from lib.storage.files import replacing
from lib.storage.json_files import write_json
from lib.transforms.postprocess import restore_to_grid
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import FloatArray

logger = logging.getLogger(__name__)

MODEL = Path(__file__).resolve().parents[2] / "model"
LabelArray = npt.NDArray[np.uint8]
MaskArray = npt.NDArray[np.bool_]
MOST_CLICKS = 10
WARM_UP = 0.05


@dataclass(frozen=True)
class Material:
    """A case on its preset's grid.

    Attributes:
        image, truth: shape (X, Y, Z).
        automatic: the preset's own mask; None where it is not known.
    """

    image: FloatArray
    truth: LabelArray
    automatic: LabelArray | None = None


def read_material(case: Case, preset: Preset, segmenter: Segmenter | None) -> Material:
    """Read a case, and segment it where there is a network to do so."""
    volume, truth = read_case(case, preset)
    image = preprocess_volume(volume, preset)
    voxels = image.as_subclass(torch.Tensor)[0].numpy()
    affine = np.asarray(image.affine.numpy(), dtype=np.float64)
    on_network = restore_to_grid(truth, volume.affine_ras, voxels.shape, affine)
    automatic = None
    if segmenter is not None:
        found = segmenter.segment(volume).labels
        automatic = restore_to_grid(found, volume.affine_ras, voxels.shape, affine)
    return Material(voxels, on_network, automatic)


class Annotation:
    """One structure in a window, with what an annotator has clicked so far.

    Args:
        image, truth, mask: shape of the window; ``mask`` is what is corrected.
        random: draws the clicks.
    """

    def __init__(self, image: FloatArray, truth: MaskArray, mask: MaskArray, random: np.random.Generator) -> None:
        self.image, self.truth, self.mask, self._random = image, truth, mask, random
        self.clicks: list[Correction] = []

    def click(self, current: MaskArray, count: int) -> MaskArray:
        """Click ``count`` times, each time mending a part by hand, from ``current`` on; the mask in the end."""
        drawn, truth = current.astype(np.uint8), self.truth.astype(np.uint8)
        for _ in range(count):
            click = next_click(drawn, truth, (1, 1, 1), self._random, [c.point for c in self.clicks])
            if click is None:
                break
            self.clicks.append(click)
            drawn = touch_up(drawn, truth, click)
        return drawn > 0

    def input(self) -> FloatArray:
        """What the network is shown."""
        sides = [np.array([c.point for c in self.clicks if c.value == v], int).reshape(-1, 3) for v in (1, 0)]
        return stack_input(self.image, self.mask.astype(np.float32), sides[0], sides[1])


def draw(material: Material, window: Sequence[int], random: np.random.Generator) -> Annotation:
    """A structure of a case, a mask to begin with (the automatic one, a spoiled reference, none) and a window."""
    values = np.unique(material.truth)[1:] if material.truth.any() else np.array([1])
    value = int(random.choice(values))
    truth, kind = material.truth == value, random.random()
    if material.automatic is not None and kind < 0.6:
        mask = material.automatic == value
    elif kind < 0.75:
        mask = np.zeros_like(truth)
    else:
        mask = spoil(truth, random)
    wrong = np.argwhere(truth != mask)
    around = wrong if len(wrong) else np.argwhere(truth) if truth.any() else np.array([[0, 0, 0]])
    centre = around[int(random.integers(len(around)))] + random.integers(-4, 5, 3)
    image, parts = material.image, [material.image, truth, mask]
    cut = []
    for size, at, n in zip(window, centre, image.shape, strict=True):
        first = int(np.clip(at - size // 2, 0, max(0, n - size)))
        if n < size:
            first = -int(random.integers(0, size - n + 1))
        cut.append((first, size, n))
    for axis, (first, size, n) in enumerate(cut):
        places = np.arange(first, first + size)
        outside = (places < 0) | (places >= n)
        for number, part in enumerate(parts):
            taken = np.take(part, np.clip(places, 0, n - 1), axis=axis)
            if number and outside.any():
                np.moveaxis(taken, axis, 0)[outside] = False
            parts[number] = taken
    return Annotation(_change(parts[0], random), parts[1], parts[2], random)


def _change(image: FloatArray, random: np.random.Generator) -> FloatArray:
    """Other contrast, brightness and noise."""
    changed = image * random.uniform(0.85, 1.15) + random.uniform(-0.15, 0.15)
    if random.random() < 0.3:
        changed = changed + random.normal(0, random.uniform(0, 0.1), image.shape)
    return changed.astype(np.float32)


def edit_loss(logit: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Dice and binary cross-entropy of a structure's logit, both of (batch, X, Y, Z)."""
    probability, axes = torch.sigmoid(logit), (1, 2, 3)
    overlap = 2 * (probability * truth).sum(axes) + 1
    dice = 1 - overlap / (probability.sum(axes) + truth.sum(axes) + 1)
    entropy = nn.functional.binary_cross_entropy_with_logits(logit, truth)
    return dice.mean() + 2 * entropy


class EditorTraining:
    """A training of the editor that can be taken up again.

    Args:
        preset: its size, and with ``weights`` where it begins.
        material: cases of each preset; every preset is drawn equally often.
        folder: of its state.
        weights: of a preset's network; None for random ones.
        batch: windows of a step.
        learning_rate: the highest one.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        preset: Preset,
        material: Mapping[str, Sequence[Material]],
        folder: Path,
        weights: Mapping[str, torch.Tensor] | None = None,
        batch: int = 2,
        learning_rate: float = 8e-4,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.preset, self.folder, self._batch, self._highest = editor_preset(preset), folder, batch, learning_rate
        self._material, self._random = (
            [list(cases) for cases in material.values() if cases],
            np.random.default_rng(seed),
        )
        if not self._material:
            raise ParameterError("data", "no labelled case", "at least one case that is not held out")
        self.network = build_editor(preset)
        if weights is not None:
            start_from(self.network, weights)
        self._device = torch.device("cpu")
        self._dtype = resolve_precision("auto", self._device)
        place_for_training(self.network, self._device)
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=learning_rate, betas=(0.9, 0.99))
        self._average = torch.optim.swa_utils.AveragedModel(
            self.network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98), use_buffers=True
        )
        self.steps, self.seconds, self.losses = 0, 0.0, list[float]()
        if (folder / "state.pt").exists():
            self._resume()

    def run(self, minutes: float, most_steps: int | None = None) -> None:
        """Train until so many minutes or steps have been spent in all."""
        while self.seconds < 60 * minutes and (most_steps is None or self.steps < most_steps):
            began = time.perf_counter()
            part = self.seconds / (60 * minutes) if most_steps is None else self.steps / most_steps
            rate = self._highest * min(1.0, (part + 0.002) / WARM_UP, 0.02 + 0.98 * (1 + np.cos(np.pi * part)) / 2)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self.losses.append(self.step())
            self.seconds += time.perf_counter() - began
            if self.steps % 20 == 0:
                logger.info("step %d, %.0f s, loss %.4f", self.steps, self.seconds, np.mean(self.losses[-20:]))
            if self.steps % 100 == 0:
                self.save()
        self.save()

    def step(self) -> float:
        """One step; its loss."""
        drawn = [self._draw() for _ in range(self._batch)]
        counts = [int(self._random.integers(1, 5)) for _ in drawn]
        currents = [one.click(one.mask, count) for one, count in zip(drawn, counts, strict=True)]
        if self._random.random() < 0.4:  # more clicks where the network itself is still wrong
            self.network.eval()
            with torch.no_grad(), autocast(self._device, self._dtype):
                currents = [c > 0 for c in structure_logit(self.network, self._stack(drawn)).cpu().numpy()]
            more = int(self._random.integers(1, MOST_CLICKS - 3))
            for one, current in zip(drawn, currents, strict=True):
                one.click(current, more)
        self.network.train()
        truth = torch.from_numpy(np.stack([one.truth for one in drawn]).astype(np.float32))
        with autocast(self._device, self._dtype):
            logit = structure_logit(self.network, self._stack(drawn))
        loss = edit_loss(logit, truth)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 2.0)
        if torch.isfinite(norm):
            self._optimizer.step()
            self._average.update_parameters(self.network)
        self.steps += 1
        return float(loss.detach())

    def checkpoint(self) -> Checkpoint:
        """The averaged weights, and how they came about."""
        info = {"steps": self.steps, "seconds": round(self.seconds), "torch": str(torch.__version__)}
        return Checkpoint(self._average.module.state_dict(), self.preset, info)

    def editor(self) -> Editor:
        """An editor with the averaged weights."""
        return Editor.from_checkpoint(self.checkpoint(), self._device)

    def save(self) -> None:
        """Write the state, and the weights in fp16."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "network": self.network.state_dict(), "average": self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(), "steps": self.steps, "seconds": self.seconds,
        }  # fmt: skip
        with replacing(self.folder / "state.pt") as file:
            torch.save(state, file)
        write_checkpoint(self.folder / "shipped.pt", self.checkpoint(), half=True)

    def _resume(self) -> None:
        state = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
        self.network.load_state_dict(state["network"])
        self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.steps, self.seconds = int(state["steps"]), float(state["seconds"])
        self._random = np.random.default_rng(self.steps)

    def _draw(self) -> Annotation:
        cases = self._material[int(self._random.integers(len(self._material)))]
        return draw(cases[int(self._random.integers(len(cases)))], self.preset.roi_size, self._random)

    def _stack(self, drawn: Sequence[Annotation]) -> torch.Tensor:
        return torch.from_numpy(np.stack([one.input() for one in drawn]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on the presets' data that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="hippocampus_mr", help="whose network's size and weights it begins with")
    parser.add_argument("--data", action="append", required=True, help="<preset>=<folder>; may be given several times")
    parser.add_argument("--without", default="", help="ids of cases to leave out, with commas between them")
    parser.add_argument("--from-network", default="", help="presets whose own masks are corrected too, with commas")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--most-cases", type=int, default=0, help="of each preset; 0 for all")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    material: dict[str, list[Material]] = {}
    for named in asked.data:
        name, _, folder = named.partition("=")
        own = name in asked.from_network.split(",")
        material[name] = _read_all(name, Path(folder), set(asked.without.split(",")), own, asked.most_cases)
        logger.info("%s: %d cases", name, len(material[name]))
    start = read_checkpoint(MODEL / asked.preset / "shipped.pt")
    training = EditorTraining(start.preset or load_preset(asked.preset), material, asked.out, start.model)
    training.run(asked.minutes)
    found = {"presets": {name: len(cases) for name, cases in material.items()}, **training.checkpoint().info}
    write_json(asked.out / "training.json", found)


def _read_all(name: str, folder: Path, without: set[str], automatic: bool, most: int) -> list[Material]:
    split, preset = shipped_split(MODEL / name), load_preset(name)
    held_out = set(split.validation) | set(split.test) if split is not None else set()
    cases = find_cases(folder / "images", folder / "labels")
    cases = [case for case in cases if case.case_id not in held_out | without]
    segmenter = None
    if automatic:
        checkpoint = read_checkpoint(MODEL / name / "shipped.pt")
        preset = checkpoint.preset or preset
        segmenter = Segmenter.from_checkpoint(checkpoint, preset, torch.device("cpu"))
    return [read_material(case, preset, segmenter) for case in (cases[:most] if most else cases)]


if __name__ == "__main__":
    main()
