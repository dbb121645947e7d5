"""The decoder's options do what they say, and caches change nothing."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from mm1_mlx.config import DecoderConfig
from mm1_mlx.models.decoder import FEEDFORWARDS, MLP, Decoder
from mm1_mlx.models.moe import SparseMLP

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "every": 2, "offset": 1}
VARIANTS = {
    "grouped": {},
    "multi_head": {"num_key_value_heads": 6},
    "multi_query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "interleaved": {"rope_interleaved": True},
    "biased": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qk_norm": {"qk_norm": "head"},
    "qk_norm_full": {"qk_norm": "full"},
    "qk_norm_rotated": {"qk_norm": "rotated", "rope_interleaved": True},
    "layer_norm": {"norm": "layer"},
    "partial_rope": {"rotary_dim": 4},
    "scaled": {"embedding_scale": 48**0.5},
    "layer_sizes": {
        "layer_sizes": [
            {
                "num_attention_heads": heads,
                "num_key_value_heads": keys,
                "intermediate_size": width,
            }
            for heads, keys, width in ((2, 1, 24), (6, 2, 64), (4, 4, 40))
        ]
    },
    "gelu": {"hidden_act": "gelu_tanh"},
    "window": {"sliding_window": 4},
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3_rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
        }
    },
    "sparse": {"moe": MOE},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
TOKENS = mx.array(np.random.default_rng(0).integers(0, 97, (2, 11)))


@pytest.fixture(scope="module")
def make_decoder(reinitialise):
    def make(**changes):
        return reinitialise(Decoder(DecoderConfig.from_dict(SIZES | changes)))

    return make


def cached(decoder, tokens, steps):
    logits, start = [], 0
    caches = [KVCache() for _ in decoder.layers]
    for step in steps:
        logits.append(decoder(tokens[:, start : start + step], caches))
        start += step
    assert start == tokens.shape[1]
    return mx.concatenate(logits, axis=1)


@variants
@pytest.mark.parametrize("steps", [[11], [1] * 11, [7, 1, 1, 1, 1], [3, 5, 3]])
def test_cached_decode_equals_the_full_forward(
    changes, steps, make_decoder, assert_close
):
    decoder = make_decoder(**changes)
    result = cached(decoder, TOKENS, steps)
    assert_close(result, decoder(TOKENS))


@variants
def test_batch_rows_equal_single_rows(changes, make_decoder, assert_close):
    decoder = make_decoder(**changes)
    alone = mx.concatenate([decoder(row[None]) for row in TOKENS])
    assert_close(decoder(TOKENS), alone)


@variants
def test_a_token_changes_only_what_follows(changes, make_decoder, assert_close):
    decoder, other = make_decoder(**changes), mx.array(TOKENS)
    other[0, 5] = (other[0, 5] + 1) % 97
    before, after = decoder(TOKENS), decoder(other)
    assert_close(after[0, :5], before[0, :5])
    assert_close(after[1], before[1])
    assert mx.abs(after[0, 5:] - before[0, 5:]).max() > 0.01


@variants
@pytest.mark.parametrize("before", [0, 1, 6])
def test_the_last_state_alone_is_that_of_all(
    changes, before, make_decoder, assert_close
):
    decoder = make_decoder(**changes)
    states, kept = [], []
    for read in (decoder.hidden, decoder.last):
        caches = [KVCache() for _ in decoder.layers]
        if before:
            decoder.hidden(TOKENS[:, :before], caches)
        states.append(read(TOKENS[:, before:], caches))
        kept.append([x for cache in caches for x in cache.state[:2]])
    assert states[1].shape == (2, 1, 48)
    assert_close(states[1], states[0][:, -1:])
    for one, other in zip(*kept, strict=True):
        assert_close(one, other)


def test_places_of_experts_are_shared_out_among_all_tokens(make_decoder, assert_close):
    moe = {"num_experts": 4, "every": 1, "offset": 0, "capacity_factor": 0.25}
    decoder = make_decoder(moe=moe)
    caches = [[KVCache() for _ in decoder.layers] for _ in range(2)]
    last = decoder.last(TOKENS, caches[0])
    assert_close(last, decoder.hidden(TOKENS, caches[1])[:, -1:])
    # Alone the last token would have had a place.
    decoder.has_capacity = False
    caches = [KVCache() for _ in decoder.layers]
    assert mx.abs(decoder.last(TOKENS, caches) - last).max() > 1e-3


def reference(decoder, config, tokens):
    """Logits [T, V] by numpy-like steps: explicit mask, repeated keys, plain softmax."""
    T, head_dim = len(tokens), config.head_dim
    window = config.sliding_window or T
    back = mx.arange(T)[:, None] - mx.arange(T)[None]
    hidden = mx.logical_or(back < 0, back >= window)
    x = decoder.embed_tokens(tokens) * config.embedding_scale
    for i, layer in enumerate(decoder.layers):
        sizes = config.sizes(i)
        heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
        attention, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = attention.q_proj(y), attention.k_proj(y), attention.v_proj(y)
        if config.qk_norm == "full":
            q, k = attention.q_norm(q), attention.k_norm(k)
        q = q.reshape(T, heads, head_dim)
        k, v = (z.reshape(T, kv_heads, head_dim) for z in (k, v))
        if config.qk_norm == "head":
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = (rotate(z, config) for z in (q, k))
        if config.qk_norm == "rotated":
            q, k = attention.q_norm(q), attention.k_norm(k)
        k, v = (mx.repeat(z, heads // kv_heads, axis=1) for z in (k, v))
        scores = mx.einsum("ihd,jhd->hij", q, k) / head_dim**0.5
        weights = mx.softmax(mx.where(hidden, -float("inf"), scores), axis=-1)
        y = mx.einsum("hij,jhd->ihd", weights, v).reshape(T, -1)
        x = x + attention.o_proj(y)
        x = x + layer.mlp(layer.post_attention_layernorm(x)[None])[0]
    x = decoder.norm(x)
    head = decoder.embed_tokens if config.tie_word_embeddings else decoder.lm_head
    return x @ head.weight.T


def rotate(x, config):
    """x [T, h, d] rotated by its position: pairs of halves, or of neighbours."""
    x, rest = mx.split(x, [config.rotary_dim or config.head_dim], axis=-1)
    half = x.shape[-1] // 2
    frequencies = config.rope_theta ** (-mx.arange(half) / half)
    angles = mx.arange(len(x))[:, None, None] * frequencies
    cos, sin = mx.cos(angles), mx.sin(angles)
    if config.rope_interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = x[..., :half], x[..., half:]
    pair = [a * cos - b * sin, a * sin + b * cos]
    if config.rope_interleaved:
        return mx.concatenate([mx.stack(pair, axis=-1).reshape(x.shape), rest], axis=-1)
    return mx.concatenate([*pair, rest], axis=-1)


@pytest.mark.parametrize(
    "name",
    [
        *("grouped", "multi_query", "tied", "interleaved", "biased", "qk_norm"),
        *("window", "qk_norm_full", "qk_norm_rotated", "layer_norm", "partial_rope"),
        *("scaled", "layer_sizes"),
    ],
)
def test_logits_equal_a_plain_computation(name, make_decoder, assert_close):
    changes = VARIANTS[name]
    config = DecoderConfig.from_dict(SIZES | changes)
    decoder = make_decoder(**changes)
    assert_close(decoder(TOKENS)[0], reference(decoder, config, TOKENS[0]))


def test_half_split_and_interleaved_rotations_differ(make_decoder):
    plain, interleaved = make_decoder(), make_decoder(rope_interleaved=True)
    interleaved.update(plain.parameters())
    difference = mx.abs(plain(TOKENS) - interleaved(TOKENS))
    assert difference[:, 1:].max() > 0.01
    # The first position is not rotated.
    assert difference[:, 0].max() < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        *("window", "linear_rope", "qk_norm", "qk_norm_rotated", "biased"),
        *("qk_norm_full", "layer_norm", "partial_rope", "scaled"),
    ],
)
def test_an_option_changes_the_logits(name, make_decoder):
    plain, changed = make_decoder(), make_decoder(**VARIANTS[name])
    shared = plain.parameters()
    changed.update(shared)
    assert mx.abs(plain(TOKENS) - changed(TOKENS))[:, -1].max() > 1e-3


def test_norms_before_and_after_the_rotation_differ(make_decoder):
    before, after = make_decoder(qk_norm="head"), make_decoder(qk_norm="rotated")
    after.update(before.parameters())
    difference = mx.abs(before(TOKENS) - after(TOKENS))
    assert difference[:, 1:].max() > 0.01
    # The first position is not rotated.
    assert difference[:, 0].max() < 1e-5


def test_the_scale_is_rounded_to_the_embeddings_precision(make_decoder):
    decoder = make_decoder(embedding_scale=3072**0.5)
    x = mx.random.normal((1, 3, 48), key=mx.random.key(1)).astype(mx.bfloat16)
    decoder.set_dtype(mx.bfloat16)
    plain = make_decoder()
    plain.update(decoder.parameters())
    # 55.4256, which transformers too makes 55.5.
    assert mx.array_equal(decoder(None, None, x), plain(None, None, x * 55.5))


def test_blocks_of_several_sizes_have_their_own(make_decoder):
    layers = make_decoder(**VARIANTS["layer_sizes"]).layers
    assert [layer.self_attn.k_proj.weight.shape for layer in layers] == [
        *((12, 48), (24, 48), (48, 48)),
    ]
    assert [layer.mlp.up_proj.weight.shape[0] for layer in layers] == [24, 64, 40]


def test_a_window_hides_what_is_further_back(make_decoder, assert_close):
    decoder, other = (
        make_decoder(sliding_window=3, num_hidden_layers=1),
        mx.array(TOKENS),
    )
    other[:, 0] = (other[:, 0] + 1) % 97
    before, after = decoder(TOKENS), decoder(other)
    assert_close(after[:, 3:], before[:, 3:])
    assert mx.abs(after[:, 2] - before[:, 2]).max() > 1e-3


def test_tied_models_have_no_head(make_decoder):
    assert "lm_head" not in make_decoder(tie_word_embeddings=True)
    assert "lm_head" in make_decoder()


def test_sparse_layers_stand_where_the_config_says(make_decoder):
    kinds = [type(layer.mlp) for layer in make_decoder(moe=MOE).layers]
    assert kinds == [MLP, SparseMLP, MLP]
    assert set(FEEDFORWARDS.values()) == {MLP, SparseMLP}


# 10 and 200 tokens: SwitchGLU sorts by expert from 64 rows on.
@pytest.mark.parametrize("length", [10, 200])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("experts", "chosen"), [(4, 2), (8, 3), (4, 1), (4, 4)])
def test_a_sparse_layer_is_a_weighted_sum_of_its_experts(
    experts, chosen, norm, length, reinitialise, assert_close
):
    moe = {"num_experts": experts, "experts_per_token": chosen, "every": 1, "offset": 0}
    config = DecoderConfig.from_dict(SIZES | {"moe": moe | {"norm_topk_prob": norm}})
    layer = reinitialise(SparseMLP(config, 0))
    x = mx.random.normal((1, length, 48), key=mx.random.key(1))
    expected = []
    for token in x[0]:
        p = np.array(mx.softmax(token @ layer.gate.weight.T))
        best = np.argsort(-p)[:chosen]
        weights = p[best] / p[best].sum() if norm else p[best]
        glu = layer.switch_mlp
        outputs = [
            (
                nn.silu(token @ glu.gate_proj.weight[e].T)
                * (token @ glu.up_proj.weight[e].T)
            )
            @ glu.down_proj.weight[e].T
            for e in best.tolist()
        ]
        expected.append(
            sum(w * y for w, y in zip(weights.tolist(), outputs, strict=True))
        )
    assert_close(layer(x)[0], mx.stack(expected))


def test_equal_experts_make_a_dense_layer(reinitialise, assert_close):
    moe = {"num_experts": 4, "every": 1, "offset": 0}
    config = DecoderConfig.from_dict(SIZES | {"moe": moe})
    sparse, dense = reinitialise(SparseMLP(config, 0)), reinitialise(MLP(config, 0))
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = dense[name].weight
        sparse.switch_mlp[name].weight = mx.broadcast_to(weight, (4, *weight.shape))
    x = mx.random.normal((2, 9, 48), key=mx.random.key(1))
    assert_close(sparse(x), dense(x), "op")


# Not the sparse one: mlx's CPU backend gathers matrices in float32 only.
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", ["grouped", "tied"])
def test_half_precision_stays_half_and_close(name, dtype, make_decoder, assert_close):
    decoder = make_decoder(**VARIANTS[name])
    expected = decoder(TOKENS)
    decoder.set_dtype(dtype)
    logits = decoder(TOKENS)
    assert logits.dtype == dtype
    assert_close(logits, expected, str(dtype).removeprefix("mlx.core."))
