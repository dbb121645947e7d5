"""What is said to be taken is at least what is taken, and not much more."""

import gc
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mm1_mlx
from mm1_mlx import budget, prefill
from mm1_mlx.adapters import AdapterConfig
from mm1_mlx.adapters.attach import attach
from mm1_mlx.budget import (
    Answer,
    check_answer,
    check_load,
    encode_bytes,
    kv_bytes,
    prefill_bytes,
    token_bytes,
    usual_bytes,
    weight_bytes,
)
from mm1_mlx.checkpoint import build_model, load_model
from mm1_mlx.config import MM1Config, QuantizationConfig
from mm1_mlx.errors import CheckpointError, PromptError
from mm1_mlx.layout import Picture
from mm1_mlx.memory.prefixes import KVPrecision, pack
from mm1_mlx.models import MM1
from mm1_mlx.presets import PRESETS, VIT_L_14_336
from mm1_mlx.recipe import find_recipe, plan
from mm1_mlx.sizes import human_bytes
from mm1_mlx.train.budget import Training
from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.loss import next_token_loss
from mm1_mlx.train.sample import Batch
from mm1_mlx.train.trainer import Trainer
from mm1_mlx.writer import CheckpointWriter

# Of what was taken, the most that may be said.
MOST = 1.5
MOE = {"num_experts": 8, "every": 2, "offset": 1}


@pytest.fixture
def taken():
    """A function: the bytes that mlx held at most while another ran, and its result."""

    def taken(function):
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        result = function()
        return mx.get_peak_memory() - before, result

    return taken


def medium(**decoder):
    """A config of 138 million parameters, LLaVA-shaped with MM1's connector."""
    sizes = {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64,
    }  # fmt: skip
    small = PRESETS["mm1-3b"].to_dict()
    vision = VIT_L_14_336.to_dict() | {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }  # fmt: skip
    connector = small["connector"] | {
        "input_size": 512, "num_features": 576, "output_size": 768,
    }  # fmt: skip
    return MM1Config.from_dict(
        small
        | {"vision": vision, "connector": connector}
        | {"image": small["image"] | {"size": 336}}
        | {"decoder": small["decoder"] | sizes | decoder}
    )


def pictures(config, count):
    rng, side = np.random.default_rng(0), config.image.size
    return [
        Picture((rng.random((side, side, 3), np.float32),), (side, side), str(i))
        for i in range(count)
    ]


# Bytes


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("recipe", ["4bit", "8bit", "mixed_3_6"])
def test_packed_weights_take_what_is_said(recipe, itemsize):
    config = medium()
    ways = plan(find_recipe(recipe), config).packed
    quantization = {"group_size": 64, "bits": 4} | {
        path: way.to_dict() for path, way in ways.items()
    }
    packed = MM1Config.from_dict(config.to_dict() | {"quantization": quantization})
    sizes: dict[str, int] = {}
    for name, x in build_model(packed, ways).tensors().items():
        part = name.partition(".")[0]
        size = x.nbytes if x.dtype == mx.uint32 else itemsize * x.size
        sizes[part] = sizes.get(part, 0) + size
    found = weight_bytes(config, ways, itemsize)
    assert found == pytest.approx(sizes, rel=1e-4)


@pytest.mark.parametrize("name", ["mm1-3b-moe", "mm1-7b-moe", "afm-3b"])
def test_a_token_reads_what_it_passes(name):
    config = PRESETS[name]
    tensors = MM1(replace(config, vision=None, connector=None)).tensors()
    moe = config.decoder.moe
    share = moe.experts_per_token / moe.num_experts if moe else 1
    passed = sum(
        2 * x.size * (share if "switch_mlp" in key else 1) for key, x in tensors.items()
    )
    assert token_bytes(config) == pytest.approx(passed, rel=1e-9)


def test_one_row_of_a_table_that_is_no_head_is_read(make_config):
    tied, own = (
        make_config(decoder={"tie_word_embeddings": tie}) for tie in (True, False)
    )
    assert token_bytes(own) - token_bytes(tied) == 2 * own.decoder.hidden_size


