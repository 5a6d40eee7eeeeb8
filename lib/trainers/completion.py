"""Labels that a case lacks, taken from the live model, so that what it has learnt is not forgotten.

A person who corrects the spleen says nothing of the liver. A network that goes on learning from such cases alone drifts
away from what it knew of the other organs; the old network's answers on the new images hold it there (learning without
forgetting, Li and Hoiem 2016, arXiv 1606.09282; as pseudo-labels in the background of a segmentation: PLOP, Douillard
et al. 2021, arXiv 2011.11390).
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
from lib.storage.files import replacing
from lib.storage.full_disk import writing
from lib.trainers.judging.masks import CaseMasks

logger = logging.getLogger("unetr.train")

COMPLETED_FOLDER = "completed"


def complete_labels(
    cases: Iterable[Case], masks: CaseMasks, never_learnt: Collection[str], folder: Path
) -> tuple[Case, ...]:
    """Fill in what the cases' labels do not speak of with what a model draws there.

    What a person has drawn stays, also around it: only background of the label becomes a missing structure. A structure
    that the model has not learnt, or of which it draws no voxel, stays missing, so that the loss says nothing of it.

    Args:
        cases: one that is oversampled is in them several times.
        masks: of the model.
        never_learnt: names of labels that the model has not learnt.
        folder: where completed labels are written. One that is there already is not made again, so that a run that
            is resumed goes on with the labels that it began with, whatever model is live by then.

    Returns:
        The cases in their order; those that lack nothing as they are.

    Raises:
        InputError: when a case cannot be read.
        StorageError: when the disk does not take a completed label.
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
    """The case with a label of its own that has the wanted structures too, as far as the model draws them."""
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
    filled = set(np.unique(completed[label == 0]).tolist())
    return replace(whole, missing=tuple(index for index in case.missing if index not in filled))
