"""Label versions and the quarantine: list, download, restore."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import FileResponse

from lib.server.dependencies import CheckImageDep, HistoryDep, SubmissionsDep
from lib.server.downloads import send_file
from lib.server.http.auth import AsReviewer, AsUser
from lib.server.http.bodies import ClientRequest
from lib.server.http.names import check_tag
from lib.server.http.parameters import check_fields, json_body, json_body_of

router = APIRouter(prefix="/datastore", tags=["Datastore"])


@router.get("/label/versions", summary="All versions of an image's label")
def list_versions(
    check_image: CheckImageDep, history: HistoryDep, user: AsUser, image: str, tag: str = ""
) -> list[dict[str, Any]]:
    """The author, time and initial prediction of each version, newest first."""
    image = check_image(image)
    return [version.describe() for version in reversed(history.versions(image, check_tag(tag)))]


@router.get("/label/versions/{version}", summary="A version's mask", response_class=FileResponse)
def get_version(history: HistoryDep, user: AsUser, version: str) -> FileResponse:
    """Download the mask, whether it is the newest or not."""
    return send_file(history.mask(history.get(version)))


@router.get("/label/versions/{version}/sent", summary="A version's file as it was sent", response_class=FileResponse)
def get_sent_file(history: HistoryDep, user: AsUser, version: str) -> FileResponse:
    """Download the file as sent by the client, before mapping, reorientation and compression."""
    return send_file(history.sent(history.get(version)))


@router.get("/label/versions/{version}/info", summary="What is known of a version")
def get_version_info(history: HistoryDep, user: AsUser, version: str) -> dict[str, Any]:
    """The record of the version."""
    return history.get(version).describe()


@router.post(
    "/label/versions/{version}/restore",
    summary="Make a version the newest again",
    openapi_extra=json_body_of(ClientRequest),
)
def restore_version(
    submissions: SubmissionsDep, user: AsReviewer, version: str, params: Annotated[dict[str, Any], Depends(json_body)]
) -> dict[str, Any]:
    """Add a copy of the version as the newest one; all versions are kept."""
    return submissions.restore(version, user, str(check_fields(ClientRequest, params).client_id)).describe()


@router.get("/quarantine", summary="Labels that were refused, with the reasons")
def list_quarantine(history: HistoryDep, user: AsReviewer) -> list[dict[str, Any]]:
    """The refused labels, newest first."""
    return [refused.describe() for refused in history.quarantine.all()]


@router.get("/quarantine/{name}", summary="A refused label's file", response_class=FileResponse)
def get_quarantined(history: HistoryDep, user: AsReviewer, name: str) -> FileResponse:
    """The refused file as sent."""
    file = history.quarantine.content(name)
    return send_file(file, "application/octet-stream")
