"""Answers for many callers at once are those that each would have been alone."""

import asyncio
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from mm1_mlx import Ask, MM1Error, Pool, astream, generate, load
from mm1_mlx.answer import Settings, join
from mm1_mlx.batch import Batch
from mm1_mlx.errors import BusyError, MemoryLimitError, PromptError
from mm1_mlx.runtime import TINY

STAR = TINY / "red-star.png"
FOUR = TINY / "four-shapes.png"
QUESTIONS = [
    ("What colour is the star?", [STAR]),
    ("Describe the picture.", [FOUR]),
    ("How many shapes are there?", [FOUR, STAR]),
    ("What is this?", []),
]
OPTIONS = [
    {},
    {"temperature": 2.0, "seed": 7},
    {"temperature": 2.0, "seed": 11, "frequency_penalty": 2.0},
    {"temperature": 2.0, "top_p": 0.95, "seed": 5, "presence_penalty": 1.5},
    {"frequency_penalty": 1.0, "logit_bias": {260: 3.0}},
    {"schema": {"type": "object", "required": ["a"], "properties": {"a": {"enum": [1]}},
                "additionalProperties": False}},
]  # fmt: skip


@pytest.fixture(scope="module")
def runtime():
    with load() as runtime:
        yield runtime


@pytest.fixture
def pool(runtime):
    with Pool(runtime, size=4) as pool:
        yield pool


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def test_threads_at_once_get_what_they_would_have_alone(runtime, pool):
    cases = [(q, images, own) for q, images in QUESTIONS for own in OPTIONS]
    alone = [generate(runtime, q, images, **own) for q, images, own in cases]
    assert len({answer.tokens for answer in alone}) > 8
    answers = [None] * len(cases)

    def ask(i):
        question, images, own = cases[i]
        answers[i] = join(list(pool.stream(question, images, **own)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, answers, strict=True):
        assert (one.text, one.tokens) == (other.text, other.tokens)
        assert one.finish_reason == other.finish_reason


def test_asyncio_callers_are_answered_together(runtime, pool):
    async def ask(question, images):
        return text_of([p async for p in pool.astream(question, images)])

    async def all_of_them():
        return await asyncio.gather(*(ask(*question) for question in QUESTIONS))

    alone = [generate(runtime, *question).text for question in QUESTIONS]
    assert asyncio.run(all_of_them()) == alone


def test_a_runtime_streams_to_asyncio(runtime):
    async def ask():
        return [p async for p in astream(runtime, "What colour is the star?", [STAR])]

    pieces = asyncio.run(ask())
    assert text_of(pieces) == "red"
    assert pieces[-1].stats.generated_tokens == 2


def test_errors_reach_asyncio_callers(runtime):
    async def ask():
        return [p async for p in astream(runtime, "What?", ["missing.png"])]

    with pytest.raises(PromptError, match=r"missing\.png"):
        asyncio.run(ask())


def test_several_answers_to_a_question_read_it_once(runtime, pool):
    runtime.forget()
    settings = Settings(temperature=1.5, seed=3, max_tokens=12)
    ask = Ask("Describe the picture.", [FOUR], settings)

    async def answers():
        pieces = {0: [], 1: [], 2: []}
        async for number, piece in pool.answers(ask, count=3):
            pieces[number].append(piece)
        return [join(pieces[i]) for i in range(3)]

    first, *others = asyncio.run(answers())
    assert first.cached_tokens == 0
    assert {o.cached_tokens for o in others} == {first.prompt_tokens - 1}
    for i, answer in enumerate([first, *others]):
        runtime.forget()
        alone = generate(
            runtime, ask.prompt, ask.images, temperature=1.5, seed=3 + i, max_tokens=12
        )
        assert alone.tokens == answer.tokens


def test_an_error_is_told_to_its_caller_alone(pool):
    good = pool.stream("What colour is the star?", [STAR])
    bad = pool.stream("What?", ["missing.png"])
    with pytest.raises(PromptError, match=r"missing\.png"):
        list(bad)
    assert text_of(good) == "red"


def test_a_failing_step_ends_what_is_under_way_and_nothing_else(pool, monkeypatch):
    step, failing = Batch.step, [True]

    def fail_once(batch):
        if len(batch) and failing.pop() if failing else False:
            raise RuntimeError("the device is lost")
        return step(batch)

    monkeypatch.setattr(Batch, "step", fail_once)
    with pytest.raises(RuntimeError, match="the device is lost"):
        list(pool.stream("Describe the picture.", [FOUR]))
    assert text_of(pool.stream("What colour is the star?", [STAR])) == "red"


def long_question(**own):
    """A question of many parts, and where each stands in its prompt."""
    settings = Settings(max_tokens=4, **own)
    return Ask("Describe the picture. " * 24, [FOUR], settings)


def test_answers_under_way_go_on_while_a_long_prompt_is_read(
    runtime, endless, monkeypatch
):
    monkeypatch.setattr("mm1_mlx.prefill.SHORT_STEP", 16)
    ask = long_question()
    alone = generate(runtime, ask.prompt, ask.images, max_tokens=4)
    runtime.forget()
    said, heard = [], []
    options = Settings(**endless)
    with Pool(runtime, size=2) as pool:
        first = threading.Event()

        def listen(_, piece):
            said.append(piece)
            first.set()

        other = pool.submit(Ask("What is this?", (), options), listen)
        first.wait()
        asked = long_question(progress=lambda done, _: heard.append((done, len(said))))
        pieces = list(pool.stream(ask.prompt, ask.images, **vars(asked.settings)))
        other.cancel()
    assert join(pieces).tokens == alone.tokens
    # A token of the other stands behind every part but the first and the last.
    places, counts = zip(*heard[1:-1], strict=True)
    assert len(places) > 5
    assert max(b - a for a, b in pairwise(places)) <= 16
    assert list(counts) == sorted(set(counts))


@pytest.fixture
def on_encoding(runtime, monkeypatch):
    """Functions that are called with the pictures that were just encoded together."""
    called, encode = [], runtime.engine.features._encode

    def encode_and_tell(pictures):
        made = encode(pictures)
        for function in called:
            function(pictures)
        return made

    monkeypatch.setattr(runtime.engine.features, "_encode", encode_and_tell)
    runtime.forget()
    return called


def noise(count):
    rng = np.random.default_rng(count)
    made = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(count)]
    return [Image.fromarray(x) for x in made]


