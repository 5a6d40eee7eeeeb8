"""Hostile bodies for every route that takes one, as the app's own routes name them: a new one is tested by itself."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from fastapi.routing import APIRoute
from pydantic import BaseModel

from tests.integration.server import Server

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # passlib, which MONAI Label uses, imports crypt
    from lib.server.app import ROUTERS, app

# What leads a request to the check of its body: things that there are.
PLACES = {"model": "hippocampus_mr", "method": "all", "strategy": "random", "image": "case_0", "version": "shipped"}
RIGHT = {"clicks": '[{"plane": "axial", "index": 1, "across": 0.5, "down": 0.5, "label": "anterior"}]'}
QUERY = {"image": "case_0", "label": "case_0", "tag": "final"}
EVIL = "\x00\x1b]0;evil\x07"
DEEP = '{"a": ' * 5000 + "1" + "}" * 5000
BROKEN = (
    "[]", '"x"', "1", "{", '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": "\\ud800"}', '{"a": 1, "a": 2}',
    '{"a": {"b": 1, "b": 2}}', DEEP, '{"a": ' + "9" * 5000 + "}", '{"a": ' + str(10**400) + "}", "[" * 5000,
)  # fmt: skip
NEVER_RIGHT = ('{"a": 1}', "[[1]]", str(10**400))
ODD = (
    '"\\u0000\\u001b]0;evil\\u0007"',
    f'"{"x" * 5000}"',
    "-1",
    "1e308",
    '"1"',
    "[]",
    "true",
    "0.5",
    '["\\u001b]0;evil"]',
)


def _typed(route: APIRoute) -> dict[str, Any]:
    """The JSON schema of a route's body, whether pydantic or OpenAPI says it; empty where it takes no JSON."""
    said = (route.openapi_extra or {}).get("requestBody", {}).get("content", {}).get("application/json", {})
    if said:
        schema: dict[str, Any] = said["schema"]
        return schema
    kind = route.body_field.field_info.annotation if route.body_field else None
    is_json = isinstance(kind, type) and issubclass(kind, BaseModel) and not kind.__name__.startswith("Body_")
    return kind.model_json_schema() if is_json else {}


JSON_ROUTES = {
    f"{min(route.methods)} {route.path}": schema
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute) and (schema := _typed(route))
}
FORM_ROUTES = [
    (f"{method.upper()} {path}", content)
    for path, operations in app.openapi()["paths"].items()
    for method, operation in operations.items()
    for kind, content in operation.get("requestBody", {}).get("content", {}).items()
    if kind != "application/json" and path != "/auth/token"  # asks nothing where there are no users
]


def _send(server: Server, route: str, **options: Any) -> requests.Response:
    method, path = route.split(" ")
    path = re.sub(r"\{(\w+)\}", lambda found: PLACES.get(found[1], "x"), path)
    return server.request(method, path, params=QUERY, **options)


def _check(server: Server, answer: requests.Response, what: object) -> str:
    """A refusal in a sentence, without what would command a terminal."""
    assert 400 <= answer.status_code < 500, (what, answer.status_code, answer.text[:300])
    assert set(answer.json()) == {"detail", "error", "request_id"}, what
    assert not {"\x00", "\x1b", "\x07"} & set(answer.text) and "Traceback" not in answer.text
    detail: str = answer.json()["detail"]
    return detail


@pytest.fixture(scope="module", autouse=True)
def cases_given_back(server: Server) -> Iterator[None]:
    """Values that are valid after all lease or skip cases; the tests that share the server need them."""
    yield
    held = server.get("/leases/").json()
    for image in held["leases"]:
        assert server.delete(f"/leases/?image={image}").status_code == 200
    for image in held["skipped"]:
        assert server.delete(f"/leases/skipped?image={image}").status_code == 200


def test_every_route_that_takes_json_says_which_fields() -> None:
    known = {"POST /train/{model}", "POST /batch/infer/{model}", "POST /scoring/{method}", "PUT /leases/skipped"}
    assert known | {"POST /case/{image}/clicks"} <= JSON_ROUTES.keys()
    for route, schema in JSON_ROUTES.items():
        assert schema.get("properties"), f"{route}: /docs says nothing of its body"


@pytest.mark.parametrize("route", JSON_ROUTES)
def test_hostile_json_is_refused_with_the_name_of_the_field(server: Server, route: str) -> None:
    headers = {"Content-Type": "application/json"}
    for body in BROKEN:
        _check(server, _send(server, route, data=body, headers=headers), body[:80])
    for field in JSON_ROUTES[route]["properties"]:
        for value in NEVER_RIGHT:
            said = _send(server, route, data=_body(route, field, value), headers=headers)
            assert field in _check(server, said, (field, value[:40])), (said.text, value[:40])
    for field, value in ((field, value) for field in JSON_ROUTES[route]["properties"] for value in ODD):
        said = _send(server, route, data=_body(route, field, value), headers=headers) if _is_refused(route) else None
        assert said is None or said.status_code < 500, (field, value[:40], said.text[:300])
    assert b"]0;evil" not in server.log.read_bytes().replace(b"\\x1b]0;evil", b"").replace(b"\\u001b]0;evil", b"")


def _body(route: str, field: str, value: str) -> str:
    """A body of one field, beside those that the route must have."""
    others = [name for name in JSON_ROUTES[route].get("required", ()) if name != field]
    return "{" + ", ".join([*(f'"{name}": {RIGHT[name]}' for name in others), f'"{field}": {value}']) + "}"


def _is_refused(route: str) -> bool:
    """Whether a body with one odd field starts no long work; trainings and the like have tests of their own."""
    return not route.startswith(("POST /train/", "POST /batch/", "POST /scoring/"))


@pytest.mark.parametrize(("route", "content"), FORM_ROUTES, ids=[route for route, _ in FORM_ROUTES])
def test_hostile_forms_and_files_are_refused(server: Server, route: str, content: dict[str, Any]) -> None:
    schema = content["schema"]
    if "$ref" in schema:
        schema = app.openapi()["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    is_file = {
        name: "contentMediaType" in str(field) or "binary" in str(field) for name, field in schema["properties"].items()
    }
    names = ("a.nii.gz", f"{EVIL}.nii.gz", "../../x.nii.gz", "x" * 3000 + ".nii.gz", "CON", "a.nii.gz\r\nX-Evil: 1")
    for text in (*BROKEN, EVIL):
        data = {name: text for name, file in is_file.items() if not file}
        files = {name: ("a.nii.gz", b"no image") for name, file in is_file.items() if file}
        if data:
            _check(server, _send(server, route, data=data, files=files or None), text[:80])
    for name in names if any(is_file.values()) else ():
        files = {field: (name, b"no image") for field, file in is_file.items() if file}
        _check(server, _send(server, route, files=files), name[:80])
    assert EVIL.encode() not in server.log.read_bytes() and b"\x00" not in server.log.read_bytes()
