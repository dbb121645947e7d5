"""The straight line on the embedded model: load, generate, stream."""

import subprocess
import sys
import threading
import time

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer
from PIL import Image

from mm1_mlx import budget, forecast, generate, load, stream
from mm1_mlx.answer import Settings
from mm1_mlx.checkpoint import load_config
from mm1_mlx.errors import CheckpointError, PromptError
from mm1_mlx.prefill import prefill
from mm1_mlx.runtime import TINY, _answer, find_model, wired
from mm1_mlx.transcript import Transcript

STAR = TINY / "red-star.png"
FOUR = TINY / "four-shapes.png"
QUESTION = "What colour is the star?"


@pytest.fixture(scope="module")
def runtime():
    with load() as runtime:
        yield runtime


def test_embedded_model_answers_about_its_pictures(runtime):
    assert generate(runtime, QUESTION, [STAR]).text == "red"
    assert generate(runtime, "How many shapes are there?", [FOUR]).text == "4"


def test_a_forecast_says_what_the_answer_takes_and_runs_nothing(monkeypatch):
    with load() as runtime:
        encode = runtime.engine.features._encode
        monkeypatch.setattr(runtime.engine.features, "_encode", pytest.fail)
        said = forecast(runtime, QUESTION, [STAR], max_tokens=9)
        monkeypatch.setattr(runtime.engine.features, "_encode", encode)
        answer = generate(runtime, QUESTION, [STAR], max_tokens=9)
        again = forecast(runtime, QUESTION, [STAR], max_tokens=9)
    assert (said.prompt_tokens, said.image_tokens, said.cached_tokens, said.max_tokens) == (
        answer.prompt_tokens, answer.image_tokens, 0, 9,
    )  # fmt: skip
    assert said.bytes == sum(
        budget.Answer(answer.prompt_tokens, 9, 1, 0, 4)
        .bytes(load_config(TINY))
        .values()
    )
    assert 0 < said.first_token < said.total
    # What is known of the question is neither encoded nor read again.
    assert again.cached_tokens == answer.prompt_tokens - 1
    assert again.bytes < said.bytes


def test_sources_of_a_picture_are_equal(runtime):
    sources = [str(STAR), STAR, STAR.read_bytes(), Image.open(STAR)]
    answers = {generate(runtime, "Describe it.", [s]).tokens for s in sources}
    assert len(answers) == 1


def test_stream_adds_up_to_the_answer(runtime, embedded):
    pieces = list(stream(runtime, "Describe the picture.", [FOUR]))
    answer = generate(runtime, "Describe the picture.", [FOUR])
    assert "".join(p.text for p in pieces) == answer.text
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == answer.finish_reason == "stop"
    assert pieces[-1].stats.generated_tokens == len(answer.tokens) + 1
    assert answer.prompt_tokens > answer.image_tokens == embedded.num_image_tokens
    assert 0 < answer.timings.first_token <= answer.timings.total


def test_answer_ends_at_its_longest(runtime):
    answer = generate(runtime, "Describe the picture.", [FOUR], max_tokens=3)
    assert (len(answer.tokens), answer.finish_reason) == (3, "length")


def test_answer_ends_before_a_stop_string(runtime):
    whole = generate(runtime, "Describe the picture.", [FOUR]).text
    word = whole.split()[2]
    cut = generate(runtime, "Describe the picture.", [FOUR], stop=["nothing", word])
    assert cut.text == whole[: whole.index(word)]
    assert cut.finish_reason == "stop"


def test_held_back_text_comes_when_it_is_no_stop_string(runtime):
    whole = generate(runtime, "Describe the picture.", [FOUR]).text
    likely = whole + " and more"
    assert (
        generate(runtime, "Describe the picture.", [FOUR], stop=[likely]).text == whole
    )


def write(ids, tokenizer, stop=()):
    """The pieces of an answer of so many tokens, to its longest."""
    transcript = Transcript(tokenizer, stop)
    return [*map(transcript.add, ids), transcript.finish("length")]


