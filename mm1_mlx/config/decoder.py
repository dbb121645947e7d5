"""The language model: a decoder-only transformer, dense or with experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm1_mlx.config.limits import (
    MAX_EXPERTS,
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    MAX_VOCAB_SIZE,
    Activation,
)
from mm1_mlx.section import Section, check_positive, check_sizes, require


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Section):
    """Context extension of rotary positions, in Hugging Face's terms."""

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        check_positive(
            self, "factor", "low_freq_factor", "original_max_position_embeddings"
        )
        require(
            self.high_freq_factor > self.low_freq_factor,
            f"RopeScaling.high_freq_factor: {self.high_freq_factor} is not above "
            f"low_freq_factor {self.low_freq_factor}",
        )


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Section):
    """Sparse feed-forward layers: every ``every``-th layer routes to experts."""

    num_experts: int
    experts_per_token: int = 2
    # Layers with index % every == offset are sparse; axlearn takes the group's last.
    every: int
    offset: int
    # Whether the chosen experts' weights are divided by their sum.
    norm_topk_prob: bool = True
    # Emulates training with a limit: of a sequence's S tokens an expert takes
    # max(1, S * factor / E) and the rest go without it, first choices before second ones
    # (axlearn's factor is 2). A sequence is what one call is given, so chunks of a
    # prefill count by themselves. None drops nothing.
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        check_sizes(self, MAX_EXPERTS, "num_experts")
        check_sizes(self, self.num_experts, "experts_per_token")
        check_sizes(self, MAX_LAYERS, "every")
        require(
            0 <= self.offset < self.every,
            f"MoEConfig.offset: {self.offset} is outside 0..{self.every - 1}",
        )
        if self.capacity_factor is not None:
            check_positive(self, "capacity_factor")


@dataclass(frozen=True, kw_only=True)
class LayerSizes(Section):
    """What differs from block to block (OpenELM's layer-wise scaling)."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int

    def __post_init__(self) -> None:
        heads = ("num_attention_heads", "num_key_value_heads")
        check_sizes(self, MAX_HIDDEN_SIZE, *heads)
        check_sizes(self, 8 * MAX_HIDDEN_SIZE, "intermediate_size")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"LayerSizes: num_attention_heads {self.num_attention_heads} is not a "
            f"multiple of num_key_value_heads {self.num_key_value_heads}",
        )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Section):
    """A decoder-only transformer: pre-norm, rotary positions, grouped queries, gates."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    # Of every norm, whichever its kind.
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    # LayerNorms (StableLM) have biases.
    norm: Literal["rms", "layer"] = "rms"
    # True rotates interleaved pairs (axlearn), False half-split ones (Hugging Face).
    rope_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    # How many of a head's first dimensions are rotated; None means all.
    rotary_dim: int | None = None
    # What every embedding is multiplied by, a picture's too (Gemma).
    embedding_scale: float = 1.0
    hidden_act: Activation = "silu"
    # Biases of q, k, v (Qwen2), and of the output projection too (some Llamas).
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    # A bias of the logits (xGen-MM).
    head_bias: bool = False
    # RMSNorm of the queries and keys: before the rotation, of each head (Qwen3) or of all
    # heads together (OLMoE), or of each head after the rotation (axlearn's AFM). Weights
    # differ from one dimension to the next, so the order matters.
    qk_norm: Literal["head", "full", "rotated"] | None = None
    # Keys a token may look back at, its own included; None means all.
    sliding_window: int | None = None
    moe: MoEConfig | None = None
    # One per block, in place of the sizes above.
    layer_sizes: tuple[LayerSizes, ...] | None = None

    def __post_init__(self) -> None:
        check_sizes(self, MAX_VOCAB_SIZE, "vocab_size")
        check_sizes(self, MAX_HIDDEN_SIZE, "hidden_size", "head_dim")
        check_sizes(self, 8 * MAX_HIDDEN_SIZE, "intermediate_size")
        check_sizes(self, MAX_LAYERS, "num_hidden_layers")
        check_sizes(
            self, self.hidden_size, "num_attention_heads", "num_key_value_heads"
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"DecoderConfig: num_attention_heads {self.num_attention_heads} is not a "
            f"multiple of num_key_value_heads {self.num_key_value_heads}",
        )
        require(
            not (self.head_bias and self.tie_word_embeddings),
            "DecoderConfig.head_bias: a head tied to the embedding has no bias",
        )
        self._check_rotation()
        check_positive(self, "rms_norm_eps", "rope_theta", "max_position_embeddings")
        check_positive(self, "embedding_scale")
        if self.sliding_window is not None:
            check_positive(self, "sliding_window")
        self._check_layers()

    def _check_rotation(self) -> None:
        require(
            self.head_dim % 2 == 0,
            f"DecoderConfig.head_dim: {self.head_dim} is odd and cannot be rotated",
        )
        if self.rotary_dim is not None:
            check_sizes(self, self.head_dim, "rotary_dim")
            require(
                self.rotary_dim % 2 == 0,
                f"DecoderConfig.rotary_dim: {self.rotary_dim} is odd",
            )

    def _check_layers(self) -> None:
        if self.layer_sizes is not None:
            require(
                len(self.layer_sizes) == self.num_hidden_layers,
                f"DecoderConfig.layer_sizes: {len(self.layer_sizes)} are given for "
                f"{self.num_hidden_layers} layers",
            )
            require(
                self.moe is None and self.qk_norm != "full",
                "DecoderConfig.layer_sizes: neither experts nor a full qk_norm go with "
                "sizes that differ from layer to layer",
            )
        if self.moe is not None:
            require(
                self.hidden_act == "silu",
                f"DecoderConfig: experts are SwiGLU; hidden_act {self.hidden_act!r} "
                "is not supported with moe",
            )
            require(not self.mlp_bias, "DecoderConfig.mlp_bias: experts have no biases")

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer's feed-forward part routes to experts."""
        return self.moe is not None and layer % self.moe.every == self.moe.offset

    def sizes(self, layer: int) -> LayerSizes:
        """Heads and feed-forward width of a layer."""
        if self.layer_sizes is not None:
            return self.layer_sizes[layer]
        return LayerSizes(
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
        )
