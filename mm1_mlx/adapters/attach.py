"""Low-rank matrices beside a model's layers: mlx-lm's layers in the places of ours.

A layer moves into one that adds the product of two small matrices to what it computes:

    y = W x + scale * (x A) B       decoder.layers.0.self_attn.q_proj.lora_a, .lora_b

B begins at zero, so that nothing changes until something is learned. The layer itself
may be packed (QLoRA). Convolutions have no such form; they are trained in full.

Source: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353), QLoRA (arXiv 2305.14314);
https://github.com/ml-explore/mlx-lm/blob/v0.32.2/mlx_lm/tuner/lora.py
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mm1_mlx.adapters.config import PLACES, AdapterConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.models import MM1
from mm1_mlx.models.linear import named_leaves

Form = Literal["linear", "experts", "embedding"]
FORMS: dict[Form, tuple[type, ...]] = {
    "linear": (nn.Linear, nn.QuantizedLinear),
    "experts": (SwitchLinear, QuantizedSwitchLinear),
    "embedding": (nn.Embedding, nn.QuantizedEmbedding),
}
# What of a wrapper is an adapter's; m is DoRA's length of every row.
LEAVES = ("lora_a", "lora_b", "m")


def form_of(module: nn.Module) -> Form | None:
    """How a layer's low-rank matrices are laid out, None if it can have none."""
    return next((f for f, kinds in FORMS.items() if isinstance(module, kinds)), None)


def wrap(
    layer: nn.Module,
    kind: Literal["lora", "dora"],
    rank: int,
    scale: float,
    dropout: float = 0.0,
) -> nn.Module:
    """The layer with two matrices beside it; itself frozen.

    Raises:
        ConfigError: DoRA is asked of experts or an embedding.
    """
    # Here: they bring a trainer along, and whoever loads a model would wait for it.
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

    form = form_of(layer)
    assert form is not None
    wrappers: dict[Form, Any] = {
        "linear": LoRALinear,
        "experts": LoRASwitchLinear,
        "embedding": LoRAEmbedding,
    }
    if kind == "lora":
        made = wrappers[form].from_base(layer, r=rank, dropout=dropout, scale=scale)
    elif form != "linear":
        raise ConfigError(
            f"DoRA is for linear layers, not for {form}; name places without them, such "
            "as decoder.attention (where, --adapter-targets decoder.attention), or take "
            "LoRA (kind 'lora', --adapter lora)"
        )
    else:
        # Its own from_base miscounts the columns of weights packed in 3, 5 or 6 bits.
        rows, columns = weight_shape(layer)
        made = DoRALinear(columns, rows, r=rank, dropout=dropout, scale=scale)
        made.set_linear(layer)
    made.freeze()
    made.unfreeze(recurse=False, keys=[leaf for leaf in LEAVES if leaf in made])
    return cast(nn.Module, made)


def weight_shape(layer: Any) -> tuple[int, ...]:
    """The shape that a layer's weight has unpacked."""
    *rows, width = layer.weight.shape
    if "scales" in layer:
        width = width * 32 // layer.bits
    return (*rows, width)


def attach(model: MM1, config: AdapterConfig, seed: int = 0) -> tuple[str, ...]:
    """The paths of the layers that have got low-rank matrices, of random beginnings.

    A layer's beginning depends on the seed and its path alone. The layers that got some
    are frozen, whatever else is trained stays as it is.

    Raises:
        ConfigError: the config names no layer of the model, or DoRA where there is none.
    """
    layers = {path: x for path, x in named_leaves(model) if form_of(x) is not None}
    paths = config.chosen(layers)
    if not paths:
        raise ConfigError(
            f"adapter: {list(config.where)} names no layer of the model that can have "
            f"low-rank matrices; name one of {sorted(PLACES)}, or a path such as "
            f"{next(iter(layers), 'decoder.lm_head')!r}"
        )
    made = []
    for path in paths:
        layer = cast(
            Any,
            wrap(layers[path], config.kind, config.rank, config.scale, config.dropout),
        )
        bound = _inputs(layer.lora_a, form_of(layers[path])) ** -0.5
        layer.lora_a = mx.random.uniform(
            -bound, bound, layer.lora_a.shape, key=_key(seed, path)
        )
        layer.train(model.training)
        # Before workers see them: their streams are others.
        mx.eval([layer[leaf] for leaf in LEAVES if leaf in layer])
        made.append((path, layer))
    model.update_modules(cast(Any, tree_unflatten(made)))
    return tuple(paths)


def _inputs(a: mx.array, form: Form | None) -> int:
    """The width that the first matrix reads."""
    return a.shape[-1] if form == "experts" else a.shape[0]


def _key(seed: int, path: str) -> mx.array:
    digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))


def wrapped(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have low-rank matrices, with them, by path."""
    return {
        path: module for path, module in model.named_modules() if "lora_a" in module
    }
