"""A request's body to its checked fields; what is wrong is named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from .errors import APIError
from .fields import Fields
from .wording import expected, is_unused

F = TypeVar("F", bound=Fields)
# A value's place, as its parent's and the step from there: whole paths of many values that
# lie deep would take far more memory than the body.
_Link = tuple["_Link | None", str | int]

_SURROGATES = re.compile("[\ud800-\udfff]")
# Of values shown in messages.
SHOWN = 60
MISSING = {"missing", "union_tag_not_found"}


def parse(body: bytes, kind: type[F]) -> F:
    """The checked fields of a body.

    Raises:
        APIError: 400; it is not JSON, or a field is unknown, missing or wrong.
    """
    content = _read_json(body)
    if (place := _unpaired(content)) is not None:
        param = _spell(place)
        raise APIError(
            400,
            f"{param:.200} holds half of a surrogate pair, which is no text",
            param=param[:200],
            code="invalid_value",
        )
    if not isinstance(content, dict):
        raise APIError(400, "the body is not a JSON object", code="invalid_json")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _refusal(error, content, kind) from None


def _read_json(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_no_number)
    # A number of thousands of digits is a ValueError, thousands of brackets the last.
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "malformed"
        raise APIError(
            400, f"the body is not JSON ({reason:.200})", code="invalid_json"
        ) from None


def _unpaired(content: Any) -> tuple[str | int, ...] | None:
    """Where a text holds a lone surrogate, which JSON can write and no encoding can."""
    held: list[tuple[_Link | None, Any]] = [(None, content)]
    while held:
        link, value = held.pop()
        if isinstance(value, dict):
            for name, inner in value.items():
                held += [((link, name), name), ((link, name), inner)]
        elif isinstance(value, list):
            held += [((link, i), inner) for i, inner in enumerate(value)]
        elif isinstance(value, str) and _SURROGATES.search(value):
            return tuple(reversed([*_steps(link)]))
    return None


def _steps(link: _Link | None) -> Iterator[str | int]:
    """The way out of a value, from its own name on."""
    while link is not None:
        link, step = link
        yield _printable(step)


def _printable(step: str | int) -> str | int:
    return step if isinstance(step, int) else _SURROGATES.sub("?", step)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _refusal(
    error: ValidationError, content: dict[str, Any], kind: type[Fields]
) -> APIError:
    """The fault that lies deepest: of a field of several kinds the one that was meant."""
    faults = [
        (_place(fault, content), fault) for fault in error.errors(include_url=False)
    ]
    # Of a text or a list: the one that it is, and is wrong as.
    place, fault = max(
        faults, key=lambda each: (len(each[0]), not each[1]["type"].endswith("_type"))
    )
    param = _spell(place)
    if fault["type"] == "extra_forbidden" or is_unused(fault):
        known = ", ".join(kind.model_fields) if len(place) == 1 else ""
        way_out = f"; the fields are {known}" if known else "; leave it out"
        return APIError(
            400,
            f"the field {param!r:.200} is not supported{way_out}",
            param=param[:200],
            code="unknown_parameter",
        )
    if fault["type"] in MISSING:
        return APIError(
            400,
            f"the field {param!r:.200} is missing",
            param=param[:200],
            code="missing_required_parameter",
        )
    # Every kind that it might have been.
    beside = [
        other
        for where, other in faults
        if where == place and other["type"].endswith("_type")
    ]
    same = beside if fault in beside else [fault]
    if fault["loc"][-1] == "[key]":
        found = f"{_spell(place[:-1])} has the key {_shown(place[-1])}"
    else:
        found = f"{param:.200} is {_shown(_at(place, content))}"
    return APIError(
        400,
        f"{found}, expected {expected(same):.300}",
        param=param[:200],
        code="invalid_value",
    )


def _place(fault: Any, content: Any) -> tuple[str | int, ...]:
    """Where a fault lies in the body; pydantic also names the kinds that it tried."""
    place: list[str | int] = []
    for step in fault["loc"]:
        inside = isinstance(content, dict) and step in content
        if inside or (isinstance(content, list) and isinstance(step, int)):
            content = content[step]
            place.append(step)
    if fault["type"] == "missing":
        place.append(fault["loc"][-1])
    # Of several kinds of objects, told apart by this field of theirs.
    elif fault["type"].startswith("union_tag_"):
        place.append(fault["ctx"]["discriminator"].strip("'"))
    return tuple(place)


def _at(place: tuple[str | int, ...], content: Any) -> Any:
    for step in place:
        content = content[step]
    return content


def _spell(place: tuple[str | int, ...]) -> str:
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".") or "body"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
