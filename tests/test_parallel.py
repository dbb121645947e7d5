"""Two processes that share a model's layers say what one says that holds them all."""

import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest

from mm1_mlx import generate, load
from mm1_mlx.checkpoint import load_model
from mm1_mlx.errors import ConfigError
from mm1_mlx.models import MM1
from mm1_mlx.models.parallel import shard
from mm1_mlx.quantize import find_recipe, quantize
from mm1_mlx.runtime import TINY
from mm1_mlx.writer import CheckpointWriter

STAR = TINY / "red-star.png"
SCRIPT = """
import json, sys
import mlx.core as mx
from mm1_mlx import Ask, generate, generate_batch, load
from mm1_mlx.answer import Settings
from mm1_mlx.runtime import TINY
group = mx.distributed.init(strict=True)
asks = [("What colour is it?", [TINY / "red-star.png"]), ("Why?", [])]
tokens = []
with load(sys.argv[1], group=group) as runtime:
    for options in ({}, {"kv_bits": 8, "kv_start": 0}):
        for question, images in asks:
            tokens.append(generate(runtime, question, images, max_tokens=24, **options).tokens)
    many = [Ask(q, i, Settings(max_tokens=24)) for q, i in asks]
    tokens += [answer.tokens for answer in generate_batch(runtime, many)]
    drawn = generate(runtime, "Why?", temperature=1.0, max_tokens=24).tokens
print(json.dumps([tokens, drawn]))
"""
MOE = {"num_experts": 4, "every": 1, "offset": 0}
SHAPES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def run(folder, environment):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alone(folder):
    """What one process says that holds the whole model."""
    tokens = []
    with load(folder) as runtime:
        for options in ({}, {"kv_bits": 8, "kv_start": 0}):
            for question, images in (("What colour is it?", [STAR]), ("Why?", [])):
                answer = generate(runtime, question, images, max_tokens=24, **options)
                tokens.append(list(answer.tokens))
    return tokens


@pytest.fixture
def write(tmp_path, byte_folder, make_config, reinitialise):
    """A function: a model folder with a tokenizer, its decoder changed as given."""

    def write(changes):
        config = make_config(
            decoder=SHAPES | changes, connector={"output_size": SHAPES["hidden_size"]}
        )
        model = reinitialise(MM1(config), seed=3)
        with CheckpointWriter(tmp_path / "model", config, {}) as writer:
            for name, tensor in model.tensors().items():
                writer.add(name, tensor)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                writer.add_file(name, byte_folder / name)
        return tmp_path / "model"

    return write


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, None),
        ({"moe": MOE}, None),
        ({"qkv_bias": True, "qk_norm": "head"}, None),
        ({}, 8),
        ({"moe": MOE}, 8),
    ],
    ids=["dense", "experts", "biases and norms", "packed", "packed experts"],
)
def test_two_processes_say_what_one_says(write, hosts, tmp_path, changes, bits):
    folder = write(changes)
    if bits:
        quantize(
            folder, folder := tmp_path / "packed", find_recipe("8bit"), measured=False
        )
    ring = [
        run(folder, {"MLX_HOSTFILE": hosts, "MLX_RANK": str(rank)}) for rank in range(2)
    ]
    expected = alone(folder)
    drawn = []
    for process in ring:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        tokens, sample = json.loads(out)
        assert tokens == [*expected, *expected[:2]]
        drawn.append(sample)
    # Without a seed of the caller's, they agree on one.
    assert drawn[0] == drawn[1]
    assert len({tuple(t) for t in expected}) > 1


class Group:
    """A group of processes that only says its size."""

    def __init__(self, size):
        self.size, self.rank = lambda: size, lambda: 0


@pytest.mark.parametrize(
    ("changes", "size", "match"),
    [
        ({}, 3, "4 heads, which 3 processes cannot share"),
        ({}, 4, "2 key-value heads, which 4 processes"),
        ({"qk_norm": "full"}, 2, "norms queries and keys over all heads"),
        ({"intermediate_size": 63}, 2, "cannot be shared out over 2 processes"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(make_model, changes, size, match):
    model = make_model(decoder=changes)
    with pytest.raises(ConfigError, match=match):
        shard(model.decoder, Group(size))


def test_one_process_keeps_everything(make_model):
    model = make_model()
    before = model.tensors()
    model.shard(mx.distributed.init())
    after = model.tensors()
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_a_process_holds_its_part_alone(write, monkeypatch):
    folder = write({})
    whole = load_model(folder)
    held = []
    monkeypatch.setattr(
        "mm1_mlx.checkpoint.check_load",
        lambda weights, *_: held.append(sum(x.nbytes for x in weights.values())),
    )
    part = load_model(folder, group=Group(2))
    layers = sum(x.nbytes for n, x in whole.tensors().items() if "decoder.layers." in n)
    everything = sum(x.nbytes for x in whole.tensors().values())
    # All but half of the decoder's layers, whose norms stay whole.
    assert held[0] < everything - 0.45 * layers
    assert part.processes == 2
    cache = part.make_cache()
    assert part.decoder.layers[0].self_attn.num_kv_heads == 1
    assert len(cache) == len(whole.make_cache())
