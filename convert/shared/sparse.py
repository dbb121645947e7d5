"""Which layers of a MoE-LLaVA are sparse, from the ``moe`` section of its config.

https://github.com/PKU-YuanGroup/MoE-LLaVA/blob/6cb5f66/moellava/model/language_model/llava_stablelm_moe.py
"""

from typing import Any

from mm1_mlx.config import MoEConfig
from mm1_mlx.errors import ConfigError

from .fields import Fields

# Of training alone, and the capacity.
HARMLESS = (
    *("capacity_factor", "eval_capacity_factor", "min_capacity", "ep_size"),
    *("router_aux_loss_coef", "train_modules", "moe_mode"),
)


def sparse_layers(fields: Fields, num_layers: int) -> MoEConfig:
    """The layers that have experts, and how many.

    Raises:
        ConfigError: they are not every n-th layer, or not alike.
    """
    fields.expect("moe_enable", True)
    fields.expect("use_residual", False)
    fields.expect("top_k_experts", 2)
    layers, counts = fields.require("moe_layers_idx"), fields.require("num_experts")
    first, every = _pattern(layers, num_layers)
    if layers != list(range(first, num_layers, every)):
        raise ConfigError(
            f"{fields.where}.moe_layers_idx: {layers!r:.80} is not every n-th of "
            f"{num_layers} layers"
        )
    if not isinstance(counts, list) or counts != counts[:1] * len(layers):
        raise ConfigError(
            f"{fields.where}.num_experts: {counts!r:.80} is not one number for each of "
            f"{len(layers)} sparse layers, the same for all"
        )
    fields.finish(HARMLESS)
    return MoEConfig.from_dict(
        {
            "num_experts": counts[0],
            "experts_per_token": 2,
            "every": every,
            "offset": first,
            "norm_topk_prob": True,
        }
    )


def _pattern(layers: Any, num_layers: int) -> tuple[int, int]:
    """The first sparse layer and the distance to the next, (0, 1) if there is no such."""
    known = [x for x in layers if type(x) is int] if isinstance(layers, list) else []
    every = known[1] - known[0] if len(known) > 1 else num_layers
    return (known[0], every) if known and 0 <= known[0] < every else (0, 1)
