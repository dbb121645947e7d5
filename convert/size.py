"""How much a conversion writes, from headers and configs alone: no weight is read."""

from collections import Counter

import mlx.core as mx

from mm1_mlx.checkpoint import build_model

from .job import Job


def bytes_by_part(job: Job, dtype: mx.Dtype | None) -> Counter[str]:
    """Bytes of the tensors that the job writes, by the model's parts.

    Args:
        job: the conversion.
        dtype: what its weights are cast to, None if each stays as it is.
    """
    stored = _stored(job)
    sizes: Counter[str] = Counter()
    for name, tensor in build_model(job.made, job.packed).tensors().items():
        kind = tensor.dtype
        # Packed integers are of one type alone.
        if mx.issubdtype(kind, mx.floating):
            kind = dtype or stored.get(name) or stored.get(_dense(name), kind)
        sizes[name.partition(".")[0]] += tensor.size * kind.size
    return sizes


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
