"""A token behind ever more positions: ``python -m benchmarks.depths``.

A preset with random 4-bit weights decodes behind 1,024 to 32,768 positions whose keys and
values have 16, 8 or 4 bits, with the kernels (``MM1_KERNELS=on``) and without them, one turn
of each after the other. One JSON object on stdout. Keys of 16 bits are attended to by mlx
either way: what that line's two figures differ by is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from mm1_mlx.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402  (after BLAS)
import numpy as np  # noqa: E402
from mlx_lm.models.cache import trim_prompt_cache  # noqa: E402

from mm1_mlx.bench.synthetic import synthetic_model  # noqa: E402
from mm1_mlx.budget import Answer  # noqa: E402
from mm1_mlx.checkpoint import device_dtypes  # noqa: E402
from mm1_mlx.kernels.choice import SWITCH  # noqa: E402
from mm1_mlx.memory.prefixes import KVPrecision  # noqa: E402
from mm1_mlx.models import MM1  # noqa: E402
from mm1_mlx.prefill import Context, prefill  # noqa: E402
from mm1_mlx.presets import PRESETS  # noqa: E402
from mm1_mlx.prompt import Prompt  # noqa: E402
from mm1_mlx.recipe import find_recipe, plan  # noqa: E402
from mm1_mlx.request import decode  # noqa: E402
from mm1_mlx.room import allowed  # noqa: E402
from mm1_mlx.runtime import wired  # noqa: E402
from mm1_mlx.sampling import Sampler  # noqa: E402

DEPTHS = (1024, 4096, 16_384, 32_768)
# None is not packed.
KV_BITS = (None, 8, 4)
DECODED = 64
ROUNDS = 5


def sweep(
    model: MM1, depths: Sequence[int], decoded: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row for every precision of keys and depth, as JSON values."""
    for bits in KV_BITS:
        precision = KVPrecision(bits, 64, 0)
        cache = model.make_cache()
        held = 0
        for depth in depths:
            row = {"kv_bits": bits, "depth": depth}
            if why := _no_room(model, precision, held, depth + decoded):
                yield row | {"left_out": why}
                continue
            _read(model, cache, precision, held, depth)
            held = depth
            yield row | _decode(model, cache, precision, decoded, rounds)


def _no_room(model: MM1, kv: KVPrecision, before: int, positions: int) -> str | None:
    """Why a cache of so many positions cannot be had, if so."""
    size = model.decoder.norm.weight.dtype.size
    answer = Answer(
        *(positions, 0, 0, before, size), *(kv.bits, kv.group_size, kv.start)
    )
    need, room = sum(answer.bytes(model.config).values()), allowed()
    if room is None or need <= room:
        return None
    return f"{need:,} bytes are needed, {room:,} are free"


def _read(
    model: MM1, cache: list[Any], precision: KVPrecision, before: int, depth: int
) -> None:
    """Fill the cache up to a depth."""
    tokens = np.random.default_rng(depth).integers(
        0, model.config.decoder.vocab_size, depth
    )
    embeddings = model.decoder.embed(mx.array(tokens[before:]))
    prompt = Prompt(tuple(tokens.tolist()))
    prefill(model, Context(prompt, cache, precision, before, embeddings))


def _decode(
    model: MM1, cache: list[Any], precision: KVPrecision, count: int, rounds: int
) -> dict[str, Any]:
    """Tokens a second with and without the kernels; the cache stays as it is."""
    rates: dict[str, list[float]] = {"on": [], "off": []}
    kept = os.environ.get(SWITCH)
    try:
        # The first round, in which kernels are compiled and checked, is not counted.
        for i in range(-1, rounds):
            for switch, measured in rates.items():
                os.environ[SWITCH] = switch
                start = time.perf_counter()
                tokens = list(decode(model, 5, cache, Sampler(), count, precision))
                seconds = time.perf_counter() - start
                trim_prompt_cache(cache, len(tokens))
                if i >= 0:
                    measured.append(len(tokens) / seconds)
    finally:
        os.environ.pop(SWITCH)
        if kept is not None:
            os.environ[SWITCH] = kept
    medians = {switch: statistics.median(x) for switch, x in rates.items()}
    return {
        "tokens_per_second": medians,
        "runs": rates,
        "on_to_off": medians["on"] / medians["off"],
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="mm1-1.2b")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--decoded", type=int, default=DECODED)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    config, depths = PRESETS[arguments.preset], sorted(arguments.depths)
    # What a position costs does not depend on how many a model was trained for.
    longest = depths[-1] + arguments.decoded
    decoder = replace(config.decoder, max_position_embeddings=longest)
    config = replace(config, decoder=decoder)
    packed = plan(find_recipe("4bit"), config).packed
    dtype = device_dtypes()[0]
    model = synthetic_model(arguments.preset, config, packed, dtype)
    rows = []
    with wired():
        for row in sweep(model, depths, arguments.decoded, arguments.rounds):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    print(
        json.dumps(
            {
                "preset": arguments.preset,
                "dtype": str(dtype).removeprefix("mlx.core."),
                "decoded": arguments.decoded,
                "rounds": arguments.rounds,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
