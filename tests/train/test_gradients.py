"""Gradients of everything that can be trained are those of finite differences.

Both are computed in float64, where a difference of the loss is a derivative to nine
places, by the same code with its float32 made float64. The float32 gradients, with the
attention and all else that float32 alone has, must then be those of float64.
"""

import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from PIL import Image

from mm1_mlx.adapters import AdapterConfig, attach
from mm1_mlx.config import MM1Config
from mm1_mlx.image import load_pictures
from mm1_mlx.kernels import blocked
from mm1_mlx.layout import Span
from mm1_mlx.models import MM1
from mm1_mlx.train import cross_entropy
from mm1_mlx.train.loss import next_token_loss, sparse_loss
from mm1_mlx.train.sample import build_sample, collate

# Of a weight, relative to its size: the error is its square, and the rounding's inverse.
STEP = 1e-5
MOE = {"num_experts": 4, "every": 1, "offset": 0}
SIZES = {"input_size": 32, "num_features": 16, "output_size": 48}
CONNECTORS = {
    "linear": {"newline": True},
    "mlp": {"hidden_size": 24, "hidden_act": "gelu"},
    "average_pool": {"num_image_tokens": 4},
    "c_abstractor": {
        "num_image_tokens": 5,
        "hidden_size": 16,
        "depth": 1,
        "prenorm": True,
        "num_eos_tokens": 1,
    },
    "attention_pool": {"num_image_tokens": 4, "num_attention_heads": 4},
    "perceiver": {
        "num_image_tokens": 4,
        "depth": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
        "intermediate_size": 40,
    },
}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Scored together, so that there are several blocks."""
    monkeypatch.setattr(cross_entropy, "block_rows", lambda _: 5)


@pytest.fixture
def double(monkeypatch):
    """A function: run something with every float32 of ours and mlx's layers a float64."""

    def convolve(x, weight, padding, groups):
        # mlx convolves float32 alone: a depthwise one, as nine shifted products.
        assert (padding, groups) == (1, x.shape[-1])
        padded = mx.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        H, W = x.shape[1:3]
        return sum(
            padded[:, i : i + H, j : j + W] * weight[:, i, j, 0]
            for i in range(3)
            for j in range(3)
        )

    def gather(a, b, rhs_indices, **_):
        return a @ b[rhs_indices]

    # mlx's own make float32 of what they are given.
    def rms_norm(x, weight, eps):
        x = x * mx.rsqrt(x.square().mean(-1, keepdims=True) + eps)
        return x if weight is None else x * weight

    def layer_norm(x, weight, bias, eps):
        x = x - x.mean(-1, keepdims=True)
        x = rms_norm(x, weight, eps)
        return x if bias is None else x + bias

    def rope(x, dims, *, traditional, base, scale, offset, freqs=None):
        assert freqs is None
        angles = np.outer(
            scale * (offset + np.arange(x.shape[-2])),
            base ** -(np.arange(dims // 2) / (dims // 2)),
        )
        cos, sin = (mx.array(f(angles), mx.float64) for f in (np.cos, np.sin))
        turned, rest = x[..., :dims], x[..., dims:]
        if traditional:
            a, b = turned[..., ::2], turned[..., 1::2]
        else:
            a, b = mx.split(turned, 2, axis=-1)
        pair = (a * cos - b * sin, a * sin + b * cos)
        joined = (
            mx.stack(pair, -1).reshape(turned.shape)
            if traditional
            else mx.concatenate(pair, -1)
        )
        return mx.concatenate([joined, rest], -1)

    # Nor are its exponentials of more than float32's places.
    def exp(x):
        return mx.power(mx.array(math.e, mx.float64), x)

    def sigmoid(x):
        return (mx.tanh(x / 2) + 1) / 2

    def logsumexp(x, axis=-1, keepdims=False):
        largest = mx.stop_gradient(x.max(axis, keepdims=True))
        total = mx.log(exp(x - largest).sum(axis, keepdims=True)) + largest
        return total if keepdims else total.squeeze(axis)

    def softmax(x, axis=-1, **_):
        return exp(x - logsumexp(x, axis, keepdims=True))

    @mx.custom_function
    def gelu(x):
        values = np.array(x)
        share = 0.5 + 0.5 * np.vectorize(math.erf)(values / 2**0.5)
        return x * mx.array(share, mx.float64)

    @gelu.vjp
    def _(x, cotangent, _):
        share = 0.5 + 0.5 * np.vectorize(math.erf)(np.array(x) / 2**0.5)
        density = exp(-x * x / 2) / (2 * math.pi) ** 0.5
        return cotangent * (mx.array(share, mx.float64) + x * density)

    def attention(q, k, v, *, scale, mask=None):
        repeats = q.shape[1] // k.shape[1]
        k, v = (mx.repeat(x, repeats, axis=1) for x in (k, v))
        scores = scale * (q @ k.swapaxes(-1, -2))
        if isinstance(mask, str):
            T, N = scores.shape[-2:]
            mask = mx.arange(N) <= mx.arange(N - T, N)[:, None]
        if mask is not None:
            scores = mx.where(mask, scores, -1e30)
        return softmax(scores) @ v

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(mx, "float32", mx.float64)
            patch.setattr(mx, "conv2d", convolve)
            patch.setattr(mx, "gather_mm", gather)
            patch.setattr(mx, "sigmoid", sigmoid)
            patch.setattr(mx, "logsumexp", logsumexp)
            patch.setattr(mx, "softmax", softmax)
            patch.setattr(nn, "gelu", gelu)
            patch.setattr(mx.fast, "rms_norm", rms_norm)
            patch.setattr(mx.fast, "layer_norm", layer_norm)
            patch.setattr(mx.fast, "rope", rope)
            patch.setattr(mx.fast, "scaled_dot_product_attention", attention)
            # Its powers of two are float32's bits.
            patch.setattr(blocked, "FEWEST", 1 << 30)
            patch.setattr(cross_entropy, "_exponentials", exp)
            return call()

    return run


def gradients(model, batch, function):
    """The loss and its gradient by every trained tensor."""
    kept = model.trainable_parameters()
    (loss, *_), found = nn.value_and_grad(model, function)(model, batch)
    mx.eval(loss, found)
    model.update(kept)
    return loss.item(), {k: np.array(x) for k, x in tree_flatten(found)}


def check(model, batch, double, tolerances, function=next_token_loss):
    """Compare the gradients of all trained tensors: with differences, and in float32."""
    # As the trainer has it; and several blocks of rows that are scored together.
    model.train()
    _, single = gradients(model, batch, function)
    model.update(tree_map(lambda x: x.astype(mx.float64), model.parameters()))
    mx.eval(model.parameters())

    def compare():
        _, found = gradients(model, batch, function)
        weights = dict(tree_flatten(model.trainable_parameters()))
        rng = np.random.default_rng(0)
        largest = max(np.abs(x).max() for x in found.values())
        assert found.keys() == single.keys()
        for name, gradient in found.items():
            assert gradient.dtype == np.float64
            # A key's bias moves no softmax: there is nothing but rounding.
            size = max(np.abs(gradient).max(), 1e-3 * largest)
            error = np.abs(single[name] - gradient).max()
            assert error <= tolerances["model"] * size, f"{name} in float32"
            weight = np.array(weights[name])
            direction = rng.standard_normal(weight.shape) * np.sqrt((weight**2).mean())
            # Where it begins at zero, as an adapter's second matrix.
            direction = direction if direction.any() else np.ones_like(weight)
            ends = []
            for sign in (1, -1):
                moved = mx.array(weight + sign * STEP * direction, mx.float64)
                model.update(tree_unflatten([(name, moved)]))
                ends.append(function(model, batch)[0].item())
            slope = (ends[0] - ends[1]) / (2 * STEP)
            # Both ends are rounded: all that is there to see where nothing moves.
            rounded = 2 * np.spacing(ends[0]) / (2 * STEP)
            model.update(tree_unflatten([(name, weights[name])]))
            expected = (gradient * direction).sum()
            scale = np.abs(gradient * direction).sum() + 1e-6 * largest
            assert abs(slope - expected) <= tolerances["op"] * scale + rounded, name

    double(compare)


@pytest.fixture
def batch_of(train_tokenizer, conversation):
    """A function: two conversations about a picture each, for a model of this config."""

    def batch_of(config):
        talks = [conversation("a blue star", "two"), conversation("red")]
        samples = [build_sample(talk, config, train_tokenizer) for talk in talks]
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
        pictures = load_pictures([Image.fromarray(x) for x in noise], config.image)
        return collate(samples, [[0], [1]], pictures, config, train_tokenizer)

    return batch_of


@pytest.fixture
def make(make_config, reinitialise):
    """A function: a re-initialised model with some sections in the places of the tiny's."""

    def make(**sections):
        config = make_config().to_dict() | sections
        return reinitialise(MM1(MM1Config.from_dict(config)))

    return make


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_connector(kind, make, batch_of, double, tolerances):
    model = make(connector={"kind": kind, **SIZES, **CONNECTORS[kind]})
    model.freeze()
    model.connector.unfreeze()
    check(model, batch_of(model.config), double, tolerances)


VISIONS = {
    "clip": {},
    "all features, normed": {"feature_layer": -1, "apply_post_norm": True},
    "aimv2": {
        "norm": "rms",
        "gated_mlp": True,
        "hidden_act": "silu",
        "pre_norm": False,
        "class_token": False,
        "patch_norm": True,
        "patch_bias": True,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "experts": {"moe": {"num_experts": 3, "num_sparse_layers": 1}},
}


@pytest.mark.parametrize("name", VISIONS)
def test_every_encoder(name, make, make_config, batch_of, double, tolerances):
    model = make(vision=make_config().vision.to_dict() | VISIONS[name])
    model.freeze()
    model.vision.unfreeze()
    check(model, batch_of(model.config), double, tolerances)


DECODERS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True, "embedding_scale": 6.9},
    "window": {"sliding_window": 7},
    "biases, layer norms": {
        "norm": "layer",
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "head_bias": True,
    },
    "full norm": {"qk_norm": "full"},
    "head norm": {"qk_norm": "head"},
    "rotated norm": {"qk_norm": "rotated"},
    "experts": {"moe": MOE},
    "experts without renormalising": {"moe": MOE | {"norm_topk_prob": False}},
}


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder(name, make, make_config, batch_of, double, tolerances):
    model = make(decoder=make_config().decoder.to_dict() | DECODERS[name])
    model.freeze()
    model.decoder.unfreeze()
    loss = sparse_loss if "experts" in name else next_token_loss
    check(model, batch_of(model.config), double, tolerances, loss)


@pytest.mark.parametrize("packed", [False, True])
def test_packed_rows(packed, make, batch_of, double, tolerances):
    model = make()
    batch = batch_of(model.config)
    if packed:
        first, second = batch.lengths
        whole = [batch.tokens[0, :first], batch.tokens[1, :second]]
        learned = [batch.learned[0, :first], batch.learned[1, :second]]
        T = batch.tokens.shape[1]
        batch = replace(
            batch,
            tokens=np.concatenate(whole)[None],
            learned=np.concatenate(learned)[None],
            spans=tuple(
                replace(span, start=span.start - (T - first) * (span.start >= T))
                for span in batch.spans
            ),
            lengths=(first + second,),
            segments=batch.lengths,
        )
    check(model, batch, double, tolerances)


def begin_elsewhere(model):
    """Draw what is zero at an adapter's beginning: its other matrix has no gradient."""
    mx.random.seed(1)
    some = {
        name: 0.1 * mx.random.normal(x.shape)
        for name, x in tree_flatten(model.trainable_parameters())
        if name.endswith("lora_b")
    }
    model.load_weights(list(some.items()), strict=False)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters(kind, make, batch_of, double, tolerances, monkeypatch):
    if kind == "dora":
        # Its gradients take the rows' lengths for constants (arXiv 2402.09353, 4.3).
        lengths = lambda x, axis: 1.5 * mx.ones(x.shape[1 - axis], x.dtype)  # noqa: E731
        monkeypatch.setattr(mx.linalg, "norm", lengths)
    model = make()
    model.freeze()
    attach(model, AdapterConfig(kind=kind, rank=3, where=("decoder", "vision")))
    begin_elsewhere(model)
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    leaves = {name.rpartition(".")[2] for name in names}
    assert leaves == {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    check(model, batch_of(model.config), double, tolerances)


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_of_the_head(tied, make, make_config, batch_of, double, tolerances):
    """Whose loss has gradients of its own."""
    tie = {"tie_word_embeddings": tied}
    model = make(decoder=make_config().decoder.to_dict() | tie)
    model.freeze()
    attach(model, AdapterConfig(rank=3, where=("head",)))
    begin_elsewhere(model)
    check(model, batch_of(model.config), double, tolerances)


def test_adapters_of_experts(make, make_config, batch_of, double, tolerances):
    model = make(decoder=make_config().decoder.to_dict() | {"moe": MOE})
    model.freeze()
    attach(model, AdapterConfig(rank=3, where=("decoder.experts",)))
    begin_elsewhere(model)
    check(model, batch_of(model.config), double, tolerances, sparse_loss)


def test_the_region_sampler(make, batch_of, double, tolerances):
    region = {
        "input_size": 32,
        "output_size": 48,
        "num_points": 12,
        "num_sub_points": [6, 3],
        "num_neighbours": 4,
    }
    model = make(region=region)
    batch = batch_of(model.config)
    points = np.random.default_rng(0).random((12, 2)).astype(np.float32)
    first, *rest = batch.pictures
    offset = batch.spans[0].length
    # In the place of the first row's first token of text behind its picture.
    place = batch.spans[0].stop
    spans = (*batch.spans, Span(place, 1, "region", 0, first.digest, offset))
    pictures = (replace(first, regions=(points,)), *rest)
    batch = replace(batch, spans=spans, pictures=pictures)
    model.freeze()
    model.region.unfreeze()
    check(model, batch, double, tolerances)