def test_answers_under_way_go_on_while_pictures_are_encoded(
    runtime, endless, on_encoding
):
    alone = generate(runtime, "What are these?", noise(5), max_tokens=3)
    runtime.forget()
    said, counts, first = [], [], threading.Event()

    def listen(_, piece):
        said.append(piece)
        first.set()

    with Pool(runtime, size=2) as pool:
        other = pool.submit(Ask("What is this?", (), Settings(**endless)), listen)
        first.wait()
        on_encoding.append(lambda pictures: counts.append((len(pictures), len(said))))
        pieces = list(pool.stream("What are these?", noise(5), max_tokens=3))
        other.cancel()
    assert join(pieces).tokens == alone.tokens
    assert [together for together, _ in counts] == [1] * 5
    assert all(b > a for (_, a), (_, b) in pairwise(counts))


@pytest.mark.parametrize(("still", "steps"), [(1e9, 0), (0.0, 1)])
def test_those_that_wait_begin_in_one_turn_while_there_is_time(
    runtime, endless, monkeypatch, still, steps
):
    monkeypatch.setattr("mm1_mlx.pool.STILL", still)
    happened = []
    for name in ("begin", "step"):
        monkeypatch.setattr(Batch, name, noted(getattr(Batch, name), name, happened))
    first, go_on, ended = threading.Event(), threading.Event(), threading.Semaphore(0)

    def hold(*_):
        first.set()
        assert go_on.wait(60)

    def listen(_, piece):
        if piece.finish_reason is not None:
            ended.release()

    with Pool(runtime, size=3) as pool:
        other = pool.submit(Ask("Describe it.", (), Settings(**endless)), hold)
        assert first.wait(60)
        short = Ask("What is this?", (), Settings(max_tokens=3))
        waiting = [pool.submit(short, listen) for _ in range(2)]
        while not all(ticket.ready for ticket in waiting):
            time.sleep(0.01)
        happened.clear()
        go_on.set()
        assert all(ended.acquire(timeout=60) for _ in waiting)
        other.cancel()
    one, two = (i for i, name in enumerate(happened) if name == "begin")
    assert two - one - 1 == steps


