"""The API in OpenAPI's words, made from the classes of requests and replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from . import fields, replies

# The first that describes streams event by event.
VERSION = "3.2.0"
REF = "#/components/schemas/{model}"
# What every request may be refused for.
REFUSALS = {
    401: "the key is missing or wrong",
    403: "the Host or Origin header is not one that is allowed",
}
READING = {
    400: "a field is unknown, missing or wrong, or the question cannot be answered; the "
    "error names it",
    404: "another model is asked for",
    408: "the body came too slowly",
    413: "the body is too long",
    415: "the body is not application/json",
    429: "too many questions wait; `Retry-After` says when to ask again",
    503: "the model cannot be loaded, or bodies of other requests leave no room",
}


class Route(BaseModel):
    """A path of the API.

    Attributes:
        path: of the URL.
        method: of HTTP, small letters.
        summary: one line.
        takes: the class of its body, None for none.
        gives: the class of its reply, or the media type of what is no JSON.
        streams: the class of the events that it can stream.
        keyed: whether the key is needed where there is one.
    """

    path: str
    method: str
    summary: str
    takes: type[BaseModel] | None = None
    gives: type[BaseModel] | str
    streams: type[BaseModel] | None = None
    keyed: bool = True


ROUTES = (
    Route(
        path="/v1/chat/completions",
        method="post",
        summary="Answer a conversation with pictures",
        takes=fields.ChatRequest,
        gives=replies.ChatCompletion,
        streams=replies.ChatChunk,
    ),
    Route(
        path="/v1/completions",
        method="post",
        summary="Go on with a text",
        takes=fields.CompletionRequest,
        gives=replies.Completion,
        streams=replies.Completion,
    ),
    Route(
        path="/v1/embeddings",
        method="post",
        summary="Vectors of texts and pictures; of CLIP models",
        takes=fields.EmbeddingRequest,
        gives=replies.EmbeddingList,
    ),
    Route(
        path="/v1/models",
        method="get",
        summary="The served model, and what it can do",
        gives=replies.ModelList,
    ),
    Route(
        path="/v1/models/{model}",
        method="get",
        summary="The same of one model",
        gives=replies.Model,
    ),
    Route(
        path="/health",
        method="get",
        summary="Whether the server is well",
        gives=replies.Health,
        keyed=False,
    ),
    Route(
        path="/metrics",
        method="get",
        summary="Counters, for Prometheus",
        gives="text/plain",
    ),
    Route(
        path="/openapi.json",
        method="get",
        summary="This description",
        gives="application/json",
    ),
)


def describe() -> dict[str, Any]:
    """The API as an OpenAPI document."""
    return {
        "openapi": VERSION,
        "info": {
            "title": "mm1 serve",
            "version": "1",
            "description": "OpenAI's API for MM1-type models, served by `mm1 serve`.",
        },
        "paths": _paths(ROUTES),
        "components": {
            "schemas": _schemas(ROUTES),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas(routes: Sequence[Route]) -> dict[str, Any]:
    kinds: list[Any] = [replies.ErrorReply]
    for route in routes:
        kinds += [
            kind
            for kind in (route.takes, route.gives, route.streams)
            if isinstance(kind, type)
        ]
    named = [(kind, "validation") for kind in dict.fromkeys(kinds)]
    schemas: dict[str, Any] = models_json_schema(named, ref_template=REF)[1]["$defs"]  # type: ignore[arg-type]
    return schemas


def _paths(routes: Sequence[Route]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method] = _operation(route)
    return paths


def _operation(route: Route) -> dict[str, Any]:
    content = {"application/json": _content(route.gives)}
    if isinstance(route.gives, str):
        content = {route.gives: {}}
    if route.streams is not None:
        content["text/event-stream"] = {"itemSchema": _event(route.streams)}
    refusals = dict(REFUSALS) if route.keyed else {403: REFUSALS[403]}
    if route.takes is not None:
        refusals |= READING
    elif "{" in route.path:
        refusals |= {404: READING[404]}
    elif route.path == "/health":
        refusals |= {503: "the model's thread has ended; start the server again"}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method}_{route.path.strip('/')}".translate(
            str.maketrans("/.{}", "____")
        ),
        "responses": {
            "200": {"description": "as asked", "content": content},
            **{
                str(status): {
                    "description": text,
                    "content": {"application/json": _content(_error_of(route, status))},
                }
                for status, text in sorted(refusals.items())
            },
        },
    }
    if route.takes is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": _content(route.takes)},
        }
    if "{" in route.path:
        operation["parameters"] = [
            {
                "name": "model",
                "in": "path",
                "required": True,
                "schema": {"type": "string"},
            }
        ]
    if route.keyed:
        operation["security"] = [{"key": []}]
    return operation


def _event(kind: type[BaseModel]) -> dict[str, Any]:
    """An event of a stream of these, as OpenAPI writes what ends with ``[DONE]``.

    Source: https://spec.openapis.org/oas/v3.2.0.html#server-sent-event-streams
    """
    objects = [_reference(kind), _reference(replies.ErrorReply)]
    data = {
        # Of an object: the text that ends a stream is none.
        "pattern": r"^\{",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": objects},
    }
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string"}},
        "oneOf": [
            {"properties": {"data": each}} for each in (data, {"const": "[DONE]"})
        ],
    }


def _error_of(route: Route, status: int) -> type[BaseModel]:
    """A server that is not well says so in the words of one that is."""
    failed = route.path == "/health" and status == 503
    return replies.Health if failed else replies.ErrorReply


def _content(kind: Any) -> dict[str, Any]:
    if isinstance(kind, str):
        return {}
    return {"schema": _reference(kind)}


def _reference(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=kind.__name__)}
