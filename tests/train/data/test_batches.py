"""Batches are pure functions of step and shard, whatever the threads and the bad rows."""

import threading
import time
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image, ImageFile

from mm1_mlx.config import MoEConfig
from mm1_mlx.errors import ConfigError, DataError
from mm1_mlx.image import load_pictures
from mm1_mlx.models import MM1
from mm1_mlx.prompt import Prompt
from mm1_mlx.tokenizer import load_tokenizer
from mm1_mlx.train.data import batches as module
from mm1_mlx.train.data.batches import Batches, refer_example
from mm1_mlx.train.data.preview import preview
from mm1_mlx.train.loss import next_token_loss

COLOURS = ("red", "blue", "lime", "white", "black", "yellow")
TINY_REGION = {
    "input_size": 32, "output_size": 48, "num_points": 6, "num_sub_points": [4, 2],
    "num_neighbours": 2,
}  # fmt: skip


def asked(count, pictures):
    """Questions about one picture each."""
    return [
        {
            "image": pictures[i % len(pictures)],
            "question": f"Number {i}?",
            "answer": COLOURS[i % len(pictures)],
        }
        for i in range(count)
    ]


def origins(batches, positions):
    return [
        int(p.example.origin.rpartition(":")[2]) for p in batches.prepare(positions)
    ]


# Purity


def test_a_batch_depends_on_step_and_shard_alone(
    make_batches, write_lines, pictures, same_batch
):
    path = write_lines(asked(30, pictures))
    first = make_batches(path, micro_batches=3)
    one = first(4, 2)
    for other in (make_batches(path, micro_batches=3), first):
        other(9, 0)
        same_batch(one, other(4, 2))
    assert len(one.pictures) == 2


def test_shards_and_steps_share_no_row_within_an_epoch(
    make_batches, write_lines, pictures
):
    batches = make_batches(write_lines(asked(24, pictures)), micro_batches=3)
    made = [batches(step, shard) for step in range(4) for shard in range(3)]
    rows = {
        bytes(row[:length])
        for batch in made
        for row, length in zip(batch.tokens, batch.lengths, strict=True)
    }
    assert len(rows) == 24


@pytest.mark.parametrize("factor", [None, 1.0])
def test_examples_that_compete_for_experts_are_not_packed(
    factor, make_batches, write_lines, tiny_config
):
    moe = MoEConfig(num_experts=4, every=1, offset=0, capacity_factor=factor)
    config = replace(tiny_config, decoder=replace(tiny_config.decoder, moe=moe))
    path = write_lines([{"question": "Who?", "answer": "I"}] * 2)
    made = partial(make_batches, path, config=config, batch_size=2)
    assert made(packing=False)(0, 0).tokens.shape[0] == 2
    if factor is None:
        assert len(made(packing=True)(0, 0).segments) == 2
        return
    with pytest.raises(
        ConfigError, match=r"capacity_factor is 1.0: all .*without pack"
    ):
        made(packing=True)


def test_packed_rows_are_the_rows_behind_one_another(
    make_batches, write_lines, pictures
):
    path = write_lines([*asked(6, pictures), {"text": "Once upon a time."}])
    rows = make_batches(path, batch_size=7)(0, 0)
    packed = make_batches(path, batch_size=7, packing=True)(0, 0)
    assert packed.segments == rows.lengths
    assert packed.tokens.shape[1] % 32 == 0
    assert packed.lengths == (sum(rows.lengths),)
    starts = np.cumsum((0, *rows.lengths))
    for row, mask, start, length in zip(
        rows.tokens, rows.learned, starts, rows.lengths, strict=False
    ):
        stop = start + length
        assert packed.tokens[0, start:stop].tolist() == row[:length].tolist()
        assert packed.learned[0, start:stop].tolist() == mask[:length].tolist()
    T = rows.tokens.shape[1]
    for own, moved in zip(rows.spans, packed.spans, strict=True):
        row, place = divmod(own.start, T)
        assert moved.start == starts[row] + place
        assert (moved.picture, moved.offset) == (own.picture, own.offset)
    assert packed.learned.sum() == rows.learned.sum()


