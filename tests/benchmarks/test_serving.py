"""The servers' benchmark counts tokens, notices wrong answers, and says what was missed."""

import json
import random
import sys
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pytest

from benchmarks.serving import __main__ as program
from benchmarks.serving import listen, load, speed
from benchmarks.serving.listen import Endless, Heard, hear
from benchmarks.serving.mix import PICTURES, Reply, Said, cases
from benchmarks.serving.servers import FaultError, mm1, peer
from mm1_mlx.runtime import TINY

SAID = Said("a star", "stop", (-0.5, -1.0))
EXPECTED = Reply((SAID,), 3)


def test_the_mix_has_every_field_together_and_apart():
    asked = cases(96)
    assert asked == cases(96)
    first, fields = asked[0].fields, {}
    for case in asked:
        for name, value in case.fields.items():
            fields.setdefault(case.kind, {}).setdefault(name, []).append(value)
    both = {
        "temperature", "top_p", "seed", "stop", "n", "logit_bias", "presence_penalty",
        "frequency_penalty", "logprobs", "stream", "stream_options", "max_tokens",
    }  # fmt: skip
    chat = both | {
        "messages", "max_completion_tokens", "top_logprobs", "response_format",
    }  # fmt: skip
    assert fields["chat"].keys() == chat
    assert fields["completion"].keys() == both | {"prompt"}
    # One of the two names of a limit, and a seed where something is drawn.
    assert first.keys() >= chat - {"max_tokens", "max_completion_tokens", "seed"}
    chats = [case for case in asked if case.kind == "chat"]
    details = {d for case in chats for q in case.questions for d in q.details}
    assert details == {None, "low", "auto", "high"}
    shown = {len(q.pictures) for case in chats for q in case.questions}
    assert shown == {0, 1, len(PICTURES)}
    assert {bool(case.fields.get("stream")) for case in chats} == {True, False}
    for case in asked:
        assert ("seed" in case.fields) == (case.fields["temperature"] > 0)


@pytest.mark.parametrize(("said", "stopped", "right"), [
    (SAID, False, True),
    (Said("a star", "stop", (-0.5001, -1.0)), False, True),
    (Said("a stars", "stop", (-0.5, -1.0)), False, False),
    (Said("a star", "length", (-0.5, -1.0)), False, False),
    (Said("a star", "stop", (-0.5, -1.01)), False, False),
    (Said("a star", "stop"), False, False),
    # The tokens of a stop string are not told, but those before it are.
    (Said("a star", "stop", (-0.5,)), False, False),
    (Said("a star", "stop", (-0.5,)), True, True),
    (Said("a star", "stop", ()), True, False),
    (Said("a star", "stop", (-0.5, -1.0, -1.0)), True, False),
])  # fmt: skip
def test_another_answer_is_noticed(said, stopped, right):
    assert said.agrees(SAID, stopped=stopped) is right
    case = next(case for case in cases(96) if bool(case.fields.get("stop")) == stopped)
    for tokens, counted in ((3, True), (4, False), (None, True)):
        agrees = Reply((said,), tokens).agrees(EXPECTED, case)
        assert agrees is (right and counted)
    assert not Reply((said, said), 3).agrees(EXPECTED, case)


def timed_out():
    return openai.APITimeoutError(httpx.Request("POST", "http://127.0.0.1"))


@pytest.mark.parametrize(("leaves", "came", "outcome"), [
    (False, (EXPECTED, True), "right"),
    (False, (Reply((Said("no", "stop"),), 3), True), "wrong"),
    (False, timed_out(), "error: APITimeoutError"),
    (False, ValueError("no usage"), "error: ValueError"),
    (True, timed_out(), "left"),
    (True, (Reply((Said("a st", ""),), None), False), "left"),
    (True, (Reply((Said("b", ""),), None), False), "wrong"),
    (True, (Reply((), None), False), "wrong"),
    (True, ValueError("no usage"), "error: ValueError"),
])  # fmt: skip
def test_what_becomes_of_a_request_is_counted(leaves, came, outcome, monkeypatch):
    def reply(*request):
        *_, events = request
        assert (events is not None) == leaves
        if isinstance(came, Exception):
            raise came
        return came

    monkeypatch.setattr(load, "reply", reply)
    # Of the draws of this seed the first is 0, or not.
    monkeypatch.setattr(load, "LEAVES", 1 if leaves else 1 << 60)
    told = load.Told()
    case = next(case for case in cases(9) if case.fields.get("stream"))
    for _ in range(load.EXAMPLES + 3):
        load.ask(None, "m", case, EXPECTED, random.Random(1), told)
    assert told.outcomes == {outcome: load.EXAMPLES + 3}
    good = outcome in ("right", "left")
    assert len(told.examples) == (0 if good else load.EXAMPLES)
    assert bool(told.seconds) == (outcome == "right")


