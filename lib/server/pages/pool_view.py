"""The cases on the page: their number by state, the next ones, and recent activity."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from lib.datastore.images.checks import ImageCheck
from lib.datastore.images.folder import FolderProblem
from lib.datastore.label_files.found_labels import Problem
from lib.datastore.quarantine import Quarantined
from lib.datastore.records import LabelVersion
from lib.datastore.store import VersionedDatastore
from lib.errors import UnetrError, UpstreamError
from lib.server.http.auth import Role, User
from lib.server.pages.effort_view import EffortView, effort_view
from lib.server.pages.titles import Title, titles_of
from lib.server.presented.cases import PresentedCases
from lib.server.tasks import TasksByName
from lib.server.work.image_checks import ImageInspector
from lib.server.work.next_case import NextCase
from lib.server.work.problems import left_out_warnings, source_problems, store_problems
from lib.trainers.task import UnetrTrainTask

logger = logging.getLogger("unetr.server")

MOST_NEXT = 6
MOST_SHOWN = 20
KINDS = ("labelled", "leased", "open", "skipped", "broken", "quarantined")


@dataclass(frozen=True)
class Share:
    """Share of a state in the bar, in percent."""

    kind: str
    start: float
    width: float


@dataclass(frozen=True)
class PoolView:
    """The number of cases in each state. Refused labels are counted separately, as are files that cannot be used.

    ``problem`` states why the list of cases may be outdated or is unavailable.
    """

    total: int
    labelled: int
    leased: int
    open: int
    skipped: int
    broken: int
    quarantined: int
    problem: str = ""
    label_problems: tuple[Problem, ...] = ()
    left_out: tuple[ImageCheck, ...] = ()
    odd: tuple[ImageCheck, ...] = ()
    files: tuple[FolderProblem, ...] = ()
    may_check: bool = False

    @property
    def shares(self) -> Iterator[Share]:
        """The parts of the bar, from left to right."""
        start = 0.0
        for kind in KINDS[:5]:
            width = 100 * getattr(self, kind) / max(1, self.total)
            yield Share(kind, start, width)
            start += width


@dataclass(frozen=True)
class NextRow:
    """A case that will be handed out soon. ``stamp`` changes with the model, so that its picture is updated."""

    id: str
    title: Title
    reason: str
    stamp: str
    ohif: str | None


@dataclass(frozen=True)
class NextView:
    """The next cases by the default strategy."""

    strategy: str
    cases: tuple[NextRow, ...]


@dataclass(frozen=True)
class LeaseView:
    """A leased case."""

    image_id: str
    client: str
    until: str
    may_release: bool

    @property
    def release_path(self) -> str:
        """The path of the request to end the lease."""
        return f"/leases/?image={quote(self.image_id, safe='')}"


@dataclass(frozen=True)
class ActivityView:
    """Recent activity, newest first."""

    labels: tuple[LabelVersion, ...]
    leases: tuple[LeaseView, ...]
    skips: tuple[Any, ...]
    quarantine: tuple[Quarantined, ...]
    effort: EffortView
    titles: Mapping[str, Title]


def pool_view(store: VersionedDatastore, inspector: ImageInspector, user: User) -> PoolView:
    """Count the cases, and list the files that cannot be used."""
    outside = (f"{sentence}." for sentence in left_out_warnings(store))
    problem = " ".join([*source_problems(store), *store_problems(store), *outside])
    try:
        images = set(store.list_images())
        unlabelled = set(store.get_unlabeled_images())
    except UpstreamError as error:  # the rest of the page works without the PACS
        images, unlabelled, problem = set(), set(), str(error)
    leased = store.leases.active().keys() & unlabelled
    skipped = (store.leases.skipped().keys() & unlabelled) - leased
    checks = inspector.broken() if images else {}
    unusable = (checks.keys() & unlabelled) - leased - skipped
    return PoolView(
        total=len(images),
        labelled=len(images) - len(unlabelled),
        leased=len(leased),
        open=len(unlabelled) - len(leased) - len(skipped) - len(unusable),
        skipped=len(skipped),
        broken=len(unusable),
        quarantined=store.history.quarantine.count(),
        problem=problem,
        label_problems=tuple(store.label_problems()[:MOST_SHOWN]),
        left_out=tuple(checks[image] for image in sorted(unusable))[:MOST_SHOWN],
        odd=tuple(inspector.warned() if images else ())[:MOST_SHOWN],
        files=store.problems[:MOST_SHOWN],
        may_check=user.role >= Role.ANNOTATOR,
    )


def next_view(
    cases: NextCase, strategy: str, presented: PresentedCases, trainers: TasksByName[UnetrTrainTask]
) -> NextView:
    """Ask the default strategy, without handing out a case."""
    try:
        chosen = cases.preview(strategy)
    except UnetrError as error:
        logger.info("the page cannot say what comes next: %s", error)
        chosen = None
    if not chosen:
        return NextView(strategy, ())
    stamp = _stamp(trainers, chosen["model"])
    images, reasons = [chosen["id"], *chosen["next"]], [chosen["reason"], *chosen["next_reasons"]]
    pairs = list(zip(images, reasons, strict=True))[:MOST_NEXT]
    titles, store = titles_of(cases.store, images), cases.store
    rows = (NextRow(image, titles[image], reason, stamp, ohif_path(store, presented, image)) for image, reason in pairs)
    return NextView(strategy, tuple(rows))


def activity_view(store: VersionedDatastore, user: User) -> ActivityView:
    """Recent activity; refused labels are visible to reviewers only."""
    history, leases = store.history, store.leases
    own = user.client("")
    held = sorted(leases.active().values(), key=lambda lease: -lease.since)[:MOST_SHOWN]
    lately = history.lately()
    labels = tuple(reversed(lately[-MOST_SHOWN:]))
    skips = tuple(sorted(leases.skipped().values(), key=lambda skip: -skip.at)[:MOST_SHOWN])
    named = [image for rows in (labels, held, skips) for image in (row.image_id for row in rows)]
    return ActivityView(
        labels=labels,
        leases=tuple(
            LeaseView(
                lease.image_id,
                lease.client,
                clock(lease.until),
                user.role >= Role.REVIEWER or (user.role >= Role.ANNOTATOR and lease.client == own),
            )
            for lease in held
        ),
        skips=skips,
        quarantine=tuple(history.quarantine.newest(MOST_SHOWN)) if user.role >= Role.REVIEWER else (),
        effort=effort_view(lately),
        titles=titles_of(store, named),
    )


def ohif_path(store: VersionedDatastore, presented: PresentedCases, image: str) -> str | None:
    """The path of an image in OHIF; None for an image that is not DICOM."""
    known = (store.get_image_info(image) or {}) | presented.attributes(image)
    study, regular = known.get("StudyInstanceUID"), presented.regular.uid(image)
    named = f"&SeriesInstanceUIDs={quote(regular)}" if regular else ""
    return f"/ohif/monai-label?StudyInstanceUIDs={quote(str(study))}{named}" if study else None


def clock(seconds: float) -> str:
    """A time in the server's time zone."""
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _stamp(trainers: TasksByName[UnetrTrainTask], model: str) -> str:
    return trainers[model].serving()[0] if model in trainers else ""
