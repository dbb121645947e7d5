"""The connector between encoder and decoder: how features become image tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from mm1_mlx.config.limits import MAX_HIDDEN_SIZE, MAX_LAYERS, Activation
from mm1_mlx.section import Section, check_positive, check_sizes, require


@dataclass(frozen=True, kw_only=True)
class _ConnectorSizes(Section):
    # Width and number of the encoder's features; width of the decoder.
    input_size: int
    num_features: int
    output_size: int
    # Whether a learned token ends every row of a tiled picture (LLaVA-NeXT).
    newline: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, MAX_HIDDEN_SIZE, "input_size", "output_size")
        check_sizes(self, MAX_HIDDEN_SIZE, "num_features")


@dataclass(frozen=True, kw_only=True)
class _FixedTokens(_ConnectorSizes):
    num_image_tokens: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, MAX_HIDDEN_SIZE, "num_image_tokens")

    def image_tokens(self, num_features: int) -> int:  # noqa: ARG002
        """Image tokens of a tile, whatever its features."""
        return self.num_image_tokens


def _check_square(section: Any, *fields: str) -> None:
    name = type(section).__name__
    for field in fields:
        value = getattr(section, field)
        require(
            value > 0 and math.isqrt(value) ** 2 == value,
            f"{name}.{field}: {value} is not a square number "
            "(the connector pools a square grid of patches)",
        )


@dataclass(frozen=True, kw_only=True)
class LinearConfig(_ConnectorSizes):
    """One linear layer: every feature becomes an image token."""

    kind: Literal["linear"] = "linear"
    bias: bool = True

    def image_tokens(self, num_features: int) -> int:
        """Image tokens of a tile of so many features."""
        return num_features


@dataclass(frozen=True, kw_only=True)
class MLPConfig(_ConnectorSizes):
    """Two linear layers with an activation: LLaVA-1.5's projector.

    With ``pooled_tokens`` the results are averaged over square bins: Matryoshka's.
    """

    kind: Literal["mlp"] = "mlp"
    hidden_size: int
    hidden_act: Activation = "gelu"
    bias: bool = True
    pooled_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, 8 * MAX_HIDDEN_SIZE, "hidden_size")
        if self.pooled_tokens is not None:
            check_sizes(self, self.num_features, "pooled_tokens")
            _check_square(self, "num_features", "pooled_tokens")

    def image_tokens(self, num_features: int) -> int:
        """Image tokens of a tile of so many features."""
        return self.pooled_tokens or num_features


@dataclass(frozen=True, kw_only=True)
class AveragePoolConfig(_FixedTokens):
    """Adaptive average pooling, then one linear layer (MM1, section 3.2)."""

    kind: Literal["average_pool"] = "average_pool"
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_square(self, "num_features", "num_image_tokens")


@dataclass(frozen=True, kw_only=True)
class CAbstractorConfig(_FixedTokens):
    """Honeybee's C-Abstractor, MM1's connector; the defaults are Honeybee's."""

    kind: Literal["c_abstractor"] = "c_abstractor"
    hidden_size: int = 1024
    depth: int = 3
    mlp_depth: int = 2
    prenorm: bool = False
    position_embedding: bool = True
    num_eos_tokens: int = 0
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, MAX_HIDDEN_SIZE, "hidden_size")
        check_sizes(self, MAX_LAYERS, "depth", "mlp_depth")
        check_positive(self, "layer_norm_eps")
        require(
            0 <= self.num_eos_tokens <= MAX_HIDDEN_SIZE,
            f"CAbstractorConfig.num_eos_tokens: {self.num_eos_tokens} is outside "
            f"0..{MAX_HIDDEN_SIZE}",
        )
        _check_square(self, "num_features")
        ends = self.num_eos_tokens
        pooled = self.num_image_tokens - ends
        side = math.isqrt(max(1, pooled))
        less = f" less {ends} end tokens" if ends else ""
        require(
            side**2 == pooled,
            f"CAbstractorConfig.num_image_tokens: {self.num_image_tokens}{less} is not a "
            f"square number, as a grid of image tokens is; take {side**2 + ends}",
        )


@dataclass(frozen=True, kw_only=True)
class AttentionPoolConfig(_FixedTokens):
    """Learned queries that attend over all features (MM1, section 3.2).

    MM1 does not state the internals; the form is CoCa's (arXiv 2205.01917).
    """

    kind: Literal["attention_pool"] = "attention_pool"
    num_attention_heads: int
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, self.output_size, "num_attention_heads")
        check_positive(self, "layer_norm_eps")
        require(
            self.output_size % self.num_attention_heads == 0,
            f"AttentionPoolConfig: output_size {self.output_size} is not a multiple of "
            f"num_attention_heads {self.num_attention_heads}",
        )


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig(_FixedTokens):
    """Latents refined by attention over features and themselves.

    Source: Flamingo's resampler (arXiv 2204.14198) as open_flamingo has it; xGen-MM's
    adds the projection to the decoder's width.
    """

    kind: Literal["perceiver"] = "perceiver"
    depth: int = 6
    num_attention_heads: int = 8
    head_dim: int = 64
    intermediate_size: int
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, MAX_HIDDEN_SIZE, "head_dim")
        check_sizes(self, 8 * MAX_HIDDEN_SIZE, "intermediate_size")
        check_sizes(self, MAX_LAYERS, "depth", "num_attention_heads")
        check_positive(self, "layer_norm_eps")


ConnectorConfig = (
    LinearConfig
    | MLPConfig
    | AveragePoolConfig
    | AttentionPoolConfig
    | PerceiverConfig
    | CAbstractorConfig
)