# Threads


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_results_do_not_depend_on_the_number_of_threads(
    threads, make_batches, write_lines, pictures, same_batch, monkeypatch
):
    rows = asked(16, pictures)
    rows[5] = {"image": "gone.png", "caption": "x"}
    path = write_lines(rows)
    batches = make_batches(path, threads=threads, batch_size=8, skip_bad=True)
    expected = make_batches(path, threads=1, batch_size=8, skip_bad=True)

    def late(*arguments, **options):
        # Whoever was asked first is not ready first.
        time.sleep(0.01 * (threading.get_ident() % 3))
        return load_pictures(*arguments, **options)

    before = [expected(step, 0) for step in range(3)]
    monkeypatch.setattr(module, "load_pictures", late)
    for step, batch in enumerate(before):
        same_batch(batches(step, 0), batch)
    assert batches.skipped.first == expected.skipped.first


@pytest.mark.parametrize("threads", [1, 4])
def test_pictures_are_decoded_side_by_side(
    threads, make_batches, write_lines, pictures, monkeypatch
):
    """Within the picture guard itself: as many at a time as there are threads."""
    batches = make_batches(
        write_lines(asked(8, pictures)), threads=threads, batch_size=8
    )
    lock, inside, most = threading.Lock(), 0, 0
    load = ImageFile.ImageFile.load

    def slow(image):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.05)
        with lock:
            inside -= 1
        return load(image)

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", slow)
    batches(0, 0)
    assert most == threads


def test_typed_special_tokens_of_many_rows_do_not_meet(
    make_batches, write_lines, same_batch, tmp_path
):
    # Each kind of them joins the tokenizer when it is first met.
    typed = ["<image>", "</s>", "<pad>", "</", "<im", "<"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{text} {i}?"},
                {"role": "assistant", "content": f"{text}."},
            ]
        }
        for i, text in enumerate(typed)
    ]
    write_lines(rows)
    # Named, the form lets a place without a picture be text.
    path = tmp_path / "mix.json"
    path.write_text('{"datasets": [{"path": "rows", "form": "messages"}]}')
    one = make_batches(path, threads=4, batch_size=6)(0, 0)
    same_batch(make_batches(path, threads=1, batch_size=6)(0, 0), one)


