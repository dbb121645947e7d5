"""A layer of 64 experts beside dense layers and mlx-lm's: ``python -m benchmarks.moe``.

In float32 on the CPU: a prefill of 4096 tokens against the dense layers that a token's
two experts amount to, and of 1024 tokens against the same experts computed by mlx-lm's
SwitchGLU. The runs are interleaved and a ratio is that of neighbours, so that what
else the machine does falls on both. Work is counted twice: from the sizes, and from the
matrices that ``mx.matmul`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm1_mlx.blas import preload_blas

BLAS = preload_blas()

import mlx.core as mx  # noqa: E402  (after BLAS)

from mm1_mlx.bench import describe  # noqa: E402
from mm1_mlx.config import DecoderConfig  # noqa: E402
from mm1_mlx.models.decoder import MLP  # noqa: E402
from mm1_mlx.models.moe import SparseMLP, choose  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "moe-cpu.json"
EXPERTS, TOP = 64, 2
BYTES = 4


def make_config(width: int, hidden: int) -> DecoderConfig:
    """A decoder whose layers have these sizes."""
    return DecoderConfig.from_dict(
        {
            "vocab_size": 8,
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": 1,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": width // 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "moe": {
                "num_experts": EXPERTS,
                "experts_per_token": TOP,
                "every": 1,
                "offset": 0,
            },
        }
    )


class Switch(SparseMLP):
    """The same layer by mlx-lm's SwitchGLU."""

    def _outputs(self, x: mx.array, experts: mx.array) -> mx.array:
        return self.switch_mlp(x, experts)


def work(rows: Sequence[int], width: int, hidden: int) -> dict[str, int]:
    """Floating-point operations and bytes of MLPs that take this many rows each.

    A row goes in and out of three products; an MLP's three matrices are read once.
    """
    matrices, total = 3 * width * hidden, sum(rows)
    numbers = len(rows) * matrices + total * 3 * (width + hidden)
    return {"flops": 2 * total * matrices, "bytes": BYTES * numbers}


@contextmanager
def counted() -> Any:
    """What the products by ``mx.matmul`` inside amount to, as ``work`` has it."""
    product, done = mx.matmul, {"flops": 0, "bytes": 0}

    def counting(a: mx.array, b: mx.array) -> mx.array:
        M, K, N = a.shape[0], a.shape[1], b.shape[1]
        done["flops"] += 2 * M * K * N
        done["bytes"] += BYTES * (M * K + K * N + M * N)
        return product(a, b)

    mx.matmul = counting  # type: ignore[assignment]
    try:
        yield done
    finally:
        mx.matmul = product


def expert_rows(layer: SparseMLP, x: mx.array) -> list[int]:
    """Rows of every expert that has any."""
    experts, _ = choose(layer.gate(x), layer.moe)
    counts = [mx.sum(experts == e).item() for e in range(EXPERTS)]
    return [n for n in counts if n]


def interleave(
    contestants: dict[str, Callable[[], mx.array]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            mx.eval(run())
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """The median of the neighbours' ratios, the least and the largest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {
        "median": round(statistics.median(ratios), 2),
        "min": round(min(ratios), 2),
        "max": round(max(ratios), 2),
    }


def measure(width: int, hidden: int, rounds: int) -> dict[str, Any]:
    """Counts and times of one size of layer."""
    config = make_config(width, hidden)
    mx.random.seed(0)
    sparse, switch = SparseMLP(config, 0), Switch(config, 0)
    switch.update(sparse.parameters())
    dense = [MLP(config, 0) for _ in range(TOP)]
    mx.eval(sparse.parameters(), *(mlp.parameters() for mlp in dense))
    long, short = (mx.random.normal((1, n, width)) for n in (4096, 1024))
    mx.eval(long, short)
    results: dict[str, Any] = {"hidden_size": width, "intermediate_size": hidden}
    for name, x in (("prefill_4096", long), ("prefill_1024", short)):
        with counted() as done:
            mx.eval(sparse(x))
        expected = work(expert_rows(sparse, x), width, hidden)
        amounts = work([x.shape[1]] * TOP, width, hidden)
        assert done == expected, f"{name}: counted {done}, expected {expected}"
        assert done["flops"] == amounts["flops"], "more work than the dense layers'"
        results[name] = {"counted": done, "theory": expected, "dense": amounts}
    pairs = {
        "prefill_4096": {
            "sparse": lambda: sparse(long),
            "dense": lambda: dense[0](long) + dense[1](long),
        },
        "prefill_1024": {
            "sparse": lambda: sparse(short),
            "switch_glu": lambda: switch(short),
        },
    }
    for name, contestants in pairs.items():
        seconds = interleave(contestants, rounds)
        results[name]["median_seconds"] = {
            k: round(statistics.median(v), 4) for k, v in seconds.items()
        }
        other = next(k for k in seconds if k != "sparse")
        if other == "dense":
            results[name]["sparse_over_dense"] = ratio(
                seconds["sparse"], seconds[other]
            )
        else:
            results[name]["switch_glu_over_sparse"] = ratio(
                seconds[other], seconds["sparse"]
            )
    return results


def main() -> None:
    """Measure, print, and write the results beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--sizes", nargs="+", default=["1024x2048", "512x1408"], help="D x H"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    layers = []
    for size in arguments.sizes:
        width, hidden = map(int, size.split("x"))
        layers.append(measure(width, hidden, arguments.rounds))
        print(json.dumps(layers[-1], indent=2), flush=True)
    report = {
        "machine": describe(BLAS),
        # Above the number of cores, other programs took their share of the time.
        "load_average": round(os.getloadavg()[1], 1),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
        "dtype": "float32",
        "experts": EXPERTS,
        "experts_per_token": TOP,
        "rounds": arguments.rounds,
        "layers": layers,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
