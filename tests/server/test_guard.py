"""Nobody asks who may not: Host, Origin, key, and paths that look like others."""

import http.client

import pytest
from serving import serving

from mm1_mlx.apps.server.policy import Policy, is_loopback, knows_host

KEY = "a-key-of-some-length"
BODY = {"messages": [{"role": "user", "content": "What is this?"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def locked():
    policy = Policy(
        key=KEY,
        hosts=frozenset({"mac.example.org"}),
        origins=frozenset({"https://page.example.org"}),
    )
    with serving(policy) as running:
        yield running


def status(server, path="/v1/models", method="GET", **headers):
    """Of a request with exactly these headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        headers = {"host": f"127.0.0.1:{server.port}", **headers}
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LocalHost", "[::1]"])
def test_own_names_are_known(server, host):
    assert status(server, host=f"{host}:{server.port}") == 200


@pytest.mark.parametrize("host", [
    "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "127.0.0.2",
    "0.0.0.0", "[::]", "127.1", "2130706433", "localhost.", "user@127.0.0.1",
    "127.0.0.1:", "127.0.0.1/", "127.0.0.1?", "a b", "*", "[::ffff:127.0.0.1]", "::1",
])  # fmt: skip
def test_other_names_are_not(server, host):
    assert status(server, host=f"{host}:{server.port}") == 403
    assert status(server, host=host) == 403


def test_another_port_or_no_host_is_refused(server):
    assert status(server, host="127.0.0.1:1") == 403
    assert status(server, host="") == 403
    # HTTP/1.1 itself asks for one.
    assert status(server, host=None) == 400


def test_an_allowed_name_is_known_with_any_port_in_front(locked):
    for host in ("mac.example.org", f"mac.example.org:{locked.port}"):
        assert status(locked, "/health", host=host) == 200
    assert status(locked, "/health", host="x.mac.example.org") == 403


def test_an_address_that_others_reach_it_by_is_known():
    policy = Policy()
    assert knows_host("192.168.1.5:8080", ("192.168.1.5", 8080), policy)
    assert knows_host("192.168.1.5", ("192.168.1.5", 80), policy)
    assert not knows_host("192.168.1.6:8080", ("192.168.1.5", 8080), policy)
    assert not knows_host("localhost:8080", ("192.168.1.5", 8080), policy)
    assert knows_host("[fe80::1]:8080", ("fe80::1%en0", 8080), policy)
    # A socket for both kinds of addresses.
    assert knows_host("192.168.1.5:8080", ("::ffff:192.168.1.5", 8080), policy)
    assert knows_host("localhost:8080", ("::ffff:127.0.0.1", 8080), policy)
    assert not knows_host("0.0.0.0:8080", ("127.0.0.1", 8080), policy)


def test_loopback_is_told_by_the_address():
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "192.168.1.5", "127.0.0.1.evil.example", "x", ""):
        assert not is_loopback(host)


@pytest.mark.parametrize(("headers", "expected"), [
    ({"origin": "https://evil.example"}, 403),
    ({"origin": "null"}, 403),
    ({"origin": "http://127.0.0.1"}, 403),
    ({"sec_fetch_site": "cross-site"}, 403),
    ({"sec_fetch_site": "same-origin"}, 200),
    ({"sec_fetch_site": "none"}, 200),
])  # fmt: skip
def test_pages_of_others_may_not_ask(server, headers, expected):
    assert status(server, **headers) == expected


def test_its_own_page_may(server):
    assert status(server, origin=f"http://127.0.0.1:{server.port}") == 200


def test_a_link_of_another_site_leads_to_the_page_and_to_nothing_else(server):
    visit = {
        "sec_fetch_site": "cross-site",
        "sec_fetch_mode": "navigate",
        "sec_fetch_dest": "document",
    }
    assert status(server, "/", **visit) == 200
    for path, changed in (
        ("/v1/models", {}),
        ("/metrics", {}),
        ("/", {"sec_fetch_dest": "iframe"}),
        ("/", {"sec_fetch_mode": "cors"}),
        ("/", {"sec_fetch_mode": "no-cors"}),
        ("/", {"origin": "https://evil.example"}),
    ):
        assert status(server, path, **visit | changed) == 403, (path, changed)


def test_the_page_behind_a_proxy_that_speaks_tls_may_ask(locked):
    key = {"authorization": f"Bearer {KEY}"}
    for host in ("mac.example.org", f"mac.example.org:{locked.port}"):
        asked = {"host": host, **key}
        assert status(locked, origin=f"https://{host}", **asked) == 200
        assert status(locked, origin="https://evil.example", **asked) == 403
    own = f"https://127.0.0.1:{locked.port}"
    assert status(locked, origin=own, **key) == 403


def test_no_page_is_told_that_it_may_unless_it_is_allowed(server, locked):
    for running, origin in ((server, None), (locked, "https://page.example.org")):
        response = running.client.options(
            "/v1/chat/completions",
            headers={
                "origin": "https://page.example.org",
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,content-type",
            },
        )
        assert response.headers.get("access-control-allow-origin") == origin
        assert "access-control-allow-credentials" not in response.headers
    allowed = locked.client.get(
        "/v1/models", headers={"origin": "https://page.example.org"}
    )
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://page.example.org"


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded"]
)
def test_simple_requests_of_pages_are_refused(server, kind):
    headers = {"content-type": kind} if kind else {}
    response = server.client.post(
        "/v1/chat/completions", content=b'{"messages": []}', headers=headers
    )
    assert response.status_code == 415


PATHS = [
    "/v1/models", "/v1/models/mm1-tiny", "/metrics", "/openapi.json", "/v1/nothing",
    "//v1/models", "/v1/../v1/models", "/V1/MODELS", "/health/../v1/models", "/health/",
    "/health%2f..%2fv1/models", "/v1/models?x=/health", "/v1/models#/health", "/docs",
    "/assets/../v1/models", "/%76%31/models",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("given", [None, "Bearer", "Bearer wrong", f"Basic {KEY}",
                                   f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", KEY])  # fmt: skip
def test_nothing_is_told_without_the_key(locked, path, given):
    assert status(locked, path, authorization=given) == 401


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
)
def test_nothing_is_answered_without_the_key(locked, path):
    response = locked.client.post(
        path, json=BODY, headers={"authorization": "Bearer x"}
    )
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == 'Bearer realm="mm1"'
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_the_key_opens_it_and_health_needs_none(locked):
    assert status(locked, authorization=f"Bearer {KEY}") == 200
    assert status(locked, authorization=f"bearer {KEY}") == 200
    assert status(locked, "/health") == 200
    assert status(locked, "/") == 200
    assert locked.client.post("/v1/chat/completions", json=BODY).status_code == 200


def test_the_key_is_never_printed(locked):
    assert locked.lines
    assert not any(KEY in line for line in locked.lines)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "GET"])
def test_other_methods_are_refused(server, method):
    response = server.client.request(method, "/v1/chat/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["code"] == "method_not_allowed"


def test_every_answer_has_an_id(server):
    given = server.client.get("/health", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    for strange in ("x" * 65, "a b", 'a"b'):
        made = server.client.get("/health", headers={"x-request-id": strange})
        assert made.headers["x-request-id"].startswith("req_")
    refused = server.client.get("/nothing")
    assert refused.headers["x-request-id"].startswith("req_")
    assert any("mine-1" in line and " 200 " in line for line in server.lines)