def noted(method, name, happened):
    """A method of a batch that notes when it is called."""

    def note(*args, **options):
        happened.append(name)
        return method(*args, **options)

    return note


def test_who_leaves_has_no_more_pictures_encoded(runtime, endless, on_encoding):
    leave, told = threading.Event(), []

    def encoded(pictures):
        told.append(len(pictures))
        if len(told) == 2:
            leave.set()

    with Pool(runtime, size=2) as pool:
        (stream,) = begun(pool, endless, 1)
        on_encoding.append(encoded)
        (piece,) = pool.stream("What are these?", noise(5), cancel=leave)
        assert piece.finish_reason == "cancelled"
        assert next(stream).text is not None
        stream.close()
        assert text_of(pool.stream("What colour is the star?", [STAR])) == "red"
    # The star of the first one was known.
    assert told == [1, 1]


def test_a_step_that_fails_while_a_prompt_is_read_is_not_that_questions(
    runtime, endless, monkeypatch
):
    monkeypatch.setattr("mm1_mlx.prefill.SHORT_STEP", 16)
    runtime.forget()
    failing = [False]
    step = Batch.step

    def fail_once(batch):
        if failing == [True]:
            failing.append(False)
            raise RuntimeError("the device is lost")
        return step(batch)

    monkeypatch.setattr(Batch, "step", fail_once)

    def fail(*_):
        failing[0] = True

    with Pool(runtime, size=2) as pool:
        (stream,) = begun(pool, endless, 1)
        ask = long_question(progress=fail)
        assert text_of(pool.stream(ask.prompt, ask.images, **vars(ask.settings)))
        with pytest.raises(RuntimeError, match="the device is lost"):
            list(stream)


def test_a_listener_that_fails_ends_its_own_answer(pool):
    def listen(*_):
        raise ValueError("not listening")

    pool.submit(Ask("Describe the picture.", [FOUR]), listen)
    assert text_of(pool.stream("What colour is the star?", [STAR])) == "red"


@pytest.fixture
def endless(runtime):
    """Options of an answer that goes on until it is stopped."""
    ends = dict.fromkeys(runtime.tokenizer.hf.eos_token_ids, -100.0)
    return {"logit_bias": ends, "max_tokens": 100_000}


def begun(pool, options, count):
    """So many answers that are under way."""
    streams = [pool.stream("Describe it.", [STAR], **options) for _ in range(count)]
    for stream in streams:
        next(stream)
    return streams


def test_too_many_questions_are_refused(runtime, endless):
    with Pool(runtime, size=2, max_waiting=3) as pool:
        streams = begun(pool, endless, 2)
        waiting = [pool.stream("What is this?", max_tokens=3) for _ in range(3)]
        with pytest.raises(BusyError, match="3 questions wait already") as refused:
            pool.stream("What is this?")
        assert refused.value.seconds > 0
        assert (pool.running, pool.waiting) == (2, 3)
        for stream in streams:
            stream.close()
        assert all(text_of(stream) for stream in waiting)


