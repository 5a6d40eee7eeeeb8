"""JSON responses for errors: ``{"detail": <sentence>, "error": <class>, "request_id": ...}`` with the right status.

One table maps the project's exceptions to HTTP status codes; any other exception is a defect, which is logged and
answered with status 500.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)
from starlette.exceptions import HTTPException

from lib.errors import (
    CheckpointError,
    ConfigError,
    ConflictError,
    DeviceError,
    FileKindError,
    InputError,
    MemoryBudgetError,
    ModelNotReadyError,
    NotFoundError,
    ParameterError,
    StorageError,
    TrainingError,
    UnetrError,
    UpstreamError,
)
from lib.server.http.request_id import current_request_id
from lib.storage.full_disk import access_problem, is_passing, storage_problem

logger = logging.getLogger("unetr.server")

LONGEST_SENTENCE = 2000
SECONDS_TO_PASS = 5


class UnauthorizedError(UnetrError):
    """A request without a valid token, although tokens are required."""


class ForbiddenError(UnetrError):
    """An action that this client's role, or this server's settings, do not allow."""


class TooLargeError(UnetrError):
    """An upload that exceeds the size limit, as sent or after decompression."""


class BusyError(UnetrError):
    """The queue is full.

    Args:
        message: the error message.
        retry_after_seconds: time after which to retry.
    """

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


# The first matching row applies, so subclasses precede their base classes.
STATUS_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ParameterError, 400),
    (ConfigError, 400),
    (UnauthorizedError, 401),
    (ForbiddenError, 403),
    (NotFoundError, 404),
    (ImageNotFoundException, 404),
    (LabelNotFoundException, 404),
    (ConflictError, 409),
    (ModelNotReadyError, 409),
    (TrainingError, 409),
    (TooLargeError, 413),
    (MemoryBudgetError, 413),
    (FileKindError, 415),
    (InputError, 422),
    (CheckpointError, 422),
    (UpstreamError, 502),
    (BusyError, 503),
    (DeviceError, 503),
    (StorageError, 507),
)
HTTP_ERRORS = {
    400: "ParameterError",
    401: "UnauthorizedError",
    403: "ForbiddenError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    409: "ConflictError",
    413: "TooLargeError",
}


def status_of(error: Exception) -> int:
    """HTTP status code for an exception; 500 for an unexpected one."""
    if isinstance(error, HTTPException) and _disk_problem(error):
        return 507
    if isinstance(error, HTTPException):
        return error.status_code
    if isinstance(error, RequestValidationError):
        return 400
    if not isinstance(error, UnetrError) and (_disk_problem(error) or access_problem(error)):
        return 507
    if is_passing(error):
        return 503
    for kind, code in STATUS_CODES:
        if isinstance(error, kind):
            return code
    if isinstance(error, MONAILabelException) and error.error is MONAILabelError.INVALID_INPUT:
        return 400
    return 500


def error_response(error: Exception) -> Response:
    """The response for an exception; the message of an unexpected one appears in the log only."""
    status = status_of(error)
    body = {
        "detail": describe(error, status)[:LONGEST_SENTENCE],
        "error": _kind(error, status),
        "request_id": current_request_id(),
    }
    # ASCII only: the sentence may quote text of a client that UTF-8 cannot encode (lone surrogates).
    return Response(json.dumps(body), status, _headers(error), media_type="application/json")


def describe(error: Exception, status: int) -> str:
    """One sentence for the client."""
    if status == 507 and not isinstance(error, UnetrError):
        if problem := _disk_problem(error):
            return f"nothing was kept: on the server, {problem}"
        return f"the server cannot use one of its files: {access_problem(error)}; its log says which"
    if is_passing(error):
        return "too much is in use on the server at the moment; come back in some seconds"
    if isinstance(error, RequestValidationError):
        return _describe_validation(error.errors())
    if isinstance(error, HTTPException):
        allowed = (error.headers or {}).get("Allow")
        return f"method not allowed; valid: {allowed}" if allowed else str(error.detail)
    if isinstance(error, MONAILabelException):
        return str(error.msg)
    if status == 500:
        return "something went wrong in the server; its log has the reason under this request_id"
    return str(error)


def register_error_handlers(app: FastAPI) -> None:
    """Register handlers for all expected exceptions; the middleware handles the others."""
    for kind in (UnetrError, MONAILabelException, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _handle)


async def _handle(request: Request, error: Exception) -> Response:
    client = request.client.host if request.client else "unknown"
    status = status_of(error)
    level = logging.ERROR if status == 500 else logging.INFO
    logger.log(
        level,
        "refused %s %s from %s: %d %s",
        request.method,
        request.url.path,
        client,
        status,
        describe(error, status)[:LONGEST_SENTENCE],
        exc_info=error if status == 500 else None,
    )
    return error_response(error)


def _disk_problem(error: BaseException) -> str:
    """Why a disk write failed, in words; FastAPI wraps such errors while a body arrives."""
    cause = error.__cause__ if isinstance(error, HTTPException) else error
    return "" if cause is None else storage_problem(cause)


def _kind(error: Exception, status: int) -> str:
    if status == 507:
        return StorageError.__name__
    if isinstance(error, HTTPException | RequestValidationError):
        return HTTP_ERRORS.get(status, "HTTPError")
    if is_passing(error):
        return BusyError.__name__
    return "InternalError" if status >= 500 and not isinstance(error, UnetrError) else type(error).__name__


def _headers(error: Exception) -> Mapping[str, str] | None:
    if isinstance(error, BusyError | DeviceError):
        return {"Retry-After": str(error.retry_after_seconds)}
    if is_passing(error):
        return {"Retry-After": str(SECONDS_TO_PASS)}
    if isinstance(error, UnauthorizedError):
        return {"WWW-Authenticate": "Bearer"}
    return error.headers if isinstance(error, HTTPException) else None


def _describe_validation(problems: Sequence[Mapping[str, Any]]) -> str:
    problem = problems[0]
    name = ".".join(str(part) for part in problem["loc"][1:]) or str(problem["loc"][0])
    if problem["type"] == "missing":
        return f"parameter {name!r} is missing"
    return f"parameter {name!r} is {problem.get('input')!r:.200}; valid: {problem['msg']}"
