"""MM1 as a whole: pictures in place, mlx-lm's loops, batches, ragged prompts."""

import inspect

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, TextStateMachine, generate_step
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.sample_utils import make_sampler

from mm1_mlx.errors import ConfigError, PromptError
from mm1_mlx.layout import Picture, Span, group_tiles
from mm1_mlx.models import MM1

K = 4  # image tokens of one tile in the tiny config
NUM_TOKENS = 12
DECODERS = {
    "dense": {},
    "qk_norm": {"qk_norm": "head", "rope_interleaved": True},
    "window": {"sliding_window": 6},
    "sparse": {"moe": {"num_experts": 4, "every": 2, "offset": 1}},
}


def make_picture(seed, tiles=1):
    rng = np.random.default_rng(seed)
    arrays = rng.standard_normal((tiles, 16, 16, 3)).astype(np.float32)
    return Picture(tuple(arrays), (16, 16), str(seed))


def lay_out(*parts):
    """Tokens and spans of a prompt written as token ids and pictures."""
    tokens, spans, pictures = [], [], []
    for part in parts:
        if isinstance(part, Picture):
            length = K * len(part.tiles)
            number = len(pictures)
            spans.append(Span(len(tokens), length, "picture", number, part.digest))
            tokens += [2] * length
            pictures.append(part)
        else:
            tokens.append(part)
    return tokens, spans, pictures


def embed(model, tokens, spans, pictures):
    image_tokens = model.encode(pictures)
    return model.embed(mx.array(tokens), image_tokens, spans)


def logits_of(model, *parts):
    tokens, spans, pictures = lay_out(*parts)
    embeddings = embed(model, tokens, spans, pictures)
    return model(mx.array(tokens)[None], input_embeddings=embeddings[None])[0]


def greedy(model, *parts, **options):
    """Tokens, and the log-probabilities of the first, by mlx-lm's loop."""
    tokens, spans, pictures = lay_out(*parts)
    steps = list(
        generate_step(
            mx.array(tokens),
            model,
            max_tokens=NUM_TOKENS,
            input_embeddings=embed(model, tokens, spans, pictures),
            **options,
        )
    )
    return [int(token) for token, _ in steps], steps[0][1]


A, B = make_picture(1), make_picture(2)
PROMPT = [5, 6, A, 7, 8, 9]


@pytest.fixture(scope="module", params=DECODERS.values(), ids=DECODERS)
def model(request, make_model):
    return make_model(decoder=request.param)


def test_generation_equals_the_full_forward_again_and_again(model):
    parts, expected = list(PROMPT), []
    for _ in range(NUM_TOKENS):
        expected.append(int(logits_of(model, *parts)[-1].argmax()))
        parts.append(expected[-1])
    assert greedy(model, *PROMPT)[0] == expected
    assert len(set(expected)) >= 4


@pytest.mark.parametrize("step", [1, 3, 7, 2048])
def test_the_prefill_chunk_does_not_matter(step, model, assert_close):
    tokens, logprobs = greedy(model, *PROMPT, B, 10, prefill_step_size=step)
    expected, expected_logprobs = greedy(model, *PROMPT, B, 10)
    assert tokens == expected
    assert_close(logprobs, expected_logprobs)


def test_embeddings_of_tokens_equal_the_tokens(model):
    tokens = mx.array([5, 6, 7, 8])
    embeddings = model.embed(tokens, [], [])
    result = model(tokens[None], input_embeddings=embeddings[None])
    assert mx.array_equal(result, model(tokens[None]))


def test_text_only_equals_a_model_that_never_had_pictures(make_config, make_model):
    model = make_model()
    blind = MM1(make_config(vision=None, connector=None, image=None))
    blind.decoder.update(model.decoder.parameters())
    tokens, logprobs = greedy(model, 5, 6, 7, 8)
    expected = list(generate_step(mx.array([5, 6, 7, 8]), blind, max_tokens=NUM_TOKENS))
    assert tokens == [int(token) for token, _ in expected]
    assert mx.array_equal(logprobs, expected[0][1])


def test_a_picture_changes_logits_only_from_its_span_on(model, assert_close):
    one, other = logits_of(model, 5, 6, A, 7, 8), logits_of(model, 5, 6, B, 7, 8)
    assert_close(one[:2], other[:2])
    assert mx.abs(one[2:] - other[2:]).max(axis=-1).min() > 1e-3


def test_the_answer_depends_on_the_picture(tiny_model):
    assert greedy(tiny_model, 5, A, 6)[0] != greedy(tiny_model, 5, B, 6)[0]


def test_the_order_of_pictures_matters(tiny_model):
    one, other = logits_of(tiny_model, A, 5, B, 6), logits_of(tiny_model, B, 5, A, 6)
    assert mx.abs(one - other)[-1].max() > 1e-3


