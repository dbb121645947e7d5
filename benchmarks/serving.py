"""``mm1 serve`` under load, and how fast it is beside its peers' servers.

    python -m benchmarks.serving load  OUT.json [--minutes 5] [--clients 16]
    python -m benchmarks.serving speed OUT.json [--rounds 5] [--mlx-lm PYTHON] [--mlx-vlm PYTHON]

``load``: clients ask the embedded model for minutes on end, whole and streamed, with
pictures, seeds, penalties, scores and schemas; every answer is compared with the one to the
same request alone. ``speed``: the model of ``peers/fixture.py``; tokens a second of 1 and of
8 clients, and the time to the first token of a client, on an idle server and while another's
long answer is written. A PYTHON is that of an environment with the peer; all servers hold
the same weights, one at a time, in rounds that take turns.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers import fixture
from mm1_mlx.blas import preload_blas
from mm1_mlx.runtime import TINY

BLAS = preload_blas()

CLIENTS, MINUTES, ROUNDS = 16, 5.0, 5
PARALLEL = 8
# Tokens of an answer whose speed is measured, and of one that others wait beside.
TOKENS, LONG = 64, 512
# Times to the first token in a round.
FIRSTS = 5
# How long a server may take until it answers, and an answer until it is there.
PATIENCE = 600
READY = re.compile(r"serving \S+ at (http://\S+)")
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer"}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@contextmanager
def mm1(python: str, model: str, *options: str) -> Iterator[str]:
    """A running ``mm1 serve``; its address."""
    run = "from mm1_mlx.apps.cli import main; main()"
    arguments = ["serve", "-m", model, "--port", "0", "--no-log", *options]
    process = subprocess.Popen(
        [python, "-c", run, *arguments], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        found = READY.match(line := process.stderr.readline())
        if found is None:
            sys.exit(f"mm1 serve did not start: {line}{process.stderr.read()}")
        yield found[1]
    finally:
        process.terminate()
        process.wait(PATIENCE)


@contextmanager
def peer(python: str, module: str, model: str) -> Iterator[str]:
    """A running server of mlx-lm or mlx-vlm; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", module, "--model", model, "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                httpx.get(f"{url}/v1/models", timeout=10)
                break
            except httpx.TransportError:
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{module} did not start")
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE)


def question(text: str, *pictures: str) -> list[dict[str, Any]]:
    """Messages that ask about pictures of the embedded model's folder."""
    parts: list[dict[str, Any]] = []
    for name in pictures:
        data = base64.b64encode((TINY / name).read_bytes()).decode()
        url = {"url": f"data:image/png;base64,{data}"}
        parts.append({"type": "image_url", "image_url": url})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def requests() -> list[dict[str, Any]]:
    """What the clients of ``load`` ask for."""
    star, four = "red-star.png", "four-shapes.png"
    messages = [
        question("What colour is the star?", star),
        question("Describe the picture.", four),
        question("How many shapes are there?", four, star),
        question("What is this?"),
    ]
    held = {"type": "json_schema", "json_schema": {"name": "seen", "schema": SCHEMA}}
    fields: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.2, "seed": 7, "n": 2, "max_tokens": 16},
        {"temperature": 1.0, "top_p": 0.9, "seed": 3, "presence_penalty": 1.0},
        {"temperature": 0, "logprobs": True, "top_logprobs": 3, "stop": ["heart"]},
        {"temperature": 0.8, "seed": 5, "response_format": held},
        {"temperature": 0, "frequency_penalty": 1.0, "logit_bias": {"300": 2}},
    ]
    return [
        {"max_tokens": 48, "messages": m, **f, "stream": stream}
        for m in messages
        for f in fields
        for stream in (False, True)
    ]


