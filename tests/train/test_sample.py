"""Targets are every assistant turn, its end included, and nothing else."""

import json
import re
import shutil
from itertools import groupby

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.errors import ConfigError, PromptError
from mm1_mlx.image import load_picture, load_pictures
from mm1_mlx.layout import indicator_texts
from mm1_mlx.prompt import Prompt, encode_turns, render
from mm1_mlx.tokenizer import load_tokenizer
from mm1_mlx.train.sample import (
    Row,
    Sample,
    build_document,
    build_sample,
    build_samples,
    collate,
    pack,
    widen_sample,
)

BRACKETS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# As Qwen's, which writes a line's end behind the end token.
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    ("system", ["Be kind."]),
    ("user", [None, "What is it?"]),
    ("assistant", ["A red square."]),
    ("user", ["And ", None, "this, ", None, "or that?"]),
    ("assistant", ["Blue."]),
    ("user", ["</s> Sure?"]),
    ("assistant", ["Yes <image> </s>!"]),
]
ANSWERS = ["A red square.</s>", "Blue.</s>", "Yes <image> </s>!</s>"]


def runs(sample, tokenizer):
    """The sample's text, cut where learned and unlearned tokens meet."""
    pairs = zip(sample.tokens, sample.learned, strict=True)
    return [
        (learned, tokenizer.hf.decode([token for token, _ in group]))
        for learned, group in groupby(pairs, key=lambda pair: pair[1])
    ]


@pytest.mark.parametrize(
    "template", ["llava", "vicuna_v1", "auroracap", BRACKETS, CHATML]
)
@pytest.mark.parametrize("folder", ["byte_folder", "spm_folder"])
def test_learned_tokens_are_exactly_the_answers_and_their_ends(
    template, folder, make_config, request
):
    named = "checkpoint" if template in (BRACKETS, CHATML) else template
    config = make_config(prompt={"template": named})
    tokenizer = load_tokenizer(request.getfixturevalue(folder), config.prompt)
    tokenizer.hf.chat_template = template
    sample = build_sample(TURNS, config, tokenizer)
    pieces = runs(sample, tokenizer)
    # Templates and tokenizers may begin an answer with a space.
    assert [text.lstrip(" ") for learned, text in pieces if learned] == ANSWERS
    # What a template writes behind the last end token is read.
    ending = [False] if template in ("auroracap", CHATML) else []
    assert [learned for learned, _ in pieces] == [False, True] * 3 + ending
    # Every turn's last learned token ends it; no other end token is learned.
    eos = tokenizer.hf.eos_token_id
    ends = [t == eos and m for t, m in zip(sample.tokens, sample.learned, strict=True)]
    following = [*sample.learned[1:], False]
    last = [m and not f for m, f in zip(sample.learned, following, strict=True)]
    assert ends == last
    assert sum(ends) == 3


def test_line_breaks_before_an_answer_join_no_template(
    make_config, byte_folder, tmp_path
):
    """Qwen's tokenizer reads the template's line break and an answer's as one token."""
    folder = shutil.copytree(byte_folder, tmp_path / "tokenizer")
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
    vocab["ĊĊ"] = len(vocab)
    merges.append(["Ċ", "Ċ"])
    breaks = {
        "type": "Split", "pattern": {"Regex": r"\s*[\r\n]+"},
        "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    bytewise = whole["pre_tokenizer"] | {"use_regex": False}
    whole["pre_tokenizer"] = {
        "type": "Sequence", "pretokenizers": [breaks, bytewise],
    }  # fmt: skip
    path.write_text(json.dumps(whole))
    config = make_config(prompt={"template": "checkpoint"})
    tokenizer = load_tokenizer(folder, config.prompt)
    tokenizer.hf.chat_template = CHATML
    assert len(tokenizer.hf.encode("\n\n", add_special_tokens=False)) == 1

    def made(answer):
        return build_sample(
            [("user", ["What?"]), ("assistant", [answer])], config, tokenizer
        )

    assert made("\nred") == made("\r\n\nred") == made("red")
    assert [text for learned, text in runs(made("\nred\n"), tokenizer) if learned] == [
        "red\n</s>"
    ]


def test_learned_and_other_text_make_the_conversation(tiny_config, tokenizer):
    sample = build_sample(TURNS[1:5], tiny_config, tokenizer)
    text = "".join(text for _, text in runs(sample, tokenizer))
    assert text == render(TURNS[1:5], tiny_config.prompt, tokenizer, answer=False)


def test_a_conversation_without_answers_teaches_nothing(tiny_config, tokenizer):
    assert not any(build_sample(TURNS[:2], tiny_config, tokenizer).learned)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}" + BRACKETS,
        "{% for m in messages[-2:] %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}",
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(
    template, make_config, tokenizer
):
    tokenizer.hf.chat_template = template
    config = make_config(prompt={"template": "checkpoint"})
    with pytest.raises(
        PromptError, match=r"turn \d cannot be told apart: the chat temp"
    ):
        build_sample(TURNS, config, tokenizer)