@pytest.mark.parametrize("naive", [False, True])
@pytest.mark.parametrize("text", ["red 漢字", "🎨🎨 star", "a\n漢漢\nb", "é"])
def test_characters_of_several_tokens_come_whole_and_once(text, naive, any_tokenizer):
    hf = any_tokenizer.hf
    if naive:  # what a tokenizer.model without tokenizer.json is given
        hf._detokenizer = NaiveStreamingDetokenizer(hf._tokenizer)
    ids = hf.encode(text, add_special_tokens=False)
    pieces = write(ids, any_tokenizer, stop=["never"])
    assert "".join(piece.text for piece in pieces) == text
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert pieces[-1].finish_reason == "length"


def test_tokens_that_the_tokenizer_does_not_know_have_no_text(any_tokenizer):
    known = any_tokenizer.hf.encode("red", add_special_tokens=False)
    ids = [*known, any_tokenizer.size, 10_000]
    pieces = write(ids, any_tokenizer)
    assert "".join(piece.text for piece in pieces) == "red"
    assert [piece.token for piece in pieces] == [*ids, None]


def test_cancel_ends_the_answer_and_the_runtime_goes_on(runtime):
    cancel = threading.Event()
    pieces = []
    for piece in stream(runtime, "Describe the picture.", [FOUR], cancel=cancel):
        pieces.append(piece)
        cancel.set()
    assert pieces[-1].finish_reason == "cancelled"
    assert generate(runtime, QUESTION, [STAR]).text == "red"


def test_cancel_gives_what_was_held_back(runtime):
    whole = generate(runtime, "Describe the picture.", [FOUR]).text
    cancel = threading.Event()
    text, tokens = "", []
    options = {"stop": [whole + " and more"], "cancel": cancel}
    for piece in stream(runtime, "Describe the picture.", [FOUR], **options):
        text += piece.text
        tokens += [] if piece.token is None else [piece.token]
        if len(tokens) == 4:
            cancel.set()
    assert text.strip() == runtime.tokenizer.hf.decode(tokens).strip()
    assert whole.startswith(text)
    assert len(tokens) >= 4


@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [(mx.float16, 1e-5), (mx.float16, 2e-5), (mx.bfloat16, 1e-5), (mx.float32, 1e-50)],
)
def test_the_smallest_temperatures_are_greedy(dtype, temperature):
    with load(dtype=dtype) as runtime:
        options = {"temperature": temperature, "seed": 1}
        assert generate(runtime, QUESTION, [STAR], **options).text == "red"


def test_waiting_for_other_answers_counts(runtime):
    runtime._worker.submit(time.sleep, 0.3)
    times = generate(runtime, QUESTION, [STAR]).timings
    assert times.encode < 0.3 <= times.first_token <= times.total


def test_caller_that_stops_listening_frees_the_runtime(runtime):
    pieces = stream(runtime, "Describe the picture.", [FOUR])
    next(pieces)
    pieces.close()
    assert generate(runtime, QUESTION, [STAR]).text == "red"


def test_seed_decides_the_sample(runtime):
    def sample(seed):
        options = {"temperature": 2.0, "seed": seed, "max_tokens": 12}
        return generate(runtime, "Describe the picture.", [FOUR], **options).tokens

    assert sample(3) == sample(3)
    assert len({sample(seed) for seed in range(6)}) > 1


def test_threads_get_the_answers_of_single_runs(runtime):
    asked = [(QUESTION, STAR), ("How many shapes are there?", FOUR)] * 4
    single = [generate(runtime, q, [p]).tokens for q, p in asked]
    answers = [None] * len(asked)

    def ask(i):
        question, picture = asked[i]
        answers[i] = generate(runtime, question, [picture]).tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == single


def test_model_can_be_used_from_the_callers_thread(runtime, embedded):
    pixels = mx.zeros((2, 96, 96, 3))
    features = runtime.model.vision(pixels)
    shape = (2, embedded.num_image_tokens, embedded.decoder.hidden_size)
    assert runtime.model.connector(features).shape == shape


def test_progress_counts_the_prompt(runtime):
    seen = []
    runtime.forget()
    answer = generate(
        runtime, QUESTION, [STAR], progress=lambda *counts: seen.append(counts)
    )
    assert seen[0] == (0, answer.prompt_tokens)
    assert seen[-1] == (answer.prompt_tokens, answer.prompt_tokens)


