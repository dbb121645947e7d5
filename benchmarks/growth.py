"""How time grows with the work: ``python -m benchmarks.growth``.

The LLaVA of ``peers/fixture.py``, the 173.5 M of its 176.7 M parameters that an answer
uses, with random weights in float32 on the CPU: encoding and reading 1 to 16 pictures,
prompts of 512 to 16,384 tokens, a token decoded behind as many; and a layer of 8 to 64
experts of which each token passes two. Of each the exponent of a power law through the
medians, by least squares of the logarithms, with its standard error, beside the exponent of
the operations that are to be done.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mm1_mlx.blas import preload_blas

BLAS = preload_blas()

import mlx.core as mx  # noqa: E402  (after BLAS)
from mlx_lm.models.cache import trim_prompt_cache  # noqa: E402

from benchmarks import moe  # noqa: E402
from benchmarks.peers import fixture  # noqa: E402
from mm1_mlx.bench import describe  # noqa: E402
from mm1_mlx.bench.synthetic import synthetic_model  # noqa: E402
from mm1_mlx.config import DecoderConfig, MM1Config  # noqa: E402
from mm1_mlx.memory.prefixes import KVPrecision  # noqa: E402
from mm1_mlx.models import MM1  # noqa: E402
from mm1_mlx.models.moe import SparseMLP  # noqa: E402
from mm1_mlx.prefill import Context, prefill  # noqa: E402
from mm1_mlx.prompt import Prompt  # noqa: E402
from mm1_mlx.request import decode  # noqa: E402
from mm1_mlx.sampling import Sampler  # noqa: E402
from mm1_mlx.work import decoder_flops, encode_flops  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "growth-cpu.json"
PICTURES = (1, 2, 4, 8, 16)
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16_384)
EXPERTS = (8, 16, 32, 64)
ROUNDS = 5
# Tokens decoded at every depth, and through every layer of experts.
DECODED = 8
EXPERT_WIDTH, EXPERT_HIDDEN, EXPERT_ROWS = 1024, 2048, 1024

# The model that is measured beside the peers.
CONFIG = MM1Config.from_dict(
    {
        "vision": {
            "image_size": fixture.IMAGE,
            "patch_size": fixture.PATCH,
            "hidden_size": fixture.VISION_WIDTH,
            "intermediate_size": 4 * fixture.VISION_WIDTH,
            "num_hidden_layers": fixture.VISION_LAYERS,
            "num_attention_heads": fixture.VISION_HEADS,
            "hidden_act": "quick_gelu",
            "interpolation": "bicubic",
            "feature_layer": -2,
            "apply_post_norm": False,
        },
        "connector": {
            "kind": "mlp",
            "input_size": fixture.VISION_WIDTH,
            "num_features": (fixture.IMAGE // fixture.PATCH) ** 2,
            "hidden_size": fixture.WIDTH,
            "output_size": fixture.WIDTH,
        },
        "decoder": {
            "vocab_size": fixture.VOCAB,
            "hidden_size": fixture.WIDTH,
            "intermediate_size": fixture.INTERMEDIATE,
            "num_hidden_layers": fixture.LAYERS,
            "num_attention_heads": fixture.HEADS,
            "num_key_value_heads": fixture.HEADS,
            "head_dim": fixture.HEAD,
            "rms_norm_eps": 1e-5,
            "rope_theta": fixture.ROPE_THETA,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": False,
        },
    }
)


@dataclass
class Table:
    """Seconds against how much of something there is.

    Attributes:
        name: what is timed.
        of: what there is more and more of.
        operations: to be done for so much of it.
        seconds: by how much, of every round.
    """

    name: str
    of: str
    operations: Callable[[int], int]
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def add(self, n: int, seconds: float) -> None:
        """Keep the seconds of a round."""
        self.seconds.setdefault(n, []).append(seconds)

    def to_dict(self) -> dict[str, Any]:
        """The table as results hold it."""
        sizes = sorted(self.seconds)
        medians = [statistics.median(self.seconds[n]) for n in sizes]
        operations = [self.operations(n) for n in sizes]
        exponent, error = fit(sizes, medians)
        return {
            "name": self.name,
            "of": self.of,
            "points": [
                {
                    "n": n,
                    "median_seconds": median,
                    "min_seconds": min(self.seconds[n]),
                    "max_seconds": max(self.seconds[n]),
                    "operations": work,
                }
                for n, median, work in zip(sizes, medians, operations, strict=True)
            ],
            "exponent": exponent,
            "standard_error": error,
            "operations_exponent": fit(sizes, operations)[0],
        }


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float | None]:
    """The exponent b of y = a x^b through points, and its standard error.

    Least squares of log y on log x. Through two points a line has no error to tell.
    """
    u, v = ([math.log(value) for value in values] for values in (xs, ys))
    slope, intercept = statistics.linear_regression(u, v)
    if len(u) < 3:
        return slope, None
    rest = sum((b - intercept - slope * a) ** 2 for a, b in zip(u, v, strict=True))
    spread = sum((a - statistics.fmean(u)) ** 2 for a in u)
    return slope, math.sqrt(rest / (len(u) - 2) / spread)


def timed(work: Callable[[], Any]) -> float:
    """Seconds until what it gives is computed."""
    start = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - start


def encoding(model: MM1, counts: Sequence[int], rounds: int) -> Table:
    """Pictures of a tile each, together."""
    config = model.config
    table = Table("encoding", "pictures", lambda n: encode_flops(config, n))
    side = config.vision.image_size
    for i in range(-1, rounds):
        for n in counts:
            pixels = mx.random.normal((n, side, side, 3), key=mx.random.key(n))
            mx.eval(pixels)
            # What is kept of another size is no memory for this one.
            mx.clear_cache()
            seconds = timed(lambda x=pixels: model.connector(model.vision(x)))
            if i >= 0:
                table.add(n, seconds)
    return table


def reading(
    model: MM1, of: str, each: int, counts: Sequence[int], rounds: int, *, decode: bool
) -> list[Table]:
    """Prompts of ever more positions, and a token behind each if ``decode``.

    One prompt is read piece by piece, as a long one always is; how long a shorter one
    takes is how long it took to come so far.
    """
    decoder = model.config.decoder
    prompts = Table("prefill", of, lambda n: decoder_flops(decoder, n * each))
    steps = Table("decoding", of, lambda n: decoder_flops(decoder, 1, n * each))
    key = mx.random.key(0)
    tokens = mx.random.randint(0, decoder.vocab_size, (counts[-1] * each,), key=key)
    ids = tuple(tokens.tolist())
    # The first round, of a few positions, is not counted.
    for i in range(-1, rounds):
        cache = model.make_cache()
        total = 0.0
        for before, n in pairwise([0, *(counts if i >= 0 else counts[:2])]):
            start, end = before * each, n * each
            embeddings = model.decoder.embed(tokens[start:end])
            mx.eval(embeddings)
            prompt = Prompt(ids[:end])
            context = Context(prompt, cache, KVPrecision(), start, embeddings)
            total += timed(lambda x=context: prefill(model, x))
            seconds = decoding(model, cache) if decode else 0.0
            if i >= 0:
                prompts.add(n, total)
                steps.add(n, seconds)
    return [prompts, steps] if decode else [prompts]


def decoding(model: MM1, cache: list[Any]) -> float:
    """Seconds of a token behind what a cache holds, which stays as it is."""
    start = time.perf_counter()
    tokens = list(decode(model, 5, cache, Sampler(), DECODED, KVPrecision()))
    seconds = time.perf_counter() - start
    trim_prompt_cache(cache, len(tokens))
    return seconds / len(tokens)


def expert_layer(experts: int) -> SparseMLP:
    """A layer of so many experts, of which a token passes ``moe.TOP``."""
    config = moe.make_config(EXPERT_WIDTH, EXPERT_HIDDEN).to_dict()
    config["moe"] |= {"num_experts": experts}
    mx.random.seed(experts)
    layer = SparseMLP(DecoderConfig.from_dict(config), 0)
    mx.eval(layer.parameters())
    return layer


def experts(counts: Sequence[int], rounds: int) -> list[Table]:
    """A layer over many rows, and over one after another."""

    def operations(rows: int) -> Callable[[int], int]:
        matrices = 3 * EXPERT_WIDTH * EXPERT_HIDDEN * moe.TOP
        return lambda n: 2 * rows * (matrices + EXPERT_WIDTH * n)

    many = Table("prefill", "experts", operations(EXPERT_ROWS))
    single = Table("decoding", "experts", operations(1))
    layers = {n: expert_layer(n) for n in counts}
    for i in range(-1, rounds):
        shape = (1, EXPERT_ROWS, EXPERT_WIDTH)
        x = mx.random.normal(shape, key=mx.random.key(i + 1))
        # Other rows pass other experts, so that none stays in a cache.
        ones = mx.split(x[:, :DECODED], DECODED, axis=1)
        mx.eval(x, ones)
        for n, layer in layers.items():
            seconds = timed(lambda layer=layer, x=x: layer(x))
            each = sum(timed(lambda layer=layer, y=y: layer(y)) for y in ones)
            if i >= 0:
                many.add(n, seconds)
                single.add(n, each / DECODED)
    return [many, single]


def markdown(table: dict[str, Any]) -> str:
    """A table for people."""
    points = table["points"]
    error = table["standard_error"]
    sure = f" ± {error:.2f}" if error is not None else ""
    rows = (
        (table["of"], [f"{point['n']:,}" for point in points]),
        ("s", [f"{point['median_seconds']:.3g}" for point in points]),
        ("GFLOP/s", [f"{_rate(point):.3g}" for point in points]),
    )
    header, *body = (f"| {' | '.join((name, *cells))} |" for name, cells in rows)
    return "\n".join(
        [
            f"{table['name']} against {table['of']}: time grows with the power "
            f"{table['exponent']:.2f}{sure}, operations with "
            f"{table['operations_exponent']:.2f}",
            "",
            header,
            f"|---|{'--:|' * len(points)}",
            *body,
            "",
        ]
    )


def line(table: dict[str, Any]) -> str:
    """A table in a line of another."""
    points, error = table["points"], table["standard_error"]
    sizes = ", ".join(f"{point['n']:,}" for point in points)
    seconds = ", ".join(f"{point['median_seconds']:.3g}" for point in points)
    sure = f" ± {error:.2f}" if error is not None else ""
    return (
        f"| {table['name']} | {sizes} ({table['of']}) | {seconds} | "
        f"{table['exponent']:.2f}{sure} | {table['operations_exponent']:.2f} |"
    )


def _rate(point: dict[str, Any]) -> float:
    return point["operations"] / point["median_seconds"] / 1e9


def measure(
    model: MM1,
    pictures: Sequence[int],
    contexts: Sequence[int],
    layers: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """All tables, printed as they are done."""
    K = model.config.num_image_tokens
    made = []
    for tables in (
        lambda: [encoding(model, pictures, rounds)],
        lambda: reading(model, "pictures", K, pictures, rounds, decode=False),
        lambda: reading(model, "context", 1, contexts, rounds, decode=True),
        lambda: experts(layers, rounds),
    ):
        for table in tables():
            made.append(table.to_dict())
            print(markdown(made[-1]), flush=True)
    return made


def main() -> None:
    """Measure, print, and write the results beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--quick", action="store_true", help="the three least of each, in two rounds"
    )
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}; none if quick")
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    model = synthetic_model("llava", CONFIG, {}, mx.float32)
    sizes = (PICTURES, CONTEXTS, EXPERTS)
    rounds = arguments.rounds
    if arguments.quick:
        sizes, rounds = tuple(x[:3] for x in sizes), 2
    start = time.perf_counter()
    tables = measure(model, *sizes, rounds)
    report = {
        "machine": describe(BLAS),
        # Above the number of cores, other programs took their share of the time.
        "load_average": round(os.getloadavg()[2], 1),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
        "dtype": "float32",
        "parameters": sum(x.size for x in model.tensors().values()),
        "rounds": rounds,
        "seconds": round(time.perf_counter() - start),
        "tables": tables,
    }
    out = arguments.out or (None if arguments.quick else RESULTS)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
