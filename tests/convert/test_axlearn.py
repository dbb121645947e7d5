"""A honeycrisp decoder computes what axlearn's code says.

axlearn (JAX) is not installed; the oracle is ``axlearn_oracle.py``, in plain PyTorch,
from its code, on tensors of axlearn's own shapes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

torch = pytest.importorskip("torch")
import axlearn_oracle as oracle  # noqa: E402
import decoders  # noqa: E402
from decoders import VOCABULARY  # noqa: E402
from parity import our_logits, undetected_swaps  # noqa: E402

from mm1_mlx.checkpoint import load_model  # noqa: E402
from mm1_mlx.errors import CheckpointError, ConfigError  # noqa: E402
from mm1_mlx.presets import PRESETS  # noqa: E402

pytestmark = pytest.mark.reference

LAYER = "model.decoder.transformer.layer."
ATTENTION, MLP = f"{LAYER}self_attention.attention.", f"{LAYER}feed_forward."
QKV = f"{ATTENTION}input_linear."


def honeycrisp(
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    inner: int = 40,
    vocabulary: int = VOCABULARY,
    **fields: Any,
) -> dict[str, Any]:
    """The lines of a honeycrisp model's config, as axlearn prints them."""
    attention, layer = "axlearn.common.attention.", "axlearn.common.layers."
    klasses = {
        "model.": "axlearn.common.causal_lm.Model",
        "model.metrics.": "axlearn.common.causal_lm.CompositeLossMetrics",
        "model.decoder.": "axlearn.common.decoder.Decoder",
        "model.decoder.decoding.": "axlearn.common.decoder.DecodingLayer",
        "model.decoder.emb.": "axlearn.common.embedding.TransformerTextEmbeddings",
        "model.decoder.emb.token_emb.": f"{layer}Embedding",
        "model.decoder.transformer.": f"{attention}RepeatedTransformerLayer",
        "model.decoder.transformer.repeat.": f"{attention}_TransformerRepeat",
        LAYER: f"{attention}TransformerLayer",
        f"{LAYER}self_attention.": f"{attention}TransformerAttentionLayer",
        f"{LAYER}self_attention.dropout.": f"{layer}Dropout",
        ATTENTION: f"{attention}GroupedQueryAttention",
        f"{ATTENTION}query_scale.": f"{attention}ScaleQuery",
        f"{ATTENTION}key_scale.": f"{attention}ScaleKey",
        f"{ATTENTION}kv_cache.": "axlearn.common.kv_cache.kv_cache.KVCache",
        f"{ATTENTION}output_linear.": f"{attention}MultiheadOutputLinear",
        QKV: f"{attention}RoFormerQKVLinear",
        f"{QKV}rope_pos_emb_layer.": f"{attention}RoFormerSinusoidalPositionalEmbedding",
        f"{QKV}input_linear.": f"{attention}FusedGroupedQKVLinear",
        f"{QKV}input_linear.layer.": f"{attention}MultiheadInputLinear",
        MLP: f"{attention}TransformerFeedForwardLayer",
        f"{MLP}linear1.": f"{layer}Linear",
        f"{MLP}linear2.": f"{layer}Linear",
    }
    norms = (
        *("model.decoder.output_norm.", f"{LAYER}self_attention.norm.", f"{MLP}norm."),
        *(f"{ATTENTION}query_scale.norm.", f"{ATTENTION}key_scale.norm."),
    )
    linears = (
        *(f"{QKV}input_linear.layer.", f"{ATTENTION}output_linear."),
        *(f"{MLP}linear1.", f"{MLP}linear2."),
    )
    return {
        "model_type": "axlearn",
        **{f"{place}klass": name for place, name in klasses.items()},
        **{f"{place}klass": f"{layer}RMSNorm" for place in norms},
        **{f"{place}eps": 1e-5 for place in norms},
        **{f"{place}bias": False for place in linears},
        **{f"{place}param_partition_spec[0]": "model" for place in linears},
        "model.decoder.dim": width,
        "model.decoder.vocab_size": vocabulary,
        "model.decoder.eos_token_id": 1,
        "model.decoder.pad_token_id": 0,
        "model.decoder.transformer.num_layers": layers,
        f"{LAYER}remat_spec['prevent_cse']": True,
        f"{LAYER}self_attention.structure": "prenorm",
        f"{ATTENTION}causal": True,
        f"{ATTENTION}num_heads": heads,
        f"{QKV}rotary_value": False,
        f"{QKV}rope_pos_emb_layer.theta": 500_000.0,
        f"{QKV}input_linear.num_kv_heads": kv_heads,
        f"{MLP}activation[0]": "nn.silu",
        f"{MLP}activation[1]": "linear",
        f"{MLP}add_dead_neuron_summary": True,
        f"{MLP}add_value_rms_norm_summary[0]": "linear2_outputs",
        f"{MLP}hidden_dim": inner,
        f"{MLP}residual_weight": 1.0,
        f"{MLP}stochastic_depth.mode": "row",
        f"{MLP}structure": "prenorm",
        "model.param_init.klass": "axlearn.common.param_init.DefaultInitializer",
        "model.dtype": "jax.numpy.float32",
        **fields,
    }


