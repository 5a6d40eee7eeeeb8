"""Segmentations as 3D Slicer stores and submits them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nrrd
import numpy as np

from lib.datastore.label_files.segment_header import Segment
from tests.tiny import oblique_affine

AFFINE = oblique_affine()
LEFT_OUT = ("background", "foreground_scribbles", "background_scribbles")


def write_segments(
    path: Path, layers: Sequence[np.ndarray], segments: Sequence[Segment], affine: np.ndarray = AFFINE
) -> Path:
    """A file as 3D Slicer's segmentation node is stored: layers first where there are several."""
    lps = np.diag([-1.0, -1, 1])
    directions = (lps @ affine[:3, :3]).T
    header: dict[str, Any] = {"space": "left-posterior-superior", "space origin": lps @ affine[:3, 3]}
    header |= {"kinds": ["domain"] * 3, "space directions": directions, "encoding": "gzip"}
    voxels = layers[0]
    if len(layers) > 1:
        voxels = np.stack(layers)
        header |= {"kinds": ["list", *["domain"] * 3], "space directions": np.vstack([[np.nan] * 3, directions])}
    for number, segment in enumerate(segments):
        header |= {f"Segment{number}_ID": f"Segment_{number + 1}", f"Segment{number}_Name": segment.name}
        header |= {f"Segment{number}_LabelValue": str(segment.value), f"Segment{number}_Layer": str(segment.layer)}
        header |= {f"Segment{number}_Color": "0.5 0.2 0.1", f"Segment{number}_Extent": "0 19 0 17 0 15"}
    header |= {"Segmentation_MasterRepresentation": "Binary labelmap"}
    nrrd.write(str(path), voxels.astype(np.uint8), header)
    return path


def as_slicer_submits(segments: Sequence[Segment]) -> list[dict[str, object]]:
    """``label_info`` of 3D Slicer's module: positions in its list, without those that it leaves out."""
    return [{"name": s.name, "idx": n} for n, s in enumerate(segments, start=1) if s.name not in LEFT_OUT]