@pytest.mark.parametrize("positions", [1, 256, 300])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_keys_and_values_take_what_is_said(positions, bits):
    config = medium(vocab_size=512)
    model = MM1(replace(config, vision=None, connector=None, image=None))
    cache = model.make_cache()
    mx.eval(model(mx.zeros((1, positions), mx.int32), cache))
    pack(cache, KVPrecision(bits, 64, 0))
    held = sum(
        x.nbytes for layer in cache for _, x in tree_flatten([layer.keys, layer.values])
    )
    expected = kv_bytes(config.decoder, positions, 4, bits, 64)
    # mlx-lm packs what is filled alone.
    assert held <= expected
    assert bits or held == expected


# Against what is taken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moe", "lengths"),
    [
        (None, (64, 700)),
        pytest.param(None, (3000,), marks=pytest.mark.drill),
        pytest.param(MOE, (64, 700, 3000), marks=pytest.mark.drill),
    ],
)
def test_a_runs_estimate_holds(moe, lengths, tmp_path, taken):
    """138 and 270 million parameters, stored in 16 bits and run in float32."""
    config = medium(moe=moe) if moe else medium()
    path = tmp_path / "model"
    with CheckpointWriter(path, config, {}) as writer:
        for name, x in MM1(config).tensors().items():
            writer.add(name, x.astype(mx.float16))
    peak, model = taken(lambda: load_model(path, mx.float32))
    tensors = model.tensors()
    held = sum(weight_bytes(config, itemsize=4).values())
    assert held == sum(x.nbytes for x in tensors.values())
    largest = max(x.nbytes for x in tensors.values())
    assert peak <= held + largest <= MOST * peak
    for tiles in (1, 4):
        peak, _ = taken(lambda n=tiles: mx.eval(model.encode(pictures(config, n))))
        assert peak <= encode_bytes(config, tiles, 4)
        assert held + encode_bytes(config, tiles, 4) <= MOST * (held + peak)
    for positions in lengths:
        peak, _ = taken(lambda n=positions: read(model, n))
        answer = Answer(positions, 0, itemsize=4)
        said = sum(answer.bytes(config).values())
        assert peak <= said
        assert held + said <= MOST * (held + peak)


def read(model, positions):
    """Prefill so many random embeddings, as ``prefill`` does."""
    cache, step = model.make_cache(), prefill.STEP
    x = mx.random.normal((positions, model.decoder.norm.weight.size))
    mx.eval(x)
    for start in range(0, positions, step):
        part = x[start : start + step]
        tokens = mx.zeros((1, len(part)), mx.int32)
        state = model.decoder.last(tokens, cache, part[None])
        mx.eval(
            model.decoder.logits(state[:, -1]) if start + step >= positions else [],
            [layer.state for layer in cache],
        )
    return cache


def test_the_embedded_models_estimate_holds(taken):
    from PIL import Image

    def run():
        with mm1_mlx.load(dtype=mx.float32) as runtime:
            picture = Image.new("RGB", (64, 64), "red")
            answer = mm1_mlx.generate(runtime, "What is this?", [picture], max_tokens=8)
            return runtime.config, answer.prompt_tokens

    peak, (config, positions) = taken(run)
    said = sum(weight_bytes(config, itemsize=4).values())
    said += sum(Answer(positions, 8, 1, itemsize=4).bytes(config).values())
    assert peak <= said <= MOST * peak


def test_prompts_are_read_in_the_steps_that_are_counted():
    assert prefill.STEP == budget.PREFILL_STEP
    decoder = PRESETS["mm1-3b"].decoder
    more = prefill_bytes(decoder, 8192) - prefill_bytes(decoder, 4096)
    assert more == 4096 * decoder.hidden_size * 2


# Training


