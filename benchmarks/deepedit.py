"""A DeepEdit-style network to compare the editor with (Diaz-Pinto et al. 2022, arXiv 2305.10655).

One UNETR for all labels: the whole volume, squeezed into the preset's window, beside one channel of clicks for each
label and for the background, each click a Gaussian of 3 voxels. Clicks are in 40 % of the training steps, where its
own mask is wrong; the others train it without. It begins with the preset's weights, its new channels with zeros.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.configs.preset import Preset
from lib.interaction.annotator import Correction, next_click
from lib.interaction.sessions import Material
from lib.networks.fine_unetr import FineUNETR
from lib.networks.precision import autocast, place_for_training, resolve_precision
from lib.networks.unetr import NORMS
from lib.trainers.optimization import build_loss, build_optimizer, half_cosine

SIGMA_VOXELS = 3.0
CLICKED_SHARE = 0.4
MOST_CLICKS = 10
WARM_UP = 0.04
CPU = torch.device("cpu")


class DeepEdit:
    """The network, with the weights of a preset's own.

    Args:
        preset: the task.
        weights: of the preset's own network.
    """

    def __init__(self, preset: Preset, weights: dict[str, torch.Tensor]) -> None:
        size: dict[str, Any] = preset.network.model_dump(exclude={"patch_size"})
        size["norm_name"] = NORMS.get(preset.network.norm_name, preset.network.norm_name)
        self.preset, self.window = preset, tuple(preset.roi_size)
        self.network = FineUNETR(
            in_channels=1 + preset.out_channels, out_channels=preset.out_channels, img_size=preset.roi_size, **size
        )
        own = self.network.state_dict()
        for name, value in weights.items():
            if own[name].shape == value.shape:
                own[name] = value
            elif value.ndim == 5:  # a convolution of the image: what clicks add begins at nothing
                own[name] = torch.zeros_like(own[name])
                own[name][:, : value.shape[1]] = value
        self.network.load_state_dict(own)
        self._dtype = resolve_precision("auto", CPU)
        place_for_training(self.network, CPU)

    def train(self, cases: Sequence[Material], minutes: float, say: Callable[[str], object] = print) -> int:
        """Train for so many minutes; returns the number of steps."""
        began, steps, random = time.perf_counter(), 0, np.random.default_rng(0)
        recipe = self.preset.training
        rate = recipe.fine_tuning_learning_rate or recipe.learning_rate
        recipe = recipe.model_copy(update={"learning_rate": rate})
        loss_of, optimizer = build_loss(recipe), build_optimizer(self.network, recipe)
        while (part := (time.perf_counter() - began) / (60 * minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * min((part + 0.002) / WARM_UP, half_cosine(part))
            case = cases[int(random.integers(len(cases)))]
            image, truth = self._squeeze(case.image), self._squeeze_mask(case.truth)
            image = image * float(random.uniform(0.9, 1.1)) + float(random.uniform(-0.1, 0.1))
            clicks = self._simulate(image, truth, random) if random.random() < CLICKED_SHARE else []
            self.network.train()
            with autocast(CPU, self._dtype):
                logits = self.network(self._input(image, clicks))
            loss = loss_of(logits.float(), torch.from_numpy(truth.astype(np.float32))[None, None])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 2.0)
            optimizer.step()
            steps += 1
            if steps % 25 == 0:
                say(f"DeepEdit: step {steps}, {time.perf_counter() - began:.0f} s, loss {float(loss.detach()):.3f}")
        self.network.eval()
        return steps

    def segment(self, image: np.ndarray, clicks: Sequence[Correction]) -> np.ndarray:
        """The mask on the network's grid.

        Args:
            image: shape (X, Y, Z), on the preset's grid.
            clicks: voxels of that grid.
        """
        scale = [(w - 1) / max(1, n - 1) for w, n in zip(self.window, image.shape, strict=True)]
        placed = [Correction(c.value, _scaled(c.point, scale)) for c in clicks]
        self.network.eval()
        with torch.inference_mode(), autocast(CPU, self._dtype):
            logits = self.network(self._input(self._squeeze(image), placed)).float()
            logits = nn.functional.interpolate(logits, size=image.shape, mode="trilinear", align_corners=True)
        return logits[0].argmax(dim=0).numpy().astype(np.uint8)

    def _simulate(self, image: torch.Tensor, truth: np.ndarray, random: np.random.Generator) -> list[Correction]:
        """Clicks on what the network gets wrong without any."""
        self.network.eval()
        with torch.inference_mode(), autocast(CPU, self._dtype):
            found = self.network(self._input(image, []))[0].argmax(dim=0).numpy().astype(np.uint8)
        made: list[Correction] = []
        for _ in range(int(random.integers(1, MOST_CLICKS + 1))):
            click = next_click(found, truth, (1, 1, 1), random, [c.point for c in made])
            if click is None:
                break
            made.append(click)
        return made

    def _input(self, image: torch.Tensor, clicks: Sequence[Correction]) -> torch.Tensor:
        maps = torch.zeros(self.preset.out_channels, *self.window)
        axes = [torch.arange(n, dtype=torch.float32) for n in self.window]
        for click in clicks:
            parts = [
                torch.exp(-((a - at) ** 2) / (2 * SIGMA_VOXELS**2)) for a, at in zip(axes, click.point, strict=True)
            ]
            ball = parts[0][:, None, None] * parts[1][:, None] * parts[2]
            maps[click.value] = torch.maximum(maps[click.value], ball)
        return torch.cat([image[None], maps])[None].contiguous(memory_format=torch.channels_last_3d)

    def _squeeze(self, image: np.ndarray) -> torch.Tensor:
        given = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None, None]
        return nn.functional.interpolate(given, size=self.window, mode="trilinear", align_corners=True)[0, 0]

    def _squeeze_mask(self, mask: np.ndarray) -> np.ndarray:
        places = [np.rint(np.linspace(0, n - 1, w)).astype(int) for n, w in zip(mask.shape, self.window, strict=True)]
        return mask[np.ix_(*places)]


def _scaled(point: Sequence[int], scale: Sequence[float]) -> tuple[int, int, int]:
    x, y, z = (round(p * s) for p, s in zip(point, scale, strict=True))
    return x, y, z
