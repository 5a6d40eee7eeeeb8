"""``/leases/``: leases of cases to clients, and skipped cases."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from lib.errors import NotFoundError, ParameterError
from lib.server.dependencies import CheckImageDep, LeasesDep
from lib.server.http.auth import AsAnnotator, AsUser, Role
from lib.server.http.bodies import LONGEST_REASON, SkipRequest
from lib.server.http.errors import ForbiddenError
from lib.server.http.parameters import check_fields, json_body, json_body_of

router = APIRouter(prefix="/leases", tags=["ActiveLearning"])


@router.get("/", summary="Cases in clients' hands, and cases that are skipped")
def list_leases(leases: LeasesDep, user: AsUser) -> dict[str, Any]:
    """The current leases by image; times are in seconds since 1970."""
    active, skipped = leases.active(), leases.skipped()
    return {
        "leases": {image: lease.describe() for image, lease in active.items()},
        "skipped": {image: skip.describe() for image, skip in skipped.items()},
    }


@router.delete("/", summary="Give a case back")
def give_back(leases: LeasesDep, user: AsAnnotator, image: str, client_id: str = "") -> dict[str, Any]:
    """End the client's own lease; a reviewer may end any lease."""
    lease = leases.active().get(image)
    if lease is None:
        raise NotFoundError("lease of image", image[:200])
    if lease.client != user.client(client_id) and user.role < Role.REVIEWER:
        raise ForbiddenError(f"the lease of {image!r} is another client's; a reviewer can end it")
    leases.release(image)
    return lease.describe()


@router.put("/skipped", summary="Have a case not handed out any more", openapi_extra=json_body_of(SkipRequest))
def skip(
    check_image: CheckImageDep,
    leases: LeasesDep,
    user: AsAnnotator,
    image: str,
    params: Annotated[dict[str, Any], Depends(json_body)],
) -> dict[str, Any]:
    """Skip a case, with a ``reason`` for other users; its lease ends."""
    image = check_image(image)
    asked = check_fields(SkipRequest, params)
    if not asked.reason.strip():
        raise ParameterError("reason", asked.reason, f"1 to {LONGEST_REASON} letters on why")
    return leases.skip(image, user.client(asked.client_id), asked.reason.strip()).describe()


@router.delete("/skipped", summary="Have a skipped case handed out again")
def unskip(leases: LeasesDep, user: AsAnnotator, image: str) -> dict[str, Any]:
    """Undo the skipping of a case."""
    leases.unskip(image)
    return {}