@pytest.mark.parametrize("template", ["checkpoint", "llava"])
def test_an_answer_before_all_questions_is_refused(make_config, tokenizer, template):
    """Unless it is only read: transformers renders no empty conversation."""
    tokenizer.hf.chat_template = BRACKETS
    config = make_config(prompt={"template": template})
    turns = [("assistant", ["Hello."]), *TURNS[1:3]]
    with pytest.raises(
        PromptError, match=r"begins with an answer, .* leave that turn out"
    ):
        build_sample(turns, config, tokenizer)
    sample = build_sample(turns, config, tokenizer, unlearned=[0])
    assert any(sample.learned)


# Of Qwen3's template what it does with thoughts: those before the last question are left
# out, and the last answer has some, be they empty.
THINKING = (
    "{% set ns = namespace(asked=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '[' + m.role + ']' }}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() "
    "if '</think>' in m.content else '' %}"
    "{% set content = m.content.split('</think>')[-1].strip() %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.asked "
    "and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + content }}{% else %}{{ content }}"
    "{% endif %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
NOTHING_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture
def thinking(make_config, byte_folder):
    config = make_config(prompt={"template": "checkpoint"})
    tokenizer = load_tokenizer(byte_folder, config.prompt)
    tokenizer.hf.chat_template = THINKING
    return config, tokenizer


def test_answers_that_a_template_rewrites_are_learned_as_they_are_asked(thinking):
    config, tokenizer = thinking
    samples = build_samples(TALK, config, tokenizer)
    asked = [TALK[:2], TALK[:4]]
    for sample, turns, answer in zip(
        samples, asked, ("the first.", "a circle, a star."), strict=True
    ):
        prompt = encode_turns(turns, config.prompt, tokenizer)
        assert sample.learned.index(True) == len(prompt)
        assert list(sample.tokens[: len(prompt)]) == prompt
        assert all(sample.learned[len(prompt) :])
        said = tokenizer.hf.decode(sample.tokens[len(prompt) :])
        assert said == f"{NOTHING_THOUGHT}{answer}</s>"
    # The answer before is read as it is written then, and what is unlearned only read.
    assert "[assistant]the first.</s>" in tokenizer.hf.decode(samples[1].tokens)
    assert build_samples(TALK, config, tokenizer, {2}) == samples[1:]
    assert build_samples(TALK[:3], config, tokenizer) == samples[:1]
    with pytest.raises(PromptError, match="2 answers differently when later turns"):
        build_sample(TALK, config, tokenizer)


def test_an_answer_that_nothing_ends_gets_an_end_and_a_sample_of_its_own(
    make_config, byte_folder
):
    """A base decoder's template writes none; a model would never learn to stop."""
    config = make_config(prompt={"template": "plain"})
    tokenizer = load_tokenizer(byte_folder, config.prompt)
    talk = [
        ("user", [None, "What is it?"]),
        ("assistant", [" A star."]),
        ("user", [" And then?"]),
        ("assistant", [" Nothing."]),
    ]
    samples = build_samples(talk, config, tokenizer)
    for sample, asked, answer in zip(
        samples, (talk[:1], talk[:3]), (" A star.</s>", " Nothing.</s>"), strict=True
    ):
        prompt = encode_turns(asked, config.prompt, tokenizer)
        assert list(sample.tokens[: len(prompt)]) == prompt
        assert runs(sample, tokenizer)[-1] == (True, answer)
        assert sample.learned.index(True) == len(prompt)
        assert sample.tokens[-1] == tokenizer.hf.eos_token_id
    # One that is only read ends nothing.
    (last,) = build_samples(talk, config, tokenizer, {1})
    assert last == samples[1]
    assert tokenizer.hf.eos_token_id not in last.tokens[:-1]


def test_words_that_only_a_question_has_are_said(make_config, tokenizer):
    """DeepSeek-R1's template begins every answer, and leaves that out of those given."""
    tokenizer.hf.chat_template = BRACKETS.replace(
        "'[assistant]' }}", "'[assistant]<think>' }}"
    )
    config = make_config(prompt={"template": "checkpoint"})
    with pytest.raises(
        PromptError,
        match=r"turn 3 cannot be learned: .* begin every answer with <think>",
    ):
        build_samples(TURNS, config, tokenizer)


def test_a_template_that_keeps_what_stands_makes_one_sample(thinking):
    config, tokenizer = thinking
    tokenizer.hf.chat_template = BRACKETS
    (sample,) = build_samples(TURNS, config, tokenizer)
    assert sample == build_sample(TURNS, config, tokenizer)


def test_a_model_without_prompt_format_cannot_be_trained(make_config, tokenizer):
    with pytest.raises(ConfigError, match="no prompt format, so it cannot be trained"):
        build_sample(TURNS, make_config(prompt=None), tokenizer)


def test_tokens_that_the_decoder_does_not_know_are_refused(byte_folder, tiny_config):
    tokenizer = load_tokenizer(byte_folder, tiny_config.prompt, regions=True)
    known = Sample((5, 6), (False, True))
    size = tiny_config.decoder.vocab_size
    assert tokenizer.region_id == size
    for token in (size + 1, -1, 10**6):
        unknown = Sample((5, token), (False, True))
        with pytest.raises(
            PromptError, match=f"makes token {token}, the decoder knows"
        ):
            collate([known, unknown], [[], []], [], tiny_config, tokenizer)
    region = Sample((5, tokenizer.region_id), (False, True))
    with pytest.raises(PromptError, match="has 1 places for regions but 0 were given"):
        collate([known, region], [[], []], [], tiny_config, tokenizer)


def test_pictures_fill_their_places_and_are_never_learned(make_batch):
    # Even a picture that the assistant shows.
    turns = [("user", ["Draw ", None]), ("assistant", ["Here: ", None, " done"])]
    batch = make_batch([turns, TURNS[1:5]], [[0, 1], [2, 0, 3]])
    fillers = np.flatnonzero(batch.tokens.ravel() == 2)
    covered = [i for span in batch.spans for i in range(span.start, span.stop)]
    assert fillers.tolist() == sorted(covered)
    assert not batch.learned.ravel()[fillers].any()
    assert [span.picture for span in batch.spans] == [0, 1, 2, 0, 3]
    assert {span.length for span in batch.spans} == {4}


def test_rows_are_padded_on_the_right_with_what_is_not_learned(
    make_batch, conversation, tiny_config, train_tokenizer
):
    talks = [conversation("red"), conversation("a blue star", "two circles")]
    batch = make_batch(talks, [[0], [1]])
    assert batch.tokens.shape == batch.learned.shape
    for row, mask, turns in zip(batch.tokens, batch.learned, talks, strict=True):
        sample = build_sample(turns, tiny_config, train_tokenizer)
        length = len(sample.tokens) + 3
        wide = [
            t for token in sample.tokens for t in [token] * (4 if token == 2 else 1)
        ]
        assert row[:length].tolist() == wide
        assert mask.sum() == sum(sample.learned)
        assert not row[length:].any()
        assert not mask[length:].any()
    assert not batch.learned[0, -1]


def test_a_row_with_another_number_of_pictures_is_an_error(make_batch, conversation):
    with pytest.raises(PromptError, match="1 places for pictures but 2 images were g"):
        make_batch([conversation("red")], [[0, 1]])


@pytest.mark.parametrize("indicators", ["none", "index", "seps"])
def test_a_row_is_what_the_model_is_shown_when_asked(
    indicators, make_config, train_tokenizer
):
    tiling = {"kind": "split", "indicators": indicators}
    config = make_config(image={"tiling": tiling})
    photos = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    question = [("user", [None, None, "What colour?"])]
    tokens = encode_turns(question, config.prompt, train_tokenizer)
    sample = Sample(tuple(tokens), (False,) * len(tokens))
    pictures = load_pictures(photos, config.image)
    batch = collate([sample], [[0, 1]], pictures, config, train_tokenizer)
    prompt = Prompt.build("What colour?", photos, config, train_tokenizer)
    assert batch.tokens[0].tolist() == list(prompt.tokens)
    assert batch.spans == prompt.spans


# Token by token: where the learned text begins and ends, written by hand

TALK = [
    ("system", ["Be kind."]),
    ("user", [None, None, "Which is red?"]),
    ("assistant", ["the first."]),
    ("user", ["and ", None, "here?"]),
    ("assistant", ["a circle, a star."]),
]
ASKED = "<image>\n<image>\nWhich is red?", "and <image>\nhere?"
TEXTS = {
    "llava": f"Be kind. USER: {ASKED[0]} ASSISTANT:{{ the first.</s>}}"
    f"USER: {ASKED[1]} ASSISTANT:{{ a circle, a star.</s>}}",
    "vicuna_v1": f"Be kind. USER: {ASKED[0]} ASSISTANT:{{ the first.</s>}}"
    f"USER: {ASKED[1]} ASSISTANT:{{ a circle, a star.</s>}}",
    "mistral": f"[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n{ASKED[0]} [/INST]"
    f"{{ the first. </s>}}[INST] {ASKED[1]} [/INST]{{ a circle, a star. </s>}}",
    "stablelm": f"Be kind. USER: {ASKED[0]} ASSISTANT:{{ the first.<|endoftext|>}}"
    f"USER: {ASKED[1]} ASSISTANT:{{ a circle, a star.<|endoftext|>}}",
    "xgen_mm": "Be kind.<image><image>Which is red?{the first.<|endofchunk|>}"
    "and <image>here?{a circle, a star.<|endofchunk|>}",
    "checkpoint": "[system]Be kind.</s>[user]<image><image>Which is red?</s>[assistant]"
    "{the first.</s>}[user]and <image>here?</s>[assistant]{a circle, a star.</s>}",
}


def cut(text):
    """The text without its braces, and for every character whether it stood in them."""
    inside = [
        (character, part.startswith("{"))
        for part in re.split(r"(\{[^}]*\})", text)
        for character in part.strip("{}")
    ]
    return "".join(c for c, _ in inside), [own for _, own in inside]


@pytest.mark.parametrize("template", TEXTS)
@pytest.mark.parametrize("folder", ["byte_folder", "spm_folder"])
def test_every_token_is_learned_that_stands_in_an_answer(
    template, folder, make_config, request
):
    config = make_config(prompt={"template": template})
    tokenizer = load_tokenizer(request.getfixturevalue(folder), config.prompt)
    tokenizer.hf.chat_template = BRACKETS
    text, learned = cut(TEXTS[template])
    assert render(TALK, config.prompt, tokenizer, answer=False) == text
    # An account of its own: from the characters that the tokenizer says a token is of.
    encoded = tokenizer.hf._tokenizer(text, return_offsets_mapping=True)
    if template == "checkpoint" and tokenizer.hf.bos_token_id is not None:
        encoded = tokenizer.hf._tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=False
        )
    sample = build_sample(TALK, config, tokenizer)
    assert list(sample.tokens) == encoded["input_ids"]
    for token, own, (start, stop) in zip(
        sample.tokens, sample.learned, encoded["offset_mapping"], strict=True
    ):
        # No token is partly of an answer.
        parts = set(learned[start:stop]) or {False}
        assert parts == {own}, tokenizer.hf.decode([token])
    assert sample.tokens.count(tokenizer.image_id) == 3