def test_messages_hold_several_pictures_in_place(runtime, embedded):
    content = [
        {"type": "image", "image": STAR},
        {"type": "text", "text": "and"},
        {"type": "image", "image": FOUR},
        {"type": "text", "text": QUESTION},
    ]
    answer = generate(runtime, [{"role": "user", "content": content}])
    assert answer.image_tokens == 2 * embedded.num_image_tokens


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected 1"),
        ({"temperature": -1.0}, "temperature is -1.0, expected 0 to 2"),
        ({"top_p": 0}, "top_p is 0, expected more"),
        ({"top_p": 1.5}, "top_p is 1.5, expected 0 to 1"),
        ({"stop": "x"}, "stop is 'x', expected a list"),
        ({"stop": [""]}, "expected a list of strings"),
        ({"stop": [1]}, "expected a list of strings"),
        ({"max_tokens": 3.5}, "max_tokens is 3.5, expected an integer"),
        ({"seed": -1}, "seed is -1, expected 0 to 18446744073709551615"),
        ({"seed": 2**64}, "seed is 18446744073709551616, expected 0 to"),
        ({"seed": 0.5}, "seed is 0.5, expected an integer"),
    ],
)
def test_setting_out_of_range_is_named(options, match):
    with pytest.raises(PromptError, match=match):
        Settings(**options)


def test_prompt_longer_than_the_context_is_refused(runtime):
    with pytest.raises(
        PromptError, match=r"prompt has .* but the model's context holds"
    ):
        generate(runtime, "star " * 2000)


def test_answer_stops_where_the_context_is_full(runtime):
    short = generate(runtime, "red " * 100, max_tokens=1).prompt_tokens
    # One token of room; the prompt's last word asks for more.
    question = "red " * (100 + 1023 - short)
    answer = generate(runtime, question, max_tokens=500)
    assert answer.prompt_tokens == 1023
    assert (len(answer.tokens), answer.finish_reason) == (1, "length")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("no such model", "model folder 'no such model' does not exist"),
        ("./nowhere", r"'./nowhere' does not exist; give a folder or a repository"),
        ("~nobody-here/a", "'~nobody-here/a' does not exist"),
        (str(TINY / "config.json"), "is a file; give the folder it lies in"),
        ("nobody/nothing", "nobody/nothing cannot be reached|neither a folder"),
    ],
)
def test_unknown_model_is_named(name, match):
    with pytest.raises(CheckpointError, match=match):
        find_model(name)


def test_a_foreign_repository_is_not_fetched(monkeypatch):
    monkeypatch.setattr("mm1_mlx.hub.model_type", lambda _: "llava")
    monkeypatch.setattr("mm1_mlx.hub.download", lambda _: pytest.fail("fetched"))
    with pytest.raises(
        CheckpointError, match=r"a/b is a 'llava' model.*'mm1 convert a/b OUT'"
    ):
        find_model("a/b")


def test_environment_names_the_default_model(monkeypatch, tmp_path):
    monkeypatch.setenv("MM1_MODEL", str(tmp_path))
    assert find_model() == tmp_path
    assert find_model(TINY) == TINY


def test_closed_runtime_says_so():
    runtime = load()
    runtime.close()
    with pytest.raises(RuntimeError, match="the runtime is closed"):
        generate(runtime, "Hello")


def test_answers_under_way_are_finished_whoever_closes():
    runtime = load()
    runtime._worker.submit(time.sleep, 0.3)
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(generate(runtime, QUESTION, [STAR]).text)
    )
    asking.start()
    while runtime._worker._jobs.empty():
        time.sleep(0.01)
    closing = [threading.Thread(target=runtime.close) for _ in range(3)]
    for thread in closing:
        thread.start()
    for thread in (asking, *closing):
        thread.join()
    assert answers == ["red"]
    assert not hasattr(runtime, "model")


def test_runtime_may_be_closed_while_it_answers():
    runtime = load()
    answer = generate(runtime, QUESTION, [STAR], progress=lambda *_: runtime.close())
    assert answer.text == "red"


