"""A decoder over several machines: each holds a part of every layer's heads and widths.

Every process computes its part of a layer, and the parts are summed twice a layer. The
image encoder, the connector, embeddings, norms and routers stay whole everywhere.

Source: Megatron-LM (arXiv 1909.08053), section 3; mlx's ``shard_linear``.
"""

import mlx.core as mx
from mlx.nn.layers.distributed import shard_inplace, shard_linear

from mm1_mlx.errors import ConfigError
from mm1_mlx.models.decoder import MLP, Attention, Decoder
from mm1_mlx.models.moe import SparseMLP


def shard(decoder: Decoder, group: mx.distributed.Group) -> None:
    """Keep this process's part of every layer.

    Raises:
        ConfigError: heads or widths cannot be shared out evenly.
    """
    if group.size() == 1:
        return
    for number, layer in enumerate(decoder.layers):
        _check(layer.self_attn, number, group.size())
    try:
        for layer in decoder.layers:
            _shard_attention(layer.self_attn, group)
            if isinstance(layer.mlp, MLP):
                _shard_mlp(layer.mlp, group)
            elif isinstance(layer.mlp, SparseMLP):
                _shard_experts(layer.mlp, group)
    except ValueError as error:
        raise ConfigError(
            f"the model's layers cannot be shared out over {group.size()} processes "
            f"({str(error).splitlines()[0]}); use another number of processes"
        ) from None


def _check(attention: Attention, number: int, size: int) -> None:
    heads = {"heads": attention.num_heads, "key-value heads": attention.num_kv_heads}
    for name, count in heads.items():
        if count % size:
            raise ConfigError(
                f"layer {number} has {count} {name}, which {size} processes cannot share "
                "evenly; use a number of processes that divides them"
            )
    if attention.qk_norm == "full":
        raise ConfigError(
            "the model norms queries and keys over all heads at once, so its layers "
            "cannot be shared out; run it in one process"
        )


def _shard_attention(layer: Attention, group: mx.distributed.Group) -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(layer, name, shard_linear(layer[name], "all-to-sharded", group=group))
    layer.o_proj = shard_linear(layer.o_proj, "sharded-to-all", group=group)
    layer.num_heads //= group.size()
    layer.num_kv_heads //= group.size()


def _shard_mlp(layer: MLP, group: mx.distributed.Group) -> None:
    for name in ("gate_proj", "up_proj"):
        setattr(layer, name, shard_linear(layer[name], "all-to-sharded", group=group))
    layer.down_proj = shard_linear(layer.down_proj, "sharded-to-all", group=group)


def _shard_experts(layer: SparseMLP, group: mx.distributed.Group) -> None:
    for name, way in (
        ("gate_proj", "all-to-sharded"),
        ("up_proj", "all-to-sharded"),
        ("down_proj", "sharded-to-all"),
    ):
        shard_inplace(layer.switch_mlp[name], way, group=group)
    # What the experts' parts make is summed once, behind them.
    layer.group = group
