"""``/case/{image}``: the page of an image, and its pictures."""

from __future__ import annotations

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse

from lib.errors import ParameterError
from lib.server.dependencies import CaseViewsDep, CheckImageDep, PicturesDep
from lib.server.pages.cases.slices import Plane, draw_slice, middle_of
from lib.server.pages.drawing import draw
from lib.server.pages.sign_in import PageUser

router = APIRouter(prefix="/case", include_in_schema=False)

MOST_LAYERS = 6
THUMBNAIL_HEIGHT = 240
PNG_HEADERS = {"Cache-Control": "private, max-age=60"}


@router.get("/{image}")
def case_page(
    request: Request, check_image: CheckImageDep, views: CaseViewsDep, pictures: PicturesDep, user: PageUser, image: str
) -> HTMLResponse:
    """The page of an image."""
    return draw(request, "case.html", user, case=views.of(check_image(image), pictures.volumes))


@router.get("/{image}/slice.png")
async def slice_picture(
    pictures: PicturesDep,
    user: PageUser,
    image: str,
    plane: Plane = "axial",
    index: Annotated[int, Query(ge=0, le=100_000)] = 0,
    layers: Annotated[str, Query(max_length=1000)] = "",
    channel: Annotated[str, Query(max_length=100)] = "",
) -> Response:
    """One slice, with the requested layers: ``prediction``, ``uncertainty``, ``label:<version>`` ...

    ``channel`` is the sequence to draw below the layers, for a case with several sequences.
    """
    names = [name for name in layers.split(",") if name]
    if not names:  # in one thread call, since a busy server's responses wait for each
        content = await anyio.to_thread.run_sync(pictures.plain_slice, image, channel, plane, index)
        return Response(content, media_type="image/png", headers=PNG_HEADERS)
    subject = await anyio.to_thread.run_sync(pictures.subject, image, channel)
    if len(names) > MOST_LAYERS:
        raise ParameterError("layers", layers[:200], f"at most {MOST_LAYERS}")
    contours, uncertainty = [], None
    for name in names:
        if name.startswith("edit:"):
            contours.append(pictures.outline(subject, pictures.edited(image, name), "edit"))
        elif name == "uncertainty":
            uncertainty = await pictures.computed(subject, "uncertainty")
        elif name == "prediction":
            contours.append(pictures.outline(subject, await pictures.computed(subject, "prediction"), name))
        else:
            contours.append(await anyio.to_thread.run_sync(pictures.label_outline, subject, name))
    content = await anyio.to_thread.run_sync(draw_slice, subject.stack, plane, index, contours, uncertainty)
    return Response(content, media_type="image/png", headers=PNG_HEADERS)


@router.get("/{image}/thumbnail.png")
def thumbnail(pictures: PicturesDep, user: PageUser, image: str) -> Response:
    """The middle slice, with the predicted contour if the prediction is cached; nothing is computed."""
    subject = pictures.subject(image)
    mask = pictures.kept_prediction(subject) if subject.model else None
    stack = subject.stack
    middle = middle_of(mask, "axial") if mask is not None else None
    contours = [] if mask is None else [pictures.outline(subject, mask, "prediction")]
    content = draw_slice(
        stack, "axial", stack.count("axial") // 2 if middle is None else middle, contours, height=THUMBNAIL_HEIGHT
    )
    return Response(content, media_type="image/png", headers=PNG_HEADERS)
