"""Answers decoded together are those that each would have been alone."""

import threading
import time

import mlx.core as mx
import pytest
from PIL import Image

from mm1_mlx import Ask, budget, generate, generate_batch, load, stream_batch
from mm1_mlx.answer import Settings
from mm1_mlx.batch import Batch, made_ready
from mm1_mlx.errors import MemoryLimitError, PromptError
from mm1_mlx.memory.named import Prefix
from mm1_mlx.prefill import Cancelled
from mm1_mlx.request import Request
from mm1_mlx.runtime import TINY
from mm1_mlx.shots import Shot

STAR = TINY / "red-star.png"
FOUR = TINY / "four-shapes.png"
QUESTIONS = [
    ("What colour is the star?", [STAR]),
    ("Describe the picture.", [FOUR]),
    ("How many shapes are there?", [FOUR, STAR]),
    ("What is this?", []),
    ("Describe the picture.", [STAR]),
]
SHOTS = [
    Shot((STAR,), "red", "What colour is the star?"),
    Shot((FOUR,), "4", "How many shapes are there?"),
]


@pytest.fixture(scope="module")
def runtime():
    with load() as runtime:
        yield runtime


def alone(runtime, **options):
    """Each answer of a runtime that remembers nothing."""
    answers = []
    for question, images in QUESTIONS:
        runtime.forget()
        answers.append(generate(runtime, question, images, **options))
    runtime.forget()
    return answers


def together(runtime, size=8, **options):
    asks = [Ask(q, images, Settings(**options)) for q, images in QUESTIONS]
    return generate_batch(runtime, asks, size=size)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens": 3},
        {"temperature": 1.5, "seed": 11},
        {"temperature": 1.0, "top_p": 0.9, "seed": 5},
        {"stop": ["heart", "star"]},
        {"kv_bits": 8, "kv_start": 0},
        {"kv_bits": 4, "kv_start": 30, "temperature": 1.0, "seed": 3},
        {"kv_bits": 4, "kv_start": 26, "temperature": 1.0, "seed": 3},
        {"shots": SHOTS},
        {"shots": SHOTS, "kv_bits": 4, "kv_start": 150},
    ],
    ids=[
        "greedy",
        "short",
        "seed",
        "top_p",
        "stop",
        "packed",
        "packed later",
        "packed at once",
        "shots",
        "shots packed later",
    ],
)
def test_rows_equal_single_answers(runtime, size, options):
    singles, rows = alone(runtime, **options), together(runtime, size, **options)
    assert len({answer.tokens for answer in singles}) > 2
    for single, row in zip(singles, rows, strict=True):
        assert (row.text, row.tokens) == (single.text, single.tokens)
        assert row.finish_reason == single.finish_reason
        assert row.prompt_tokens == single.prompt_tokens


def test_rows_of_several_precisions_go_together(runtime):
    packed = {"kv_bits": 8, "kv_start": 0}
    options = [{}, packed, {}, packed, {"temperature": 1.0, "seed": 2}]
    asks = [
        Ask(q, images, Settings(**own))
        for (q, images), own in zip(QUESTIONS, options, strict=True)
    ]
    rows = generate_batch(runtime, asks)
    for (question, images), own, row in zip(QUESTIONS, options, rows, strict=True):
        runtime.forget()
        assert generate(runtime, question, images, **own).tokens == row.tokens


def test_examples_are_read_once(runtime, monkeypatch):
    runtime.forget()
    rows = []
    routed = runtime.model.decoder.routed

    def count(tokens, *args, **options):
        rows.append(tokens.shape[1])
        return routed(tokens, *args, **options)

    monkeypatch.setitem(runtime.model.decoder.__dict__, "routed", count)
    answers = together(runtime, shots=SHOTS)
    first, *others = (answer.cached_tokens for answer in answers)
    assert first == 0
    (shared,) = {*others}
    assert shared > 2 * 16
    prompts = sum(n for n in rows if n > 1)
    assert prompts == shared + sum(a.prompt_tokens - shared for a in answers)