def test_several_pictures_stand_where_their_spans_say(tiny_model):
    tokens, spans, pictures = lay_out(5, A, B, 6, A, 7)
    embeddings = embed(tiny_model, tokens, spans, pictures)
    one, two = tiny_model.encode([A, B])
    text = tiny_model.decoder.embed_tokens(mx.array([5, 6, 7]))
    expected = [text[0:1], one, two, text[1:2], one, text[2:3]]
    assert mx.allclose(embeddings, mx.concatenate(expected), atol=1e-5)


def test_spans_may_share_a_picture_and_come_in_any_order(tiny_model):
    tokens = mx.array([5] + [2] * K + [6] + [2] * K + [7] + [2] * K)
    starts, owners = [1, 2 + K, 3 + 2 * K], [1, 0, 1]
    spans = [Span(s, K, "picture", p, "") for s, p in zip(starts, owners, strict=True)]
    image_tokens = tiny_model.encode([A, B])
    embeddings = tiny_model.embed(tokens, image_tokens, spans[::-1])
    for start, owner in zip(starts, owners, strict=True):
        assert mx.array_equal(embeddings[start : start + K], image_tokens[owner])
    assert mx.array_equal(
        embeddings[2 + 2 * K], tiny_model.decoder.embed_tokens(tokens)[-K - 1]
    )


def test_pictures_of_several_tiles_are_ragged(tiny_model, assert_close):
    three, one = make_picture(3, tiles=3), make_picture(4)
    image_tokens = tiny_model.encode([three, one])
    assert [len(x) for x in image_tokens] == [3 * K, K]
    tiles = [Picture((tile,), (16, 16), "") for tile in three.tiles]
    expected = mx.concatenate(tiny_model.encode(tiles))
    assert_close(image_tokens[0], expected)


def test_tiles_of_several_resolutions_are_put_back_in_order(tiny_model, assert_close):
    rng = np.random.default_rng(5)
    large = rng.standard_normal((24, 24, 3)).astype(np.float32)
    small = make_picture(6, tiles=2).tiles
    mixed = Picture((small[0], large, small[1]), (16, 16), "")
    result = tiny_model.encode([A, mixed])
    alone = [Picture((tile,), (16, 16), "") for tile in mixed.tiles]
    assert_close(result[0], tiny_model.encode([A])[0])
    assert_close(result[1], mx.concatenate(tiny_model.encode(alone)))


def test_tiles_are_grouped_by_resolution_in_order_of_appearance():
    small = np.zeros((8, 8, 3), np.float32)
    mixed = Picture((A.tiles[0], small), (16, 16), "")
    groups = group_tiles([A, mixed, B])
    assert [g.pixels.shape for g in groups] == [(3, 16, 16, 3), (1, 8, 8, 3)]
    assert [g.places for g in groups] == [((0, 0), (1, 0), (2, 0)), ((1, 1),)]


@pytest.mark.parametrize(
    ("length", "owner", "message"),
    [
        (3, 0, "picture 1 has 4 image tokens but the prompt holds 3 places for it"),
        (5, 0, "picture 1 has 4 image tokens but the prompt holds 5 places for it"),
        (4, 1, "prompt has a place for picture 2 but 1 pictures were given"),
    ],
)
def test_spans_that_do_not_fit_the_pictures_are_named(
    length, owner, message, tiny_model
):
    spans = [Span(1, length, "picture", owner, "")]
    tokens = mx.array([5] + [2] * length)
    with pytest.raises(PromptError, match=message):
        tiny_model.embed(tokens, tiny_model.encode([A]), spans)


@pytest.mark.parametrize("part", ["vision", "connector"])
def test_a_model_without_eyes_says_so(part, make_config):
    model = MM1(make_config(**{part: None, "image": None}))
    with pytest.raises(ConfigError, match=f"the model has no {part}"):
        model.encode([A])


def test_no_pictures_need_no_eyes(make_config):
    assert MM1(make_config(vision=None, connector=None, image=None)).encode([]) == []


def test_parts_left_out_are_not_built(make_config):
    encoder = MM1(make_config(connector=None, decoder=None, prompt=None))
    assert set(encoder.parameters()) == {"vision"}
    decoder = MM1(make_config(vision=None, connector=None, image=None))
    assert set(decoder.parameters()) == {"decoder"}
    assert set(decoder.tensors()) == {f"decoder.{k}" for k in names(decoder.decoder)}


def names(module):
    return {name for name, _ in tree_flatten(module.parameters())}


# Ragged rows: other lengths, other places of the pictures, one without any.
ROWS = [PROMPT, [5, A, 6, B, 7, 8, 9, 10, 11], [12, 13], [B, 9]]