# By name: layers, width, heads, kv heads and feed-forward width.
CASES = {
    "3 queries a key": (2, 48, 6, 2, 64),
    "all heads": (3, 32, 4, 4, 40),
}
FLASH = {f"{ATTENTION}klass": "axlearn.common.flash_attention.layer.FlashAttention"}
FLASH |= {f"{ATTENTION}tpu_block_size": 512}  # type: ignore[dict-item]


def forward_of(state: oracle.State, heads: int) -> Callable[..., Any]:
    def forward(tokens: list[int], _: Any) -> Any:
        return oracle.forward(
            state, torch.tensor(tokens), heads=heads, theta=500_000.0, eps=1e-5
        )

    return forward


@pytest.mark.parametrize("prefix", ["", "model/"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_the_oracle(
    name: str, prefix: str, tmp_path: Path
) -> None:
    sizes = CASES[name]
    state = oracle.make_state(*sizes, VOCABULARY, seed=0)
    saved = {f"{prefix}{key}": x for key, x in state.items()}
    values = honeycrisp(*sizes, **FLASH)
    decoders.check(tmp_path, forward_of(state, sizes[2]), saved, values)


def test_every_swap_of_two_rules_is_noticed_but_one_that_changes_nothing(
    tmp_path: Path,
) -> None:
    sizes = (2, 32, 4, 4, 32)
    state = oracle.make_state(*sizes, VOCABULARY, seed=0)
    folder = decoders.save(tmp_path / "in", state, honeycrisp(*sizes))
    decoders.convert(str(folder), tmp_path / "out")
    prompt = decoders.Prompt.make(VOCABULARY)
    count, unnoticed = undetected_swaps(
        folder, tmp_path / "out", lambda m: our_logits(m, prompt, None)
    )
    # Seven matrices, two norms of heads, two of blocks, whatever the layer.
    assert count == 21 + 1 + 1
    # After the rotation, scores hold the product of both heads' norms and no more: which
    # is which cannot be computed, so the next test looks.
    (pair,) = unnoticed
    assert all("q_norm" in name or "k_norm" in name for name in pair)


def test_norms_of_queries_and_of_keys_are_each_where_they_belong(
    tmp_path: Path,
) -> None:
    state = oracle.make_state(2, 32, 4, 2, 40, VOCABULARY, seed=0)
    decoders.save(tmp_path / "in", state, honeycrisp())
    decoders.convert(str(tmp_path / "in"), tmp_path / "out")
    tensors = load_model(tmp_path / "out").tensors()
    for layer in range(2):
        for ours, theirs in (("q_norm", "scale_query"), ("k_norm", "scale_key")):
            name = f"decoder.layers.{layer}.self_attn.{ours}.weight"
            path = "decoder/transformer/repeat/layer/self_attention/attention"
            expected = state[f"{path}/{theirs}/norm/scale"][layer]
            assert mx.array_equal(tensors[name], mx.array(expected.numpy()))


def test_the_config_is_the_source_s(tmp_path: Path) -> None:
    norms = ["model.decoder.output_norm", f"{LAYER}self_attention.norm", f"{MLP}norm"]
    norms += [f"{ATTENTION}{name}_scale.norm" for name in ("query", "key")]
    values = honeycrisp(
        **{f"{name}.eps": decoders.MARKED["rms_norm_eps"] for name in norms}
    )
    values |= {f"{QKV}rope_pos_emb_layer.theta": decoders.MARKED["rope_theta"]}
    values |= {"input.source.max_sequence_length": 77}
    assert decoders.config_of(tmp_path, values) == decoders.expected(
        max_position_embeddings=77,
        tie_word_embeddings=True,
        rope_interleaved=True,
        hidden_act="silu",
        qk_norm="rotated",
    )


def test_a_feed_forward_width_may_be_a_rule(tmp_path: Path) -> None:
    rule = {"fn": "axlearn.experiments.text.gpt.common.scale_fn", "scale": 2.1}
    rule |= {"round_up_to_multiples_of": 16}
    fields = {f"{MLP}hidden_dim.{key}": value for key, value in rule.items()}
    values = honeycrisp(**fields)
    del values[f"{MLP}hidden_dim"]
    assert decoders.config_of(tmp_path, values).intermediate_size == 80


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({f"{MLP}structure": "hybridnorm"}, "structure: 'hybridnorm' is not supported"),
        ({f"{MLP}activation[0]": "nn.gelu"}, "'nn.gelu' is not supported"),
        ({f"{MLP}norm.eps": 1e-6}, "norms of several eps are not supported"),
        ({f"{MLP}linear1.bias": True}, "linear1.bias: True is not supported"),
        ({f"{MLP}residual_weight": 0.5}, "residual_weight: 0.5 is not supported"),
        ({f"{MLP}structure": None}, "structure' is missing"),
        ({f"{MLP}hidden_dim": None}, "hidden_dim.scale' is missing"),
        (
            {f"{ATTENTION}key_scale.norm.klass": None},
            "key_scale.norm.klass' is missing",
        ),
        (
            {f"{QKV}input_linear.klass": "axlearn.common.attention.FusedQKVLinear"},
            "FusedQKVLinear' is not supported; supported: .*FusedGroupedQKVLinear",
        ),
        ({"model.decoder.lm_head.klass": "x"}, r"'model.decoder.lm_head.klass'\] are"),
        ({"model.decoder.emb.scale": "unit"}, r"'model.decoder.emb.scale'\] are not"),
    ],
)
def test_other_models_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        decoders.config_of(tmp_path, honeycrisp(**fields))


