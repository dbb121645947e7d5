"""The server's socket, its signals, and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from mm1_mlx.errors import ConfigError

from .connections import MAX_HEAD, protocol
from .policy import Policy

# Seconds that answers under way have once the server is told to end.
GRACE = 120
LEFT = b"ended at once; answers under way are left as they are\n"


def listen(host: str, port: int) -> socket.socket:
    """A socket that the server will accept connections from.

    Args:
        host: a name or an address.
        port: 0 takes one that is free.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        held = socket.socket(family, kind, number)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
        held.listen(256)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened at ({error.strerror or error}); choose "
            "another by --host and --port"
        ) from None
    return held


def make_server(
    app: ASGIApp, policy: Policy, ready: Callable[[], None]
) -> uvicorn.Server:
    """What serves until SIGTERM, Ctrl-C or ``should_exit``, and finishes what it began.

    Ctrl-C while it does ends the process.

    Args:
        app: what answers.
        policy: limits of connections.
        ready: called once requests are answered.
    """
    config = uvicorn.Config(
        app,
        http=protocol(policy),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # The address of who asks is the connection's own, whatever a header says.
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE,
        h11_max_incomplete_event_size=MAX_HEAD,
    )
    return _Server(config, ready)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            # Nothing is waited for: neither the model's thread nor a line half printed.
            os.write(2, LEFT)
            os._exit(128 + sig)
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            # uvicorn would raise the signals again: what they asked for is done.
            self._captured_signals.clear()
