"""Exported functions compute what the model does, whatever its parts."""

import json
import os
import signal
import subprocess
import sys

import mlx.core as mx
import pytest

from mm1_mlx.checkpoint import device_dtype, load_model
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.mlxfn import export, open_program
from mm1_mlx.mlxfn.functions import Traced
from mm1_mlx.mlxfn.sidecar import SIDECAR, Sidecar
from mm1_mlx.prompt import Prompt
from mm1_mlx.runtime import TINY, generate, load

STAR, FOUR = TINY / "red-star.png", TINY / "four-shapes.png"
ASKED = [
    ("What colour is the star?", [STAR]),
    ("Describe the picture.", [FOUR]),
    ("How many shapes are there?", [FOUR]),
    ("Where is the circle?", [FOUR]),
    ("What is a star?", []),
    ("Which of the two pictures shows a star?", [FOUR, STAR]),
]
MOE = {"num_experts": 4, "experts_per_token": 2, "every": 2, "offset": 1}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
}  # fmt: skip
DECODERS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "olmoe": {"qk_norm": "full", "moe": MOE | {"norm_topk_prob": False}},
    "afm": {"qk_norm": "rotated", "rope_interleaved": True},
    "mixtral": {"moe": MOE | {"every": 1, "offset": 0}},
    "mistral": {"sliding_window": 6},
    "gemma": {"embedding_scale": 48**0.5, "hidden_act": "gelu_tanh"},
    "stablelm": {"norm": "layer", "rotary_dim": 4},
    "xgen": {"head_bias": True, "o_bias": True, "mlp_bias": True},
    "llama3": {"rope_scaling": LLAMA3},
    "openelm": {
        "layer_sizes": [
            {"num_attention_heads": heads, "num_key_value_heads": kv,
             "intermediate_size": size}
            for heads, kv, size in ((2, 1, 48), (4, 2, 64))
        ],
    },
}  # fmt: skip
ENCODERS = {
    "aim": {"position": "sincos", "class_token": False, "patch_bias": True},
    "aimv2": {
        "norm": "rms", "gated_mlp": True, "class_token": False, "patch_norm": True,
        "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
    },
    "moe": {"moe": {"num_experts": 4, "experts_per_image": 2, "num_sparse_layers": 1}},
}  # fmt: skip
SIZES = {"input_size": 32, "num_features": 16, "output_size": 48}
FEW = SIZES | {"num_image_tokens": 4}
CONNECTORS = {
    "linear": SIZES,
    "mlp": SIZES | {"hidden_size": 24},
    "average_pool": FEW,
    "attention_pool": FEW | {"num_attention_heads": 4},
    "perceiver": FEW | {"depth": 1, "num_attention_heads": 2, "intermediate_size": 24},
}


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_is_traced(name, write_model, tmp_path):
    model = write_model(tmp_path / "model", decoder=DECODERS[name])
    assert export(model, tmp_path / "out", prefill=(4, 16)).difference < 1e-5


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_is_traced(name, write_model, tmp_path):
    model = write_model(tmp_path / "model", vision=ENCODERS[name])
    assert export(model, tmp_path / "out", prefill=(16,)).difference < 1e-5


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_connector_is_traced(kind, write_model, tmp_path):
    fields = CONNECTORS[kind] | {"kind": kind}
    model = write_model(tmp_path / "model", connector_fields=fields)
    assert export(model, tmp_path / "out", prefill=(16,)).difference < 1e-5


def test_a_decoder_alone_is_exported(write_model, tmp_path):
    model = write_model(tmp_path / "model", vision=None, connector=None, image=None)
    report = export(model, tmp_path / "out", prefill=(4,))
    assert report.sidecar.prompt.with_picture is None
    names = {function.name for function in report.sidecar.functions}
    assert names == {"embed", "run"}


@pytest.mark.parametrize(
    ("question", "pictures"), ASKED, ids=[question for question, _ in ASKED]
)
def test_the_tokens_are_those_of_generate(question, pictures, exported, tiny):
    program = open_program(exported)
    prompt = Prompt.build(question, pictures, tiny.config, tiny.tokenizer)
    answer = generate(tiny, question, pictures, max_tokens=40)
    found = [t for t in program.answer(prompt, 40) if t not in (1,)]
    assert found == [t for t in answer.tokens if t not in (1,)]


def test_weights_are_stored_once_as_they_are(packed, tmp_path):
    """The files are as large as the weights, packed ones too, and one graph or two."""
    for name, folder in (("plain", TINY), ("packed", packed)):
        export(folder, tmp_path / name, prefill=())
        model = load_model(folder, device_dtype)
        size = {"decoder": 0, "encode": 0}
        for path, tensor in model.tensors().items():
            part = "decoder" if path.startswith("decoder.") else "encode"
            size[part] += tensor.nbytes
        for part, weights in size.items():
            written = (tmp_path / name / f"{part}.mlxfn").stat().st_size
            assert weights < written < weights + 80_000


