"""CLIP's text tower, for embeddings and zero-shot classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mm1_mlx.config.limits import (
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    MAX_VOCAB_SIZE,
    Activation,
)
from mm1_mlx.section import Section, check_positive, check_sizes, require


@dataclass(frozen=True, kw_only=True)
class TextConfig(Section):
    """A causal transformer whose end token's state is the text's embedding."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: Activation
    # Longest text, in tokens.
    max_position_embeddings: int
    projection_size: int
    layer_norm_eps: float = 1e-5
    # The token whose first place is read; None reads the place of the highest id.
    eos_token_id: int | None = None
    # What fills the places after the text.
    pad_token_id: int = 0

    # What every such tower has, for the block that it shares with the image encoder.
    norm: ClassVar[Literal["layer", "rms"]] = "layer"
    attention_bias: ClassVar[bool] = True
    mlp_bias: ClassVar[bool] = True
    gated_mlp: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes(self, MAX_VOCAB_SIZE, "vocab_size")
        check_sizes(self, MAX_HIDDEN_SIZE, "hidden_size", "max_position_embeddings")
        check_sizes(self, MAX_HIDDEN_SIZE, "projection_size")
        check_sizes(self, 8 * MAX_HIDDEN_SIZE, "intermediate_size")
        check_sizes(self, MAX_LAYERS, "num_hidden_layers")
        check_sizes(self, self.hidden_size, "num_attention_heads")
        check_positive(self, "layer_norm_eps")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"TextConfig: hidden_size {self.hidden_size} is not a multiple of "
            f"num_attention_heads {self.num_attention_heads}",
        )
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < self.vocab_size,
                f"TextConfig.{name}: {value} is outside the vocabulary of "
                f"{self.vocab_size}",
            )