def prefilled(model, parts):
    """Caches that hold all of a prompt but its last token; that token; the rest."""
    tokens, spans, pictures = lay_out(*parts)
    embeddings = embed(model, tokens, spans, pictures)
    cache = model.make_cache()
    head = mx.array(tokens[:-1])
    model(head[None], cache, embeddings[None, :-1])
    return cache, tokens[-1], tokens[:-1]


@pytest.mark.parametrize("name", DECODERS)
def test_ragged_batches_of_pictures_equal_single_prompts(name, make_model):
    model = make_model(decoder=DECODERS[name])
    caches, last, before = zip(*(prefilled(model, row) for row in ROWS), strict=True)
    generator = BatchGenerator(model, max_tokens=NUM_TOKENS)
    uids = generator.insert(
        [[token] for token in last], caches=list(caches), all_tokens=list(before)
    )
    answers = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            answers[response.uid].append(response.token)
    for uid, row in zip(uids, ROWS, strict=True):
        assert answers[uid] == greedy(model, *row)[0]


def test_rows_of_a_batch_equal_rows_alone(model, assert_close):
    rows = [lay_out(5, 6, picture, 7, 8) for picture in (A, B)]
    tokens = mx.array([row[0] for row in rows])
    embeddings = mx.stack([embed(model, *row) for row in rows])
    logits = model(tokens, input_embeddings=embeddings)
    for i, picture in enumerate((A, B)):
        assert_close(logits[i], logits_of(model, 5, 6, picture, 7, 8))


# What mlx-lm must keep: exactly the calls the package makes.


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (
            generate_step,
            {
                "max_tokens", "sampler", "prompt_cache", "prefill_step_size",
                "prompt_progress_callback", "input_embeddings",
            },
        ),
        (make_sampler, {"temp", "top_p"}),
        (create_attention_mask, {"h", "cache", "window_size"}),
        (scaled_dot_product_attention, {"cache", "scale", "mask"}),
        (BatchGenerator.insert, {"prompts", "max_tokens", "caches", "all_tokens"}),
    ],
)  # fmt: skip
def test_mlx_lm_takes_the_arguments_we_pass(function, arguments):
    assert arguments <= set(inspect.signature(function).parameters)


def test_mlx_lms_positional_calls_mean_what_we_mean():
    rope = initialize_rope(8, 10_000.0, True, None, 128)
    assert (rope.dims, rope.base, rope.traditional) == (8, 10_000.0, True)
    glu = SwitchGLU(6, 10, 3)
    shapes = [glu[n].weight.shape for n in ("gate_proj", "up_proj", "down_proj")]
    assert shapes == [(3, 10, 6), (3, 10, 6), (3, 6, 10)]
    sampler = make_sampler(0.0, 1.0)
    assert sampler(mx.array([[0.0, 2.0, 1.0]])).item() == 1


def test_mlx_lms_cache_counts_its_offset():
    cache = KVCache()
    keys = mx.zeros((1, 2, 3, 4))
    cache.update_and_fetch(keys, keys)
    assert cache.offset == 3
    k, v = cache.update_and_fetch(keys[:, :, :1], keys[:, :, :1])
    assert k.shape == v.shape == (1, 2, 4, 4)


def test_mlx_lms_progress_callback_counts_prompt_tokens(tiny_model):
    seen = []
    greedy(
        tiny_model,
        *PROMPT,
        prefill_step_size=4,
        prompt_progress_callback=lambda *counts: seen.append(counts),
    )
    assert seen == [(0, 9), (4, 9), (8, 9), (9, 9)]


def test_mlx_lms_text_machine_stops_at_a_string_and_holds_back_its_beginning():
    machine = TextStateMachine({"normal": [("STOP", None)]})
    state = machine.make_state()
    state, text, name = machine.step(state, "one ST")
    assert (text, name) == ("one ", "normal")
    flushed = machine.flush(state)
    assert flushed[1] == "ST"
    state, text, name = machine.step(state, "OP two")
    assert (text, name) == ("", None)


def test_mlx_lms_tokenizer_wrapper_streams_text(any_tokenizer):
    wrapper = any_tokenizer.hf
    assert wrapper.eos_token_ids == {wrapper.eos_token_id}
    assert wrapper.convert_tokens_to_ids("<image>") == any_tokenizer.image_id
    ids = wrapper.encode("is the square red", add_special_tokens=False)
    detokenizer = wrapper.detokenizer
    pieces = []
    for token in ids:
        detokenizer.add_token(token)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    pieces.append(detokenizer.last_segment)
    assert "".join(pieces) == "is the square red"
    # A fresh one per answer.
    assert wrapper.detokenizer is not detokenizer
    assert wrapper.detokenizer.text == ""
