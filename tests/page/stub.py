"""A server of the page whose answers are known: what it says is what it was asked.

``say TEXT`` is answered with the text, ``count N`` slowly with numbers; ``busy`` is refused
the first time, ``refuse TEXT`` always, ``break`` breaks off. What came is in ``bodies``.
"""

import asyncio
import contextlib
import json
import re
import socket
import threading

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mm1_mlx.apps.page import DIST, POLICY

MODEL = "stub-model"
# Seconds between two numbers.
PAUSE = 0.05
USAGE = {
    "prompt_tokens": 28,
    "completion_tokens": 5,
    "total_tokens": 33,
    "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 16},
}
ABILITIES = {
    "answers": True,
    "resolution": {"low": "378", "auto": "672", "high": "2x672"},
}
TIMINGS = {"ttft_seconds": 0.25, "tokens_per_second": 230.0}


class Stub:
    def __init__(self):
        self.url = ""
        self.clear()

    def clear(self):
        self.bodies = []
        # Questions of which a client went away.
        self.left = []
        self.key = None
        self.abilities = ABILITIES
        self.was_busy = False

    def app(self):
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Mount("/", StaticFiles(directory=DIST, html=True)),
        ]
        return with_policy(Starlette(routes=routes))

    def locked(self, request):
        given = request.headers.get("authorization")
        if self.key is None or given == f"Bearer {self.key}":
            return None
        return refusal(401, "the API key is missing or wrong")

    async def models(self, request):
        return self.locked(request) or JSONResponse(
            {"data": [{"id": MODEL, "mm1": self.abilities}]}
        )

    async def chat(self, request):
        if locked := self.locked(request):
            return locked
        body = await request.json()
        self.bodies.append(body)
        content = body["messages"][-1]["content"]
        question = content[-1].get("text", "")
        if question.startswith("refuse "):
            return refusal(400, question.removeprefix("refuse "))
        if question == "busy" and not self.was_busy:
            self.was_busy = True
            return refusal(503, "16 requests wait already", {"Retry-After": "3"})
        return StreamingResponse(self.stream(question), media_type="text/event-stream")

    async def stream(self, question):
        try:
            async for piece in pieces(question):
                yield event({"choices": [{"delta": {"content": piece}}]})
                if question == "break":
                    return
        except asyncio.CancelledError:
            self.left.append(question)
            raise
        finish = "length" if question.startswith("long") else "stop"
        yield event({"choices": [{"delta": {}, "finish_reason": finish}]})
        yield event({"choices": [], "usage": USAGE, "timings": TIMINGS})
        yield "data: [DONE]\n\n"


async def pieces(question):
    verb, _, rest = question.partition(" ")
    if verb == "count":
        for number in range(int(rest)):
            yield f"{number} "
            await asyncio.sleep(PAUSE)
    else:
        answer = rest if verb == "say" else f"You said: {question}"
        for piece in re.findall(r"[\s\S]{1,4}", f" {answer}"):
            yield piece


def event(chunk):
    return f"data: {json.dumps(chunk)}\n\n"


def refusal(status, message, headers=None):
    body = {"error": {"message": message, "type": "invalid_request_error"}}
    return JSONResponse(body, status, headers)


def with_policy(app):
    """The page's policy on every answer, as the server has it."""

    async def wrapped(scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message["headers"], policy]
            await send(message)

        await app(scope, receive, send_with_policy)

    return wrapped


@contextlib.contextmanager
def running(stub):
    """Serve it on a free port of this machine."""
    listening = socket.create_server(("127.0.0.1", 0))
    stub.url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    config = uvicorn.Config(stub.app(), log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield stub
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()