def test_every_fault_under_load_is_said():
    good = {
        "answers": {"right": 9, "left": 1}, "left_behind": {}, "healthy": True,
        "server_said": "", "examples": [],
    }  # fmt: skip
    assert load.missed(good) == []
    for change in (
        {"answers": {"right": 9, "wrong": 1}, "examples": ["what"]},
        {"answers": {"left": 9}},
        {"left_behind": {"mm1_answers_running": 1.0}},
        {"healthy": False},
        {"server_said": "Traceback"},
    ):
        assert load.missed({**good, **change})


def chunk(text="", **more):
    return {"choices": [{"index": 0, "delta": {"content": text}}], **more}


def last(tokens):
    return {"choices": [], "usage": {"completion_tokens": tokens}}


@contextmanager
def stub(script, status=200):
    """A server that answers with what a function of the request yields."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["content-length"])
            request = json.loads(self.rfile.read(length))
            self.send_response(status)
            self.end_headers()
            try:
                for event in script(request):
                    said = event if isinstance(event, str) else json.dumps(event)
                    self.wfile.write(f"data: {said}\n\n".encode())
            except OSError:
                closed.set()

        def log_message(self, *_):
            pass

    closed = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", closed
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_first_token_counts_though_it_has_no_text(monkeypatch):
    now = 0.0

    def events(*asked):
        nonlocal now
        *_, request = asked
        assert request["stream_options"] == {"include_usage": True}
        for now, event in ((1.0, chunk()), (2.0, chunk("star")), (3.0, last(2))):  # noqa: B007
            yield event

    monkeypatch.setattr(listen, "_events", events)
    monkeypatch.setattr(listen.time, "perf_counter", lambda: now)
    assert hear("http://127.0.0.1", {"max_tokens": 2}) == Heard(1.0, 3.0, 2)


@pytest.mark.parametrize(("events", "said"), [
    ([chunk("a"), last(3), "[DONE]"], "answered 3 tokens in place of 2"),
    ([chunk("a"), "[DONE]"], "answered None tokens"),
    ([last(2), "[DONE]"], "answered 2 tokens"),
    ([chunk("a"), last(2)], "without"),
    ([chunk("a"), {"error": {"message": "no room"}}], "no room"),
    ([chunk("a"), last(2) | {"timings": {"ttft_seconds": 9.0}}, "[DONE]"], "before"),
])  # fmt: skip
def test_an_answer_of_other_tokens_is_no_measurement(events, said):
    with stub(lambda _: events) as (url, _), pytest.raises(FaultError, match=said):
        hear(url, {"max_tokens": 2})


def test_a_refusal_is_no_measurement():
    with (
        stub(lambda _: ["no"], 503) as (url, _),
        pytest.raises(FaultError, match="503"),
    ):
        hear(url, {"max_tokens": 2})


def test_a_long_answer_is_cancelled_when_the_others_were_measured():
    def script(_):
        while True:
            yield chunk("a")
            threading.Event().wait(0.01)

    with stub(script) as (url, closed):
        with Endless(url, {}) as long:
            since = long.times[-1]
            long.wait(3)
            assert long.longest_gap(since) > 0
        assert closed.wait(300)


def test_a_long_answer_that_ends_is_no_measurement():
    going = threading.Event()

    def script(_):
        yield from (chunk(), chunk("a"))
        going.wait(300)
        yield "[DONE]"

    with stub(script) as (url, _), Endless(url, {}) as long:
        going.set()
        with pytest.raises(FaultError, match="ended the long answer"):
            long.wait()


def test_an_error_in_the_long_answers_thread_is_told():
    with (
        stub(lambda _: [{"error": "no room"}]) as (url, _),
        pytest.raises(FaultError, match="no room"),
        Endless(url, {}),
    ):
        pass


def rounds(**ours):
    names = dict(zip(
        ("one", "eight", "idle", "busy", "picture_idle", "picture_busy", "gap"),
        speed.FIGURES, strict=True,
    ))  # fmt: skip
    values = {
        "one": 10.0, "eight": 21.0, "idle": 1.0, "busy": 1.9, "picture_idle": 2.0,
        "picture_busy": 3.9, "gap": 1.0, **ours,
    }  # fmt: skip
    return [{names[key]: value for key, value in values.items()}] * 3


def missed(**found):
    made = [row.to_dict() for row in speed.rows(found)]
    return speed.missed({"rows": made, "rounds": found})


@pytest.mark.parametrize("ours", [
    {"eight": 19.9}, {"busy": 2.0}, {"picture_busy": 4.1},
], ids=str)  # fmt: skip
def test_a_missed_goal_is_named(ours):
    assert missed(mm1=rounds()) == []
    (said,) = missed(mm1=rounds(**ours))
    assert said.startswith(
        {"eight": speed.EIGHT, "busy": speed.BUSY, "picture_busy": speed.PICTURE_BUSY}[
            next(iter(ours))
        ]
    )


def test_a_peer_that_is_better_is_named():
    assert missed(mm1=rounds(), mlx_vlm=rounds()) == []
    blind = [{k: v for k, v in each.items() if "picture" not in k} for each in rounds()]
    made = speed.rows({"mm1": rounds(), "mlx_lm": blind})
    assert len(made) == len(speed.OWN) + 4
    theirs = rounds(one=10.5, gap=0.9, eight=20.0)
    said = missed(mm1=rounds(), mlx_vlm=theirs)
    assert [line.split(",")[0] for line in said] == [
        "tokens a second",
        "longest gap of a long answer",
    ]
    assert said[0].startswith(f"{speed.ONE}, mlx_vlm: 0.952 times as good")


def run(monkeypatch, out, *arguments):
    """What the program's exit says, and its figures."""
    monkeypatch.setattr(
        sys, "argv", ["serving", arguments[0], str(out), *arguments[1:]]
    )
    said = None
    try:
        program.main()
    except SystemExit as ended:
        said = ended.code
    return said, json.loads(out.read_text())[arguments[0]]


