"""Matryoshka Multimodal Models (arXiv 2405.17430): LLaVA whose image tokens are averaged.

https://github.com/mu-cai/matryoshka-mm/blob/main/llava/model/llava_arch.py

The model takes any of its numbers of image tokens: 144 here, MM1's, where it has it; the
config's ``connector.pooled_tokens`` may be set to another one.
"""

import math
from dataclasses import replace
from typing import Any

from mm1_mlx.config import MLPConfig, MM1Config
from mm1_mlx.errors import ConfigError

from ..rules import Table
from ..shared import llava as layout
from ..source import Source
from . import llava

SCALES = "matryoshka_vis_token_scale"
PREFERRED = 144

elsewhere = layout.elsewhere


def detect(source: Source) -> bool:
    """Whether the source is a LLaVA with numbers of image tokens to choose from."""
    config = source.config
    own = config.get("model_type") in tuple(llava.KINDS) and "mm_vision_tower" in config
    return own and bool(config.get(SCALES))


def rules(source: Source) -> Table:
    """The tensor names of the whole model, which are LLaVA's."""
    return llava.rules(source)


def config(source: Source) -> MM1Config:
    """The whole model.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    made = llava.config(source)
    if not isinstance(made.connector, MLPConfig):
        raise ConfigError("LlavaConfig.mm_projector_type: M3 pools an MLP's results")
    tokens = _tokens(source.config[SCALES], made.connector.num_features)
    connector = replace(made.connector, pooled_tokens=tokens)
    return replace(made, connector=connector)


def _tokens(scales: Any, features: int) -> int:
    known = [n for n in scales if type(n) is int] if isinstance(scales, list) else []
    # Averages of whole squares of features, as the source's own pooling has them.
    sides = {n: math.isqrt(n) for n in known if n > 0}
    fitting = [
        n
        for n, side in sides.items()
        if side**2 == n and math.isqrt(features) % side == 0
    ]
    if not fitting:
        raise ConfigError(
            f"LlavaConfig.{SCALES}: {scales!r:.80} holds no number of image tokens that "
            f"divides {features} features into squares"
        )
    return PREFERRED if PREFERRED in fitting else max(fitting)
