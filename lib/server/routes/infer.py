"""``POST /infer/{model}``: segment an image of the studies, an uploaded file or a session's image."""

from __future__ import annotations

import json
import logging
import secrets
from contextlib import AsyncExitStack
from typing import Annotated
from urllib.parse import quote

import anyio.to_thread
from fastapi import APIRouter, Depends, File, Form, Request, Response, UploadFile
from monailabel.utils.others.generic import get_mime_type
from urllib3.fields import RequestField
from urllib3.filepost import encode_multipart_formdata

from lib.server.dependencies import (
    AnswersDep,
    FindSessionsDep,
    ImagesDep,
    InferencesDep,
    InferTasksDep,
    PresentedDep,
    StoreDep,
)
from lib.server.http.auth import AsUser
from lib.server.http.bodies import InferParams, described_by
from lib.server.http.names import as_attachment
from lib.server.http.parameters import check_fields, parse_aside
from lib.server.http.uploads import FormRoute, temporary_folder
from lib.server.inference.answers import Answer
from lib.server.inference.requests import Output, RequestChecks
from lib.server.routes.sessions import session_image
from lib.server.work.prefetch import PrefetchKey

logger = logging.getLogger("unetr.server")
router = APIRouter(prefix="/infer", tags=["Infer"], route_class=FormRoute)

WARNINGS_HEADER = "X-Warnings"
"""Percent-encoded warnings for clients that request the mask alone; others find ``warnings`` in ``params``."""


async def get_request_checks(
    tasks: InferTasksDep, images: ImagesDep, store: StoreDep, presented: PresentedDep, find_sessions: FindSessionsDep
) -> RequestChecks:
    """The validation of requests, as a FastAPI dependency."""
    return RequestChecks(tasks, images, store, presented, lambda session: session_image(find_sessions(), session))


@router.post("/{model}", summary="Segment an image")
async def infer(
    request: Request,
    checks: Annotated[RequestChecks, Depends(get_request_checks)],
    answers: AnswersDep,
    inferences: InferencesDep,
    user: AsUser,
    model: str,
    image: str = "",
    session_id: str = "",
    params: Annotated[str, Form(json_schema_extra=described_by(InferParams))] = "{}",
    file: Annotated[UploadFile | None, File()] = None,
    label: Annotated[UploadFile | None, File()] = None,
    output: Output = Output.all,
) -> Response:
    """Answer with ``multipart/form-data`` of ``params`` (JSON) and ``image`` (the mask), or only one of them."""
    given = await parse_aside(params)
    check_fields(InferParams, given)
    # in a thread, since a series may have to be downloaded from a PACS
    asked = await anyio.to_thread.run_sync(checks.check, user, model, image, session_id, given, file, label, output)
    ready = await anyio.to_thread.run_sync(answers.recall, asked, user)
    if ready is not None:
        return respond(ready, output)
    what = PrefetchKey(asked.model, asked.image_id or str(asked.request.image))
    forecast = None  # the upload has not been copied yet
    if asked.upload is None:
        forecast = await anyio.to_thread.run_sync(inferences.forecast, asked.task, asked.request)
    async with AsyncExitStack() as stack:
        one = answers.start(asked, user, stack.enter_context(temporary_folder()))
        async with inferences.slot(asked.request.requested_device, what, forecast, one.read_ahead) as slot:
            if await request.is_disconnected():
                logger.info("the client left while it waited for %s", model)
                return Response(status_code=499)
            begun = await slot.run(lambda: one.begin(slot.ahead))
            place = await stack.enter_async_context(slot.finishing())
        answer = await place.run(lambda: one.complete(begun))
    return respond(answer, output)


def respond(answer: Answer, output: Output) -> Response:
    """The response in the form that MONAI Label's clients read."""
    warnings = answer.params["warnings"]
    headers = {WARNINGS_HEADER: quote("; ".join(warnings))} if warnings else {}
    if output is Output.json:
        return Response(json.dumps(answer.params), media_type="application/json", headers=headers)
    if output is Output.all:
        params = RequestField("params", json.dumps(answer.params))
        params.make_multipart(content_type="application/json")
        mask = RequestField("image", answer.content, answer.name)
        mask.make_multipart(content_type=get_mime_type(answer.name))
        content, media_type = encode_multipart_formdata([params, mask], secrets.token_hex(16))
        return Response(content, media_type=media_type, headers=headers)
    mime = "application/dicom" if output is Output.dicom_seg else get_mime_type(answer.name)
    return Response(answer.content, media_type=mime, headers={**as_attachment(answer.name), **headers})
