from __future__ import annotations

import json

import pytest
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelError, MONAILabelException
from starlette.exceptions import HTTPException

from lib import errors
from lib.server.http import errors as server_errors
from lib.server.http.errors import STATUS_CODES, BusyError, error_response, status_of


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ParameterError("a", 1, "2"), 400),
        (errors.ConfigError("x"), 400),
        (errors.ImageError("x"), 422),
        (errors.LabelError("x"), 422),
        (errors.InputError("x"), 422),
        (errors.NotFoundError("model", "x"), 404),
        (errors.CheckpointError("x"), 422),
        (errors.ModelNotReadyError("x"), 409),
        (errors.TrainingError("x"), 409),
        (server_errors.TooLargeError("x"), 413),
        (server_errors.ConflictError("x"), 409),
        (server_errors.UnauthorizedError("x"), 401),
        (server_errors.ForbiddenError("x"), 403),
        (BusyError("x", 5), 503),
        (ImageNotFoundException("x"), 404),
        (MONAILabelException(MONAILabelError.INVALID_INPUT, "x"), 400),
        (MONAILabelException(MONAILabelError.SERVER_ERROR, "x"), 500),
        (HTTPException(418, "x"), 418),
        (ValueError("x"), 500),
        (OSError(28, "No space left on device"), 507),
        (OSError(13, "Permission denied"), 507),
        (OSError(2, "No such file or directory"), 500),
    ],
)
def test_status_code(error: Exception, status: int) -> None:
    assert status_of(error) == status


def test_every_exception_of_the_project_has_a_status() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not errors.UnetrError]
    assert all(any(issubclass(kind, listed) for listed, _ in STATUS_CODES) for kind in kinds)


def test_row_above_is_never_the_base_of_one_below() -> None:
    rows = [kind for kind, _ in STATUS_CODES]
    hidden = [(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :] if issubclass(b, a)]
    assert hidden == []


def test_unexpected_error_does_not_tell_its_reason() -> None:
    body = json.loads(error_response(ValueError("/secret/path")).body)
    assert body["error"] == "InternalError"
    assert "secret" not in body["detail"]


def test_busy_server_says_when_to_come_back() -> None:
    assert error_response(BusyError("x", 7)).headers["retry-after"] == "7"


def test_missing_token_is_asked_for() -> None:
    assert error_response(server_errors.UnauthorizedError("x")).headers["www-authenticate"] == "Bearer"


def test_sentence_quotes_what_utf8_cannot_hold() -> None:
    assert json.loads(error_response(errors.NotFoundError("image", "\ud800")).body)["detail"].endswith("'\\ud800'")


def test_long_sentence_is_cut() -> None:
    body = json.loads(error_response(errors.ImageError("x" * 10_000)).body)
    assert len(body["detail"]) == 2000