def test_examples_are_known_to_a_later_batch(runtime):
    runtime.forget()
    for cached in (False, True, True):
        ask = Ask("How many?", [FOUR], Settings(shots=SHOTS))
        (row,) = generate_batch(runtime, [ask])
        assert (row.cached_tokens > 0) == cached
    ask = Ask("Describe the picture.", [FOUR], Settings(shots=SHOTS))
    (row,) = generate_batch(runtime, [ask])
    assert row.cached_tokens > 2 * 16


def test_an_example_that_is_read_holds_up_nobody(runtime):
    """Between its pictures the others go on, and it may be cancelled."""
    runtime.forget()
    stopped = []

    def ask_all():
        batch = Batch(runtime.engine)
        settings = Settings(shots=SHOTS)
        batch.add(0, Ask("How many?", [FOUR], settings))
        # Nothing is known of the examples any more.
        runtime.engine.prefixes.clear()
        runtime.engine.features.clear()
        plan = Ask("How many?", [STAR], settings).plan(runtime.engine)

        def stop():
            stopped.append(True)
            raise Cancelled

        with pytest.raises(Cancelled):
            batch.begin(1, plan, time.perf_counter(), between=stop)
        assert len(batch) == 1
        batch.close()
        yield None

    list(runtime.run(lambda _: ask_all()))
    assert stopped


def test_a_bad_question_stops_no_other(runtime):
    asks = [
        Ask("What colour is the star?", [STAR]),
        Ask("What?", ["missing.png"]),
        Ask("Describe.", [STAR], Settings(prefix="unknown")),
        Ask("How many shapes are there?", [FOUR]),
    ]
    first, second, third, fourth = generate_batch(runtime, asks)
    assert isinstance(second, PromptError)
    assert "missing.png" in str(second)
    assert isinstance(third, PromptError)
    assert (first.text, fourth.text) == ("red", "4")


def test_pieces_come_while_others_are_under_way(runtime):
    asks = [Ask("Describe the picture.", [FOUR]), Ask("What colour?", [STAR])]
    order = [number for number, _ in stream_batch(runtime, asks)]
    assert order[:1] == [0]
    # The short answer ends before the long one does.
    last = {number: i for i, number in enumerate(order)}
    assert last[1] < last[0]


def test_the_end_of_an_answer_is_told_before_its_caches_are_kept(runtime, monkeypatch):
    kept, keep = [], Request.keep

    def note(request, *cache):
        kept.append(request)
        return keep(request, *cache)

    monkeypatch.setattr(Request, "keep", note)
    batch = Batch(runtime.engine)
    batch.add(0, Ask("Describe the picture.", [FOUR], Settings(max_tokens=3)))
    ended = False
    while not ended:
        pieces = batch.step()
        for _, piece in pieces:
            ended = piece.finish_reason is not None
            assert (len(batch), kept) == (1, [])
    assert (len(batch), len(kept)) == (0, 1)
    batch.close()


def test_questions_are_taken_as_answers_end(runtime, monkeypatch):
    under_way = []
    add = Batch.add

    def counted(batch, number, ask):
        under_way.append(len(batch))
        return add(batch, number, ask)

    monkeypatch.setattr(Batch, "add", counted)
    asks = (Ask(q, images, Settings(max_tokens=4)) for q, images in QUESTIONS)
    assert len(generate_batch(runtime, asks, size=2)) == len(QUESTIONS)
    assert max(under_way) == 1
    assert len(under_way) == len(QUESTIONS)


def test_one_row_may_be_cancelled(runtime):
    cancel = threading.Event()
    asks = [
        Ask("Describe the picture.", [FOUR], Settings(cancel=cancel)),
        Ask("Describe the picture.", [FOUR]),
    ]
    ended = {}
    for number, piece in stream_batch(runtime, asks):
        cancel.set()
        if piece.finish_reason:
            ended[number] = piece.finish_reason
    assert ended == {0: "cancelled", 1: "stop"}


def test_a_listener_who_leaves_frees_the_runtime(runtime):
    asks = [Ask("Describe the picture.", [FOUR])] * 3
    pieces = stream_batch(runtime, asks)
    next(pieces)
    pieces.close()
    assert generate(runtime, "What colour is the star?", [STAR]).text == "red"