def test_a_state_of_another_depth_is_refused(tmp_path: Path) -> None:
    state = oracle.make_state(2, 32, 4, 2, 40, VOCABULARY, seed=0)
    decoders.save(tmp_path / "in", state, honeycrisp(layers=3))
    with pytest.raises(CheckpointError, match="11 tensors of the model have no source"):
        decoders.convert(str(tmp_path / "in"), tmp_path / "out")


def test_afm_on_device_fits_and_is_the_preset(tmp_path: Path) -> None:
    sizes = {"layers": 26, "width": 3072, "heads": 24, "kv_heads": 8, "inner": 8064}
    values = honeycrisp(**sizes, vocabulary=49_152)
    layer = "decoder/transformer/repeat/layer/"
    attention = f"{layer}self_attention/attention/"
    # As axlearn's golden file of honeycrisp-3B lists them, all layers together.
    shapes = {
        "decoder/emb/token_emb/weight": (49_152, 3072),
        "decoder/output_norm/scale": (3072,),
        f"{layer}self_attention/norm/scale": (26, 3072),
        f"{attention}i_proj/i_proj/qkv_proj/weight": (26, 3072, 40, 128),
        f"{attention}o_proj/weight": (26, 3072, 24, 128),
        f"{attention}scale_query/norm/scale": (26, 128),
        f"{attention}scale_key/norm/scale": (26, 128),
        f"{layer}feed_forward/norm/scale": (26, 3072),
        f"{layer}feed_forward/linear1_0/weight": (26, 3072, 8064),
        f"{layer}feed_forward/linear1_1/weight": (26, 3072, 8064),
        f"{layer}feed_forward/linear2/weight": (26, 8064, 3072),
    }
    count = decoders.count_parameters(tmp_path / "a", values, shapes)
    # The matrices and norms of the blocks, their norms of heads, the last norm, and the
    # embedding.
    assert count == 2_586_734_592 + 26 * 2 * 128 + 3072 + 150_994_944
    assert decoders.config_of(tmp_path / "b", values) == PRESETS["afm-3b"].decoder
