"""The API's manual, written from the classes of requests and replies.

``python -m mm1_mlx.apps.server.reference`` prints it; ``API.md`` is what it printed.
"""

from __future__ import annotations

from typing import Any

from .limits import limits
from .openapi import ROUTES, Route, describe

INTRODUCTION = """\
# The HTTP API of `mm1 serve`

Written by `python -m mm1_mlx.apps.server.reference` from the code; a test keeps it so.

Requests and answers are OpenAI's: its clients work with `base_url="http://127.0.0.1:8080/v1"`.
A field that is not listed here is refused with status 400 and its name; `null` stands for a
field's default. `timings`, `mm1` and comments (`: still here`) in streams are additions.

Where the server has a key, every path but those marked *open* needs
`Authorization: Bearer KEY`. Errors are `{"error": {"message", "type", "param", "code"}}`;
`Retry-After` stands beside 429 and 503. Every answer has an `X-Request-Id`, the caller's own
if it sent one of letters, digits, dots, dashes and underscores.

Several clients are answered at once, each as it would be alone, up to the rounding of several
rows. A client that leaves ends its answer. A stream is `text/event-stream`: every event is
`data: ` and an object of the class named below, and `data: [DONE]` is the last; an error
after the stream's beginning is an event of its own.
"""

LIMITS = """\
Of a server without flags; fields have theirs in the tables of the objects below. What is too
large is refused before it is decoded.
"""


def reference() -> str:
    """The manual, as Markdown."""
    schemas = describe()["components"]["schemas"]
    routes = [_route(route) for route in ROUTES]
    objects = [_object(name, schema) for name, schema in sorted(schemas.items())]
    return "\n".join(
        [
            INTRODUCTION,
            "## Paths\n",
            *routes,
            "\n## Limits\n",
            LIMITS,
            *_limits(),
            "\n## Objects\n",
            "\n\n".join(objects),
        ]
    )


def _limits() -> list[str]:
    lines = ["| | at most | beyond |", "|---|---|---|"]
    for heading, rows in limits().items():
        lines.append(f"| **{heading}** | | |")
        lines += [f"| {what} | {most} | {beyond} |" for what, most, beyond in rows]
    return lines


def _route(route: Route) -> str:
    mark = "" if route.keyed else " *open*"
    text = f"- `{route.method.upper()} {route.path}`{mark}: {route.summary}."
    if route.takes is not None:
        text += f" Takes {_link(route.takes.__name__)}."
    gives = route.gives if isinstance(route.gives, str) else _link(route.gives.__name__)
    text += f" Gives {gives}"
    if route.streams is not None:
        text += f", or a stream of {_link(route.streams.__name__)}"
    return text + "."


def _object(name: str, schema: dict[str, Any]) -> str:
    rows = []
    required = schema.get("required", [])
    for field, value in schema.get("properties", {}).items():
        mark = " (needed)" if field in required else ""
        said = value.get("description", "").replace("\n", " ")
        rows.append(f"| `{field}`{mark} | {_kind(value)} | {said} |")
    head = f"### {name}\n\n{schema.get('description', '')}"
    if not rows:
        return head
    return "\n".join([f"{head}\n", "| field | is | |", "|---|---|---|", *rows])


def _kind(schema: dict[str, Any]) -> str:
    """What a field may be, in words."""
    if "$ref" in schema:
        return _link(schema["$ref"].rpartition("/")[2])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            kinds = [_kind(one) for one in schema[several]]
            return " or ".join(kind for kind in kinds if kind != "null") or "null"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "anything")
    if kind == "array" and schema.get("maxItems") == 0:
        return "empty list"
    if kind == "array":
        return f"list{_bounds(schema, 'Items', ' of ')} of {_kind(schema.get('items', {}))}"
    if kind == "object" and "additionalProperties" in schema:
        inner = schema["additionalProperties"]
        if isinstance(inner, dict):
            return f"object of {_kind(inner)}"
    if kind == "string":
        return f"string{_bounds(schema, 'Length', ' of ')}"
    low, high = schema.get("minimum"), schema.get("maximum")
    low = schema.get("exclusiveMinimum", low)
    if low is not None or high is not None:
        above = "above " if "exclusiveMinimum" in schema else ""
        return f"{kind}, {above}{low} to {high}"
    return str(kind)


def _bounds(schema: dict[str, Any], of: str, before: str) -> str:
    low, high = schema.get(f"min{of}"), schema.get(f"max{of}")
    if low is None and high is None:
        return ""
    what = "" if of == "Items" else " characters"
    return f"{before}{low or 0} to {high}{what}"


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


if __name__ == "__main__":
    print(reference())