def trained(model, size, folder, **settings):
    """The trainer of a model that took two steps on so many rows of so many tokens."""
    settings = {"learning_rate": 1e-4, "warmup_steps": 1, "decay_steps": 0} | settings
    batch = Batch(
        np.zeros(size, np.int32), np.ones(size, bool), (), (), (size[1],) * size[0]
    )
    config = TrainConfig(steps=2, **settings)
    trainer = Trainer(model, next_token_loss, lambda *_: batch, config, folder)
    for _ in range(2):
        trainer.train_step()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "positions"),
    [
        ("adamw", 128),
        ("muon", 128),
        pytest.param("adafactor", 512, marks=pytest.mark.drill),
        pytest.param("adamw", 512, marks=pytest.mark.drill),
    ],
)
def test_a_training_steps_estimate_holds(optimizer, positions, taken, tmp_path):
    config = MM1Config(decoder=medium(vocab_size=8192).decoder)

    def train():
        return trained(MM1(config), (1, positions), tmp_path, optimizer=optimizer)

    peak, trainer = taken(train)
    assert peak <= trainer.forecast()["bytes"] <= MOST * peak


@pytest.mark.slow
@pytest.mark.parametrize("size", [(4, 256), (8, 64)])
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_it_holds_whatever_is_kept(
    precision, checkpointing, rank, size, taken, tmp_path
):
    small = replace(
        medium().decoder, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=512,
    )  # fmt: skip
    config = MM1Config(decoder=small)

    def train():
        model = MM1(config)
        model.set_dtype(getattr(mx, precision))
        mx.eval(model.parameters())
        model.decoder.recompute = checkpointing
        if rank:
            model.freeze()
            attach(model, AdapterConfig(rank=rank))
        mx.reset_peak_memory()
        flags = {"precision": precision, "checkpointing": checkpointing}
        return trained(model, size, tmp_path, **flags)

    peak, trainer = taken(train)
    assert peak <= trainer.forecast()["bytes"] <= MOST * peak


def test_what_training_takes_is_told_apart():
    config = PRESETS["mm1-3b"]
    numbers = sum(weight_bytes(config, itemsize=1).values())
    whole = Training(4, 2048, 4)
    full = whole.bytes(config)
    assert full["weights"] == full["gradients"] == 4 * numbers
    assert full["optimizer"] == 8 * numbers
    sums = replace(whole, optimizer="adafactor").bytes(config)["optimizer"]
    assert sums < full["optimizer"] / 100
    D, H, layers = 3072, 8064, 26
    rank = 16 * layers * (4 * 2 * D + 3 * (D + H))
    # As one: where it stands does not matter to their sum.
    low = {"decoder.layers.0.self_attn.q_proj.lora_a": (rank,)}
    adapters = replace(whole, trained=low, parts=("decoder",)).bytes(config)
    assert adapters["gradients"] == 4 * rank
    assert adapters["weights"] == 4 * (numbers + rank)
    again = replace(whole, checkpointing=True).bytes(config)
    assert again["activations"] < full["activations"] / 3


# Refusals


def free(monkeypatch, size):
    monkeypatch.setattr(budget, "allowed", lambda: size)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    monkeypatch,
):
    # Lazy: nothing of it is ever there.
    config = PRESETS["mm1-3b"]
    weights = {k: x.astype(mx.float32) for k, x in MM1(config).tensors().items()}
    free(monkeypatch, 10e9)
    with pytest.raises(
        CheckpointError,
        match=r"^big needs 15.5 GB of memory for its weights, but 10.0 GB are free here; "
        "'mm1 quantize' makes a 4bit one that needs 4.6 GB here, or use a Mac with 16 GB$",
    ):
        check_load(weights, "big", config)
    # Neither that nor what it is asked would fit.
    free(monkeypatch, 6e9)
    with pytest.raises(CheckpointError, match="take a smaller model, or use a Mac"):
        check_load(weights, "big", config)
    with pytest.raises(CheckpointError, match="here; go elsewhere, or use a Mac"):
        check_load(weights, "big", config, "go elsewhere")
    free(monkeypatch, 10e9)
    with pytest.raises(CheckpointError, match="take a smaller model, or use a Mac"):
        check_load(weights | {"c": mx.zeros(4, mx.uint32)}, "big", config)
    free(monkeypatch, 16e9)
    check_load(weights, "big", config)
    free(monkeypatch, None)
    check_load(weights, "big", config)


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_what_a_refusal_says_of_a_packed_model_is_what_it_takes(dtype, monkeypatch):
    config = medium()
    ways = plan(find_recipe("4bit"), config).packed
    packed = replace(config, quantization=QuantizationConfig.of_modules(ways))
    held = sum(
        x.nbytes if x.dtype == mx.uint32 else x.size * dtype.size
        for x in build_model(packed, ways).tensors().values()
    )
    weights = {k: x.astype(dtype) for k, x in MM1(config).tensors().items()}
    free(monkeypatch, held + usual_bytes(config, dtype.size))
    if sum(x.nbytes for x in weights.values()) > budget.allowed():
        with pytest.raises(CheckpointError, match=f"needs {human_bytes(held)} here"):
            check_load(weights, "it", config)
    free(monkeypatch, held + usual_bytes(config, dtype.size) - 10_000)
    with pytest.raises(CheckpointError, match="take a smaller model"):
        check_load(weights, "it", config)


