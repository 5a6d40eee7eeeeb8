"""JSON that clients send: strictly parsed, and harmless to send back."""

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
"""What the datastore and the strategies keep beside an image; a client's own value would break them."""


def json_body_of(model: type[BaseModel], hidden: Collection[str] = ()) -> dict[str, Any]:
    """What OpenAPI says of a route whose body is a model's fields, each of which may be left out.

    Args:
        model: the fields.
        hidden: fields that clients may not set.
    """
    schema = model.model_json_schema()
    schema.pop("required", None)
    schema["properties"] = {name: field for name, field in schema["properties"].items() if name not in hidden}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}


def check_fields(model: type[_Model], params: Mapping[str, Any]) -> _Model:
    """Check a JSON object against a model; each value must have its type, and null is as if it was left out.

    Raises:
        ParameterError: naming the first field that is not valid, its value and what would be.
    """
    try:
        return model.model_validate({key: value for key, value in params.items() if value is not None}, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        name = str(problems[0]["loc"][0])
        valid = " or ".join(dict.fromkeys(p["msg"] for p in problems if p["loc"][0] == name))  # one for each choice
        raise ParameterError(name, _shorten(str(params[name])), valid) from error


def parse_object(text: str, name: str = "params") -> dict[str, Any]:
    """Parse a JSON object; empty text is an empty object.

    Raises:
        ParameterError: for anything else, for a key that stands twice, for NaN and infinities, for whole numbers of
            more than 64 bits, and for text that UTF-8 cannot hold.
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
    """As :func:`parse_object`; a long text beside the event loop, where every other client would wait for it.

    Raises:
        ParameterError: as there.
    """
    if len(text) > LARGEST_INFO:
        return await anyio.to_thread.run_sync(parse_object, text, name)
    return parse_object(text, name)


def parse_info(text: str, name: str = "info", kept: Collection[str] = KEPT_BY_SERVER) -> dict[str, Any]:
    """Parse what a client wants kept beside an image or label.

    Args:
        text: a JSON object.
        name: of the parameter.
        kept: names that the server itself keeps there.

    Raises:
        ParameterError: as :func:`parse_object`; for more than 64 KiB, and for names that the server itself keeps.
    """
    if len(text) > LARGEST_INFO:
        raise ParameterError(name, _shorten(text), f"at most {LARGEST_INFO} characters")
    info = parse_object(text, name)
    taken = sorted(set(info) & set(kept))
    if taken:
        raise ParameterError(name, ", ".join(taken), f"other names than {', '.join(kept)}")
    return info


def check_room_for(info: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse what would make the information about an image or label grow without bound, one request after the other.

    Raises:
        ParameterError: naming the limit.
    """
    if len(json.dumps({**known, **info}, default=str)) > LARGEST_KNOWN:
        raise ParameterError(
            "info", _shorten(", ".join(info)), f"at most {LARGEST_KNOWN} characters with what is known"
        )


async def json_body(request: Request) -> dict[str, Any]:
    """The request's body as a JSON object; no body is an empty one.

    Raises:
        ParameterError: as :func:`parse_object`.
    """
    body = await request.body()
    try:
        return await parse_aside(body.decode("utf-8"), "body")
    except UnicodeDecodeError as error:
        raise ParameterError("body", _shorten(repr(body)), "a JSON object in UTF-8") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no key stands twice: readers differ in which of the two values counts."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {_shorten(twice, 40)!r} stands twice")
    return unique


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _shorten(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[:most] + "..."