@pytest.mark.slow
def test_clients_of_all_kinds_get_the_runtimes_answers(tmp_path, monkeypatch):
    arguments = ("--minutes", "0.1", "--clients", "4", "--requests", "8")
    said, figures = run(monkeypatch, tmp_path / "out.json", "load", *arguments)
    assert said is None
    assert figures["answers"].keys() <= {"right", "left"}
    assert figures["answers"]["right"] > 0
    assert figures["machine"]["versions"]["mm1"].keys() >= {"mm1-mlx", "mlx"}


@pytest.mark.slow
def test_a_round_measures_everything(tmp_path, monkeypatch):
    start = partial(mm1, sys.executable, str(TINY))
    server = speed.Server("mm1", start, "mm1-tiny", end=1, long=700)
    monkeypatch.setattr(speed, "prepare", lambda *_: [server])
    for name, value in (("FIRSTS", 1), ("TOKENS", 8), ("PICTURES", 2)):
        monkeypatch.setattr(speed, name, value)
    said, figures = run(monkeypatch, tmp_path / "out.json", "speed", "--rounds", "1")
    (found,) = figures["rounds"]["mm1"]
    assert found.keys() == speed.FIGURES.keys()
    assert all(value > 0 for value in found.values())
    assert [row["rounds"] for row in figures["rows"]] == [1] * len(speed.OWN)
    # How fast it is depends on what else the machine does.
    faults = speed.missed(figures)
    assert said == ("\n".join(["missed:", *faults]) if faults else None)


def test_a_server_that_does_not_start_says_why():
    with (
        pytest.raises(FaultError, match="no_such_module"),
        peer(sys.executable, "no_such_module", "m"),
    ):
        pass
    with (
        pytest.raises(FaultError, match="does not exist"),
        mm1(sys.executable, "/no/such/model"),
    ):
        pass


@pytest.mark.drill
def test_sixteen_clients_for_five_minutes(tmp_path, monkeypatch):
    said, figures = run(monkeypatch, tmp_path / "out.json", "load")
    assert said is None, said
    assert (figures["clients"], figures["minutes"]) == (16, 5.0)
    assert figures["answers"]["left"] > 0
