"""A point's model, small enough to be trained on one core in minutes, and its encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from benchmarks.lessons.points import Connector, Point
from benchmarks.shapes.recipe import make_config
from mm1_mlx.checkpoint import load_config
from mm1_mlx.config import MM1Config, VisionConfig
from mm1_mlx.files import sha256
from mm1_mlx.models import MM1
from mm1_mlx.models.resample import stretch
from mm1_mlx.runtime import TINY
from mm1_mlx.writer import CheckpointWriter

WEIGHTS = TINY / "model.safetensors"
POSITIONS = "position_embedding"
WIDTH = 64
LAYERS = 4
# Of a dense feed-forward part.
INTERMEDIATE = 192
EVERY = 2


def config_of(point: Point) -> MM1Config:
    """Its config; one with experts has as many weights at work as one without."""
    shipped = load_config(TINY).vision
    assert shipped is not None
    decoder: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    if point.experts:
        # Of two layers one has two experts at work: three parts in place of two.
        decoder["intermediate_size"] = INTERMEDIATE * 2 // 3
        decoder["moe"] = {
            "num_experts": point.experts,
            "every": EVERY,
            "offset": EVERY - 1,
        }
    parts: dict[str, dict[str, Any]] = {
        "vision": shipped.to_dict() | {"image_size": point.image_size},
        "connector": {
            "kind": point.connector,
            "num_image_tokens": point.image_tokens,
            **_inside(point.connector),
        },
        "decoder": decoder,
        "image": {"resize": "pad"},
    }
    return make_config(parts)


def encoder_weights(config: VisionConfig) -> dict[str, mx.array]:
    """The embedded model's encoder, its positions stretched to the config's grid."""
    prefix = "vision."
    weights = {
        name.removeprefix(prefix): x.astype(mx.float32)
        for name, x in mx.load(str(WEIGHTS)).items()
        if name.startswith(prefix)
    }
    classes, table = mx.split(weights[POSITIONS], [int(config.class_token)])
    table = stretch(table, config.grid_size, config.interpolation)
    return weights | {POSITIONS: mx.concatenate([classes, table])}


def encoder_digest() -> str:
    """What tells the encoder's file from another."""
    return sha256(WEIGHTS)


def _inside(kind: Connector) -> dict[str, int]:
    if kind == "c_abstractor":
        return {"hidden_size": WIDTH, "depth": 1}
    return {"num_attention_heads": 4} if kind == "attention_pool" else {}


def working_weights(model: MM1) -> int:
    """How many weights of the decoder a token meets."""
    moe = model.config.decoder.moe if model.config.decoder else None
    total = 0
    weights: Any = tree_flatten(model.decoder.parameters())
    for name, x in weights:
        size = x.size
        if moe and ".switch_mlp." in name:
            size = size * moe.experts_per_token // moe.num_experts
        total += size
    return total


def export(model: MM1, tokenizer: Path, out: Path, *, answers: bool) -> None:
    """Write a model that ``load`` takes; one that answers nothing gets no template."""
    config = model.config
    assert config.prompt is not None
    if not answers:
        config = replace(config, prompt=replace(config.prompt, template="plain"))
    source = {"name": "lesson", "recipe": "benchmarks/lessons", "licence": "MIT"}
    with CheckpointWriter(out, config, source, overwrite=True) as writer:
        for name, tensor in model.tensors().items():
            writer.add(name, tensor.astype(mx.float32))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            writer.add_file(name, tokenizer / name)
