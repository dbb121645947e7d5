"""Targets are every assistant turn, its end included, and nothing else."""

from itertools import groupby

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.errors import ConfigError, PromptError
from mm1_mlx.image import load_pictures
from mm1_mlx.prompt import Prompt, encode_turns, render
from mm1_mlx.tokenizer import load_tokenizer
from mm1_mlx.train.sample import Sample, build_sample, collate

CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
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


@pytest.mark.parametrize("template", ["llava", "vicuna_v1", "checkpoint"])
@pytest.mark.parametrize("folder", ["byte_folder", "spm_folder"])
def test_learned_tokens_are_exactly_the_answers_and_their_ends(
    template, folder, make_config, request
):
    config = make_config(prompt={"template": template})
    tokenizer = load_tokenizer(request.getfixturevalue(folder), config.prompt)
    tokenizer.hf.chat_template = CHATML
    sample = build_sample(TURNS, config, tokenizer)
    pieces = runs(sample, tokenizer)
    assert [text.strip() for learned, text in pieces if learned] == ANSWERS
    assert [learned for learned, _ in pieces] == [False, True] * 3
    # Every turn's last learned token ends it; no other end token is learned.
    eos = tokenizer.hf.eos_token_id
    ends = [t == eos and m for t, m in zip(sample.tokens, sample.learned, strict=True)]
    following = [*sample.learned[1:], False]
    last = [m and not f for m, f in zip(sample.learned, following, strict=True)]
    assert ends == last
    assert sum(ends) == 3


def test_learned_and_other_text_make_the_conversation(tiny_config, tokenizer):
    sample = build_sample(TURNS[1:5], tiny_config, tokenizer)
    text = "".join(text for _, text in runs(sample, tokenizer))
    assert text == render(TURNS[1:5], tiny_config.prompt, tokenizer, answer=False)


def test_a_conversation_without_answers_teaches_nothing(tiny_config, tokenizer):
    assert not any(build_sample(TURNS[:2], tiny_config, tokenizer).learned)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}" + CHATML,
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
