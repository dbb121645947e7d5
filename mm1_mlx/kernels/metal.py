"""The Metal kernels: attention of a few queries over packed or plain keys, and the merge.

Decoding reads every key and value once, and mlx has no kernel that reads them packed:
unpacked first, or in two products with the scores between them, a packed cache is
slower than a plain one. ``qsdpa_partial.metal`` reads each byte once for all queries of
its key-value head and returns a ``State``; ``qsdpa_merge.metal`` joins states, of the
blocks of one run or of a shared prefix and its suffixes. ``plain.py`` defines both.

A .metal file is the body of a kernel; mlx writes the signature from the names below.
Comments in it must not hold an input's name followed by _shape, _strides or _ndim.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.kernels.plain import State, joined
from mm1_mlx.kernels.run import Run

# ``mx.fast.metal_kernel``, or one that runs the same text elsewhere.
Factory = Callable[..., Callable[..., list[mx.array]]]

FOLDER = Path(__file__).parent
PARTIAL, MERGE = "qsdpa_partial", "qsdpa_merge"
INPUTS = ["q", "k", "ks", "kb", "values", "vs", "vb", "starts", "sizes", "scale"]

HEAD_DIMS = (64, 128)
BITS = (0, 4, 8)
GROUP_SIZES = (32, 64, 128)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
# More queries are prefill: the products are matrices then, and unpacking is paid once.
MAX_QUERIES = 8

SIMDGROUPS = 4
MAX_ROWS = 8  # of a threadgroup: its memory is 21 of 32 KB then
MIN_CHUNK = 256  # keys: the partial results stay small beside them
MAX_BLOCKS = 128
THREADGROUPS = 128  # enough to fill a GPU


def source(name: str) -> str:
    """The body of a kernel."""
    return (FOLDER / f"{name}.metal").read_text(encoding="utf-8")


def digest() -> str:
    """What changes when a kernel or the way it is called does."""
    files = [FOLDER / f"{PARTIAL}.metal", FOLDER / f"{MERGE}.metal", Path(__file__)]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def fits(q: mx.array, run: Run, mask: mx.array | str | None) -> bool:
    """Whether the kernels can attend from q over a run."""
    return (
        not isinstance(mask, mx.array)
        and q.shape[2] <= MAX_QUERIES
        and q.shape[3] in HEAD_DIMS
        and q.dtype in DTYPES
        and run.dtype == q.dtype
        and run.bits in BITS
        and (run.bits == 0 or run.group_size in GROUP_SIZES)
        and _head_dim(run) == (q.shape[3], q.shape[3])
    )


def _head_dim(run: Run) -> tuple[int, int]:
    """Numbers of a key and of a value."""
    per_word = 32 // run.bits if run.bits else 1
    k, v = (planes[0].shape[3] * per_word for planes in run.planes)
    return k, v


def geometry(B: int, H: int, rows: int, length: int) -> tuple[int, int, int]:
    """Rows of a threadgroup, keys of a block (a multiple of 128) and blocks."""
    R = min(MAX_ROWS, 1 << (rows - 1).bit_length())
    groups = B * H * -(-rows // R)
    blocks = min(-(-length // MIN_CHUNK), -(-THREADGROUPS // groups), MAX_BLOCKS)
    keys = 32 * SIMDGROUPS
    chunk = -(-length // (max(blocks, 1) * keys)) * keys
    return R, chunk, -(-length // chunk)


def partial(
    q: mx.array,
    run: Run,
    *,
    scale: float,
    causal: bool,
    factory: Factory,
    chunk: int | None = None,
) -> State:
    """The state of queries [B, Hq, T, D] over a run, a part for every block of keys.

    ``chunk`` sets the keys of a block, a multiple of 32.
    """
    B, Hq, T, D = q.shape
    H = run.num_kv_heads
    shared = run.rows != B
    if shared:
        # The prefix is every row's past: all queries of a head see all of it.
        q = q.reshape(B, H, -1, D).swapaxes(0, 1)
    batch, rows = (1, B * Hq // H * T) if shared else (B, Hq // H * T)
    R, planned, blocks = geometry(batch, H, rows, run.length)
    if chunk is not None:
        planned, blocks = chunk, -(-run.length // chunk)
    tiles = -(-rows // R)
    queries = T if causal and not shared else 1
    # Made of numbers, not computed: nothing runs on the GPU but the kernels.
    starts = mx.array([0] * batch) if run.starts is None else run.starts
    sizes = [run.capacity, planned, queries, H, rows, blocks, run.length]
    keys, values = run.planes
    part = (batch, H, rows, blocks)
    o, m, l = _kernel(PARTIAL, factory)(  # noqa: E741
        inputs=[
            q,
            *keys,
            *values,
            starts,
            mx.array(sizes),
            mx.array(scale),
        ],
        template=[
            ("T", q.dtype),
            ("D", D),
            ("BITS", run.bits),
            ("GS", run.group_size or D),
            ("R", R),
            ("SG", SIMDGROUPS),
        ],
        # Threads, not threadgroups.
        grid=(blocks * tiles * 32 * SIMDGROUPS, H, batch),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        output_shapes=[(*part, D), part, part],
        output_dtypes=[mx.float32] * 3,
    )
    if shared:
        o, m, l = (  # noqa: E741
            x.reshape(H, B, rows // B, *x.shape[3:]).swapaxes(0, 1) for x in (o, m, l)
        )
    return State(o, m, l)


def merge(states: list[State], like: mx.array, *, factory: Factory) -> mx.array:
    """Attention in the shape [B, Hq, T, D] and precision of ``like``."""
    o, m, l = joined(states)  # noqa: E741
    B, Hq, T, D = like.shape
    (out,) = _kernel(MERGE, factory)(
        inputs=[o, m, l, mx.array(o.shape[3])],
        template=[("T", like.dtype), ("D", D)],
        grid=(D, B * Hq * T, 1),
        threadgroup=(D, 1, 1),
        output_shapes=[like.shape],
        output_dtypes=[like.dtype],
    )
    return out


@functools.lru_cache(maxsize=16)
def _kernel(name: str, factory: Factory) -> Callable[..., Any]:
    """Made once: mlx compiles it at its first call for each template."""
    inputs, outputs = {
        PARTIAL: (INPUTS, ["po", "pm", "pl"]),
        MERGE: (["po", "pm", "pl", "parts"], ["out"]),
    }[name]
    return factory(
        name=f"mm1_{name}",
        input_names=inputs,
        output_names=outputs,
        source=source(name),
    )
