"""Segments the cases of a source on an engine, and stores the results."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lib.cluster.engine import Engine, Recipe, Rest
from lib.cluster.model import Model, ModelFile
from lib.cluster.results import CaseResult, Masked, ResultFolder, measure_ml, packed_mask
from lib.cluster.source import CaseSource, ReadCase, read_case
from lib.errors import UnetrError, UpstreamError
from lib.models.calibration import foreground_uncertainty

PAUSES_SECONDS = (2.0, 5.0, 10.0, 20.0)
Send = Callable[[CaseResult, Path], str]
"""Uploads a mask, and returns its location for the record."""


@dataclass(frozen=True)
class Case:
    """A case to segment, and the result of an earlier run with the same weights."""

    id: str
    known: CaseResult | None = None


@dataclass
class Outcome:
    """The cases of a run by their result; ``failed`` has the reason for each id."""

    done: dict[str, CaseResult] = field(default_factory=dict)
    skipped: dict[str, CaseResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class SegmentingWorker:
    """A model on a device, and the source of its cases.

    Args:
        source: the source of the cases.
        model: the loaded model.
        pauses: seconds to wait before each further request to a server that does not respond.
    """

    def __init__(self, source: CaseSource, model: Model, pauses: Sequence[float] = PAUSES_SECONDS) -> None:
        self._source, self._model, self._pauses = source, model, pauses

    def read(self, case: Case) -> CaseResult | ReadCase:
        """The image, or its existing result.

        Raises:
            UnetrError: if it is unavailable or cannot be read.
        """
        for pause in self._pauses:
            try:
                return self._read(case)
            except UpstreamError:
                time.sleep(pause)
        return self._read(case)

    def _read(self, case: Case) -> CaseResult | ReadCase:
        known = case.known
        if known is not None and self._source.is_unchanged(case.id, known.image_sha256, known.image_stamp):
            return known
        with tempfile.TemporaryDirectory(prefix="unetr-") as folder:
            return read_case(case.id, self._source.fetch(case.id, Path(folder)), self._model.segmenter.preset)

    def compute(self, ready: CaseResult | ReadCase) -> CaseResult | Rest[CaseResult | Masked]:
        """Segment the image that was read.

        Raises:
            InputError: if it cannot be segmented.
        """
        return ready if isinstance(ready, CaseResult) else segment(ready, self._model)


@dataclass(frozen=True)
class MakeWorker:
    """A factory of workers, in this or in other processes."""

    source: CaseSource
    model: ModelFile

    def __call__(self, device: str) -> SegmentingWorker:
        return SegmentingWorker(self.source, self.model.load(device))


def segment_cases(
    cases: Iterable[str],
    results: ResultFolder,
    engine: Engine,
    recipe: Callable[[], Recipe[Case, CaseResult | Masked]],
    weights: tuple[str, str],
    send: Send | None = None,
    on_case: Callable[[str], None] = lambda case: None,
) -> Outcome:
    """Segment each case without a result; a case that cannot be segmented is reported, and the others continue.

    Args:
        cases: ids of the cases.
        results: folder of the results.
        engine: engine that computes them.
        recipe: recipe of its workers.
        weights: name of the preset and checksum of the weights; results of other weights are computed again.
        send: called with each result that was not uploaded yet.
        on_case: called with each id when it is finished, skipped or failed.

    Raises:
        StorageError: if a mask cannot be stored.
    """
    outcome = Outcome()
    items: Iterator[Case] = (Case(case, results.find(case, *weights)) for case in cases)
    for finished in engine.run(items, recipe):
        case, answer = finished.item.id, finished.answer
        if isinstance(answer, Masked):
            outcome.done[case] = results.keep(answer)
        elif answer is not None:
            outcome.skipped[case] = answer
        else:
            outcome.failed[case] = finished.problem
        if answer is not None and send is not None:
            _send(case, outcome, results, send)
        on_case(case)
    return outcome


def _send(case: str, outcome: Outcome, results: ResultFolder, send: Send) -> None:
    """Upload a result; if that fails, its mask is kept, and the next run uploads it."""
    records = outcome.done if case in outcome.done else outcome.skipped
    try:
        sent_to = send(records[case], results.folder / records[case].mask)
    except UnetrError as error:
        del records[case]
        outcome.failed[case] = f"it is segmented, but its mask was not taken: {error}"
        return
    if sent_to != records[case].sent_to:
        records[case] = replace(records[case], sent_to=sent_to)
        results.record(records[case])


def segment(ready: ReadCase, model: Model) -> Rest[Masked]:
    """Run the network; the mask of the image and its record are the remaining work.

    Raises:
        InputError: if it cannot be segmented.
    """
    start = time.perf_counter()
    segmenter, volume = model.segmenter, ready.volume
    computed = segmenter.compute(volume, name=ready.case, entropy=model.calibration is not None)
    seconds, affine = time.perf_counter() - start, volume.affine_ras
    case, sha256, stamp, warnings = ready.case, ready.sha256, ready.stamp, ready.warnings

    def finish() -> Masked:  # keeps no reference to the image except its affine
        start = time.perf_counter()
        segmented, preset = segmenter.restore(computed), segmenter.preset
        took = round(seconds + time.perf_counter() - start, 3)
        quality = None
        if model.calibration is not None and segmented.entropy is not None:
            quality = model.calibration.estimate(foreground_uncertainty(segmented.entropy, segmented.labels))
        result = CaseResult(
            case=case,
            image_sha256=sha256,
            model=model.name,
            version=model.version,
            weights_sha256=model.weights_sha256,
            mask=f"{case}.nii.gz",
            seconds=took,
            volumes_ml=measure_ml(segmented.labels, affine, preset),
            estimated_dice=quality["estimated_dice"] if quality else None,
            engine=segmented.plan.engine,
            image_stamp=stamp,
            label_names=preset.label_indices,
            warnings=warnings,
        )
        return Masked(result, packed_mask(segmented.labels, affine, preset))

    return Rest(finish)
