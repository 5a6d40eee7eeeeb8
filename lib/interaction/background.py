"""Trains the editor network in the background, after a training of the preset, on the same labels and the same split.

The new editor is judged by simulated clicks on the held-out cases (:mod:`lib.interaction.editor_gate`), kept as a
version, and served if it is better than the editor that is served now.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lib.cases.labelled import Case
from lib.configs.preset import Preset
from lib.configs.retraining import Retraining
from lib.errors import CheckpointError, InputError, MemoryBudgetError
from lib.infers.memory import host_bytes_left
from lib.infers.plan import Planner
from lib.infers.segmenter import Segmenter
from lib.interaction.editor import Editor, EditorDesign, EditorWeights, read_editor, write_editor
from lib.interaction.editor_gate import judge_clicks
from lib.interaction.editor_memory import MATERIAL_SHARE, fitting_voxels
from lib.interaction.evaluation import JudgedCase, read_judged, score_clicks
from lib.interaction.served import ServedEditor
from lib.interaction.sessions import Material
from lib.interaction.training import VOXELS, EditorTraining, read_material
from lib.models.provenance import code_version, trained_on
from lib.models.versions import Version
from lib.models.weights import WeightsLocator, preset_for
from lib.networks.checkpoint import check_finite, read_checkpoint
from lib.trainers.judging.gate import Verdict
from lib.trainers.material import EndedRun
from lib.trainers.pause import wait_while_paused

logger = logging.getLogger("unetr.train")

CPU = torch.device("cpu")
GROWTH = "growth without weights"
READING_SHARE = 0.33
"""Of the minutes of a training, for reading cases and segmenting them, which a CT takes many seconds for."""
MOST_JUDGED = 12
"""Held-out cases that are clicked on: ten clicks of two editors take seconds each."""


class EditorTrainer:
    """Trains, judges and keeps the editors of one preset.

    Args:
        preset: the preset whose masks the editor corrects.
        locator: finds the weights of the preset, whose masks are corrected.
        served: finds the editor that is served and the folder of the versions.
        settings: minutes of training, the margin of the gate, and the number of versions that are kept.
        budget: bytes of host memory that may be used; by default the memory that is free.
        design: design of a network that is trained from the beginning.
        most_steps: upper limit of training steps, whatever the minutes.
    """

    def __init__(
        self,
        preset: Preset,
        locator: WeightsLocator,
        served: ServedEditor,
        settings: Retraining,
        budget: int | None = None,
        design: EditorDesign | None = None,
        most_steps: int | None = None,
    ) -> None:
        self._preset, self._locator, self._served, self._settings = preset, locator, served, settings
        self._budget, self._design, self._most_steps = budget, design or EditorDesign(), most_steps

    def __call__(self, run: EndedRun) -> dict[str, Any]:
        """Train an editor after a training run, and publish it if it is better; an interrupted training is resumed.

        Returns:
            The outcome: ``status``, ``reason``, and the ``version`` if one was written.

        Raises:
            MemoryBudgetError: if even the smallest training step does not fit into the memory.
        """
        if made := self._version_of(run.run):
            return _summary(made)
        preset, segmenter = self._segmenter()
        folder = run.run_dir / "editor"
        train = list({case.case_id: case for case in run.material.train}.values())
        started = self._served.current()
        training = self._train(train, preset, segmenter, folder, run)
        logger.info("editor of %s: %d steps in %.0f s", preset.name, training.steps, training.seconds)
        weights = training.weights()
        check_finite(weights.model)
        verdict = self._judge(Editor.from_weights(weights, CPU), run.material.validation, preset, segmenter)
        logger.info("editor of %s: %s", preset.name, verdict.reason)
        details = self._details(run, verdict, weights) | {"parent": self._served.version()}
        details["started_from"] = started.sha256 if started is not None else ""

        def write(path: Path, name: str, created: str) -> None:
            info = dict(weights.info) | {"version": name, "created": created}
            write_editor(path, EditorWeights(weights.model, weights.design, (preset.name,), info))

        version = self._served.versions.add_file(verdict.status, write, details)
        self._served.versions.prune(self._settings.keep_versions)
        shutil.rmtree(folder, ignore_errors=True)
        return _summary(version)

    def _version_of(self, run: str) -> Version | None:
        return next((v for v in self._served.versions.list() if v.details.get("run") == run), None)

    def _segmenter(self) -> tuple[Preset, Segmenter | None]:
        """The preset in the form that its weights require, and its segmenter; None where there are no weights."""
        file = self._locator.find()
        if file is None:
            return self._preset, None
        checkpoint = read_checkpoint(file.path)
        preset = preset_for(checkpoint, self._preset)
        return preset, Segmenter.from_checkpoint(checkpoint, preset, CPU, planner=Planner(self._budget))

    def _train(
        self, cases: Sequence[Case], preset: Preset, segmenter: Segmenter | None, folder: Path, run: EndedRun
    ) -> EditorTraining:
        start = self._start()
        design = start.design if start is not None else self._design
        voxels = fitting_voxels(design, VOXELS, host_bytes_left(self._budget))
        material = self._read_material(cases, preset, segmenter)
        training = EditorTraining(design, {preset.name: material}, folder, voxels, start=start)
        minutes = self._settings.editor_training_minutes
        training.run(minutes, self._most_steps, before_step=lambda: wait_while_paused(run.pause_file))
        return training

    def _start(self) -> EditorWeights | None:
        """The weights to continue from, which are those of the editor that is served."""
        try:
            shared = self._served.current()
            return None if shared is None else read_editor(shared.path)
        except CheckpointError as error:
            logger.warning("the editor is trained from nothing: %s", error)
            return None

    def _read_material(self, cases: Sequence[Case], preset: Preset, segmenter: Segmenter | None) -> list[Material]:
        """Read as many cases as fit into a share of the memory and of the time, in an order drawn from their ids."""
        most, taken, materials = MATERIAL_SHARE * host_bytes_left(self._budget), 0, list[Material]()
        ends = time.monotonic() + READING_SHARE * 60 * self._settings.editor_training_minutes
        for number, case in enumerate(_shuffled(cases)):
            try:
                one = read_material(case, preset, segmenter, seed=number)
            except MemoryBudgetError:
                raise
            except InputError as error:
                logger.warning("the editor is not trained on %s: %s", case.case_id, error)
                continue
            taken += one.image.nbytes + one.truth.nbytes + sum(mask.nbytes for mask in one.network_masks)
            if materials and (taken > most or time.monotonic() > ends):
                logger.info("the editor is trained on %d of %d cases, for memory and time", len(materials), len(cases))
                break
            materials.append(one)
        return materials

    def _judge(self, new: Editor, cases: Sequence[Case], preset: Preset, segmenter: Segmenter | None) -> Verdict:
        """Compare with the editor that is served now, which may have changed since the training began."""
        most, taken, judged = MATERIAL_SHARE * host_bytes_left(self._budget), 0, list[JudgedCase]()
        for case in _shuffled(cases)[:MOST_JUDGED]:
            one = read_judged(case, preset, segmenter)
            taken += one.size_bytes
            if judged and taken > most:
                break
            judged.append(one)
        scores = score_clicks(judged, new)
        while True:
            shared = self._served.current()
            sha256 = shared.sha256 if shared is not None else ""
            theirs = score_clicks(judged, shared.on(CPU) if shared is not None else None)
            verdict = judge_clicks(scores, theirs, self._settings.gate_margin, self._in_words(sha256))
            still = self._served.current()
            if (still.sha256 if still is not None else "") == sha256:
                return verdict

    def _in_words(self, sha256: str) -> str:
        return GROWTH if not sha256 else f"editor {self._served.version() or 'of all presets'}"

    def _details(self, run: EndedRun, verdict: Verdict, weights: EditorWeights) -> dict[str, Any]:
        comparison = verdict.comparison
        scored = {"held_out": "challenger", "held_out_before": "champion"} if comparison else {}
        return {
            "run": run.run,
            "preset": self._preset.name,
            "labels": self._preset.label_indices,
            "reason": verdict.reason,
            "compared": verdict.compared,
            "comparison": dict(comparison) or None,
            "training": dict(weights.info),
            "split": {
                side: sorted({case.case_id for case in getattr(run.material, side)}) for side in ("train", "validation")
            },
            "trained_on": trained_on(run.material.train),
            "label_digests": dict(run.material.labels),
            "code": code_version(),
        } | {side: {"mean_dice": sum(comparison[name]) / len(comparison[name])} for side, name in scored.items()}


def _summary(version: Version) -> dict[str, Any]:
    return {"version": version.name, "status": version.status, "reason": version.details.get("reason", "")}


def _shuffled(cases: Sequence[Case]) -> list[Case]:
    """The cases in an order that depends on their ids alone."""
    return sorted(cases, key=lambda case: hashlib.sha256(case.case_id.encode()).hexdigest())
