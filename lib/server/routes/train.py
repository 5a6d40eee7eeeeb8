"""``/train/``, ``/batch/infer`` and ``/scoring/``: start, observe and stop long work in separate processes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType
from starlette.exceptions import HTTPException

from lib.errors import NotFoundError, ParameterError, TrainingError
from lib.infers.task import UnetrInferTask
from lib.server.dependencies import (
    DatastoreDep,
    JobsDep,
    JournalDep,
    LanesDep,
    PauseDep,
    ReadersDep,
    ScoringMethodsDep,
    SegmentationTasksDep,
    TrainTasksDep,
)
from lib.server.http.auth import AsAnnotator, AsReviewer, Role, at_least
from lib.server.http.bodies import BatchRequest, ScoringRequest
from lib.server.http.names import check_image_known
from lib.server.http.parameters import check_fields, json_body, json_body_of
from lib.server.labels.submissions import tag_for_prediction
from lib.server.tasks import TasksByName
from lib.server.work.jobs import Job, Jobs, Kind
from lib.server.work.places import idle_place
from lib.server.work.trainings import Trainings, own
from lib.trainers.request import SERVER_FIELDS, TrainRequest

train_router = APIRouter(prefix="/train", tags=["Train"])
batch_router = APIRouter(prefix="/batch", tags=["Infer"])
scoring_router = APIRouter(prefix="/scoring", tags=["Scoring"])

Body = Annotated[dict[str, Any], Depends(json_body)]
Status = dict[str, Any] | list[dict[str, Any]]
TRAIN_BODY = json_body_of(TrainRequest, SERVER_FIELDS)
BATCH_BODY = json_body_of(BatchRequest)
SCORING_BODY = json_body_of(ScoringRequest)
SECONDS_BETWEEN_LOOKS = 0.2


async def get_trainings(
    trainers: TrainTasksDep,
    jobs: JobsDep,
    pause: PauseDep,
    lanes: LanesDep,
    datastore: DatastoreDep,
    readers: ReadersDep,
    journal: JournalDep,
) -> Trainings:
    """Starts trainings, as a FastAPI dependency."""
    return Trainings(trainers, jobs, pause, lanes, datastore, readers, journal.check_alone)


def add_status_and_stop(router: APIRouter, path: str, kind: Kind, noun: str, may_stop: Role) -> None:
    """Add two routes for a kind of job: ``GET`` for its status, ``DELETE`` to stop it.

    Args:
        router: router of the kind.
        path: path below the router's prefix.
        kind: kind of the jobs.
        noun: name of such a job in the API's documentation.
        may_stop: lowest role that may stop it; any user may see its status.
    """

    lines = "with the last 20 lines that it printed; 404 where there is none (or none runs)"

    def get_status(jobs: JobsDep, all: bool = False, check_if_running: bool = False) -> Status:
        return status(jobs, kind, all, check_if_running)

    def delete(jobs: JobsDep) -> dict[str, Any] | None:
        return stop(jobs, kind)

    router.add_api_route(
        path,
        get_status,
        name=f"{kind}_status",
        summary=f"Status of the {noun}",
        description=f"The latest {noun}, {lines}.",
        response_model=None,
        dependencies=[Depends(at_least(Role.USER))],
    )
    router.add_api_route(
        path,
        delete,
        methods=["DELETE"],
        name=f"stop_{kind}",
        summary=f"Stop the {noun}",
        description=f"Stop the {noun} that runs and those that wait; null when there is none.",
        dependencies=[Depends(at_least(may_stop))],
    )


add_status_and_stop(train_router, "/", "train", "training", Role.REVIEWER)
add_status_and_stop(batch_router, "/infer", "batch_infer", "batch inference", Role.ANNOTATOR)
add_status_and_stop(scoring_router, "/", "scoring", "scoring", Role.ANNOTATOR)

TrainingsDep = Annotated[Trainings, Depends(get_trainings)]


@train_router.post("/", summary="Train all models, one after the other", openapi_extra=TRAIN_BODY)
async def train_all(trainings: TrainingsDep, user: AsReviewer, params: Body, run_sync: bool = False) -> dict[str, Any]:
    """Train every model that has labels, with common settings or with settings under each model's name.

    If no model has labels, all are started, and each training reports this.
    """
    models = list(trainings.trainers)
    shared = {key: value for key, value in params.items() if key not in models}
    requests = {model: shared | _object(params.get(model, {}), model) for model in models}
    for model, request in requests.items():
        trainings.check(model, request)
    notices = {model: await trainings.notice(model, request) for model, request in requests.items()}
    trained = await trainings.labelled() or models
    started = {model: await trainings.start(model, requests[model], enqueue=True) for model in trained}
    skipped = {model: {"result": None, "detail": "no label yet"} for model in models if model not in trained}
    return skipped | {
        model: {"result": _noting(await answer(job, run_sync), notices[model]), "detail": notices[model] or None}
        for model, job in started.items()
    }


@train_router.post("/{model}", summary="Train a model", openapi_extra=TRAIN_BODY)
async def train(
    trainings: TrainingsDep,
    user: AsReviewer,
    model: str,
    params: Body,
    run_sync: bool = False,
    enqueue: bool = False,
) -> Any:
    """Start a training; 409 if one is running, unless ``enqueue`` lets it wait.

    ``notice`` in the response warns if no held-out case will judge the result.
    """
    trainings.check(model, params)
    words = await trainings.notice(model, params)
    return _noting(await answer(await trainings.start(model, params, enqueue), run_sync), words)


@batch_router.post("/infer/{model}", summary="Segment many images and keep the labels", openapi_extra=BATCH_BODY)
async def batch_infer(
    models: SegmentationTasksDep,
    jobs: JobsDep,
    lanes: LanesDep,
    datastore: DatastoreDep,
    user: AsAnnotator,
    model: str,
    params: Body,
    images: BatchInferImageType = BatchInferImageType.IMAGES_ALL,
    run_sync: bool = False,
) -> Any:
    """Segment all, the labelled or the unlabelled images; the masks are saved as labels of the tag ``original``.

    The request's ``label_tag`` sets another tag; ``final`` requires a reviewer. Labels drawn by a person are not
    replaced.
    """
    # each device computes one image at a time; one more worker reads the next image meanwhile
    workers = 1 + sum(lane.pooled for lane in lanes)
    request = {"images": images.value, "max_workers": workers} | own(params, model)
    check_batch(models, datastore, model, request)
    request["label_tag"] = tag_for_prediction(user, request)
    # by which a restarted server finds the images that are done
    request["begun_at"] = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return await answer(jobs.submit("batch_infer", request), run_sync)


@scoring_router.post("/{method}", summary="Score the images", openapi_extra=SCORING_BODY)
async def score(
    methods: ScoringMethodsDep,
    trainers: TrainTasksDep,
    jobs: JobsDep,
    lanes: LanesDep,
    user: AsAnnotator,
    method: str,
    params: Body,
    run_sync: bool = False,
) -> Any:
    """Run one scoring method over the images."""
    if method not in methods:
        raise NotFoundError("scoring method", method[:200], list(methods))
    request = check_fields(ScoringRequest, params).model_dump(exclude_defaults=True)
    model = request.get("model")
    if model and model not in trainers:
        raise NotFoundError("model", model, list(trainers))
    request |= {"method": method} | idle_place(lanes)
    return await answer(jobs.submit("scoring", request, enqueue=True), run_sync)


def status(jobs: Jobs, kind: Kind, everything: bool, only_open: bool) -> Status:
    """The jobs of a kind, in MONAI Label's form.

    Raises:
        HTTPException: 404 if there is none.
    """
    kept = jobs.of(kind)
    current = jobs.current(kind)
    if only_open and current is None:
        raise HTTPException(404, f"no {kind} task runs or waits")
    if not kept:
        raise HTTPException(404, f"there has been no {kind} task since the server was started")
    if everything and not only_open:
        return [job.describe() for job in kept]
    return (current or kept[-1]).describe()


def stop(jobs: Jobs, kind: Kind) -> dict[str, Any] | None:
    """Stop the jobs of a kind; None if none is running or waiting."""
    job = jobs.stop(kind)
    return job.describe() if job else None


async def answer(job: Job, run_sync: bool) -> Any:
    """The current job; with ``run_sync``, its result after it has ended.

    Raises:
        TrainingError: if it failed, with the last line that it printed.
    """
    if not run_sync:
        return job.describe()
    while not job.finished.is_set():
        await anyio.sleep(SECONDS_BETWEEN_LOOKS)
    if job.status != "DONE":
        raise TrainingError(
            f"{job.kind} ended as {job.status}: {job.details[-1] if job.details else 'it printed nothing'}"
        )
    return job.result


def _noting(answer: Any, words: str) -> Any:
    return answer | {"notice": words} if words and isinstance(answer, dict) else answer


def check_batch(
    models: TasksByName[UnetrInferTask], datastore: Datastore, model: str, request: Mapping[str, Any]
) -> None:
    """Validate a batch inference before its process starts.

    Raises:
        NotFoundError: for an unknown model or image.
        ParameterError: for an invalid field.
    """
    models.find(model).parse({**request, "image": "image.nii.gz"})
    images = check_fields(BatchRequest, request).images
    if isinstance(images, list):
        for image in images:
            check_image_known(datastore, image)


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ParameterError(name, value, "a JSON object of settings")
    return value
