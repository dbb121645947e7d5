"""Packed layers on a CPU: ``python -m benchmarks.packed_cpu``.

Prefill and decode of a LLaVA-shaped decoder of 134 M parameters with random weights, in
turns: float32, 4 bits with unpacked weights kept beside, 4 bits alone, and mlx's own
packed layers. Ratios are medians of those of one turn. What they compute is compared, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm1_mlx.blas import preload_blas

BLAS = preload_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mm1_mlx.bench import describe  # noqa: E402
from mm1_mlx.checkpoint import build_model  # noqa: E402
from mm1_mlx.config import DecoderConfig, MM1Config, QuantizationConfig  # noqa: E402
from mm1_mlx.models import MM1  # noqa: E402
from mm1_mlx.models.linear import keep_unpacked  # noqa: E402
from mm1_mlx.quantize.pack import pack_deferred  # noqa: E402
from mm1_mlx.recipe import (  # noqa: E402
    DEFAULT,
    RECIPES,
    Recipe,
    find_recipe,
    parse_way,
    plan,
)
from mm1_mlx.shard import Deferred  # noqa: E402

CONFIG = MM1Config(
    decoder=DecoderConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
)
ROWS, STEPS = 600, 16


def chosen(name: str, head: str | None) -> Recipe:
    """The recipe as ``mm1 quantize`` has it, or with another way for embeddings and head."""
    recipe = find_recipe(name)
    return recipe.with_ways({"head": parse_way(head, "head")}) if head else recipe


def packed_model(dense: MM1, recipe: Recipe) -> MM1:
    """The model, rounded as the recipe has it."""
    packed = plan(recipe, CONFIG).packed
    config = replace(CONFIG, quantization=QuantizationConfig.of_modules(packed))
    model = build_model(config, packed)
    tensors = ((name, Deferred.of(x)) for name, x in dense.tensors().items())
    rounded = pack_deferred(tensors, packed)
    model.load_weights([(name, tensor.whole()) for name, tensor in rounded])
    mx.eval(model.parameters())
    return model.eval()


def as_mlx(dense: MM1, recipe: Recipe) -> MM1:
    """The same with mlx's own layers."""
    ours = packed_model(dense, recipe)
    quantization = ours.config.quantization
    packed = {n.removesuffix(".scales") for n in ours.tensors() if "scales" in n}
    model = MM1(CONFIG)
    nn.quantize(
        model,
        class_predicate=lambda path, _: (
            path in packed and quantization.way(path).to_dict()
        ),
    )
    model.load_weights(list(ours.tensors().items()))
    mx.eval(model.parameters())
    return model.eval()


def timed(function: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    mx.eval(function())
    return time.perf_counter() - start


def prefill(model: MM1) -> float:
    """Seconds of a prompt's first logits, as mlx-lm computes them: of its last token."""
    cache = model.make_cache()
    tokens = mx.random.randint(0, CONFIG.decoder.vocab_size, (1, ROWS))

    def run() -> mx.array:
        model(tokens[:, :-1], cache)
        mx.eval([layer.state for layer in cache])
        return model(tokens[:, -1:], cache)

    return timed(run)


def decode(model: MM1) -> float:
    """Seconds of a token."""
    cache = model.make_cache()
    token = mx.random.randint(0, CONFIG.decoder.vocab_size, (1, 1))
    mx.eval(model(token, cache))

    def run() -> mx.array:
        logits = token
        for _ in range(STEPS):
            logits = model(token, cache)
            mx.eval(logits)
        return logits

    return timed(run) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=DEFAULT, choices=list(RECIPES))
    parser.add_argument(
        "--head", help="bits of embeddings and head (default: the recipe's)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--mlx-rounds", type=int, default=1, help="in which mlx's own layers prefill"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()

    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    recipe = chosen(arguments.recipe, arguments.head)
    dense = MM1(CONFIG).eval()
    mx.eval(dense.parameters())
    kept = packed_model(dense, recipe)
    kept_bytes = keep_unpacked(kept, float("inf"))
    models = {
        "float32": dense,
        "packed, unpacked kept": kept,
        "packed alone": packed_model(dense, recipe),
        "packed, mlx's layers": as_mlx(dense, recipe),
    }
    times: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": []} for name in models
    }
    peaks = dict.fromkeys(models, 0)
    for i in range(arguments.rounds + 1):
        for name, model in models.items():
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            seconds = {}
            # Minutes each: of mlx's own not in every turn.
            if not name.endswith("mlx's layers") or 0 < i <= arguments.mlx_rounds:
                seconds["prefill"] = prefill(model)
                peaks[name] = max(peaks[name], mx.get_peak_memory() - before)
            seconds["decode"] = decode(model)
            if i:  # the first warms up
                for kind, value in seconds.items():
                    times[name][kind].append(value)
    tokens = mx.random.randint(0, CONFIG.decoder.vocab_size, (1, 64))
    expected = models["packed, mlx's layers"](tokens)
    figures: dict[str, Any] = {
        "what": __doc__.split("\n")[0],
        "machine": describe(BLAS),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
        # Above the number of cores, other programs took their share of the time.
        "load_average": round(os.getloadavg()[2], 1),
        "recipe": arguments.recipe,
        "ways": {name: way.to_dict() for name, way in recipe.ways.items()},
        "parameters": sum(x.size for x in dense.tensors().values()),
        "rows": ROWS,
        "weight_bytes": {
            name: sum(x.nbytes for x in model.tensors().values())
            for name, model in models.items()
        },
        "kept_bytes": kept_bytes,
        "prefill_peak_bytes": peaks,
        "difference_from_mlx": {
            name: float(mx.abs(model(tokens) - expected).max() / mx.abs(expected).max())
            for name, model in models.items()
            if name.startswith("packed")
        },
    }
    for kind in ("prefill", "decode"):
        base = times["float32"][kind]
        figures[f"{kind}_seconds"] = {
            name: [round(x, 5) for x in found[kind]] for name, found in times.items()
        }
        figures[f"{kind}_ratio"] = {
            name: round(
                statistics.median(
                    a / b for a, b in zip(found[kind], base, strict=False)
                ),
                3,
            )
            for name, found in times.items()
        }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
