"""Tolerances, tiny models and tokenizers; every test is offline and on the CPU."""

# OpenBLAS must be loaded before anything imports mlx.
# ruff: noqa: E402

import json
import math
import os
import socket
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("MM1_MODEL", None)

from mm1_mlx.blas import preload_blas

preload_blas()

import mlx.core as mx

# Before mlx-lm makes its stream of the default device.
mx.set_default_device(mx.cpu)

import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mm1_mlx import runtime
from mm1_mlx.checkpoint import load_config
from mm1_mlx.config import MM1Config, PromptConfig
from mm1_mlx.models import MM1
from mm1_mlx.tokenizer import load_tokenizer
from mm1_mlx.writer import CheckpointWriter

# Largest relative difference; never invented per test.
TOLERANCES = {
    "op": 1e-5,
    "model": 1e-4,
    "float16": 2e-3,
    "bfloat16": 2e-2,
    # Absolute, of numbers around 1, beside the rounding of the result.
    "kernel": 2e-6,
}

CORPUS = [
    "USER: \nWhat colour is the square? ASSISTANT: red</s>",
    "Human: How many circles are there?\nAI: two, and a blue star.",
    "The following is a conversation between a curious human and AI assistant.",
]

TINY = {
    "vision": {
        "image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "quick_gelu",
        "feature_layer": -2, "apply_post_norm": False,
    },
    "connector": {
        "kind": "c_abstractor", "input_size": 32, "num_features": 16,
        "output_size": 48, "num_image_tokens": 4, "hidden_size": 16, "depth": 1,
    },
    "decoder": {
        "vocab_size": 320, "hidden_size": 48, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "max_position_embeddings": 256, "tie_word_embeddings": False,
    },
    "image": {
        "size": 16, "resize": "squash", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
    },
    "prompt": {"template": "llava", "image_token_id": 2},
}  # fmt: skip

CLIP_TEXT = {
    "vocab_size": 340,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 40,
    "projection_size": 16,
}


@pytest.fixture(scope="session")
def tolerances():
    return TOLERANCES


@pytest.fixture(scope="session")
def assert_close():
    """A function: arrays differ by at most the named tolerance of the largest value."""

    def assert_close(result, expected, kind="model"):
        result, expected = (
            np.array(x.astype(mx.float32) if isinstance(x, mx.array) else x)
            for x in (result, expected)
        )
        assert result.shape == expected.shape
        difference = np.abs(result - expected).max()
        assert difference <= TOLERANCES[kind] * np.abs(expected).max()

    return assert_close


@pytest.fixture(scope="session")
def embedded():
    """The embedded model's config."""
    return load_config(runtime.TINY)


@pytest.fixture(scope="session")
def make_config():
    """A function: the tiny config with some sections' fields replaced."""

    def make(**changes):
        sections = {name: dict(fields) for name, fields in TINY.items()}
        for name, fields in changes.items():
            if fields is not None:
                fields = sections.get(name, {}) | fields
            sections[name] = fields
        return MM1Config.from_dict(sections)

    return make


@pytest.fixture(scope="session")
def tiny_config(make_config):
    return make_config()


def _fresh(name, parameter):
    leaf = name.rpartition(".")[2]
    if parameter.ndim > 1:
        std = math.prod(parameter.shape[1:]) ** -0.5
        return mx.random.normal(parameter.shape, scale=1.0 if "embed" in name else std)
    center = 1.0 if leaf == "weight" else 0.0
    return mx.random.uniform(center - 0.2, center + 0.2, parameter.shape)


@pytest.fixture(scope="session")
def reinitialise():
    """A function: give every parameter a value that shows in the wrong place."""

    def reinitialise(module, seed=0):
        mx.random.seed(seed)
        module.update(tree_map_with_path(_fresh, module.parameters()))
        mx.eval(module.parameters())
        return module.eval()

    return reinitialise


@pytest.fixture(scope="session")
def make_model(make_config, reinitialise):
    """A function: a re-initialised tiny model, its config changed as given."""

    def make(seed=0, **changes):
        return reinitialise(MM1(make_config(**changes)), seed)

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model):
    """Shared by tests that do not change it."""
    return make_model()


@pytest.fixture(scope="session")
def parameter_count():
    """A function: the number of parameters of a module, none of them allocated."""
    return lambda module: sum(x.size for _, x in tree_flatten(module.parameters()))


def _write(folder, backend, **options):
    PreTrainedTokenizerFast(tokenizer_object=backend, **options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory):
    """A byte-level BPE tokenizer, as Qwen's, without a beginning token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    return _write(folder, backend, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="session")
def spm_folder(tmp_path_factory):
    """A tokenizer as SentencePiece's for Llama: Metaspace, byte fallback, <s> first."""
    specials = ["<unk>", "<s>", "</s>", "<image>"]
    letters = sorted({c for text in CORPUS for c in text} - {" ", "\n"} | set("<>/▁"))
    pieces = [*specials, *(f"<0x{i:02X}>" for i in range(256)), *letters]
    merges = [("▁", "a"), ("▁", "<"), ("i", "s"), ("▁", "is"), ("r", "e"), ("re", "d")]
    pieces += ["".join(pair) for pair in merges]
    backend = Backend(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        "▁", prepend_scheme="first", split=False
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(specials)
    backend.post_processor = _leading("<s>", 1)
    folder = tmp_path_factory.mktemp("spm")
    return _write(folder, backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _leading(token, token_id):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B",
        special_tokens=[(token, token_id)],
    )


@pytest.fixture(scope="session")
def clip_folder(make_config, reinitialise, byte_folder, tmp_path_factory):
    """A model with two towers and a tokenizer, in our format."""
    sections = make_config().to_dict()
    shared = {"feature_layer": -1, "apply_post_norm": True, "projection_size": 16}
    config = MM1Config.from_dict(
        {
            "vision": sections["vision"] | shared,
            "text": CLIP_TEXT,
            "image": sections["image"],
        }
    )
    out = tmp_path_factory.mktemp("clip") / "model"
    with CheckpointWriter(out, config, {}) as writer:
        for name, tensor in reinitialise(MM1(config)).tensors().items():
            writer.add(name, tensor)
        for path in Path(byte_folder).iterdir():
            writer.add_file(path.name, path)
    return out


@pytest.fixture(params=["byte_folder", "spm_folder"])
def any_folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def plain_prompt():
    """A function: a prompt config with some fields replaced."""

    def make(**changes):
        return PromptConfig(**({"template": "plain", "image_token_id": 2} | changes))

    return make


@pytest.fixture
def tokenizer(byte_folder, plain_prompt):
    """The byte-level one; fresh, because typed special tokens are added to it."""
    return load_tokenizer(byte_folder, plain_prompt())


@pytest.fixture
def any_tokenizer(any_folder, plain_prompt):
    return load_tokenizer(any_folder, plain_prompt())


@pytest.fixture
def hosts(tmp_path):
    """The file of a ring of two on this machine."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    return str(path)