def test_what_is_kept_of_answers_holds_no_batch(runtime):
    """Rows of other pictures each, so that none is taken for another."""
    runtime.forget()
    generate(runtime, "What is this?", [STAR])
    prefixes = runtime.engine.prefixes
    before, kept = mx.get_active_memory(), prefixes.nbytes
    pictures = [Image.new("RGB", (96, 96), (20 * i, 90, 9)) for i in range(8)]
    settings = Settings(max_tokens=24, stop=["nothing"])
    generate_batch(runtime, [Ask("Describe it.", [p], settings) for p in pictures])
    runtime.engine.features.clear()
    grown, told = mx.get_active_memory() - before, prefixes.nbytes - kept
    runtime.forget()
    assert told > 400_000
    assert grown < 1.5 * told


def test_no_questions_are_no_answers(runtime):
    assert generate_batch(runtime, []) == []


def test_the_next_turn_of_a_row_computes_only_what_is_new(runtime):
    runtime.forget()
    (row,) = generate_batch(runtime, [Ask("Describe the picture.", [FOUR])])
    turns = [
        {"role": "user", "content": [
            {"type": "image", "image": FOUR},
            {"type": "text", "text": "Describe the picture."},
        ]},
        {"role": "assistant", "content": row.text},
        {"role": "user", "content": "How many shapes are there?"},
    ]  # fmt: skip
    answer = generate(runtime, turns)
    assert answer.cached_tokens > row.prompt_tokens


@pytest.mark.parametrize("start", [0, 4096])
def test_a_packed_row_is_known_to_the_next_question(runtime, start):
    options = {"kv_bits": 8, "kv_start": start}
    runtime.forget()
    ask = Ask("Describe the picture.", [FOUR], Settings(**options))
    (row,) = generate_batch(runtime, [ask])
    (again,) = generate_batch(runtime, [ask])
    assert (row.cached_tokens, again.cached_tokens) == (0, row.prompt_tokens - 1)
    answer = generate(runtime, "Describe the picture.", [FOUR], **options)
    assert answer.cached_tokens == row.prompt_tokens - 1


def test_prefixes_that_nobody_needs_are_let_go(runtime):
    batch = Batch(runtime.engine)
    held = []

    def ask_all():
        for i in range(6):
            shots = [Shot((STAR,), str(i), "How many?")]
            ask = Ask("How many?", [FOUR], Settings(shots=shots, max_tokens=3))
            batch.add(2 * i, ask)
            batch.add(2 * i + 1, ask)
            assert len(batch) == 2
            while len(batch):
                list(batch.step())
            held.append((len(batch._shared), len(batch._groups)))
        batch.close()
        yield None

    list(runtime.run(lambda _: ask_all()))
    # Beside those that come with examples for the first time.
    assert max(held) == (1, 2)


@pytest.fixture
def groups(monkeypatch):
    """How many rows each group has at every step that is taken from now on."""
    counts, step = [], Batch.step

    def note(batch):
        counts.append([len(group.rows) for group in batch._groups.values()])
        return step(batch)

    monkeypatch.setattr(Batch, "step", note)
    return counts


def test_answers_with_other_examples_each_go_together(runtime, groups):
    asks = [
        Ask("How many?", [FOUR], Settings(shots=[Shot((STAR,), str(i), "How many?")]))
        for i in range(6)
    ]
    runtime.forget()
    alone = [
        generate(runtime, a.prompt, a.images, shots=a.settings.shots) for a in asks
    ]
    runtime.forget()
    rows = generate_batch(runtime, asks)
    assert groups[0] == [6]
    assert [row.tokens for row in rows] == [answer.tokens for answer in alone]


def test_examples_that_come_again_are_shared_beside_others(runtime, groups):
    asks = [Ask("Describe the picture.", [FOUR])]
    asks += [Ask("Describe it.", [STAR], Settings(shots=SHOTS)) for _ in range(4)]
    generate_batch(runtime, asks)
    assert groups[0] == [2, 3]


