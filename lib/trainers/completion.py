"""Completes labels that lack structures with predictions of the live model, so that training does not unlearn them.

A person who corrects the spleen does not annotate the liver. A network that is trained on such cases alone loses its
skill on the other organs; predictions of the old network on the new images preserve it (learning without forgetting, Li
and Hoiem 2016, arXiv 1606.09282). The completed label shows where crops are drawn; the targets there are the model's
probabilities (:mod:`lib.trainers.run.distillation`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from lib.cases.labelled import Case, read_case
from lib.imagefiles.compression import pack_gzip
from lib.networks.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from lib.storage.files import replacing
from lib.storage.full_disk import writing
from lib.trainers.judging.masks import CaseMasks

logger = logging.getLogger("unetr.train")

COMPLETED_FOLDER = "completed"
TEACHER_FILE = "teacher.pt"


def complete_labels(
    cases: Iterable[Case], masks: CaseMasks, never_learnt: Collection[str], folder: Path
) -> tuple[Case, ...]:
    """Fill the structures that the cases' labels do not annotate with a model's prediction.

    Voxels that a person has labelled are not changed: only background of the label becomes a missing structure. A
    structure that the model has not learnt, or of which it predicts no voxel, stays missing and is excluded from the
    loss.

    Args:
        cases: the cases; an oversampled case occurs several times.
        masks: masks of the model.
        never_learnt: names of labels on which the model was not trained.
        folder: folder of the completed labels. Existing ones are reused, so that a resumed run keeps the labels with
            which it began, whichever model is live by then.

    Returns:
        The cases in their order; complete ones are unchanged. ``predicted`` names what is the model's alone: not a
        structure that a person has begun to draw.

    Raises:
        InputError: if a case cannot be read.
        StorageError: if a completed label cannot be written.
    """
    unknown = {index for name, index in masks.preset.label_indices.items() if name in never_learnt}
    completed: dict[str, Case] = {}
    result = []
    for case in cases:
        wanted = sorted(set(case.missing) - unknown)
        if wanted and case.case_id not in completed:
            completed[case.case_id] = _complete(case, masks, wanted, folder)
        result.append(completed.get(case.case_id, case))
    if completed:
        logger.info("labels that %d cases lack are taken from the live weights", len(completed))
    return tuple(result)


def _complete(case: Case, masks: CaseMasks, wanted: list[int], folder: Path) -> Case:
    """The case with a separate label that also has the wanted structures, as far as the model predicts them."""
    volume, label = read_case(case, masks.preset)
    whole = replace(case, label=folder / f"{case.case_id}.nii.gz", values=None)
    if not whole.label.is_file():
        drawn = masks.of(case, volume).labels
        taken = np.where((label == 0) & np.isin(drawn, wanted), drawn, label)
        folder.mkdir(parents=True, exist_ok=True)
        content = pack_gzip(nib.Nifti1Image(taken, volume.affine_ras).to_bytes())
        with writing(f"the completed label of {case.case_id!r}"), replacing(whole.label) as stream:
            stream.write(content)
    completed = read_case(whole, masks.preset)[1]
    filled, begun = (set(np.unique(values).tolist()) for values in (completed[label == 0], label))
    missing = tuple(index for index in case.missing if index not in filled)
    return replace(whole, missing=missing, predicted=tuple(index for index in wanted if index in filled - begun))


def keep_teacher(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The model that completed the labels in ``folder``, which a resumed run keeps, whichever model is live by then.

    Raises:
        StorageError: if the weights cannot be written.
        CheckpointError: if the stored weights are damaged.
    """
    file = folder / TEACHER_FILE
    if not file.is_file():
        write_checkpoint(file, checkpoint)
        return checkpoint
    return read_checkpoint(file)