def test_the_mac_has_room_for_a_usual_question_too(monkeypatch):
    """16 bits of the weights alone would be said to fit; with an answer they do not."""
    config = medium()
    need = sum(weight_bytes(config).values())
    macs = []
    monkeypatch.setattr(budget, "smallest_memory", macs.append)
    free(monkeypatch, 1000)
    for dtype in (mx.float16, mx.float32):
        weights = {k: x.astype(dtype) for k, x in MM1(config).tensors().items()}
        with pytest.raises(CheckpointError, match=r"take a smaller model$"):
            check_load(weights, "it", config)
    assert macs == [need + usual_bytes(config)] * 2


def test_an_encoder_too_large_is_refused(monkeypatch):
    config = MM1Config(vision=VIT_L_14_336)
    free(monkeypatch, 1000)
    weights = MM1(config).tensors()
    with pytest.raises(
        CheckpointError, match="here; take a smaller model, or use a Mac"
    ):
        check_load(weights, "it", config)


@pytest.mark.parametrize(
    ("answer", "room", "message"),
    [
        (
            Answer(20_000, 5000),
            8.5e9,
            r"needs 8.7 GB \(8.0 GB keys and values \+ 652.1 MB activations\) of memory "
            "beside the weights, but 8.5 GB are free here; pass --kv-bits 8$",
        ),
        (Answer(20_000, 5000), 6e9, "are free here; pass --kv-bits 8$"),
        (Answer(20_000, 5000), 4e9, "are free here; pass --kv-bits 4$"),
        (
            Answer(200, 56, tiles=80),
            4e9,
            "encoding 80 tiles.* are free here; give fewer pictures, or a --resolution",
        ),
        (
            Answer(20_000, 5000, kv_bits=4),
            1.5e9,
            r"prompt and --max-tokens together may be \d,\d{3} tokens, not 25,000$",
        ),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_with_what_would(
    answer, room, message, monkeypatch
):
    config = PRESETS["mm1-3b"]
    free(monkeypatch, int(room))
    with pytest.raises(PromptError, match=message):
        check_answer(config, answer)
    free(monkeypatch, sum(answer.bytes(config).values()))
    check_answer(config, answer)


def test_what_is_named_as_fitting_fits(monkeypatch):
    config, answer = PRESETS["mm1-3b"], Answer(20_000, 5000, kv_bits=4)
    free(monkeypatch, 1_500_000_000)
    with pytest.raises(PromptError) as refusal:
        check_answer(config, answer)
    count = int(str(refusal.value).split("may be ")[1].split()[0].replace(",", ""))
    check_answer(config, replace(answer, positions=count - 100, room=100))
    with pytest.raises(PromptError):
        check_answer(config, replace(answer, positions=count + 300, room=0))


def test_what_is_known_of_a_prompt_is_not_counted_again():
    config = PRESETS["mm1-3b"]
    first, again = Answer(4000, 56, 1), Answer(4000, 56, 0, reused=3840)
    assert sum(again.bytes(config).values()) < sum(first.bytes(config).values()) / 4