def test_a_named_prefix_is_read_from_disk_by_a_batch(monkeypatch, tmp_path):
    monkeypatch.setenv("MM1_CACHE", str(tmp_path))
    with load() as runtime:
        runtime.save_prefix(Prefix("shots", shots=tuple(SHOTS)))
    encoded = []
    with load() as runtime:
        encode = runtime.model.encode
        monkeypatch.setattr(
            runtime.engine.features, "_encode",
            lambda pictures: encoded.append(len(pictures)) or encode(pictures),
        )  # fmt: skip
        settings = Settings(prefix="shots")
        asks = [Ask("How many shapes are there?", [FOUR], settings)] * 2
        rows = generate_batch(runtime, asks)
        # The question's own picture alone.
        assert encoded == [1]
        whole = generate(runtime, "How many shapes are there?", [FOUR], shots=SHOTS)
    assert [row.tokens for row in rows] == [whole.tokens] * 2


def test_answers_go_on_while_no_question_is_there(runtime):
    def asks():
        yield Ask("Describe the picture.", [FOUR])
        # As often as it is asked meanwhile.
        while not ended:
            yield None
        yield Ask("What colour is the star?", [STAR])

    ended = []
    answers = []
    for number, piece in stream_batch(runtime, asks()):
        if piece.finish_reason:
            ended.append(number)
            answers.append(piece.stats.generated_tokens)
    assert ended == [0, 1]


def test_a_row_whose_heads_cannot_be_packed_stops_no_other(runtime):
    asks = [
        Ask("What colour is the star?", [STAR]),
        Ask("What?", [STAR], Settings(kv_bits=8, kv_group_size=64)),
    ]
    first, second = generate_batch(runtime, asks)
    assert first.text == "red"
    assert "cannot be packed in groups of 64" in str(second)


def test_a_question_waits_until_there_is_room(runtime, monkeypatch):
    runtime.forget()
    check = budget.check_answer

    def checked(config, answer, *, spare=0, promised=0):
        if promised:
            raise MemoryLimitError("no room")
        check(config, answer, spare=spare, promised=promised)

    monkeypatch.setattr("mm1_mlx.prefill.check_answer", checked)
    asks = [Ask("Describe the picture.", [FOUR]), Ask("What colour?", [STAR])]
    order = [number for number, _ in stream_batch(runtime, asks)]
    # One after the other.
    assert order == sorted(order)
    assert set(order) == {0, 1}


def test_what_rows_will_still_take_is_kept_free(runtime, monkeypatch):
    seen = []
    check = budget.check_answer

    def checked(config, answer, *, spare=0, promised=0):
        seen.append(promised)
        check(config, answer, spare=spare, promised=promised)

    monkeypatch.setattr("mm1_mlx.prefill.check_answer", checked)
    runtime.forget()
    asks = [
        Ask("Describe the picture.", [FOUR], Settings(max_tokens=n))
        for n in (9, 500, 9)
    ]
    generate_batch(runtime, asks)
    config = runtime.config.decoder
    first, second, third = seen
    assert first == 0
    assert second >= budget.kv_bytes(config, 26 + 9, 4)
    # Both rows as long as the longer may become.
    assert third >= 2 * budget.kv_bytes(config, 26 + 500, 4)


def test_what_threads_make_ready_is_answered_as_before(runtime, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    asks = [Ask(q, images) for q, images in QUESTIONS] * 2
    asks.insert(3, Ask("What is this?", [tmp_path / "bad.png"]))
    expected = generate_batch(runtime, asks, size=3)
    runtime.forget()
    answers = generate_batch(runtime, made_ready(runtime, asks, ahead=4), size=3)
    assert isinstance(answers[3], PromptError)
    assert "bad.png" in str(answers[3])
    for answer, known in zip(
        answers[:3] + answers[4:], expected[:3] + expected[4:], strict=True
    ):
        assert (answer.text, answer.tokens) == (known.text, known.tokens)


def test_few_questions_are_made_ready_before_they_are_asked(runtime):
    read = []

    def asks():
        for number in range(20):
            read.append(number)
            yield Ask("What is this?")

    ready = made_ready(runtime, asks(), ahead=3)
    for count in range(1, 4):
        next(ready)
        assert len(read) == count + 2
    ready.close()
    assert len(read) == 5
