"""The paths of the server, and what stands before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .chat import answer_chat
from .completions import answer_completions
from .embeddings import embed
from .errors import APIError, refuse
from .guard import Guard
from .openapi import describe
from .page import Page
from .replies import Health, Model, ModelList
from .service import Service, as_json
from .watch import HEADER, Watch


def make_app(service: Service, say: Callable[[str], None] | None = None) -> Starlette:
    """The server's ASGI application.

    Args:
        service: the model, and what is allowed of it.
        say: prints a line for every request, None for none.
    """
    page, policy = Page(), service.policy
    _watch_model(service)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.keeper.let_go_when_idle())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await service.keeper.close()

    middleware = [Middleware(Watch, metrics=service.metrics, say=say)]
    if policy.origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=[*policy.origins],
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type", HEADER],
                expose_headers=[HEADER, "retry-after"],
            )
        )
    middleware.append(
        Middleware(Guard, policy=policy, open_paths=("/health", *page.paths))
    )
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", answer_chat, methods=["POST"]),
            Route("/v1/completions", answer_completions, methods=["POST"]),
            Route("/v1/embeddings", embed, methods=["POST"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", show_model, methods=["GET"]),
            Route("/health", tell_health, methods=["GET"]),
            Route("/metrics", tell_metrics, methods=["GET"]),
            Route("/openapi.json", tell_openapi, methods=["GET"]),
            *(Route(path, page.get, methods=["GET"]) for path in page.paths),
        ],
        middleware=middleware,
        exception_handlers={
            APIError: refuse,
            HTTPException: _respond_unrouted,
        },
        lifespan=lifespan,
    )
    # Neither a slash too many nor one too few leads anywhere.
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def list_models(request: Request) -> Response:
    """The served model, in a list of one."""
    return as_json(ModelList(data=[_model(request)]))


async def show_model(request: Request) -> Response:
    """The served model, by its id."""
    service: Service = request.app.state.service
    service.check_model(request.path_params["model"])
    return as_json(_model(request))


def _model(request: Request) -> Model:
    service: Service = request.app.state.service
    return Model(id=service.name, created=service.created, mm1=service.abilities)


async def tell_health(request: Request) -> Response:
    """Whether the model's threads are there."""
    service: Service = request.app.state.service
    loaded = service.keeper.loaded
    well = loaded is None or loaded.well
    health = Health(
        status="ok" if well else "failed", model=service.name, loaded=loaded is not None
    )
    return JSONResponse(health.model_dump(), 200 if well else 503)


async def tell_metrics(request: Request) -> Response:
    """The counters."""
    metrics = request.app.state.service.metrics
    return Response(metrics.render(), media_type=metrics.content_type)


async def tell_openapi(request: Request) -> Response:  # noqa: ARG001
    """The API's description."""
    return JSONResponse(describe())


def _watch_model(service: Service) -> None:
    """Tell of the model what can be read at any time."""
    keeper = service.keeper

    def of_pool(name: str) -> Callable[[], float]:
        def read() -> float:
            pool = keeper.loaded.pool if keeper.loaded else None
            return float(getattr(pool, name)) if pool else 0.0

        return read

    watch = service.metrics.watch
    watch("mm1_questions_waiting", "Questions that wait.", of_pool("waiting"))
    watch("mm1_answers_running", "Answers under way.", of_pool("running"))
    watch(
        "mm1_model_loaded", "Whether the model is in memory.",
        lambda: float(keeper.loaded is not None),
    )  # fmt: skip


async def _respond_unrouted(request: Request, error: Exception) -> Response:
    """No such path, or another method of it."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.scope["path"]
    message = (
        f"there is no {method} {path!r:.100} here; /openapi.json says what there is"
    )
    code = "not_found" if error.status_code == 404 else "method_not_allowed"
    response = APIError(error.status_code, message, code=code).response()
    response.headers.update(error.headers or {})
    return response
