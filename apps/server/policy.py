"""What a server lets its callers do, and how much of it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
# The most that ``parallel`` may be.
MAX_PARALLEL = 128


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is allowed beyond the safe defaults, and the limits.

    Attributes:
        key: what callers must send as ``Authorization: Bearer KEY``, None for nothing.
        hosts: names beside the server's own that a ``Host`` header may hold.
        origins: pages of other sites that may call it from a browser.
        remote_hosts: names of hosts that pictures may be fetched from, by https.
        media_root: a folder that ``file://`` pictures may lie in.
        parallel: how many answers are under way at once.
        max_waiting: how many questions may wait, and how many requests for embeddings.
        max_body: bytes of a request's body.
        body_budget: bytes of the bodies of all requests under way.
        body_seconds: how long a body may take to arrive.
        header_seconds: how long a request's head may take.
        send_seconds: how long a client may take no part of an answer.
        pulse_seconds: silence after which a stream says that it is alive.
        max_connections: how many may be open.
        max_tokens: of an answer that asks for no number of them.
        load_seconds: for which a model that could not be loaded is not tried again.
    """

    key: str | None = None
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    remote_hosts: frozenset[str] = frozenset()
    media_root: Path | None = None
    parallel: int = 8
    max_waiting: int = 64
    max_body: int = 64 << 20
    body_budget: int = 512 << 20
    body_seconds: float = 30.0
    header_seconds: float = 10.0
    send_seconds: float = 60.0
    pulse_seconds: float = 15.0
    max_connections: int = 256
    max_tokens: int = 1024
    load_seconds: float = 10.0


def is_loopback(host: str) -> bool:
    """Whether a name or address to listen at is this machine's own alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _plain(address: str) -> str:
    """The address as people spell it: IPv4 within IPv6 as IPv4, no zone."""
    address = address.partition("%")[0]
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def is_address(host: str) -> bool:
    """Whether it is an address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def knows_host(host: str, local: tuple[str, int], policy: Policy) -> bool:
    """Whether a ``Host`` header names this server.

    Exact: a name that somebody else's DNS leads here is none of them. An address is the
    one that the connection came in by.

    Args:
        host: the header's value.
        local: address and port that the client connected to.
        policy: names that are allowed beside the server's own.
    """
    address, port = _plain(local[0]), local[1]
    spelled = f"[{address}]" if ":" in address else address
    names = {spelled, *policy.hosts}
    if is_loopback(address):
        names |= {*LOOPBACK_NAMES}
    known = {f"{name}:{port}" for name in names}
    if port == 80:
        known |= names
    # Behind a proxy the port is the proxy's.
    return host.lower() in known | policy.hosts
