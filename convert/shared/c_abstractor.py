"""The C-Abstractor's tensors, as Honeybee names what timm's RegNet stages are made of.

https://github.com/kakaobrain/honeybee/blob/68a8d84/honeybee/projectors/projectors.py
"""

import math

import mlx.core as mx

from ..rules import Op, Table, conv, squeeze

MAX_MLP_DEPTH = 8


def patch_rows(target: str) -> Op:
    """Position embeddings [1, L, C] to [g * g, C].

    Old checkpoints have a first row for the class token, which was never used.
    """

    def rows(x: mx.array) -> tuple[mx.array, ...]:
        extra = x.shape[1] - math.isqrt(x.shape[1]) ** 2
        return (x[0, 1:] if extra == 1 else x.squeeze(0),)

    return Op((target,), rows)


def rules(prefix: str) -> Table:
    """The connector's rules, for names that start with ``prefix``."""
    table: Table = {
        f"{prefix}pos_emb": patch_rows("connector.position_embedding"),
        f"{prefix}eos_tokens": squeeze("connector.eos_tokens", 0),
        f"{prefix}prenorm.weight": "connector.prenorm.weight",
        f"{prefix}prenorm.bias": "connector.prenorm.bias",
    }
    for stage, target in ((0, "connector.stage1"), (2, "connector.stage2")):
        # Blocks are counted from 1.
        table |= _block(f"{prefix}net.{stage}.b{{}}.", f"{target}.{{-1}}.")
    for i in range(MAX_MLP_DEPTH):
        # Activations lie between the layers.
        for leaf in ("weight", "bias"):
            table[f"{prefix}readout.{2 * i}.{leaf}"] = f"connector.readout.{i}.{leaf}"
    return table


def _block(source: str, target: str) -> Table:
    """A RegNet bottleneck; its "bn" are LayerNorms."""
    table: Table = {
        f"{source}conv1.conv.weight": squeeze(f"{target}conv1.weight", 2, 3),
        f"{source}conv2.conv.weight": conv(f"{target}conv2.weight"),
        f"{source}conv3.conv.weight": squeeze(f"{target}conv3.weight", 2, 3),
        f"{source}downsample.conv.weight": squeeze(
            f"{target}shortcut.conv.weight", 2, 3
        ),
        f"{source}se.fc1.weight": squeeze(f"{target}se.fc1.weight", 2, 3),
        f"{source}se.fc2.weight": squeeze(f"{target}se.fc2.weight", 2, 3),
        f"{source}se.fc1.bias": f"{target}se.fc1.bias",
        f"{source}se.fc2.bias": f"{target}se.fc2.bias",
    }
    norms = {f"conv{i}.bn": f"norm{i}" for i in (1, 2, 3)}
    for theirs, ours in (norms | {"downsample.bn": "shortcut.norm"}).items():
        for leaf in ("weight", "bias"):
            table[f"{source}{theirs}.{leaf}"] = f"{target}{ours}.{leaf}"
    return table