@pytest.mark.parametrize("template", ["llava", "mistral", "checkpoint"])
@pytest.mark.parametrize("indicators", ["none", "index", "seps"])
def test_tiles_and_what_stands_between_them_are_never_learned(
    template, indicators, make_config, byte_folder
):
    tiling = {"kind": "split", "indicators": indicators}
    config = make_config(prompt={"template": template}, image={"tiling": tiling})
    tokenizer = load_tokenizer(byte_folder, config.prompt)
    tokenizer.hf.chat_template = BRACKETS
    # Also where the assistant shows one.
    talk = [*TALK[:-1], ("assistant", ["a circle ", None, "it is."])]
    sample = build_sample(talk, config, tokenizer)
    photos = [Image.new("RGB", (40, 30), c) for c in ("red", "blue", "lime", "white")]
    pictures = load_pictures(photos, config.image)
    row = widen_sample(sample, pictures, config, tokenizer)
    expected, number = [], 0
    for token, own in zip(sample.tokens, sample.learned, strict=True):
        if token != tokenizer.image_id:
            expected.append((token, own))
            continue
        texts = indicator_texts(pictures[number], number, config.image.tiling)
        for text in texts or [""] * 5:
            spelled = tokenizer.encode(text, add_special_tokens=False) if text else []
            expected += [(t, False) for t in spelled] + [(2, False)] * 4
        number += 1
    assert number == 4
    assert list(zip(row.tokens, row.learned, strict=True)) == expected
    assert sum(span.length for span in row.spans) == 4 * 5 * 4


