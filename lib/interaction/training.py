"""Trains the editor network with a simulated annotator, on the labelled cases of one or several presets.

    python -m lib.interaction.training --data hippocampus_mr=<folder> --data abdomen_ct=<folder> --out <folder>

Each data folder holds the folders ``images`` and ``labels``. Cases that ``model/<preset>/split.json`` holds out and
those that ``--without`` names are excluded. An interrupted run can be resumed: its state is in ``<out>/state.pt``, and
the preprocessed cases are in ``<out>/cases``.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import nn

from lib.cases.labelled import Case, find_cases, read_case
from lib.cases.split import shipped_split
from lib.configs.catalogue import load_preset
from lib.configs.preset import Preset
from lib.errors import ParameterError
from lib.infers.segmenter import Segmenter
from lib.interaction.editor import (
    Editor,
    EditorDesign,
    EditorWeights,
    Window,
    build_editor,
    read_editor,
    structure_logit,
    write_editor,
)
from lib.interaction.sessions import Material, Session, begin_session
from lib.networks.checkpoint import load_weights, read_checkpoint
from lib.networks.precision import autocast, place_for_training, resolve_precision
from lib.storage.files import replacing, sha256_of
from lib.storage.json_files import write_json
from lib.trainers.optimization import average_weights, half_cosine
from lib.transforms.postprocess import restore_to_grid
from lib.transforms.preprocess import preprocess_volume
from lib.transforms.volume import Volume

logger = logging.getLogger(__name__)

MODEL = Path(__file__).resolve().parents[2] / "model"
LabelArray = npt.NDArray[np.uint8]
VOXELS = 2**17
LEARNING_RATE = 8e-3
"""Learning rate; with a tenth of it, and with zeros in the last layer, a thousand steps had almost no effect."""
WARM_UP, LOWEST_RATE = 0.02, 0.02
"""Share of the training until the highest learning rate is reached, and share of that rate at the end."""
EMA_DECAY = 0.99
NEAR_WEIGHT = 10.0
"""Weight in the loss of voxels next to a click, relative to other voxels."""
MOST_BLUR_VOXELS, MOST_NOISE = 1.2, 0.35
"""Perturbation of an image that makes its network mask worse: blur, and noise in standard deviations."""


def read_material(case: Case, preset: Preset, segmenter: Segmenter | None, masks: int = 2, seed: int = 0) -> Material:
    """Read a case, and segment the image and perturbed versions of it if there is a network.

    A network is more accurate on the cases of its own training than on new ones, so its masks of perturbed images are
    more like the masks that will be corrected.
    """
    volume, truth = read_case(case, preset)
    image = preprocess_volume(volume, preset)
    voxels = image.as_subclass(torch.Tensor)[preset.display_channel].numpy()
    affine = np.asarray(image.affine.numpy(), dtype=np.float64)
    random, masks_of_network = np.random.default_rng(seed), []
    for number in range(masks if segmenter is not None else 0):
        assert segmenter is not None
        changed = change_image(volume, random) if number else volume
        labels = segmenter.segment(changed).labels
        masks_of_network.append(restore_to_grid(labels, volume.affine_ras, voxels.shape, affine))
    on_network = restore_to_grid(truth, volume.affine_ras, voxels.shape, affine)
    return Material(voxels, on_network, tuple(masks_of_network))


def change_image(volume: Volume, random: np.random.Generator) -> Volume:
    """The image with blur and noise, for which a network gives a worse mask."""
    voxels = ndimage.gaussian_filter(volume.voxels, random.uniform(0, MOST_BLUR_VOXELS))
    noise = ndimage.gaussian_filter(random.normal(size=voxels.shape), 0.7)
    noise *= random.uniform(0, MOST_NOISE) * float(volume.voxels.std()) / max(float(noise.std()), 1e-6)
    return replace(volume, voxels=(voxels + noise).astype(np.float32))


def edit_loss(logit: torch.Tensor, given: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Dice and binary cross-entropy of a structure's logit; in the latter, voxels next to clicks have more weight.

    Args:
        logit, truth: shape (batch, X, Y, Z).
        given: input of the network, which contains the prompt maps; shape (batch, 4, X, Y, Z).
    """
    probability, axes = torch.sigmoid(logit), (1, 2, 3)
    overlap = 2 * (probability * truth).sum(axes) + 1
    dice = 1 - overlap / (probability.sum(axes) + truth.sum(axes) + 1)
    weight = 1 + NEAR_WEIGHT * given[:, 2:].amax(dim=1)
    entropy = nn.functional.binary_cross_entropy_with_logits(logit, truth, weight=weight, reduction="none")
    return dice.mean() + 2 * (entropy.sum(axes) / weight.sum(axes)).mean()


