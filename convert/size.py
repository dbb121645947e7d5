"""How much a conversion writes, from headers and configs alone: no weight is read."""

from collections.abc import Collection

import mlx.core as mx

from mm1_mlx.checkpoint import build_model

from .job import Job


def bytes_of(
    job: Job, dtype: mx.Dtype | None, parts: Collection[str] | None = None
) -> int:
    """Bytes of the tensors that the job writes, cast where there is a dtype.

    Args:
        job: the conversion.
        dtype: what its weights are cast to, None if each stays as it is.
        parts: the model's parts that count, all by default.
    """
    stored = _stored(job)
    total = 0
    for name, tensor in build_model(job.made, job.packed).tensors().items():
        if parts is not None and name.partition(".")[0] not in parts:
            continue
        kind = tensor.dtype
        # Packed integers are of one type alone.
        if mx.issubdtype(kind, mx.floating):
            kind = dtype or stored.get(name) or stored.get(_dense(name), kind)
        total += tensor.size * kind.size
    return total


def _dense(name: str) -> str:
    """The tensor whose type an upcycled layer's has: experts are its copies."""
    name = name.replace(".mlp.gate.weight", ".mlp.gate_proj.weight")
    return name.replace(".mlp.switch_mlp.", ".mlp.")


def _stored(job: Job) -> dict[str, mx.Dtype]:
    """The type of every tensor that has a source, as it is read from there."""
    kinds: dict[str, mx.Dtype] = {}
    found = {origin.name: origin.source.tensors for origin in job.sourced.values()}
    for name, (_, plan) in job.plans.items():
        for step in plan.steps:
            first = step.sources[0]
            if info := found[name].get(first):
                kind = info.dtype
            else:  # unpacked, which its module's name stands for
                kind = found[name][f"{first}.scales"].dtype
                # What integer scales unpack to.
                kind = kind if mx.issubdtype(kind, mx.floating) else mx.bfloat16
            kinds |= dict.fromkeys(step.targets, kind)
    return kinds
