"""Clients that ask for minutes on end, by OpenAI's own client; some of them leave.

Every answer is compared with the one that the runtime alone gave before the server began.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving.mix import RESOLUTION, Case, Reply, Said, alone, cases
from benchmarks.serving.servers import PATIENCE, Running, mm1
from mm1_mlx.runtime import TINY, load

PARALLEL = 8
# One of so many requests is left before its answer is there.
LEAVES = 8
# After so many events at most, or so many seconds where there are none.
EVENTS, SECONDS = 6, 0.3
# Of what went wrong so many are told, each so long.
EXAMPLES, LENGTH = 5, 1500
# Until the server has let go of answers that nobody waits for.
SETTLED = 60
GAUGES = ("mm1_answers_running", "mm1_questions_waiting")


@dataclass
class Told:
    """What the clients were told."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def add(self, outcome: str, seconds: float, example: str = "") -> None:
        """An answer, or what came in its place."""
        self.outcomes[outcome] += 1
        if outcome == "right":
            self.seconds.append(seconds)
        if example and len(self.examples) < EXAMPLES:
            self.examples.append(example[:LENGTH])


def measure(minutes: float, clients: int, count: int) -> dict[str, Any]:
    """Clients that ask for so long a mix of so many requests."""
    asked = cases(count)
    with load(resolution=RESOLUTION) as runtime:
        expected = [alone(runtime, case) for case in asked]
    options = ("--parallel", str(PARALLEL), "--resolution", RESOLUTION)
    told = Told()
    with mm1(sys.executable, str(TINY), *options) as server:
        end = time.monotonic() + minutes * 60

        def work(number: int) -> None:
            draw = random.Random(number)
            with _client(server) as client:
                model = client.models.list().data[0].id
                while time.monotonic() < end:
                    i = draw.randrange(len(asked))
                    ask(client, model, asked[i], expected[i], draw, told)

        with ThreadPoolExecutor(clients) as threads:
            for _ in threads.map(work, range(clients)):
                pass
        left_behind = _settle(server.url)
        healthy = httpx.get(f"{server.url}/health").json()["status"] == "ok"
        said = server.said()
    times = sorted(told.seconds) or [0.0]
    return {
        "minutes": minutes,
        "clients": clients,
        "requests": len(asked),
        "answers": dict(told.outcomes),
        "median_seconds": statistics.median(times),
        "p95_seconds": times[int(0.95 * (len(times) - 1))],
        "left_behind": left_behind,
        "healthy": healthy,
        "server_said": said[:LENGTH],
        "examples": told.examples,
    }


def missed(figures: dict[str, Any]) -> list[str]:
    """What is not as it should be, in words."""
    answers: dict[str, int] = figures["answers"]
    faults = [
        f"{count} of {sum(answers.values())} answers: {outcome}"
        for outcome, count in sorted(answers.items())
        if outcome not in ("right", "left")
    ]
    if not answers.get("right"):
        faults.append("no answer was right")
    if figures["left_behind"]:
        faults.append(f"still under way when all had left: {figures['left_behind']}")
    if not figures["healthy"]:
        faults.append("the server is not well")
    if figures["server_said"]:
        faults.append(f"the server said: {figures['server_said']}")
    return faults + figures["examples"]


def ask(
    client: openai.OpenAI,
    model: str,
    case: Case,
    expected: Reply,
    draw: random.Random,
    told: Told,
) -> None:
    """One request, and what becomes of it."""
    leaves = not draw.randrange(LEAVES)
    events = draw.randrange(1, EVENTS) if leaves else None
    # A whole answer is left by waiting no longer.
    if leaves and not case.fields.get("stream"):
        client = client.with_options(timeout=draw.uniform(SECONDS / 10, SECONDS))
    start = time.perf_counter()
    try:
        said, whole = reply(client, model, case, events)
    except openai.APITimeoutError as error:
        outcome, example = "left", ""
        if not leaves:
            outcome, example = "error: APITimeoutError", f"{error!r} for {case}"
    # Whatever else the client is told in place of an answer is an error.
    except Exception as error:
        outcome = f"error: {type(error).__name__}"
        example = f"{error!r} for {case}"
    else:
        example = ""
        if whole:
            right = said.agrees(expected, case)
            outcome = "right" if right else "wrong"
        else:
            right = begins(said, expected)
            outcome = "left" if right else "wrong"
        if not right:
            example = f"{said}\nin place of {expected}\nfor {case}"
    told.add(outcome, time.perf_counter() - start, example)


def begins(said: Reply, expected: Reply) -> bool:
    """Whether what was heard of answers is their beginning."""
    pairs = zip(said.answers, expected.answers, strict=False)
    return len(said.answers) == len(expected.answers) and all(
        whole.text.startswith(heard.text) for heard, whole in pairs
    )


def reply(
    client: openai.OpenAI, model: str, case: Case, events: int | None
) -> tuple[Reply, bool]:
    """What is answered, and whether that is all of it.

    Args:
        client: OpenAI's.
        model: the served one's id.
        case: the request.
        events: a stream is left behind so many; None for never.
    """
    chat, completion = client.chat.completions, client.completions
    create: Any = chat.create if case.kind == "chat" else completion.create
    made = create(model=model, **case.fields)
    if not case.fields.get("stream"):
        return Reply(_join([made]), made.usage.completion_tokens), True
    held, tokens = [], None
    with made:
        for event in made:
            held.append(event)
            if event.usage is not None:
                tokens = event.usage.completion_tokens
            if len(held) == events:
                count = case.fields.get("n", 1) * len(case.questions)
                return Reply(_join(held, count), None), False
    if tokens is None:
        raise ValueError("the stream ended without the usage that was asked for")
    return Reply(_join(held), tokens), True


def _join(parts: Iterable[Any], count: int = 0) -> tuple[Said, ...]:
    """The answers that whole replies or events hold, ``count`` of them at least."""
    texts: dict[int, str] = dict.fromkeys(range(count), "")
    scores: dict[int, tuple[float, ...]] = {}
    reasons: dict[int, str] = {}
    for part in parts:
        for choice in part.choices:
            i = choice.index
            text, values = _held(choice)
            texts[i] = texts.get(i, "") + text
            if values is not None:
                scores[i] = scores.get(i, ()) + values
            if choice.finish_reason is not None:
                if i in reasons:
                    raise ValueError(f"answer {i} ended twice")
                reasons[i] = choice.finish_reason
    if sorted(texts) != [*range(len(texts))]:
        raise ValueError(f"answers have the numbers {sorted(texts)}")
    return tuple(
        Said(texts[i], reasons.get(i, ""), scores.get(i)) for i in sorted(texts)
    )


def _held(choice: Any) -> tuple[str, tuple[float, ...] | None]:
    """The text of a choice, and its tokens' log probabilities."""
    scores = choice.logprobs
    if hasattr(choice, "text"):
        return choice.text, scores and tuple(scores.token_logprobs)
    message = choice.delta if hasattr(choice, "delta") else choice.message
    return message.content or "", scores and tuple(t.logprob for t in scores.content)


def _client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
    )


def _settle(url: str) -> dict[str, float]:
    """Gauges that are above zero, though nobody waits any more."""
    end = time.monotonic() + SETTLED
    while True:
        text = httpx.get(f"{url}/metrics").text
        busy = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in GAUGES and sample.value
        }
        if not busy or time.monotonic() > end:
            return busy
        time.sleep(0.1)
