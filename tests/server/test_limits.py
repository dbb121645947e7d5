"""What is too much, too slow or not wanted any more harms nobody else."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from serving import FOUR, STAR, events, picture, serving, text

from mm1_mlx.apps.server.keeper import open_model
from mm1_mlx.apps.server.policy import Policy
from mm1_mlx.batch import Batch
from mm1_mlx.errors import CheckpointError

DESCRIBE = [picture(FOUR), text("Describe the picture.")]
# Longer than anybody waits: the embedded model's context is 1,024.
LONG = {"max_tokens": 900, "temperature": 2.0, "seed": 1}


@pytest.fixture(scope="module")
def endless():
    """Options of answers that do not end by themselves."""
    from mm1_mlx import load

    with load() as runtime:
        ends = runtime.tokenizer.hf.eos_token_ids
    return {**LONG, "logit_bias": {str(token): -100 for token in ends}}


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


@contextmanager
def streaming(server, options):
    """The lines of a stream whose first event has come; the client leaves at the end."""
    body = {"messages": [{"role": "user", "content": DESCRIBE}], "stream": True}
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json={**body, **options}) as got,
    ):
        lines = got.iter_lines()
        next(lines)
        yield lines


def test_many_clients_at_once_get_what_each_would_alone(server):
    cases = [
        (content, {"temperature": t, "seed": seed, "max_tokens": 24})
        for content in (
            DESCRIBE,
            [picture(STAR), text("What colour is the star?")],
            [picture(STAR), picture(FOUR), text("How many shapes are there?")],
            "What is this?",
        )
        for t, seed in ((0, 0), (2.0, 3), (2.0, 8), (1.5, 5))
    ]
    said = lambda response: response.json()["choices"][0]["message"]["content"]  # noqa: E731
    alone = [said(server.chat(content, **fields)) for content, fields in cases]
    together = [None] * len(cases)

    def ask(i):
        content, fields = cases[i]
        together[i] = said(server.chat(content, **fields))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(threads) == 16
    assert len(set(alone)) > 7
    assert together == alone


def test_a_client_that_leaves_a_stream_ends_its_answer(server, endless):
    with streaming(server, endless) as lines:
        assert server.pool.running == 1
        for _ in range(6):
            next(lines)
    wait_until(lambda: server.pool.running == 0)
    wait_until(lambda: any(" 499 " in line for line in server.lines))


def test_a_client_that_leaves_before_its_answer_ends_it(server, endless):
    body = {"messages": [{"role": "user", "content": DESCRIBE}], **endless}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)
    wait_until(lambda: server.pool.running == 0)


def test_who_leaves_the_queue_is_not_answered(endless):
    with serving(Policy(parallel=1)) as server, streaming(server, endless):
        body = {"messages": [{"role": "user", "content": "What is this?"}]}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)
        wait_until(lambda: server.pool.waiting == 0)
        assert server.pool.running == 1


def test_a_full_queue_is_told_with_a_time(endless):
    with serving(Policy(parallel=1, max_waiting=1)) as server:
        with streaming(server, endless):
            waiting = threading.Thread(target=server.chat, args=("What?",))
            waiting.start()
            wait_until(lambda: server.pool.waiting == 1)
            refused = server.chat("What is this?")
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
        waiting.join()
        assert server.chat("What is this?", max_tokens=1).status_code == 200


def test_a_body_that_is_too_long_is_refused_before_it_is_read():
    with serving(Policy(max_body=10_000)) as server:
        refused = server.chat("x" * 10_001)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "request_too_large"
        # And so is one that does not say how long it is, with most of it unread.
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as held:
            held.sendall(head.encode() + b"Content-Type: application/json\r\n")
            held.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
            held.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n1\r\n \r\n")
            held.settimeout(20)
            assert held.recv(100).startswith(b"HTTP/1.1 413")
        assert server.chat("What is this?", max_tokens=1).status_code == 200


def test_bodies_of_others_leave_no_room():
    policy = Policy(max_body=1 << 20, body_budget=1 << 20, body_seconds=5)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        "Content-Type: application/json\r\nContent-Length: 900000\r\n\r\n"
    )
    with serving(policy) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as held:
            held.sendall(head.format(port=server.port).encode() + b" " * 800_000)
            wait_until(lambda: server.service.bodies._held >= 800_000)
            refused = server.chat("x" * 400_000)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
        wait_until(lambda: server.service.bodies._held == 0)
        assert server.chat("What is this?", max_tokens=1).status_code == 200


def test_a_body_that_does_not_come_is_given_up():
    with (
        serving(Policy(body_seconds=0.5)) as server,
        socket.create_connection(("127.0.0.1", server.port)) as held,
    ):
        held.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\n"
            + f"Host: 127.0.0.1:{server.port}\r\n".encode()
            + b"Content-Type: application/json\r\nContent-Length: 90\r\n\r\n{"
        )
        held.settimeout(20)
        assert held.recv(100).startswith(b"HTTP/1.1 408")


def test_slow_heads_are_closed_and_slow_nobody_down():
    with serving(Policy(header_seconds=1.0)) as server:
        slow = [
            socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)
        ]
        try:
            for held in slow:
                held.sendall(b"GET /health HTTP/1.1\r\n")
            assert server.client.get("/health").status_code == 200
            end = time.monotonic() + 20
            # A byte now and then does not help.
            while slow and time.monotonic() < end:
                for held in [*slow]:
                    held.settimeout(0.01)
                    try:
                        held.sendall(b"a")
                        open_ = held.recv(10) != b""
                    except TimeoutError:
                        open_ = True
                    except OSError:
                        open_ = False
                    if not open_:
                        held.close()
                        slow.remove(held)
            assert not slow
            assert server.client.get("/health").status_code == 200
        finally:
            for held in slow:
                held.close()


def test_connections_beyond_the_limit_are_told():
    with serving(Policy(max_connections=5)) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        try:
            time.sleep(0.3)
            with socket.create_connection(("127.0.0.1", server.port)) as late:
                late.settimeout(20)
                said = late.recv(1000)
            assert said.startswith(b"HTTP/1.1 503")
            assert b"Retry-After" in said
        finally:
            for connection in held:
                connection.close()
        wait_until(lambda: server.client.get("/health").status_code == 200)


def test_websockets_and_long_heads_are_refused(server):
    head = b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 20_000
    with socket.create_connection(("127.0.0.1", server.port)) as held:
        held.sendall(head)
        held.settimeout(20)
        assert held.recv(100).startswith(b"HTTP/1.1 400")
    response = server.client.get(
        "/v1/models", headers={"connection": "upgrade", "upgrade": "websocket"}
    )
    assert response.status_code == 200


def test_a_quiet_stream_says_that_it_is_alive(endless, monkeypatch):
    policy = Policy(pulse_seconds=0.05, parallel=1)
    slow, step = threading.Event(), Batch.step

    def slowly(batch):
        slow.wait(0.5)
        return step(batch)

    monkeypatch.setattr(Batch, "step", slowly)
    with (
        serving(policy) as server,
        streaming(server, {**endless, "max_tokens": 4}) as lines,
    ):
        said = [*lines]
        assert said.count(": still here") >= 3
        assert "data: [DONE]" in said


def test_an_idle_model_is_let_go_and_loaded_again():
    with serving(idle=1.0) as server:
        first = server.chat(DESCRIBE, temperature=0).json()
        assert server.client.get("/health").json()["loaded"]
        wait_until(lambda: not server.client.get("/health").json()["loaded"])
        # It can be told of without it.
        assert server.client.get("/v1/models").json()["data"][0]["mm1"]["answers"]
        assert not server.client.get("/health").json()["loaded"]
        again = server.chat(DESCRIBE, temperature=0).json()
        assert again["choices"] == first["choices"]


def test_a_model_that_cannot_be_loaded_again_is_told_and_tried_again():
    failing = [True]

    def load():
        if failing:
            failing.pop()
            raise CheckpointError("/secret/path is gone")
        return open_model(Policy())

    with serving(idle=0.5, load=load) as server:
        wait_until(lambda: not server.client.get("/health").json()["loaded"])
        refused = server.chat("What is this?")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "10"
        assert "secret" not in refused.text
        # Until then it is not even tried.
        again = server.chat("What is this?")
        assert again.status_code == 503
        assert int(again.headers["retry-after"]) <= 10
        server.service.keeper._failed -= 10
        assert server.chat("What is this?", max_tokens=1).status_code == 200


def test_a_bug_tells_the_caller_nothing_but_its_id(server, monkeypatch, capfd):
    def fail(*_, **__):
        raise ZeroDivisionError("inner workings")

    monkeypatch.setattr(Batch, "begin", fail)
    failed = server.chat("What is this?")
    assert failed.status_code == 500
    assert failed.headers["x-request-id"] in failed.json()["error"]["message"]
    assert "inner workings" not in failed.text
    assert "inner workings" in capfd.readouterr().err
    monkeypatch.undo()
    assert server.chat("What is this?", max_tokens=1).status_code == 200


def test_a_failing_step_is_told_in_the_stream(server, monkeypatch, endless):
    def fail(_):
        raise ZeroDivisionError("inner workings")

    with streaming(server, endless) as lines:
        monkeypatch.setattr(Batch, "step", fail)
        rest = [line for line in lines if line.startswith("data: ")]
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal")
    assert "inner workings" not in error["message"]
    monkeypatch.undo()
    assert server.chat("What is this?", max_tokens=1).status_code == 200


def test_a_dead_thread_is_told_by_health():
    with serving() as server:
        worker = server.service.keeper.loaded.runtime._worker
        assert server.client.get("/health").json()["status"] == "ok"
        worker.close()
        failed = server.client.get("/health")
        assert failed.status_code == 503
        assert failed.json()["status"] == "failed"
        assert server.chat("What is this?").status_code == 503


def test_metrics_count_what_was_answered(embedded):
    with serving() as server:
        said = server.chat(DESCRIBE, temperature=0).json()
        server.chat("What?", foo=1)
        server.client.get("/nothing")
        lines = server.client.get("/metrics").text.splitlines()
        numbers = dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")
        usage = said["usage"]
        assert (
            float(numbers['mm1_tokens_total{kind="prompt"}']) == usage["prompt_tokens"]
        )
        shown = float(numbers['mm1_tokens_total{kind="image"}'])
        assert shown == embedded.num_image_tokens
        generated = float(numbers['mm1_tokens_total{kind="generated"}'])
        assert generated == usage["completion_tokens"]
        requests = 'mm1_requests_total{path="/v1/chat/completions",status="%d"}'
        assert float(numbers[requests % 200]) == float(numbers[requests % 400]) == 1
        assert float(numbers['mm1_requests_total{path="other",status="404"}']) == 1
        assert float(numbers["mm1_first_token_seconds_count"]) == 1
        assert float(numbers["mm1_answers_running"]) == 0
        assert float(numbers["mm1_model_loaded"]) == 1


def test_a_server_that_ends_finishes_what_it_began(endless):
    with serving() as server:
        done = []
        body = {"messages": [{"role": "user", "content": DESCRIBE}], "stream": True}
        options = {**endless, "max_tokens": 200}

        def ask():
            done.append(
                server.client.post("/v1/chat/completions", json={**body, **options})
            )

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: server.pool.running == 1)
        server.server.should_exit = True
        asking.join(60)
        (response,) = done
        said = events(response)
        assert said[-1]["choices"][0]["finish_reason"] == "length"