# Documents


@pytest.mark.parametrize("folder", ["byte_folder", "spm_folder"])
def test_all_text_of_a_document_is_learned_behind_the_first_token(
    folder, make_config, request
):
    config = make_config()
    tokenizer = load_tokenizer(request.getfixturevalue(folder), config.prompt)
    sample = build_document(["a star, ", None, " a circle </s>."], config, tokenizer)
    end = tokenizer.hf.eos_token_id
    assert sample.tokens[-1] == end
    # What looks like an end in the text is text.
    assert sample.tokens.count(end) == 1
    picture = load_picture(Image.new("RGB", (9, 9)), config.image)
    row = widen_sample(sample, [picture], config, tokenizer)
    (span,) = row.spans
    places = range(span.start, span.stop)
    unlearned = [i for i, own in enumerate(row.learned) if not own]
    assert unlearned == sorted({0, *places})


def test_the_text_behind_a_documents_first_picture_is_learned(
    tiny_config, train_tokenizer
):
    sample = build_document([None, " a star"], tiny_config, train_tokenizer)
    picture = load_picture(Image.new("RGB", (9, 9)), tiny_config.image)
    row = widen_sample(sample, [picture], tiny_config, train_tokenizer)
    assert row.learned == (*[False] * 4, *[True] * (len(row.tokens) - 4))


