"""Pictures of named hosts, fetched over https; nothing else is ever connected to.

The host's addresses are asked for once and the one that was checked is dialled: a name
that changes its address in between, or points into the local network, leads nowhere.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import urlsplit

from .errors import APIError

SECONDS = 10.0
PORT = 443
CHUNK = 64 << 10


def fetch(url: str, hosts: frozenset[str], max_bytes: int, param: str) -> bytes:
    """A picture's bytes; takes at most ``SECONDS`` once its host's address is known.

    All of it happens on the thread that calls it.

    Args:
        url: where it is.
        hosts: exact names of those that may be asked.
        max_bytes: how long it may be.
        param: what errors call the field.

    Raises:
        APIError: 400; it is elsewhere, or cannot be had.
    """
    host, target = _split(url, hosts, param)
    deadline = time.monotonic() + SECONDS
    try:
        address = _address(host, param)
        plain = socket.create_connection((address, PORT), timeout=SECONDS)
        with plain, _Deadline(plain, deadline):
            context = ssl.create_default_context()
            with context.wrap_socket(plain, server_hostname=host) as secure:
                picture = _get(secure, host, target, max_bytes, param)
        # A socket that was shut looks like one whose other end had said all.
        if time.monotonic() >= deadline:
            raise TimeoutError
        return picture
    except (OSError, http.client.HTTPException) as error:
        late = time.monotonic() >= deadline
        reason = f"it took over {SECONDS:g} seconds" if late else type(error).__name__
        raise _refusal(f"{host} did not give it ({reason})", param) from None


def _split(url: str, hosts: frozenset[str], param: str) -> tuple[str, str]:
    """Host and target of a URL, if it is one that may be asked."""
    if not url.isascii() or any(c <= " " or c in '\\"<>^`{|}' for c in url):
        raise _refusal("the URL has characters that must be percent-encoded", param)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refusal("the URL is malformed", param) from None
    # The whole of it: neither a user's name nor another port, nor another spelling.
    host = parts.netloc.lower()
    if parts.scheme != "https" or host not in hosts or port is not None:
        raise _refusal(
            f"{parts.netloc!r:.80} is no host that pictures may be fetched from; send a "
            "data URI, or allow it by --allow-remote-images",
            param,
        )
    return host, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _address(host: str, param: str) -> str:
    """An address of the host, all of which are public."""
    found = socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        ip = ipaddress.ip_address(address.partition("%")[0])
        inner = getattr(ip, "ipv4_mapped", None) or ip
        if not inner.is_global or inner.is_multicast:
            raise _refusal(f"{host} has an address that is not public", param)
    return addresses[0]


class _Deadline:
    """Shuts a socket at the deadline: a server that sends byte by byte meets no timeout."""

    def __init__(self, held: socket.socket, deadline: float) -> None:
        # A duplicate: what is wrapped by TLS is detached from the socket.
        self._held = held.dup()
        left = max(0.0, deadline - time.monotonic())
        self._timer = threading.Timer(left, self._end)
        self._timer.daemon = True

    def _end(self) -> None:
        try:
            self._held.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # It has ended by itself.

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._held.close()


def _get(
    secure: ssl.SSLSocket, host: str, target: str, max_bytes: int, param: str
) -> bytes:
    connection = http.client.HTTPSConnection(host, timeout=SECONDS)
    connection.sock = secure
    connection.request(
        "GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise _refusal(f"{host} answered {response.status}, expected 200", param)
    parts, size = [], 0
    while part := response.read(CHUNK):
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise _refusal(f"the picture has more than {max_bytes:,} bytes", param)
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _refusal(message: str, param: str) -> APIError:
    return APIError(400, f"{param}: {message}", param=param, code="invalid_image_url")