def answer(client: httpx.Client, request: dict[str, Any]) -> list[Any]:
    """What an answer says: of every choice its text, its tokens and why it ended."""
    path = "/v1/chat/completions"
    if not request.get("stream"):
        response = client.post(path, json=request)
        response.raise_for_status()
        return [
            [c["message"]["content"], _tokens(c["logprobs"]), c["finish_reason"]]
            for c in response.json()["choices"]
        ]
    choices: dict[int, list[Any]] = {}
    with client.stream("POST", path, json=request) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            for c in event["choices"]:
                held = choices.setdefault(c["index"], ["", [], None])
                held[0] += c["delta"].get("content") or ""
                held[1] += _tokens(c["logprobs"])
                held[2] = held[2] or c["finish_reason"]
    return [choices[i] for i in sorted(choices)]


def _tokens(logprobs: dict[str, Any] | None) -> list[str]:
    return [token["token"] for token in logprobs["content"]] if logprobs else []


def load(minutes: float, clients: int) -> dict[str, Any]:
    """Clients that ask for so long; every answer is that of an idle server, or counted."""
    asked = requests()
    with mm1(sys.executable, str(TINY), "--parallel", str(PARALLEL)) as url:
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            alone = [answer(client, request) for request in asked]
        end = time.monotonic() + minutes * 60
        results: list[tuple[str, float]] = []

        def work(number: int) -> None:
            draw = random.Random(number)
            with httpx.Client(base_url=url, timeout=PATIENCE) as client:
                while time.monotonic() < end:
                    i = draw.randrange(len(asked))
                    start = time.perf_counter()
                    try:
                        said = answer(client, asked[i])
                        outcome = "right" if said == alone[i] else "wrong"
                    # What the client is told, whatever it is, is an error here.
                    except Exception as error:
                        outcome = f"error: {type(error).__name__}"
                    results.append((outcome, time.perf_counter() - start))

        run_all(work, clients)
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            healthy = client.get("/health").json()["status"] == "ok"
    times = sorted(seconds for _, seconds in results)
    return {
        "minutes": minutes,
        "clients": clients,
        "requests": len(asked),
        "answers": dict(Counter(outcome for outcome, _ in results)),
        "median_seconds": statistics.median(times),
        "p95_seconds": times[int(0.95 * (len(times) - 1))],
        "healthy": healthy,
    }


