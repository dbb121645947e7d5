"""Where pictures may come from, and where they may not."""

import os
import socket
import ssl
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from serving import FOUR, STAR, serving, text

from mm1_mlx.apps.server import remote
from mm1_mlx.apps.server.errors import APIError
from mm1_mlx.apps.server.modes import Views
from mm1_mlx.apps.server.policy import Policy
from mm1_mlx.image import load_pictures

HOSTS = frozenset({"images.example.org"})
STAR_BYTES = STAR.read_bytes()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with a picture in it, and things that are none of its pictures."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.png").write_bytes(FOUR.read_bytes())
    root = tmp_path_factory.mktemp("media") / "root"
    (root / "inner folder").mkdir(parents=True)
    (root / "star.png").write_bytes(STAR_BYTES)
    (root / "inner folder" / "star.png").write_bytes(STAR_BYTES)
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "linked").symlink_to(outside)
    os.mkfifo(root / "pipe.png")
    (root.parent / "root-not").mkdir()
    (root.parent / "root-not" / "secret.png").write_bytes(FOUR.read_bytes())
    with serving(Policy(media_root=root.resolve())) as running:
        yield running, root.resolve(), outside.resolve()


def ask(server, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    asked = [part, text("What colour is the star?")]
    return server.chat(asked, temperature=0, max_tokens=8)


def test_pictures_below_the_media_root_are_read(media):
    server, root, _ = media
    for url in (
        f"file://{root}/star.png",
        "file:///star.png",
        "file:///inner%20folder/star.png",
        f"file://{root}/inner%20folder/star.png",
    ):
        answer = ask(server, url)
        assert answer.json()["choices"][0]["message"]["content"] == "red", url


def test_nothing_else_is(media):
    server, root, outside = media
    for url in (
        f"file://{outside}/secret.png",
        f"file://{root}/../root-not/secret.png",
        f"file://{root}-not/secret.png",
        "file:///../root-not/secret.png",
        "file:///%2e%2e/root-not/secret.png",
        "file:///link.png",
        "file:///linked/secret.png",
        "file:///pipe.png",
        "file:///inner%20folder",
        "file:///",
        "file://",
        "file:///etc/passwd",
        "file:///dev/zero",
        "file:////etc/passwd",
        "file:///~/secret.png",
        "file:///star.png%00.png",
        "file://localhost/star.png",
        f"file://evil.example{root}/star.png",
        "file:///star.png?x",
        "file:///star.png#x",
        "FILE:///nothing.png",
        "file://[x/star.png",
    ):
        refused = ask(server, url)
        assert refused.status_code == 400, url
        error = refused.json()["error"]
        assert error["code"] == "invalid_image_url"
        assert error["param"] == "messages[0].content[0].image_url.url"
        assert str(outside) not in error["message"]


def test_too_many_pictures_are_refused_before_one_is_read(media, monkeypatch):
    server, _, _ = media
    read = []
    monkeypatch.setattr(
        "mm1_mlx.apps.server.media.read", lambda *given: read.append(given)
    )
    part = {"type": "image_url", "image_url": {"url": "file:///star.png"}}
    refused = server.chat([part] * 25)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        "messages holds 25 pictures, expected at most 24"
    )
    assert read == []


def test_what_pictures_take_counts_as_the_request_does(media):
    _, root, _ = media
    noise = np.random.default_rng(0).bytes(200_000)
    (root / "large.png").write_bytes(noise)
    part = {"type": "image_url", "image_url": {"url": "file:///large.png"}}
    policy = Policy(media_root=root, max_body=500_000)
    with serving(policy) as server:
        assert server.chat([part] * 2).json()["error"]["code"] == "invalid_prompt"
        refused = server.chat([part] * 3)
        assert refused.status_code == 413
        assert "more than 500,000 bytes" in refused.json()["error"]["message"]
        assert server.service.bodies._held == 0


@pytest.fixture
def connections(monkeypatch):
    """Every address that anything tries to connect to."""
    tried = []

    def connect(address, **_):
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(remote.socket, "create_connection", connect)
    return tried


def resolve_to(monkeypatch, *addresses):
    def found(*_, **__):
        return [(0, 0, 0, "", (address, 443)) for address in addresses]

    monkeypatch.setattr(remote.socket, "getaddrinfo", found)


@pytest.mark.parametrize("url", [
    "https://evil.example/x.png",
    "https://images.example.org.evil.example/x.png",
    "https://images.example.org@evil.example/x.png",
    "https://evil.example\\@images.example.org/x.png",
    "https://images.example.org:444/x.png",
    "https://images.example.org:443/x.png",
    "https://user@images.example.org/x.png",
    "https://images.example.org./x.png",
    "https://images.example.org%2f.evil.example/x.png",
    "https://127.0.0.1/x.png",
    "https://[::1]/x.png",
    "https://0x7f.1/x.png",
    "https://169.254.169.254/latest/meta-data",
    "https:///x.png",
    "https:images.example.org/x.png",
    "https://images.example.org\r\nHost: x/",
    "https://images.example.org/ x",
    "https://\u0131mages.example.org/x.png",
    "http://images.example.org/x.png",
])  # fmt: skip
def test_other_hosts_are_never_connected_to(connections, monkeypatch, url):
    resolve_to(monkeypatch, "93.184.216.34")
    with pytest.raises(APIError):
        remote.fetch(url, HOSTS, 1000, "url")
    assert connections == []