def test_packed_tokens_are_those_of_generate(packed, packed_exported):
    program = open_program(packed_exported)
    with load(packed) as runtime:
        for question, pictures in ASKED:
            prompt = Prompt.build(question, pictures, runtime.config, runtime.tokenizer)
            answer = generate(runtime, question, pictures, max_tokens=40)
            found = [t for t in program.answer(prompt, 40) if t not in (1,)]
            assert found == [t for t in answer.tokens if t not in (1,)]


def test_an_answer_ends_where_the_cache_is_full(tiny, tmp_path):
    out = tmp_path / "out"
    question = "Describe the picture."
    prompt = Prompt.build(question, [FOUR], tiny.config, tiny.tokenizer)
    capacity = len(prompt.tokens) + 10
    export(TINY, out, capacity=capacity, prefill=(8, 32))
    program = open_program(out)
    answer = generate(tiny, question, [FOUR], max_tokens=40)
    found = list(program.answer(prompt, 40))
    # The last token needs no place.
    assert len(found) == capacity - len(prompt.tokens) + 1 < len(answer.tokens)
    assert found == list(answer.tokens[: len(found)])
    long = Prompt.build(question * 9, [FOUR], tiny.config, tiny.tokenizer)
    with pytest.raises(
        ValueError, match=f"more than the {capacity} that the functions hold"
    ):
        next(program.answer(long, 1))


def test_padding_does_not_show(exported, tiny):
    """Whatever lies behind the last position, as after a padded run, is not read."""
    program = open_program(exported)
    prompt = Prompt.build("What is it?", [STAR], tiny.config, tiny.tokenizer)
    clean, dirty = program.start(), program.start()
    dirty.caches = [x + 1e3 for x in dirty.caches]
    first, second = (program.logits(prompt, state) for state in (clean, dirty))
    assert mx.array_equal(first, second)


def test_the_sidecar_comes_back_as_it_was(exported):
    values = json.loads((exported / SIDECAR).read_text())
    assert Sidecar.from_dict(values).to_dict() == json.loads(json.dumps(values))
    assert values["mlx"] == mx.__version__
    assert values["device"] == "cpu"


def refused(tmp_path, error, match, *arguments, **options):
    with pytest.raises(error, match=match):
        export(*arguments, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.mm1-*"))


def test_what_cannot_be_traced_is_named(write_model, tmp_path):
    moe = MOE | {"capacity_factor": 2.0}
    model = write_model(tmp_path / "model", decoder={"moe": moe})
    refused(tmp_path, ConfigError, "moe.capacity_factor is 2.0", model)
    refused(tmp_path, ConfigError, "--resolution 96", TINY, resolution="2x96")
    refused(tmp_path, ConfigError, "more than the model's 1,024", TINY, capacity=1025)
    refused(
        tmp_path, ConfigError, "holds no question about a picture", TINY, capacity=9
    )


def test_another_resolution_is_another_encoder(tmp_path):
    with load(TINY, resolution="192") as runtime:
        export(TINY, tmp_path / "out", resolution="192", prefill=(64,))
        program = open_program(tmp_path / "out")
        assert program.sidecar.find("encode").inputs[0].shape == (1, 192, 192, 3)
        question = "What colour is the star?"
        prompt = Prompt.build(question, [STAR], runtime.config, runtime.tokenizer)
        tokens = generate(runtime, question, [STAR], max_tokens=8).tokens
        assert list(program.answer(prompt, 8))[: len(tokens)] == list(tokens)


def test_functions_that_differ_are_not_shipped(monkeypatch, tmp_path):
    run = Traced.run

    def wrong(self, *inputs):
        logits, *caches = run(self, *inputs)
        return [logits * 1.01, *caches]

    monkeypatch.setattr(Traced, "run", wrong)
    refused(tmp_path, CheckpointError, "differ from the model by 0.01", TINY)


def test_an_export_is_replaced_only_if_told(tmp_path):
    out = tmp_path / "out"
    export(TINY, out, prefill=())
    before = (out / SIDECAR).read_bytes()
    with pytest.raises(CheckpointError, match="already exists; choose another name or"):
        export(TINY, out, prefill=(8,))
    assert (out / SIDECAR).read_bytes() == before
    export(TINY, out, prefill=(8,), overwrite=True)
    assert open_program(out).sidecar.buckets == (1, 8)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("")
    with pytest.raises(CheckpointError, match="holds no exported functions"):
        export(TINY, other, overwrite=True)
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from mm1_mlx.mlxfn import export
from mm1_mlx.runtime import TINY

def progress(task, done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

export(TINY, Path(sys.argv[1]), prefill=(8,), progress=progress)
"""


def test_a_killed_export_leaves_no_folder_in_its_place(tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, out], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.mm1-partial"]
    export(TINY, out, prefill=(8,))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert open_program(out).sidecar.buckets == (1, 8)


def test_a_stopped_export_leaves_nothing(monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Traced, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        export(TINY, tmp_path / "deep/out")
    assert list(tmp_path.iterdir()) == []
