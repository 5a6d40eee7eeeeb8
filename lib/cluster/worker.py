"""Segments cases one after the other, and reads the next one meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lib.cluster.results import CaseResult, ResultFolder, measure_ml
from lib.cluster.source import ReadCase, checksum_of, read_case
from lib.errors import InputError
from lib.infers.segmenter import Segmenter
from lib.models.calibration import Calibration, foreground_uncertainty


@dataclass(frozen=True)
class Model:
    """What segments: a network, and which weights it has."""

    segmenter: Segmenter
    name: str
    version: str
    weights_sha256: str
    calibration: Calibration | None = None


@dataclass
class Outcome:
    """What became of the cases of a run, by id; ``failed`` has the reason of each."""

    done: dict[str, CaseResult] = field(default_factory=dict)
    skipped: dict[str, CaseResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


Ready = CaseResult | ReadCase


def segment_cases(
    cases: Mapping[str, Path], model: Model, results: ResultFolder, on_case: Callable[[str], None] = lambda case: None
) -> Outcome:
    """Segment each case that has no result yet; a case that cannot be segmented is reported, and the others go on.

    Args:
        cases: id to file or DICOM folder.
        model: what segments them.
        results: where masks are kept.
        on_case: called with each id when it is finished, skipped or failed.

    Raises:
        StorageError: when a mask cannot be kept.
    """
    outcome = Outcome()

    def read(case: str) -> Ready:
        checksum = checksum_of(cases[case])
        kept = results.find(case, checksum, model.name, model.weights_sha256)
        return kept if kept is not None else read_case(cases[case], checksum)

    for case, reading in _one_ahead(list(cases), read):
        try:
            ready = reading.result()
            if isinstance(ready, CaseResult):
                outcome.skipped[case] = ready
            else:
                outcome.done[case] = _segment(case, ready, model, results)
        except InputError as error:
            outcome.failed[case] = str(error)
        on_case(case)
    return outcome


def _one_ahead(cases: Sequence[str], read: Callable[[str], Ready]) -> Iterator[tuple[str, Future[Ready]]]:
    """Each case while the next one is being read; never more than one ahead, since volumes are large."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        ahead = pool.submit(read, cases[0]) if cases else None
        for position, case in enumerate(cases):
            assert ahead is not None
            current = ahead
            current.exception()  # waits
            ahead = pool.submit(read, cases[position + 1]) if position + 1 < len(cases) else None
            yield case, current


def _segment(case: str, ready: ReadCase, model: Model, results: ResultFolder) -> CaseResult:
    start = time.perf_counter()
    found = model.segmenter.segment(ready.volume, name=case, entropy=model.calibration is not None)
    seconds = round(time.perf_counter() - start, 3)
    preset, affine = model.segmenter.preset, ready.volume.affine_ras
    quality = None
    if model.calibration is not None and found.entropy is not None:
        quality = model.calibration.estimate(foreground_uncertainty(found.entropy, found.labels))
    result = CaseResult(
        case=case,
        image_sha256=ready.sha256,
        model=model.name,
        version=model.version,
        weights_sha256=model.weights_sha256,
        mask=f"{case}.nii.gz",
        seconds=seconds,
        volumes_ml=measure_ml(found.labels, affine, preset),
        estimated_dice=quality["estimated_dice"] if quality else None,
    )
    results.keep(result, found, affine, preset)
    return result