def run_all(work: Any, count: int) -> None:
    """Threads that do the same, each with its number."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@dataclass(frozen=True)
class Server:
    """A server that is measured: its name, how it is started, what it calls the model."""

    name: str
    start: Any
    model: str


def ask(server: Server, number: int, tokens: int) -> dict[str, Any]:
    """A request of its own for an answer of so many tokens."""
    text = f"{number}: " + " ".join(str(200 + (number * 7 + i) % 99) for i in range(48))
    return {
        "model": server.model,
        "messages": question(text),
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        # The fixture never ends an answer by itself where it is told to go on.
        "logit_bias": {"2": -100},
    }


def stream(client: httpx.Client, request: dict[str, Any]) -> tuple[float, float, int]:
    """Seconds to the first text and to the last, and how many events had some."""
    start = time.perf_counter()
    first = last = 0.0
    count = 0
    with client.stream("POST", "/v1/chat/completions", json=request) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                if choice["delta"].get("content"):
                    last = time.perf_counter() - start
                    first = first or last
                    count += 1
    return first, last, count


def measure(server: Server, url: str, seed: int) -> dict[str, float]:
    """One round of one server, which has answered before."""
    numbers = iter(range(seed * 1000, seed * 1000 + 999))

    def client() -> httpx.Client:
        return httpx.Client(base_url=url, timeout=PATIENCE)

    with client() as one:
        stream(one, ask(server, next(numbers), 4))
        _, last, _ = stream(one, ask(server, next(numbers), TOKENS))
        alone = TOKENS / last
        idle = statistics.median(
            stream(one, ask(server, next(numbers), 2))[0] for _ in range(FIRSTS)
        )
    mine = [next(numbers) for _ in range(PARALLEL)]
    start = time.perf_counter()

    def work(i: int) -> None:
        with client() as own:
            stream(own, ask(server, mine[i], TOKENS))

    run_all(work, PARALLEL)
    together = PARALLEL * TOKENS / (time.perf_counter() - start)
    busy = beside_a_long_answer(server, client, [next(numbers) for _ in range(9)])
    return {
        "tokens_per_second_1": alone,
        f"tokens_per_second_{PARALLEL}": together,
        "first_token_idle": idle,
        "first_token_busy": busy,
    }


def beside_a_long_answer(server: Server, client: Any, numbers: Sequence[int]) -> float:
    """Seconds to the first text while another answer is written."""
    begun, enough = threading.Event(), threading.Event()

    def write() -> None:
        request = ask(server, numbers[0], LONG)
        with (
            client() as own,
            own.stream("POST", "/v1/chat/completions", json=request) as response,
        ):
            for line in response.iter_lines():
                if '"content"' in line:
                    begun.set()
                if enough.is_set():
                    return

    writing = threading.Thread(target=write)
    writing.start()
    begun.wait(PATIENCE)
    with client() as own:
        seconds = [
            stream(own, ask(server, number, 2))[0] for number in numbers[1 : FIRSTS + 1]
        ]
    enough.set()
    writing.join()
    return statistics.median(seconds)


def speed(rounds: int, peers: dict[str, str | None]) -> dict[str, Any]:
    """Medians of every server's rounds, and of their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        source, ours = Path(folder, "hf"), Path(folder, "mm1")
        fixture.write(source)
        from mm1_mlx.convert import convert

        convert(str(source), ours)
        _take_strings(source / "decoder")
        folders = {"mlx_lm": source / "decoder", "mlx_vlm": source}
        servers = [Server("mm1", partial(mm1, sys.executable, str(ours)), ours.name)]
        for name, python in peers.items():
            if python:
                model = str(folders[name])
                start = partial(peer, python, f"{name}.server", model)
                servers.append(Server(name, start, model))
        figures: dict[str, list[dict[str, float]]] = {s.name: [] for s in servers}
        for i in range(rounds):
            for server in servers if i % 2 == 0 else servers[::-1]:
                with server.start() as url:
                    figures[server.name].append(measure(server, url, i + 1))
    return {name: _summary(rows) for name, rows in figures.items()}


def _take_strings(folder: Path) -> None:
    """Give mlx-lm's copy the same template for contents that are one string."""
    path = folder / "tokenizer_config.json"
    held = json.loads(path.read_text())
    held["chat_template"] = (
        "{% for m in messages %}{{ m.role.upper() + ': ' + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    path.write_text(json.dumps(held, indent=2))


def _summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {
        **medians,
        "throughput_ratio": statistics.median(
            row[f"tokens_per_second_{PARALLEL}"] / row["tokens_per_second_1"]
            for row in rows
        ),
        "first_token_ratio": statistics.median(
            row["first_token_busy"] / row["first_token_idle"] for row in rows
        ),
        "rounds": rows,
    }


def main() -> None:
    """Measure what is asked for, and write it."""
    from mm1_mlx.bench import describe

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["load", "speed"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--mlx-lm", metavar="PYTHON")
    parser.add_argument("--mlx-vlm", metavar="PYTHON")
    options = parser.parse_args()
    if options.what == "load":
        figures = load(options.minutes, options.clients)
    else:
        peers = {"mlx_lm": options.mlx_lm, "mlx_vlm": options.mlx_vlm}
        figures = speed(options.rounds, peers)
    machine = describe(BLAS) | {"load": list(os.getloadavg())}
    held = json.loads(options.out.read_text()) if options.out.exists() else {}
    held |= {options.what: {"machine": machine, **figures}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(held, indent=1) + "\n")
    print(json.dumps({k: v for k, v in figures.items() if k != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