def test_one_row_at_a_time_goes_through_the_tokenizer(
    make_batches, write_lines, pictures, monkeypatch
):
    """Also of several batches, as of learning and of validation."""
    path = write_lines(asked(4, pictures))
    inside, most, build = [], [], module.build_samples

    def slow(*arguments):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return build(*arguments)

    monkeypatch.setattr(module, "build_samples", slow)
    both = [make_batches(path, batch_size=4) for _ in range(2)]
    threads = [threading.Thread(target=each, args=(0, 0)) for each in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


# Bad rows


def bad_rows(tmp_path, png):
    (tmp_path / "cut.png").write_bytes(png()[:60])
    (tmp_path / "empty.png").touch()
    (tmp_path / "wide.png").write_bytes(png(size=(20_000, 1)))
    return {
        "broken": ("{", "expected a JSON object"),
        "gone": ({"image": "gone.png", "caption": "x"}, r"'.*gone.png' was not found"),
        "cut": ({"image": "cut.png", "caption": "x"}, r"cut.png' is damaged or cut sh"),
        "empty": ({"image": "empty.png", "caption": "x"}, r"empty.png' is empty \(0 b"),
        "wide": ({"image": "wide.png", "caption": "x"}, "has 20000 x 1 pixels, expect"),
        "long name": ({"image": "x" * 5000, "caption": "x"}, "cannot be opened|lies out"),
        "many": ({"images": ["red.png"] * 300, "caption": "x"}, "300 pictures were gi"),
        "long": (
            {"question": "x" * 300, "answer": "a"},
            r"it has \d+ tokens, 0 of them of pictures, expected at most 200; allow lo",
        ),
        "unanswered": ({"messages": [{"role": "user", "content": "a"}]}, "no assistant t"),
        "outside": ({"image": "../x.png", "caption": "x"}, "lies outside"),
    }  # fmt: skip


NAMES = (
    *("broken", "gone", "cut", "empty", "wide", "long name", "many", "long"),
    *("unanswered", "outside"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_row_is_named_by_file_and_line(
    name, make_batches, write_lines, tmp_path, png
):
    row, reason = bad_rows(tmp_path, png)[name]
    batches = make_batches(write_lines([row]), batch_size=1)
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*({reason})"):
        batches(0, 0)


def test_bad_rows_are_replaced_by_the_next_of_the_order(
    make_batches, write_lines, pictures, tmp_path, png
):
    good = asked(20, pictures)
    order = origins(make_batches(write_lines(good)), range(20))
    bad = [row for row, _ in bad_rows(tmp_path, png).values()]
    rows = [good[i] if i % 2 else bad[i // 2] for i in range(20)]
    reported = []
    batches = make_batches(
        write_lines(rows), skip_bad=True, more={"report": reported.append}
    )
    found = origins(batches, range(20))
    # Lines count from 1: those of even number are good.
    following = [
        next(line for line in (order[i:] + order) if line % 2 == 0) for i in range(20)
    ]
    # Past the epoch's end comes the next epoch's order, which is another one.
    settled = [i for i in range(20) if any(line % 2 == 0 for line in order[i:])]
    assert [found[i] for i in settled] == [following[i] for i in settled]
    assert all(line % 2 == 0 for line in found)
    assert batches.skipped.count == len(reported) == 10
    assert len(batches.skipped.first) == 5
    assert all("rows.jsonl:" in text for text in batches.skipped.first)
    # From another position on it is the same.
    again = make_batches(write_lines(rows), skip_bad=True)
    assert origins(again, [13, 2]) == [found[13], found[2]]


def test_answers_of_no_weight_are_not_learned(make_batches, write_lines):
    def row(weight):
        asked = {"role": "user", "content": "What?"}
        first = {"role": "assistant", "content": "red", "weight": weight}
        return {"messages": [asked, first, asked, {**first, "weight": 1}]}

    path = write_lines([row(0), row(1)])
    batches = make_batches(path, batch_size=1)
    some, all_ = sorted(batches.prepare([0, 1]), key=lambda x: x.example.origin)
    assert some.rows[0].tokens == all_.rows[0].tokens
    learned = [i for i, x in enumerate(some.rows[0].learned) if x]
    # Of two equal answers the last.
    both = [i for i, x in enumerate(all_.rows[0].learned) if x]
    assert learned == both[len(both) // 2 :]


def test_one_row_that_can_be_used_is_found_from_everywhere(
    make_batches, write_lines, pictures
):
    (good,) = asked(1, pictures)
    batches = make_batches(write_lines(["{"] * 6 + [good]), skip_bad=True)
    assert set(origins(batches, range(28))) == {7}


def test_bad_rows_are_counted_wherever_they_lie(make_batches, write_lines):
    """Errors begin with a row's path, which may hold what stands behind it in them."""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    path = write_lines(["{"] * 3 + [{"messages": turns}], "My: set/rows.jsonl")
    batches = make_batches(path, skip_bad=True)
    assert set(origins(batches, range(8))) == {4}
    assert batches.skipped.count == len(batches.skipped.first) == 3


def test_a_data_set_of_bad_rows_is_given_up(make_batches, write_lines):
    batches = make_batches(write_lines(["{", "{", "{"]), skip_bad=True)
    with pytest.raises(
        DataError, match=r"3 rows of .*rows.jsonl behind one another can"
    ):
        batches(0, 0)


def test_a_model_without_eyes_is_shown_no_pictures(
    make_batches, make_config, write_lines, pictures
):
    config = make_config(vision=None, connector=None, image=None)
    batches = make_batches(write_lines(asked(1, pictures)), config=config, batch_size=1)
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: it has 1 picture\(s\), but the"
    ):
        batches(0, 0)


# Length


def test_a_row_beyond_the_decoders_context_is_refused(
    make_batches, make_config, write_lines
):
    config = make_config(decoder={"max_position_embeddings": 60})
    path = write_lines([{"text": "qz" * 90}])
    with pytest.raises(
        DataError,
        match=r"jsonl:1: it has \d+ tokens, 0 of them of pictures, expected at most 60; "
        r"the decoder's context holds no more; have such rows cut \(--truncate\), or l",
    ):
        make_batches(path, config=config, batch_size=1)(0, 0)
    cut = make_batches(path, config=config, batch_size=1, truncate=True)(0, 0)
    assert cut.lengths == (60,)
    # Where the run allows less, that is what can be changed.
    with pytest.raises(
        DataError, match=r"at most 50; allow longer examples \(--max-len"
    ):
        make_batches(path, config=config, batch_size=1, max_length=50)(0, 0)


# What a template with thoughts does: the last answer is written otherwise than the others.
LAST_OTHERWISE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '(hm)' }}{% endif %}"
    "{{ m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.mark.parametrize("sampler", [False, True])
def test_answers_written_otherwise_later_are_rows_that_share_pictures(
    sampler, make_config, byte_folder, make_run, open_data, write_lines, pictures,
    monkeypatch, same_batch, assert_close,
):  # fmt: skip
    config = make_config(
        prompt={"template": "checkpoint"},
        **({"region": TINY_REGION} if sampler else {}),
    )
    tokenizer = load_tokenizer(byte_folder, config.prompt, regions=sampler)
    tokenizer.hf.chat_template = LAST_OTHERWISE
    place = {"type": "region", "box": [2, 3, 15, 12]}
    shown = [{"type": "image", "image": name} for name in pictures[:2]]
    questions = [[shown[0], "What is ", place], [shown[1], "And ", place], ["Why?"]]
    row = {"messages": []}
    for question, answer in zip(questions, ("red", "blue", "so"), strict=True):
        parts = [
            {"type": "text", "text": x} if isinstance(x, str) else x for x in question
        ]
        row["messages"] += [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": answer},
        ]
    mixture = open_data(write_lines([row, {"question": "Who?", "answer": "I"}]))
    loaded = []
    monkeypatch.setattr(
        module, "load_pictures", lambda *x: loaded.append(x) or load_pictures(*x)
    )
    padded, packed = (
        Batches(mixture, config, tokenizer, make_run(max_length=250, packing=packing))
        for packing in (False, True)
    )
    batch = padded(0, 0)
    assert len(loaded) == 1
    same_batch(batch, padded(0, 0))
    assert (batch.tokens.shape[0], len(batch.pictures)) == (4, 2)
    # Each picture once among the pictures, and in every row that shows it.
    assert sorted({s.picture for s in batch.spans}) == [0, 1]
    learned = [
        tokenizer.hf.decode(tokens[own].tolist())
        for tokens, own in zip(batch.tokens, batch.learned, strict=True)
    ]
    assert sorted(learned) == sorted(f"(hm){x}</s>" for x in ("red", "blue", "so", "I"))
    shown = preview(padded, tokenizer)
    assert shown.tokens.most == sum(sorted(batch.lengths)[1:])
    assert shown.learned == pytest.approx(batch.learned.sum() / sum(batch.lengths))
    model = MM1(config)
    loss, count = next_token_loss(model, batch)
    other, same = next_token_loss(model, packed(0, 0))
    assert count.item() == same.item() == batch.learned.sum()
    assert_close(loss, other)


def test_what_is_too_long_is_cut_if_that_is_asked(
    make_batches, make_config, write_lines, pictures
):
    config = make_config(decoder={"max_position_embeddings": 1000})
    rows = [{"image": pictures[0], "caption": "a long caption " * 30}]
    path = write_lines(rows)
    whole = make_batches(path, config=config, batch_size=1, max_length=1000)(0, 0)
    batch = make_batches(path, batch_size=1, max_length=50, truncate=True)(0, 0)
    assert batch.lengths == (50,)
    assert batch.tokens.tolist() == whole.tokens[:, :50].tolist()
    assert batch.learned.tolist() == whole.learned[:, :50].tolist()
    assert batch.spans == whole.spans


def test_a_book_is_not_written_out_in_tokens(
    make_batches, make_config, write_lines, pictures, train_tokenizer, monkeypatch
):
    endless = make_config(decoder={"max_position_embeddings": 10**5})
    longest = max(map(len, train_tokenizer.vocabulary))
    text = "a book of many words, " * 2000
    rows = [{"text": text}, {"question": text, "answer": "x"}]
    rows.append({"images": pictures[:1], "parts": ["it ", {"type": "image"}, text]})
    seen, encode = [], type(train_tokenizer).encode

    def watched(self, text, **options):
        seen.append(len(text))
        return encode(self, text, **options)

    whole = [
        make_batches(
            write_lines([row]), config=endless, batch_size=1, max_length=10**5
        )(0, 0)
        for row in (rows[0], rows[2])
    ]
    monkeypatch.setattr(type(train_tokenizer), "encode", watched)
    for row in rows[:2]:
        batches = make_batches(write_lines([row]), batch_size=1, max_length=60)
        with pytest.raises(
            DataError, match=r"jsonl:1: it has 440\d\d characters, more "
        ):
            batches(0, 0)
    assert not seen
    for row, expected in zip((rows[0], rows[2]), whole, strict=True):
        batch = make_batches(
            write_lines([row]), batch_size=1, max_length=60, truncate=True
        )(0, 0)
        # The very tokens that the whole begins with.
        assert batch.tokens.tolist() == expected.tokens[:, :60].tolist()
        assert batch.spans == expected.spans
    assert max(seen) <= 60 * longest + 20


@pytest.mark.parametrize("length", [2, 10, 14, 17])
def test_a_picture_is_never_cut(length, make_batches, write_lines, pictures):
    text = "a " * 5
    rows = [{"parts": [text, {"type": "image"}, text], "images": pictures[:1]}]
    batches = make_batches(
        write_lines(rows), batch_size=1, max_length=length, truncate=True
    )
    prepared = make_batches(write_lines(rows), batch_size=1).prepare([0])[0]
    span = prepared.rows[0].spans[0]
    if span.stop <= length:
        assert batches(0, 0).lengths == (length,)
        return
    with pytest.raises(
        DataError, match=rf"picture 1 stands at positions {span.start}\.\."
    ):
        batches(0, 0)


def test_a_document_may_hold_more_than_a_question(make_batches, write_lines, tmp_path):
    Image.new("RGB", (2400, 1800)).save(tmp_path / "large.png")
    rows = [{"parts": ["a", *[{"type": "image"}] * 30], "images": ["large.png"] * 30}]
    batch = make_batches(write_lines(rows), batch_size=1)(0, 0)
    assert len(batch.pictures) == 30
    rows[0] = {
        "parts": ["a", *[{"type": "image"}] * 257],
        "images": ["large.png"] * 257,
    }
    with pytest.raises(
        DataError, match="257 pictures were given, expected at most 256"
    ):
        make_batches(write_lines(rows), batch_size=1)(0, 0)


def test_an_answer_that_is_cut_away_teaches_nothing(make_batches, write_lines):
    rows = [{"question": "x" * 100, "answer": "red"}]
    batches = make_batches(
        write_lines(rows), batch_size=1, max_length=50, truncate=True
    )
    with pytest.raises(DataError, match="nothing of its first 50 tokens is learned"):
        batches(0, 0)


# Regions

SHAPES = [
    {"type": "region", "box": [2, 3, 15, 12]},
    {"type": "region", "point": [5, 6], "picture": 0},
]


def region_row(pictures, answer):
    content = [
        {"type": "image", "image": pictures[0]},
        {"type": "text", "text": "What is in "},
        SHAPES[0],
        {"type": "text", "text": " and at "},
        SHAPES[1],
        {"type": "image", "image": pictures[1]},
        {"type": "text", "text": "beside "},
        {"type": "region", "box": [0, 0, 9, 9]},
        {"type": "text", "text": "?"},
    ]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture
def regional(make_config, byte_folder):
    """A config with a region sampler, or without, and its tokenizer."""

    def regional(sampler=True):
        config = make_config(**({"region": TINY_REGION} if sampler else {}))
        return config, load_tokenizer(byte_folder, config.prompt, regions=sampler)

    return regional


@pytest.mark.parametrize("sampler", [False, True])
def test_a_row_with_regions_is_what_the_model_is_shown_when_asked(
    sampler, regional, make_run, open_data, write_lines, pictures, tmp_path
):
    config, tokenizer = regional(sampler)
    row = region_row(pictures, "A square.")
    mixture = open_data(write_lines([row]))
    batch = Batches(mixture, config, tokenizer, make_run(batch_size=1))(0, 0)
    question = row["messages"][0]["content"]
    shown = [
        {**part, "image": str(tmp_path / part["image"])} if "image" in part else part
        for part in question
    ]
    prompt = Prompt.build([{"role": "user", "content": shown}], [], config, tokenizer)
    length = len(prompt.tokens)
    assert batch.tokens[0, :length].tolist() == list(prompt.tokens)
    assert batch.spans == prompt.spans
    assert [p.digest for p in batch.pictures] == [p.digest for p in prompt.pictures]
    assert sum(span.kind == "region" for span in batch.spans) == (3 if sampler else 0)
    for own, theirs in zip(batch.pictures, prompt.pictures, strict=True):
        assert len(own.regions) == len(theirs.regions)
        assert all(map(np.array_equal, own.regions, theirs.regions))
    # Nothing of the question is learned, all of the answer is.
    assert not batch.learned[0, :length].any()
    assert batch.learned[0, length:].all()


def test_a_region_in_an_answer_is_its_coordinates(
    regional, make_run, open_data, write_lines, pictures
):
    config, tokenizer = regional()
    row = region_row(pictures, [{"type": "text", "text": "Here: "}, SHAPES[0]])
    mixture = open_data(write_lines([row]))
    turns, seen = refer_example(mixture[0], config)
    assert turns[1] == ("assistant", ["Here: ", "[100, 187, 750, 750]"])
    assert [len(picture.regions) for picture in seen] == [2, 1]
    batch = Batches(mixture, config, tokenizer, make_run(batch_size=1))(0, 0)
    answer = tokenizer.hf.decode(batch.tokens[0][batch.learned[0]].tolist())
    assert answer.strip() == "Here: [100, 187, 750, 750]</s>"


def test_a_region_outside_its_picture_is_a_bad_row(
    regional, make_run, open_data, write_lines, pictures
):
    config, tokenizer = regional()
    row = region_row(pictures, "x")
    row["messages"][0]["content"][2] = {"type": "region", "box": [0, 0, 99, 5]}
    mixture = open_data(write_lines([row]))
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: box .* is not inside picture 1"
    ):
        Batches(mixture, config, tokenizer, make_run(batch_size=1))(0, 0)


def test_gradients_reach_the_region_sampler(
    regional, make_run, reinitialise, open_data, write_lines, pictures
):
    config, tokenizer = regional()
    model = reinitialise(MM1(config))
    row = region_row(pictures, "A square.")
    batch = Batches(
        open_data(write_lines([row])), config, tokenizer, make_run(batch_size=1)
    )(0, 0)

    def loss(model):
        return next_token_loss(model, batch)[0]

    value, grads = nn.value_and_grad(model, loss)(model)
    mx.eval(value, grads)
    reached = {
        name: float(mx.abs(grad).max()) for name, grad in tree_flatten(grads["region"])
    }
    assert len(reached) == len(tree_flatten(model.region.parameters()))
    assert all(size > 0 for size in reached.values()), reached
    # Along the gradient the loss falls as it says.
    name, grad = max(tree_flatten(grads["region"]), key=lambda x: x[1].size)
    weights = dict(tree_flatten(model.parameters()))
    step = 1e-2 / float(mx.sqrt((grad * grad).sum()))
    losses = []
    for sign in (1, -1):
        moved = weights[f"region.{name}"] + sign * step * grad
        model.load_weights([(f"region.{name}", moved)], strict=False)
        losses.append(float(loss(model)))
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(float((grad * grad).sum()), rel=0.02)
