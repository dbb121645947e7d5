"""Servers of the embedded model, each on a free port of this machine."""

import base64
import json
import threading
from contextlib import contextmanager

import httpx

from mm1_mlx.apps.server.app import make_app
from mm1_mlx.apps.server.keeper import Keeper, open_model
from mm1_mlx.apps.server.policy import Policy
from mm1_mlx.apps.server.run import listen, make_server
from mm1_mlx.apps.server.service import Service
from mm1_mlx.runtime import TINY

STAR = TINY / "red-star.png"
FOUR = TINY / "four-shapes.png"


class Running:
    """A server that runs in a thread, and a client of it."""

    def __init__(self, service, app, port, policy):
        self.service, self.app, self.port = service, app, port
        self.url = f"http://127.0.0.1:{port}"
        self.key = policy.key
        headers = {"authorization": f"Bearer {policy.key}"} if policy.key else {}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=60)

    @property
    def pool(self):
        return self.service.keeper.loaded.pool

    def chat(self, content, **fields):
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return self.client.post("/v1/chat/completions", json=body)


@contextmanager
def serving(policy=None, *, idle=None, load=None, **options):
    policy = policy or Policy()

    def load_again():
        return open_model(policy, **options)

    keeper = Keeper(load or load_again, load_again(), idle, policy.load_seconds)
    held = listen("127.0.0.1", 0)
    ready = threading.Event()
    lines = []

    def run():
        # The keeper's lock belongs to the loop that it is first used in.
        service = Service("mm1-tiny", 1, keeper, policy)
        app = make_app(service, lines.append)
        server = make_server(app, policy, ready.set)
        state.extend((service, app, server))
        server.run(sockets=[held])

    state = []
    port = held.getsockname()[1]
    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    service, app, server = state
    running = Running(service, app, port, policy)
    running.lines, running.server, running.thread = lines, server, thread
    try:
        yield running
    finally:
        running.client.close()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def data_uri(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def picture(path, **options):
    return {"type": "image_url", "image_url": {"url": data_uri(path), **options}}


def text(said):
    return {"type": "text", "text": said}


def events(response):
    """The objects of a stream of events, which ends as it should."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
