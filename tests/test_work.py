"""The operations that a config says are those that the model asks mlx for."""

import math

import mlx.core as mx
import pytest

from mm1_mlx.config import MM1Config
from mm1_mlx.models import MM1
from mm1_mlx.models.connector import build_connector
from mm1_mlx.presets import PRESETS, VIT_H_14_378
from mm1_mlx.work import connector_flops, decoder_flops, encode_flops, vision_flops


@pytest.fixture
def counted(monkeypatch):
    """A dict whose ``flops`` are those of every product that mlx is asked for since."""
    count = {"flops": 0}

    def product(x, inner):
        count["flops"] += 2 * math.prod(x.shape) * inner
        return x

    def watch(owner, name, inner):
        plain = getattr(owner, name)

        def call(*args, **kwargs):
            return product(plain(*args, **kwargs), inner(*args, **kwargs))

        monkeypatch.setattr(owner, name, call)

    watch(mx.array, "__matmul__", lambda a, _: a.shape[-1])
    watch(mx, "matmul", lambda a, _: a.shape[-1])
    watch(mx, "addmm", lambda _, a, __: a.shape[-1])
    watch(mx, "conv2d", lambda _, w, **__: math.prod(w.shape[1:]))
    watch(mx, "gather_mm", lambda a, *_, **__: a.shape[-1])

    def attention(q, k, v, *, mask=None, **_):
        B, Hq, T, D = q.shape
        N = k.shape[2]
        pairs = T * (N - T) + T * (T + 1) // 2 if isinstance(mask, str) else T * N
        count["flops"] += 2 * B * Hq * pairs * (D + v.shape[-1])
        return mx.zeros((B, Hq, T, v.shape[-1]))

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    monkeypatch.setattr("mm1_mlx.kernels.fused.attend", attention)
    return count


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feature_layer": -1, "class_token": False, "patch_norm": True},
        {"gated_mlp": True, "drop_cls": False},
        {"moe": {"num_experts": 4, "num_sparse_layers": 2, "experts_per_image": 2}},
    ],
)
@pytest.mark.parametrize("size", [16, 24])
def test_the_encoder_does_what_is_counted(changes, size, make_config, counted):
    vision = make_config(vision=changes, connector=None, decoder=None, prompt=None)
    model = MM1(vision)
    # Stretching positions is done once and left out.
    model.vision._place(mx.zeros((1, (size // 4) ** 2, 32)), size // 4)
    before = counted["flops"]
    model.vision._place(mx.zeros((1, (size // 4) ** 2, 32)), size // 4)
    stretching = counted["flops"] - before
    counted["flops"] = 0
    model.vision(mx.zeros((3, size, size, 3)))
    counted["flops"] -= stretching
    assert counted["flops"] == 3 * vision_flops(vision.vision, size)


CONNECTORS = {
    "linear": {},
    "mlp": {"hidden_size": 24},
    "mlp, pooled": {"kind": "mlp", "hidden_size": 24, "pooled_tokens": 4},
    "average_pool": {"num_image_tokens": 9},
    "attention_pool": {"num_image_tokens": 5, "num_attention_heads": 4},
    "perceiver": {"num_image_tokens": 5, "intermediate_size": 40, "depth": 2},
    "c_abstractor": {"num_image_tokens": 4, "hidden_size": 20, "depth": 2},
    "c_abstractor, ends": {
        "kind": "c_abstractor", "num_image_tokens": 6, "num_eos_tokens": 2, "depth": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONNECTORS)
def test_the_connector_does_what_is_counted(name, counted):
    sizes = {"input_size": 32, "num_features": 16, "output_size": 48}
    section = {"kind": name} | sizes | CONNECTORS[name]
    config = MM1Config.from_dict({"connector": section}).connector
    build_connector(config)(mx.zeros((1, 16, 32)))
    assert counted["flops"] == connector_flops(config, 16)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"moe": {"num_experts": 4, "experts_per_token": 2, "every": 2, "offset": 1}},
        {"moe": {"num_experts": 4, "every": 1, "offset": 0, "capacity_factor": 8.0}},
    ],
)
@pytest.mark.parametrize(("before", "positions"), [(0, 7), (5, 1), (3, 6)])
@pytest.mark.parametrize("rows", [1, "all"])
def test_the_decoder_does_what_is_counted(
    changes, before, positions, rows, make_config, counted
):
    config = make_config(
        vision=None, connector=None, image=None, prompt=None, decoder=changes
    )
    model = MM1(config)
    cache = model.make_cache()
    if before:
        model(mx.zeros((1, before), mx.int32), cache)
    counted["flops"] = 0
    tokens = mx.zeros((1, positions), mx.int32)
    if rows == 1:
        states = model.decoder.last(tokens, cache)
    else:
        rows, states = positions, model.decoder.hidden(tokens, cache)
    model.decoder.logits(states)
    assert counted["flops"] == decoder_flops(config.decoder, positions, before, rows)


def test_a_window_hides_keys():
    decoder = PRESETS["mm1-3b"].decoder
    near = MM1Config.from_dict({"decoder": decoder.to_dict() | {"sliding_window": 4}})
    D, layers = decoder.hidden_size, decoder.num_hidden_layers
    saved = decoder_flops(decoder, 6, 2) - decoder_flops(near.decoder, 6, 2)
    # The six look at 3 to 8 keys, at most 4 of them; in the last layer the last one asks.
    seen = (layers - 1) * ((3 + 4 + 5 + 6 + 7 + 8) - (3 + 5 * 4)) + 8 - 4
    assert saved == 4 * D * seen


def test_the_papers_encoder_takes_what_the_arithmetic_says():
    """ViT-H/14: 730 places at 378 pixels, 2,305 at 672."""
    assert vision_flops(VIT_H_14_378, 378) == pytest.approx(1.01e12, rel=0.005)
    assert 5 * vision_flops(VIT_H_14_378, 672) == pytest.approx(18.9e12, rel=0.005)
    model = PRESETS["mm1-3b"]
    connector = encode_flops(model) - vision_flops(VIT_H_14_378, 378)
    assert connector == connector_flops(model.connector, 729)