@pytest.mark.parametrize("address", [
    "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0",
    "100.64.0.1", "224.0.0.1", "::1", "fe80::1", "fe80::1%eth0", "fc00::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1",
])  # fmt: skip
def test_names_that_lead_inside_are_never_connected_to(
    connections, monkeypatch, address
):
    for addresses in ([address], ["93.184.216.34", address]):
        resolve_to(monkeypatch, *addresses)
        with pytest.raises(APIError, match="not public"):
            remote.fetch("https://images.example.org/x", HOSTS, 1000, "url")
    assert connections == []


def test_the_address_that_was_checked_is_the_one_that_is_dialled(
    connections, monkeypatch
):
    resolve_to(monkeypatch, "93.184.216.34")
    with pytest.raises(APIError, match="did not give it"):
        remote.fetch("https://images.example.org/x", HOSTS, 1000, "url")
    assert connections == [("93.184.216.34", 443)]


@contextmanager
def answering(monkeypatch, *parts, pause=0.0):
    """A host that answers with these bytes; TLS is left out."""
    listener = socket.create_server(("127.0.0.1", 0))
    asked = []

    def serve():
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            asked.append(connection.recv(4096))
            for part in parts:
                try:
                    connection.sendall(part)
                except OSError:
                    return
                if pause and ended.wait(pause):
                    return

    ended = threading.Event()
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    port = listener.getsockname()[1]

    def connect(_, timeout):
        held = socket.socket()
        held.settimeout(timeout)
        held.connect(("127.0.0.1", port))
        return held

    resolve_to(monkeypatch, "93.184.216.34")
    monkeypatch.setattr(remote.socket, "create_connection", connect)

    class Plain:
        def wrap_socket(self, held, server_hostname):
            assert server_hostname == "images.example.org"
            return held

    monkeypatch.setattr(remote.ssl, "create_default_context", Plain)
    try:
        yield asked
    finally:
        ended.set()
        listener.close()
        thread.join(10)


def test_a_picture_is_fetched(monkeypatch):
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(STAR_BYTES)}\r\n\r\n".encode()
    with answering(monkeypatch, head, STAR_BYTES) as asked:
        url = "https://images.example.org/a/star.png?size=1"
        assert remote.fetch(url, HOSTS, 1 << 20, "url") == STAR_BYTES
    (request,) = asked
    assert request.startswith(b"GET /a/star.png?size=1 HTTP/1.1\r\n")
    assert b"Host: images.example.org\r\n" in request


@pytest.mark.parametrize(("head", "said"), [
    (b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/\r\n\r\n", "answered 302"),
    (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered 404"),
    (b"SSH-2.0\r\n", "BadStatusLine"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "IncompleteRead"),
])  # fmt: skip
def test_other_answers_are_none(monkeypatch, head, said):
    with answering(monkeypatch, head), pytest.raises(APIError, match=said):
        remote.fetch("https://images.example.org/x", HOSTS, 1 << 20, "url")


def test_too_long_a_picture_is_given_up(monkeypatch):
    parts = [b"HTTP/1.1 200 OK\r\n\r\n", *([b"x" * 10_000] * 100)]
    with (
        answering(monkeypatch, *parts),
        pytest.raises(APIError, match=r"more than 20,000 bytes"),
    ):
        remote.fetch("https://images.example.org/x", HOSTS, 20_000, "url")


def test_a_host_that_dribbles_is_given_up(monkeypatch):
    monkeypatch.setattr(remote, "SECONDS", 1.0)
    parts = [b"HTTP/1.1 200 OK\r\n", *([b"a"] * 100)]
    with (
        answering(monkeypatch, *parts, pause=0.2),
        pytest.raises(APIError, match="took over 1 seconds"),
    ):
        remote.fetch("https://images.example.org/x", HOSTS, 20_000, "url")


def test_certificates_are_checked():
    context = remote.ssl.create_default_context()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_details_are_the_models_modes(make_config):
    tiled = {"tiling": {"kind": "split", "grid": 2}}
    config = make_config(image=tiled)
    views = Views(config)
    assert views.modes.model_dump() == {"low": "16", "auto": "2x16", "high": "2x16"}
    counts = {}
    for detail in ("low", "auto", "high", None):
        (shown,) = load_pictures([views.show(STAR_BYTES, detail)], config.image)
        counts[detail] = len(shown.tiles)
    assert counts == {"low": 1, "auto": 5, "high": 5, None: 5}


def test_a_large_encoder_has_a_high_resolution(make_config):
    config = make_config(
        vision={"image_size": 336, "patch_size": 14},
        image={"size": 336},
        connector={"num_features": 576},
    )
    views = Views(config)
    assert views.modes.model_dump() == {"low": "336", "auto": "336", "high": "2x672"}
    shown = load_pictures(
        [views.show(STAR_BYTES, detail) for detail in ("low", "high")], config.image
    )
    assert [[tile.shape[0] for tile in one.tiles] for one in shown] == [
        [336],
        [672] * 5,
    ]


def test_a_model_without_eyes_has_no_modes(make_config):
    config = make_config(vision=None, connector=None, image=None)
    assert Views(config).modes is None
    assert Views(config).show(b"x", "high") == b"x"
