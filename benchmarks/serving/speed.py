"""How fast servers of the same weights are, in rounds that take turns.

Tokens a second of one client and of eight; seconds to a client's first token, with and
without a picture, on an idle server and while another's long answer is written; and how long
that answer stands still when a neighbour shows several new pictures.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.peers import fixture
from benchmarks.peers.rows import Row
from benchmarks.serving.listen import Endless, hear
from benchmarks.serving.mix import data_uri, messages
from benchmarks.serving.servers import Running, mm1, peer

OURS = "mm1"
PARALLEL = 8
# Tokens of an answer whose speed is measured, and of one that others wait beside.
TOKENS, LONG = 64, 4096
# Times to the first token in a round, and new pictures of a neighbour.
FIRSTS, PICTURES = 5, 4
# Of what is measured: which is better, and its unit.
FIGURES = {
    "tokens a second, one client": ("higher", "tokens/s"),
    "tokens a second, eight clients": ("higher", "tokens/s"),
    "first token, idle": ("lower", "s"),
    "first token beside a long answer": ("lower", "s"),
    "first token behind a picture, idle": ("lower", "s"),
    "first token behind a picture, beside a long answer": ("lower", "s"),
    "longest gap of a long answer, neighbour with pictures": ("lower", "s"),
}
ONE, EIGHT, IDLE, BUSY, PICTURE_IDLE, PICTURE_BUSY, GAP = FIGURES
# What the server is compared with itself in, and how good the median has to be: eight
# clients twice one's throughput, a first token in less than twice its time when idle.
OWN = {(EIGHT, ONE): 2.0, (BUSY, IDLE): 0.5, (PICTURE_BUSY, PICTURE_IDLE): 0.5}
# And with any peer, in everything.
LEAST = 1.0


@dataclass(frozen=True)
class Server:
    """A server that is measured.

    Attributes:
        name: what results call it.
        start: starts it.
        model: what it calls the model.
        sees: whether it takes pictures.
        end: the id of the token that ends an answer.
        long: tokens of an answer that does not end while others are measured.
    """

    name: str
    start: Callable[[], AbstractContextManager[Running]]
    model: str
    sees: bool = True
    end: int = 2
    long: int = LONG

    def ask(self, number: int, tokens: int, pictures: int = 0) -> dict[str, Any]:
        """A request like no other for an answer of so many tokens."""
        words = (str(200 + (number * 7 + i) % 99) for i in range(48))
        urls = [{"url": data_uri(_noise(number, i))} for i in range(pictures)]
        return {
            "model": self.model,
            "messages": messages(f"{number}: {' '.join(words)}", urls),
            "max_tokens": tokens,
            "temperature": 0,
            "logit_bias": {str(self.end): -100},
        }


def measure(rounds: int, peers: dict[str, str]) -> dict[str, Any]:
    """Rows of this server beside itself and beside every peer, and all rounds."""
    with tempfile.TemporaryDirectory() as folder:
        return compare(prepare(Path(folder), peers), rounds)


def prepare(folder: Path, peers: dict[str, str]) -> list[Server]:
    """The servers, ours first, of a model that is made in a folder."""
    from mm1_mlx.convert import convert

    source, ours = folder / "hf", folder / "ours"
    fixture.write(source)
    convert(str(source), ours)
    decoder = source / "decoder"
    _take_strings(decoder)
    models = {"mlx_lm": (decoder, False), "mlx_vlm": (source, True)}
    servers = [Server(OURS, partial(mm1, sys.executable, str(ours)), ours.name)]
    for name, python in peers.items():
        model, sees = models[name]
        start = partial(peer, python, f"{name}.server", str(model))
        servers.append(Server(name, start, str(model), sees))
    return servers


def compare(servers: Sequence[Server], rounds: int) -> dict[str, Any]:
    """One server at a time, in rounds of alternating order."""
    found: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
    for i in range(rounds):
        for server in servers if i % 2 == 0 else servers[::-1]:
            with server.start() as running:
                found[server.name].append(one_round(server, running.url))
    return {"rows": [row.to_dict() for row in rows(found)], "rounds": found}


def one_round(server: Server, url: str) -> dict[str, float]:
    """What one server does in one round."""
    numbers = itertools.count(1)

    def firsts(pictures: int) -> float:
        times = (
            hear(url, server.ask(next(numbers), 2, pictures)).first
            for _ in range(FIRSTS)
        )
        return statistics.median(times)

    # The model is loaded, and its kernels are made.
    hear(url, server.ask(next(numbers), 4, int(server.sees)))
    alone = hear(url, server.ask(next(numbers), TOKENS))
    asked = [server.ask(next(numbers), TOKENS) for _ in range(PARALLEL)]
    start = time.perf_counter()
    with ThreadPoolExecutor(PARALLEL) as threads:
        tokens = sum(heard.tokens for heard in threads.map(partial(hear, url), asked))
    together = tokens / (time.perf_counter() - start)
    found = {ONE: alone.tokens / alone.last, EIGHT: together, IDLE: firsts(0)}
    if server.sees:
        found[PICTURE_IDLE] = firsts(1)
    with Endless(url, server.ask(next(numbers), server.long)) as long:
        found[BUSY] = firsts(0)
        long.wait()
    if server.sees:
        with Endless(url, server.ask(next(numbers), server.long)) as long:
            found[PICTURE_BUSY] = firsts(1)
            long.wait()
        with Endless(url, server.ask(next(numbers), server.long)) as long:
            neighbour = server.ask(next(numbers), 2, PICTURES)
            since = time.perf_counter()
            hear(url, neighbour)
            long.wait()
            found[GAP] = long.longest_gap(since)
    return found


def rows(found: dict[str, list[dict[str, float]]]) -> list[Row]:
    """The server beside itself, then beside its peers, round by round."""
    ours = found[OURS]
    made = []
    for what, beside in OWN:
        better, unit = FIGURES[what]
        mine, idle = ([one[name] for one in ours] for name in (what, beside))
        made.append(Row(f"{what}; {beside}", better, unit, mine, idle))
    for name, theirs in found.items():
        for what, (better, unit) in FIGURES.items():
            if name != OURS and what in theirs[0]:
                mine, their = ([one[what] for one in each] for each in (ours, theirs))
                made.append(Row(f"{what}, {name}", better, unit, mine, their))
    return made


def missed(figures: dict[str, Any]) -> list[str]:
    """The goals that were not reached, in words."""
    goals = {f"{what}; {beside}": least for (what, beside), least in OWN.items()}
    faults = []
    for row, told in zip(rows(figures["rounds"]), figures["rows"], strict=True):
        ratio = statistics.median(row.ratios)
        least = goals.get(row.name, LEAST)
        # Less than twice as long is more than half as good.
        if ratio < least or (ratio == least and least < LEAST):
            faults.append(
                f"{row.name}: {ratio:.3g} times as good (at least "
                f"{told['ratio_lower_95']}), wanted {least:g}"
            )
    return faults


def _noise(number: int, place: int) -> bytes:
    """A picture that no server has seen before."""
    random = np.random.default_rng((number, place))
    pixels = random.integers(0, 256, (24, 24, 3), np.uint8)
    image = Image.fromarray(pixels).resize((fixture.IMAGE, fixture.IMAGE))
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def _take_strings(folder: Path) -> None:
    """Give mlx-lm's copy the same template for contents that are one string."""
    path = folder / "tokenizer_config.json"
    held = json.loads(path.read_text())
    held["chat_template"] = (
        "{% for m in messages %}{{ m.role.upper() + ': ' + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    path.write_text(json.dumps(held, indent=2))
