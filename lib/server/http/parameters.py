"""Parses JSON from clients strictly, so that it can be stored and sent on safely."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NoReturn, TypeVar

import anyio.to_thread
from fastapi import Request
from pydantic import BaseModel, ValidationError

from lib.errors import ParameterError
from lib.storage.json_files import find_odd

_Model = TypeVar("_Model", bound=BaseModel)
DEEPEST = 20
LARGEST_INFO = 64 * 1024
LARGEST_KNOWN = 4 * LARGEST_INFO
KEPT_BY_SERVER = ("path", "name", "ts", "strategy")
"""Keys that the datastore and the strategies store with an image; values from clients would break them."""


def json_body_of(model: type[BaseModel], hidden: Collection[str] = ()) -> dict[str, Any]:
    """The OpenAPI schema of a route whose body has a model's fields, all of which are optional.

    Args:
        model: the model of the fields.
        hidden: fields that clients must not set.
    """
    schema = model.model_json_schema()
    schema.pop("required", None)
    schema["properties"] = {name: field for name, field in schema["properties"].items() if name not in hidden}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}


def check_fields(model: type[_Model], params: Mapping[str, Any]) -> _Model:
    """Validate a JSON object against a model; each value must have its type, and null counts as missing.

    Raises:
        ParameterError: naming the first invalid field, its value and the valid values.
    """
    try:
        return model.model_validate({key: value for key, value in params.items() if value is not None}, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        name = str(problems[0]["loc"][0])
        valid = " or ".join(
            dict.fromkeys(p["msg"] for p in problems if p["loc"][0] == name)
        )  # one message for each choice
        raise ParameterError(name, _shorten(str(params[name])), valid) from error


def parse_object(text: str, name: str = "params") -> dict[str, Any]:
    """Parse a JSON object; empty text is an empty object.

    Raises:
        ParameterError: for other values, a repeated key, NaN, infinities, whole numbers of more than 64 bits, and text
            that UTF-8 cannot encode.
    """
    if not text.strip():
        return {}
    try:
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ParameterError(name, _shorten(text), f"a JSON object ({error})") from error
    if not isinstance(data, dict):
        raise ParameterError(name, _shorten(text), "a JSON object")
    if (odd := find_odd(data, DEEPEST, name)) is not None:
        where, value, valid = odd
        raise ParameterError(where, _shorten(str(value)), valid)
    return data


async def parse_aside(text: str, name: str = "params") -> dict[str, Any]:
    """Like :func:`parse_object`; a long text is parsed in a thread, so that the event loop stays responsive.

    Raises:
        ParameterError: see :func:`parse_object`.
    """
    if len(text) > LARGEST_INFO:
        return await anyio.to_thread.run_sync(parse_object, text, name)
    return parse_object(text, name)


def parse_info(text: str, name: str = "info", kept: Collection[str] = KEPT_BY_SERVER) -> dict[str, Any]:
    """Parse information that a client wants to store with an image or label.

    Args:
        text: a JSON object.
        name: name of the parameter.
        kept: reserved keys of the server.

    Raises:
        ParameterError: see :func:`parse_object`; also for more than 64 KiB, and for reserved keys.
    """
    if len(text) > LARGEST_INFO:
        raise ParameterError(name, _shorten(text), f"at most {LARGEST_INFO} characters")
    info = parse_object(text, name)
    taken = sorted(set(info) & set(kept))
    if taken:
        raise ParameterError(name, ", ".join(taken), f"other names than {', '.join(kept)}")
    return info


def check_room_for(info: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse additions that would let the information on an image or label grow without bound.

    Raises:
        ParameterError: naming the limit.
    """
    if len(json.dumps({**known, **info}, default=str)) > LARGEST_KNOWN:
        raise ParameterError(
            "info", _shorten(", ".join(info)), f"at most {LARGEST_KNOWN} characters with what is known"
        )


async def json_body(request: Request) -> dict[str, Any]:
    """The request's body as a JSON object; a missing body is an empty object.

    Raises:
        ParameterError: see :func:`parse_object`.
    """
    body = await request.body()
    try:
        return await parse_aside(body.decode("utf-8"), "body")
    except UnicodeDecodeError as error:
        raise ParameterError("body", _shorten(repr(body)), "a JSON object in UTF-8") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys, for which parsers differ in the value that they use."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {_shorten(twice, 40)!r} stands twice")
    return unique


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _shorten(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[:most] + "..."