def test_a_document_is_what_a_base_model_is_shown(make_config, any_folder):
    # Whatever template the model speaks with later.
    config = make_config(prompt={"template": "vicuna_v1"})
    base = make_config(prompt={"template": "plain"})
    tokenizer = load_tokenizer(any_folder, config.prompt)
    photo = Image.new("RGB", (9, 9))
    parts = ["a star\n", None, " a circle"]
    content = [
        {"type": "text", "text": parts[0]},
        {"type": "image", "image": photo},
        {"type": "text", "text": parts[2]},
    ]
    prompt = Prompt.build([{"role": "user", "content": content}], [], base, tokenizer)
    sample = build_document(parts, config, tokenizer)
    row = widen_sample(sample, prompt.pictures, config, tokenizer)
    assert row.tokens == (*prompt.tokens, tokenizer.hf.eos_token_id)
    assert row.spans == prompt.spans


def test_a_document_needs_an_end(make_config, byte_folder):
    config = make_config()
    tokenizer = load_tokenizer(byte_folder, config.prompt)
    tokenizer.hf._tokenizer.eos_token = None
    with pytest.raises(
        PromptError, match="the tokenizer has no end token, so no text can end"
    ):
        build_document(["a"], config, tokenizer)
    named = make_config(prompt={"eos_token_ids": [7]})
    assert build_document(["a"], named, tokenizer).tokens[-1] == 7


# Rows


def test_a_packed_row_learns_no_first_token():
    rows = [Row((5, 6, 7), (True, True, False), ()), Row((8, 9), (True, True), ())]
    batch = pack(rows, [[], []], [])
    assert batch.tokens[0, :6].tolist() == [5, 6, 7, 8, 9, 0]
    assert batch.learned[0, :6].tolist() == [False, True, False, False, True, False]
    assert (batch.segments, batch.lengths, batch.tokens.shape) == (
        (3, 2),
        (5,),
        (1, 32),
    )
    assert batch.real.sum() == 5