class EditorTraining:
    """A resumable training of the editor network.

    Each step trains on several sessions of each preset. A session has one more click or scribble than at the step
    before, placed where the network's prediction of that step was wrong, and is replaced by a new one when all its
    prompts have been made. Every forward pass thus contributes to training, whatever its number of prompts.

    Args:
        design: architecture of the network.
        material: the cases of each preset.
        folder: folder of the training state.
        voxels: voxels of each preset in a step, which determine the number of its windows; at least one window is used.
        learning_rate: highest learning rate.
        seed: seed of all random numbers.
        start: initial weights of the same architecture; random if not given.
    """

    def __init__(
        self,
        design: EditorDesign,
        material: Mapping[str, Sequence[Material]],
        folder: Path,
        voxels: int = VOXELS,
        learning_rate: float = LEARNING_RATE,
        seed: int = 0,
        start: EditorWeights | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.design, self.folder, self._highest = design, folder, learning_rate
        self._random = np.random.default_rng(seed)
        self._material = [list(cases) for cases in material.values() if cases]
        if not self._material:
            raise ParameterError("data", "no labelled case", "at least one case that is not held out")
        self._windows = [window_for(cases, design) for cases in self._material]
        batches = [max(1, voxels // int(np.prod(window))) for window in self._windows]
        self._sessions: list[list[Session | None]] = [[None] * batch for batch in batches]
        self.network = build_editor(design)
        if start is not None:
            load_weights(self.network, start.model)
        self._device = torch.device("cpu")
        self._dtype = resolve_precision("auto", self._device)
        place_for_training(self.network, self._device)
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self._average = average_weights(self.network, lambda _: EMA_DECAY)
        self.steps, self.seconds, self.losses = 0, 0.0, list[float]()
        if (folder / "state.pt").exists():
            self._resume()

    def run(
        self, minutes: float, most_steps: int | None = None, before_step: Callable[[], object] = lambda: None
    ) -> None:
        """Train until a total number of minutes or steps is reached.

        Args:
            minutes: total training time over all starts, excluding the time of ``before_step``.
            most_steps: total number of steps over all starts.
            before_step: called before each step, and may block.
        """
        while self.seconds < 60 * minutes and (most_steps is None or self.steps < most_steps):
            before_step()
            began = time.perf_counter()
            part = self.seconds / (60 * minutes) if most_steps is None else self.steps / most_steps
            for group in self._optimizer.param_groups:
                group["lr"] = self._highest * min((part + 0.002) / WARM_UP, half_cosine(part, LOWEST_RATE))
            self.losses.append(self.step())
            self.seconds += time.perf_counter() - began
            if self.steps % 50 == 0:
                logger.info("step %d, %.0f s, loss %.4f", self.steps, self.seconds, np.mean(self.losses[-50:]))
            if self.steps % 200 == 0:
                self.save()
        self.save()

    def step(self) -> float:
        """Run one training step, and return its mean loss."""
        self.network.train()
        self._optimizer.zero_grad(set_to_none=True)
        losses = []
        for number, window in enumerate(self._windows):
            sessions = [self._next(number, place, window) for place in range(len(self._sessions[number]))]
            given = torch.from_numpy(np.stack([one.input() for one in sessions]))
            truth = torch.from_numpy(np.stack([one.truth for one in sessions]).astype(np.float32))
            with autocast(self._device, self._dtype):
                logit = structure_logit(self.network, given)
            loss = edit_loss(logit, given, truth)
            (loss / len(self._windows)).backward()
            losses.append(float(loss.detach()))
            for one, predicted in zip(sessions, (logit.detach() > 0).numpy(), strict=True):
                one.current = predicted
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 2.0)
        if torch.isfinite(norm):
            self._optimizer.step()
            self._average.update_parameters(self.network)
        self.steps += 1
        return float(np.mean(losses))

    def _next(self, number: int, place: int, window: Window) -> Session:
        """The session at an index with one more prompt, or a new session if it is over."""
        session, tries = self._sessions[number][place], 0
        while session is None or not session.prompt(self._random):
            cases = self._material[number]
            session = begin_session(cases[int(self._random.integers(len(cases)))], window, self._random)
            if (tries := tries + 1) > 20 and not session.prompt(self._random):
                break  # no case has an error that could be corrected
        self._sessions[number][place] = session
        return session

    def weights(self) -> EditorWeights:
        """The averaged weights and their provenance."""
        info = {"steps": self.steps, "seconds": round(self.seconds), "torch": str(torch.__version__)}
        return EditorWeights(self._average.module.state_dict(), self.design, info=info)

    def editor(self) -> Editor:
        """An editor with the averaged weights."""
        return Editor.from_weights(self.weights(), self._device)

    def save(self) -> None:
        """Write the training state, and the weights in half precision."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "network": self.network.state_dict(), "average": self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(), "steps": self.steps, "seconds": self.seconds,
        }  # fmt: skip
        with replacing(self.folder / "state.pt") as file:
            torch.save(state, file)
        write_editor(self.folder / "shipped.pt", self.weights())

    def _resume(self) -> None:
        state = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
        self.network.load_state_dict(state["network"])
        self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.steps, self.seconds = int(state["steps"]), float(state["seconds"])
        self._random = np.random.default_rng(self.steps)


def window_for(cases: Sequence[Material], design: EditorDesign) -> Window:
    """The training window, which is no larger than most of the cases need."""
    sizes = np.percentile([case.image.shape for case in cases], 80, axis=0)
    step = design.step
    x, y, z = (min(most, step * max(1, round(size / step))) for most, size in zip(design.window, sizes, strict=True))
    return x, y, z


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on the data that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", action="append", required=True, help="<preset>=<folder>; may be given several times")
    parser.add_argument("--without", default="", help="ids of cases to leave out, with commas between them")
    parser.add_argument("--without-labels", default="", help="names of labels to leave out, with commas between them")
    parser.add_argument("--from-network", default="", help="presets whose own masks are corrected too, with commas")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--most-cases", type=int, default=0, help="of each preset; 0 for all")
    parser.add_argument("--voxels", type=int, default=VOXELS, help="of each preset in a step")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    material: dict[str, list[Material]] = {}
    without = set(asked.without.split(","))
    for named in asked.data:
        name, _, folder = named.partition("=")
        own = name in asked.from_network.split(",")
        cases = _read_all(name, Path(folder), without, own, asked.most_cases, asked.out / "cases")
        values = {v for n, v in load_preset(name).label_indices.items() if n in asked.without_labels.split(",")}
        material[name] = [_without_labels(case, values) for case in cases] if values else cases
        logger.info("%s: %d cases", name, len(material[name]))
    training = EditorTraining(EditorDesign(), material, asked.out, asked.voxels, asked.learning_rate)
    training.run(asked.minutes)
    write_side_car(asked.out / "shipped.pt", {name: len(cases) for name, cases in material.items()})


def write_side_car(weights: Path, cases: Mapping[str, int]) -> None:
    """Write the JSON side-car that describes an editor's weights.

    Args:
        weights: file of the weights.
        cases: number of training cases of each preset.
    """
    read = read_editor(weights)
    network = build_editor(read.design)
    side_car = {
        "design": asdict(read.design),
        "parameters": sum(p.numel() for p in network.parameters()),
        "sha256": sha256_of(weights),
        "bytes": weights.stat().st_size,
        "cases": dict(cases),
        "training": dict(read.info),
    }
    write_json(weights.with_suffix(".json"), side_car)


def _read_all(name: str, folder: Path, without: set[str], automatic: bool, most: int, kept: Path) -> list[Material]:
    split, preset = shipped_split(MODEL / name), load_preset(name)
    held_out = set(split.validation) | set(split.test) if split is not None else set()
    cases = find_cases(folder / "images", folder / "labels")
    cases = [case for case in cases if case.case_id not in held_out | without]
    segmenter = None
    if automatic:
        checkpoint = read_checkpoint(MODEL / name / "shipped.pt")
        preset = checkpoint.preset or preset
        segmenter = Segmenter.from_checkpoint(checkpoint, preset, torch.device("cpu"))
    chosen = cases[:most] if most else cases
    return [_read_kept(case, preset, segmenter, kept / name, number) for number, case in enumerate(chosen)]


def _read_kept(case: Case, preset: Preset, segmenter: Segmenter | None, folder: Path, seed: int) -> Material:
    """A preprocessed case, from the cache folder if it is there."""
    file = folder / f"{case.case_id}.{'found' if segmenter is not None else 'plain'}.npz"
    if file.exists():
        with np.load(file) as kept:
            return Material(kept["image"].astype(np.float32), kept["truth"], tuple(kept["found"]))
    made = read_material(case, preset, segmenter, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    network_masks = np.stack(made.network_masks) if made.network_masks else np.zeros((0, *made.truth.shape), np.uint8)
    with replacing(file) as stream:
        np.savez_compressed(stream, image=made.image.astype(np.float16), truth=made.truth, found=network_masks)
    return made


def _without_labels(material: Material, values: set[int]) -> Material:
    """The case with some labels treated as unlabelled."""
    known = np.where(np.isin(material.truth, list(values)), 0, material.truth).astype(np.uint8)
    return replace(material, truth=known)


if __name__ == "__main__":
    main()
