"""``mm1 serve`` as people start and end it."""

import asyncio
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest
from serving import STAR, picture, text
from starlette.requests import Request

from mm1_mlx.apps.cli import main
from mm1_mlx.apps.server.page import ABSENT, Page
from mm1_mlx.apps.server.run import LEFT

MM1 = [sys.executable, "-c", "from mm1_mlx.apps.cli import main; main()", "serve"]
# On a busy machine.
LONG = 300
# The token that ends an answer of the embedded model.
END = "1"
READY = re.compile(r"serving (\S+) at (http://\S+) ")


def start(*arguments, **environment):
    process = subprocess.Popen(
        [*MM1, "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    line = process.stderr.readline()
    found = READY.match(line)
    assert found, line + process.stderr.read()
    return process, *found.groups()


def answers(url):
    try:
        httpx.get(f"{url}/health", timeout=LONG)
    except httpx.TransportError:
        return False
    return True


@pytest.fixture
def refused(monkeypatch, capfd):
    """Run the command in this process; its exit status and what it said."""

    def run(*arguments):
        handler = signal.getsignal(signal.SIGTERM)
        argv = ["mm1", "serve", "--port", "0", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, said = capfd.readouterr()
        assert out == ""
        return ended.value.code, said

    return run


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_end_and_finishes_its_answers(how):
    process, name, url = start()
    try:
        assert name == "mm1-tiny"
        body = {
            "messages": [{"role": "user", "content": [picture(STAR), text("What?")]}],
            "stream": True, "max_tokens": 60, "temperature": 2.0, "seed": 3,
            "logit_bias": {END: -100},
        }  # fmt: skip
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, timeout=LONG
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(how)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(LONG) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
    finally:
        process.kill()
        said = process.stderr.read()
    assert "'/v1/chat/completions' 200" in said
    assert "Traceback" not in said
    assert process.stdout.read() == ""


def test_a_second_ctrl_c_ends_it_at_once():
    process, _, url = start("--no-log")
    # Longer than anybody waits for the end.
    body = {
        "messages": [{"role": "user", "content": "What?"}],
        "stream": True, "max_tokens": 900, "temperature": 2.0, "seed": 3,
        "logit_bias": {END: -100},
    }  # fmt: skip
    try:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, timeout=LONG
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            # No more are let in, and the answer goes on.
            while answers(url):
                pass
            next(lines)
            process.send_signal(signal.SIGINT)
            assert process.wait(LONG) == 130
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
    finally:
        process.kill()
    assert process.stderr.read() == LEFT.decode()


def test_lines_of_requests_can_be_left_out(tmp_path):
    key = tmp_path / "key"
    key.write_text("a-key-of-some-length\n")
    process, name, url = start("--no-log", "--name", "mine", "--api-key-file", str(key))
    try:
        assert name == "mine"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"authorization": "Bearer a-key-of-some-length"}
        listed = httpx.get(f"{url}/v1/models", headers=headers).json()
        assert listed["data"][0]["id"] == "mine"
        process.terminate()
        assert process.wait(LONG) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()


def test_the_key_may_come_from_the_environment():
    process, _, url = start(MM1_API_KEY="from-the-environment")
    try:
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"authorization": "Bearer from-the-environment"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
    finally:
        process.kill()
        process.wait()


def test_others_are_let_in_with_a_key_alone(tmp_path, refused):
    for host in ("0.0.0.0", "::"):
        status, said = refused("--host", host)
        assert status == 2
        assert "--api-key-file" in said
    empty = tmp_path / "empty"
    empty.write_text("\n")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff" * 40)
    for argument in (*map(str, (empty, binary)), str(tmp_path / "missing")):
        status, said = refused("--host", "0.0.0.0", "--api-key-file", argument)
        assert status == 1
        assert said.startswith("error: ")
        assert said.count("\n") == 1
    for key in ("", "short", "with a space", "schl\u00fcssel-lang"):
        status, said = refused("--api-key", key)
        assert (status, said.count("\n")) == (1, 1)
        assert "holds no key" in said


@pytest.mark.parametrize(("arguments", "status", "said"), [
    (["--allow-origin", "example.org"], 2, "--allow-origin"),
    (["--allow-origin", "https://example.org/"], 2, "--allow-origin"),
    (["--allow-remote-images", "https://example.org"], 2, "--allow-remote-images"),
    (["--allow-remote-images", "*.example.org"], 2, "--allow-remote-images"),
    (["--media-root", "/no/such/folder"], 1, "is no folder"),
    (["--host", "no.such.host.invalid", "--api-key", "a-long-key"], 1, "listened at"),
    (["-m", "/no/such/model"], 1, "does not exist"),
    (["--resolution", "wide"], 1, "resolution"),
], ids=str)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_served(
    arguments, status, said, refused
):
    ended, message = refused(*arguments)
    assert ended == status, message
    assert said in message


def test_a_port_that_is_taken_is_said(server, refused):
    ended, said = refused("--port", str(server.port))
    assert ended == 1
    assert "choose another by --host and --port" in said


def test_the_page_is_served_with_a_strict_policy(server):
    page = server.client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert any(asset.endswith(".js") for asset in assets)
    for asset in assets:
        got = server.client.get(f"/{asset}")
        assert got.status_code == 200
        assert got.headers["content-security-policy"] == policy
        assert got.headers["content-encoding"] == "gzip"
        again = server.client.get(
            f"/{asset}", headers={"if-none-match": got.headers["etag"]}
        )
        assert (again.status_code, again.content) == (304, b"")
    assert server.client.get("/assets/../../pyproject.toml").status_code == 404
    assert server.client.get("/assets/nothing.js").status_code == 404


def test_without_a_page_the_server_says_what_it_has(tmp_path):
    page = Page(tmp_path)
    assert page.paths == ("/",)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    response = asyncio.run(page.get(Request(scope)))
    assert response.body.decode() == ABSENT