def test_closed_runtime_lets_the_weights_go():
    before = mx.get_active_memory()
    runtime = load()
    assert mx.get_active_memory() - before > 4_000_000
    runtime.close()
    runtime.close()
    assert mx.get_active_memory() - before < 100_000
    assert str(TINY) in repr(runtime)


@pytest.mark.slow
def test_process_ends_quietly_without_close():
    code = (
        "from mm1_mlx import load, generate\n"
        f"print(generate(load(), {QUESTION!r}, [{str(STAR)!r}]).text)"
    )
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        )
        assert (run.returncode, run.stdout, run.stderr) == (0, "red\n", "")


def test_an_answer_that_will_not_fit_is_refused_before_it_begins(runtime, monkeypatch):
    runtime.forget()
    monkeypatch.setattr(budget, "allowed", lambda: 100_000)
    with pytest.raises(PromptError, match=r"needs .* MB .* are free here; "):
        generate(runtime, "Describe the picture.", [FOUR])
    monkeypatch.undo()
    assert generate(runtime, QUESTION, [STAR]).text == "red"


def test_what_is_kept_for_others_gives_way_first(runtime, monkeypatch):
    runtime.forget()
    generate(runtime, QUESTION, [STAR])
    room = iter([100_000, 10**12])
    monkeypatch.setattr(budget, "allowed", lambda: next(room))
    assert generate(runtime, "How many shapes are there?", [FOUR]).text == "4"
    assert next(room, None) is None


def test_a_model_that_will_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(budget, "allowed", lambda: 1_000_000)
    with pytest.raises(CheckpointError, match="of memory for its weights"):
        load()


def test_a_listener_who_leaves_ends_the_reading(monkeypatch):
    with load() as runtime:
        steps = []
        routed = runtime.model.decoder.routed
        reading, left = threading.Event(), threading.Event()

        def counted(tokens, *args, **options):
            steps.append(tokens.shape[1])
            if len(steps) == 3:
                reading.set()
                assert left.wait(5)
            return routed(tokens, *args, **options)

        monkeypatch.setitem(runtime.model.decoder.__dict__, "routed", counted)
        options = prefill.__kwdefaults__ | {"step": 1}
        monkeypatch.setattr(prefill, "__kwdefaults__", options)
        gone = []

        def make(event):
            gone.append(event)
            return _answer(runtime, "Describe it.", [FOUR], Settings(), 0.0, event)

        pieces = runtime.run(make)
        listener = threading.Thread(target=lambda: list(pieces))
        listener.start()
        assert reading.wait(5)
        gone[0].set()
        left.set()
        listener.join(5)
        assert len(steps) == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": "0"}, "temperature is '0', expected a number"),
        ({"num_draft_tokens": 2.5}, "num_draft_tokens is 2.5, expected an integer"),
        ({"max_tokens": True}, "max_tokens is True, expected an integer"),
        ({"kv_bits": 8.0}, "kv_bits is 8.0, expected one of"),
        ({"kv_bits": 5}, "kv_bits is 5, expected one of"),
        ({"kv_group_size": 16}, "kv_group_size is 16, expected one of"),
        ({"prefix": 3}, "prefix is 3, expected its name"),
        ({"draft": "x"}, "draft is 'x', expected a Runtime"),
        ({"prompt_lookup": True, "draft": True}, "draft is True"),
    ],
)
def test_settings_of_another_type_are_named(options, match):
    with pytest.raises(PromptError, match=match):
        Settings(**options)


def test_the_memory_limit_is_reset_by_the_last_who_answers(monkeypatch):
    limits = []
    monkeypatch.setattr("mm1_mlx.runtime.maybe_set_recommended_wired_limit", lambda: 7)
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    with wired():
        with wired():
            pass
        assert limits == []
    assert limits == [7]


def test_less_is_kept_where_less_is_free(monkeypatch):
    with load() as runtime:
        assert runtime.engine.prefixes.max_bytes <= 2 << 30
    monkeypatch.setattr("mm1_mlx.runtime.allowed", lambda: 8_000_000)
    with load() as runtime:
        assert runtime.engine.prefixes.max_bytes == 1_000_000
