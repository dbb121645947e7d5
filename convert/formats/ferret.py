"""Ferret (arXiv 2310.07704): LLaVA on Vicuna v1.3, with a token for each region.

https://github.com/apple/ml-ferret/blob/3c9e5c9/ferret/model/language_model/ferret_llama.py

Its authors published differences from Vicuna: name that by ``--base``. The encoder lies
elsewhere: name it by ``--vision``.
"""

from typing import cast

import mlx.core as mx

from mm1_mlx.config import MM1Config

from ..rules import Table
from ..shared import ferret as layout
from ..shared import language
from ..source import Source

# By the decoder's width, what the published differences are from.
BASES = {4096: "lmsys/vicuna-7b-v1.3", 5120: "lmsys/vicuna-13b-v1.3"}
NORM = "model.norm.weight"
# Weights of a trained final norm are above, differences between two of them below.
LEAST_NORM = 0.1

elsewhere = layout.elsewhere


def detect(source: Source) -> bool:
    """Whether the source is a Ferret, or its differences from Vicuna."""
    return source.config.get("model_type") == "ferret"


def base(source: Source) -> str | None:
    """What the source holds differences from, None if it is whole."""
    # Not what a Delta reads, which is whole.
    norm = Source.tensor(source, NORM).read().astype(mx.float32)
    if cast(float, mx.abs(norm).mean().item()) >= LEAST_NORM:
        return None
    return BASES.get(norm.size, "VICUNA")


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the whole model."""
    return layout.rules("llama")


def config(source: Source) -> MM1Config:
    """The whole model.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields, rest = layout.split_config(source, "llama")
    text = language.values(rest, "FERRETConfig")
    # FERRETConfig has no kinds of projectors: it is one linear layer.
    fields.expect("mm_projector_type", "linear")
    return layout.model(source, fields, text, "ferret")