def test_a_question_that_is_called_off_leaves_the_queue(runtime, endless):
    with Pool(runtime, size=1) as pool:
        (under_way,) = begun(pool, endless, 1)
        cancel = threading.Event()
        waiting = pool.stream("What is this?", cancel=cancel)
        left = pool.submit(Ask("What is this?"), lambda *_: None)
        assert pool.waiting == 2
        left.cancel()
        assert pool.waiting == 1
        cancel.set()
        (piece,) = waiting
        assert (piece.finish_reason, piece.stats.generated_tokens) == ("cancelled", 0)
        assert next(under_way).text is not None
        under_way.close()


def test_who_stops_listening_frees_the_place(runtime, endless):
    with Pool(runtime, size=1) as pool:
        for _ in range(3):
            (stream,) = begun(pool, endless, 1)
            stream.close()
        assert text_of(pool.stream("What colour is the star?", [STAR])) == "red"


def test_a_small_question_waits_for_those_before_it_alone(runtime, endless):
    order = []

    def note(name):
        def listen(_, piece):
            if getattr(piece, "finish_reason", True):
                order.append(name)

        return listen

    with Pool(runtime, size=2) as pool:
        large = Ask("Describe the picture.", [FOUR], Settings(max_tokens=40))
        streams = begun(pool, endless, 2)
        pool.submit(large, note("before"), count=2)
        pool.submit(Ask("What is this?", (), Settings(max_tokens=1)), note("small"))
        for i in range(6):
            pool.submit(large, note(f"behind {i}"), count=2)
        for stream in streams:
            stream.close()
    assert order.index("small") <= 3


def test_a_question_waits_until_there_is_memory(runtime, endless, monkeypatch):
    from mm1_mlx import budget

    check, refused = budget.check_answer, []

    def checked(config, answer, *, spare=0, promised=0):
        if promised and answer.room == 77:
            refused.append(promised)
            raise MemoryLimitError("no room")
        check(config, answer, spare=spare, promised=promised)

    monkeypatch.setattr("mm1_mlx.prefill.check_answer", checked)
    runtime.forget()
    with Pool(runtime, size=4) as pool:
        one, other = begun(pool, endless, 2)
        waiting = pool.stream("What colour is the star?", [STAR], max_tokens=77)
        while not refused:
            time.sleep(0.01)
        one.close()
        other.close()
        assert text_of(waiting) == "red"
    # Asked again only when an answer had ended: at both checks, twice.
    assert len(refused) <= 4


def test_a_closed_pool_answers_what_waits_and_takes_no_more(runtime):
    pool = Pool(runtime, size=1)
    streams = [pool.stream("What colour is the star?", [STAR]) for _ in range(3)]
    pool.close()
    assert [text_of(stream) for stream in streams] == ["red"] * 3
    with pytest.raises(RuntimeError, match="the pool is closed"):
        pool.stream("What is this?")
    assert generate(runtime, "What colour is the star?", [STAR]).text == "red"


def test_scores_add_up_and_are_the_same_in_a_batch(pool):
    options = {"top_logprobs": 3, "temperature": 1.0, "seed": 4, "max_tokens": 8}
    alone = list(pool.stream("Describe the picture.", [FOUR], **options))
    others = begun(pool, {"max_tokens": 30}, 2)
    together = list(pool.stream("Describe the picture.", [FOUR], **options))
    for one, other in zip(alone, together, strict=True):
        assert one.token == other.token
        if one.token is not None:
            assert one.score.token == one.token
            assert one.score.logprob == pytest.approx(other.score.logprob, abs=1e-4)
            likeliest = [value for _, value in one.score.likeliest]
            assert likeliest == sorted(likeliest, reverse=True)
            assert len(likeliest) == 3
            assert one.score.logprob <= likeliest[0] <= 0
    for stream in others:
        stream.close()


def test_an_unknown_token_has_no_bias(pool):
    with pytest.raises(MM1Error, match="logit_bias names token 999999"):
        list(pool.stream("What is this?", logit_bias={999_999: 1.0}))
