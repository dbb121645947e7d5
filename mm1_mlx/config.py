"""The shape of a model as plain values: frozen, strict, JSON in and out.

One dataclass per part (``vision``, ``connector``, ``decoder``), one for how pictures
become pixels (``image``) and one for how messages become text (``prompt``). No mlx
import: a tool can read a model's config without a GPU stack. What MM1 (arXiv
2403.09611) leaves open is a field here, never a constant in the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from mm1_mlx.errors import ConfigError
from mm1_mlx.section import Section, check_positive, check_sizes, require

MODEL_TYPE: Final = "mm1"

# Limits of what a config file may ask for, checked before anything is allocated.
MAX_LAYERS = 256
MAX_HIDDEN_SIZE = 32_768
MAX_VOCAB_SIZE = 1_000_000
MAX_EXPERTS = 512

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Section):
    """A CLIP image encoder (spec: OpenAI CLIP, DFN; ViT-L/14, ViT-H/14)."""

    kind: Literal["clip"] = "clip"
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: Activation
    layer_norm_eps: float = 1e-5
    # Index into hidden states as Hugging Face counts them: -1 is the last block's
    # output, -2 the one before. Blocks past it are neither built nor stored.
    feature_layer: int = -1
    # Whether the tower's final LayerNorm is applied to the patch features.
    apply_post_norm: bool = True
    # Whether the class token is left out of the features.
    drop_cls: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, MAX_HIDDEN_SIZE, "image_size", "patch_size", "hidden_size")
        check_sizes(self, 8 * MAX_HIDDEN_SIZE, "intermediate_size")
        check_sizes(self, MAX_LAYERS, "num_hidden_layers")
        check_sizes(self, self.hidden_size, "num_attention_heads")
        check_positive(self, "layer_norm_eps")
        require(
            self.image_size % self.patch_size == 0,
            f"VisionConfig: image_size {self.image_size} is not a multiple of "
            f"patch_size {self.patch_size}",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"VisionConfig: hidden_size {self.hidden_size} is not a multiple of "
            f"num_attention_heads {self.num_attention_heads}",
        )
        require(
            -self.num_hidden_layers <= self.feature_layer <= -1,
            f"VisionConfig.feature_layer: {self.feature_layer} is outside "
            f"-{self.num_hidden_layers}..-1",
        )

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one tile, without the class token."""
        return self.grid_size**2

    @property
    def num_features(self) -> int:
        """Feature vectors of one tile."""
        return self.num_patches + (not self.drop_cls)

    @property
    def depth(self) -> int:
        """Blocks that run to reach the feature layer."""
        return self.num_hidden_layers + 1 + self.feature_layer


@dataclass(frozen=True, kw_only=True)
class _ConnectorSizes(Section):
    # Width and number of the encoder's features; width of the decoder.
    input_size: int
    num_features: int
    output_size: int

    def __post_init__(self) -> None:
        check_sizes(self, MAX_HIDDEN_SIZE, "input_size", "output_size")
        check_sizes(self, MAX_HIDDEN_SIZE, "num_features")


def _check_square(section: Any) -> None:
    name = type(section).__name__
    for field in ("num_features", "num_image_tokens"):
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

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one tile."""
        return self.num_features


@dataclass(frozen=True, kw_only=True)
class MLPConfig(_ConnectorSizes):
    """Two linear layers with an activation: LLaVA-1.5's projector."""

    kind: Literal["mlp"] = "mlp"
    hidden_size: int
    hidden_act: Activation = "gelu"
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, 8 * MAX_HIDDEN_SIZE, "hidden_size")

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one tile."""
        return self.num_features


@dataclass(frozen=True, kw_only=True)
class AveragePoolConfig(_ConnectorSizes):
    """Adaptive average pooling, then one linear layer (MM1, section 3.2)."""

    kind: Literal["average_pool"] = "average_pool"
    num_image_tokens: int
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, MAX_HIDDEN_SIZE, "num_image_tokens")
        _check_square(self)


@dataclass(frozen=True, kw_only=True)
class CAbstractorConfig(_ConnectorSizes):
    """Honeybee's C-Abstractor, MM1's connector; the defaults are Honeybee's."""

    kind: Literal["c_abstractor"] = "c_abstractor"
    num_image_tokens: int
    hidden_size: int = 1024
    depth: int = 3
    mlp_depth: int = 2
    prenorm: bool = False
    position_embedding: bool = True
    num_eos_tokens: int = 0
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, MAX_HIDDEN_SIZE, "hidden_size", "num_image_tokens")
        check_sizes(self, MAX_LAYERS, "depth", "mlp_depth")
        check_positive(self, "layer_norm_eps")
        require(
            0 <= self.num_eos_tokens <= MAX_HIDDEN_SIZE,
            f"CAbstractorConfig.num_eos_tokens: {self.num_eos_tokens} is outside "
            f"0..{MAX_HIDDEN_SIZE}",
        )
        pooled = self.num_image_tokens - self.num_eos_tokens
        for name, value in (("num_features", self.num_features), ("pooled", pooled)):
            require(
                value > 0 and math.isqrt(value) ** 2 == value,
                f"CAbstractorConfig: {name} {value} is not a square number",
            )


ConnectorConfig = LinearConfig | MLPConfig | AveragePoolConfig | CAbstractorConfig


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

    def __post_init__(self) -> None:
        check_sizes(self, MAX_EXPERTS, "num_experts")
        check_sizes(self, self.num_experts, "experts_per_token")
        check_sizes(self, MAX_LAYERS, "every")
        require(
            0 <= self.offset < self.every,
            f"MoEConfig.offset: {self.offset} is outside 0..{self.every - 1}",
        )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Section):
    """A decoder-only transformer: RMSNorm, rotary positions, grouped queries, SwiGLU."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    # True rotates interleaved pairs (axlearn), False half-split ones (Hugging Face).
    rope_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    hidden_act: Activation = "silu"
    # Biases of q, k, v (Qwen2), and of the output projection too (some Llamas).
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    # RMSNorm of each head's queries and keys before the rotation (Qwen3, AFM).
    qk_norm: bool = False
    # Keys a token may look back at, its own included; None means all.
    sliding_window: int | None = None
    moe: MoEConfig | None = None

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
            self.head_dim % 2 == 0,
            f"DecoderConfig.head_dim: {self.head_dim} is odd and cannot be rotated",
        )
        check_positive(self, "rms_norm_eps", "rope_theta", "max_position_embeddings")
        if self.sliding_window is not None:
            check_positive(self, "sliding_window")
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


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Section):
    """How a picture becomes normalised tiles."""

    size: int
    # squash: both sides to ``size``; crop: shortest edge to ``size``, then the centre;
    # pad: a square of the mean colour around the picture, then ``size``.
    resize: Literal["squash", "crop", "pad"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        check_sizes(self, MAX_HIDDEN_SIZE, "size")
        require(
            all(value > 0 for value in self.std),
            f"ImageConfig.std: {self.std} must be positive",
        )


@dataclass(frozen=True, kw_only=True)
class PromptConfig(Section):
    """How messages become tokens."""

    # A built-in template, or the checkpoint's own (chat_template of the tokenizer).
    template: Literal["checkpoint", "llava", "vicuna_v1", "honeybee", "plain"]
    # What the template writes where a picture stands.
    image_token: str = "<image>"
    # A valid id that fills the picture's positions; image tokens replace its embedding.
    image_token_id: int = 0
    # Whether the checkpoint's template takes content as typed parts or as one string.
    content: Literal["parts", "string"] = "string"
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.image_token != "", "PromptConfig.image_token is empty")


@dataclass(frozen=True, kw_only=True)
class MM1Config(Section):
    """A whole model, or some of its three parts."""

    model_type: Literal["mm1"] = MODEL_TYPE
    vision: VisionConfig | None = None
    connector: ConnectorConfig | None = None
    decoder: DecoderConfig | None = None
    image: ImageConfig | None = None
    prompt: PromptConfig | None = None
    quantization: None = None

    PARTS: ClassVar[tuple[str, ...]] = ("vision", "connector", "decoder")

    def __post_init__(self) -> None:
        decoder = self.decoder
        require(
            any((self.vision, self.connector, decoder)),
            f"MM1Config: at least one of {list(self.PARTS)} is needed",
        )
        self._check_joints()
        if decoder and self.prompt:
            require(
                0 <= self.prompt.image_token_id < decoder.vocab_size,
                f"PromptConfig.image_token_id: {self.prompt.image_token_id} is outside "
                f"the vocabulary of {decoder.vocab_size}",
            )

    @property
    def sees(self) -> bool:
        """Whether the model can take pictures."""
        return bool(self.vision and self.connector and self.decoder and self.image)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one tile.

        Raises:
            ConfigError: the model has no connector.
        """
        if self.connector is None:
            raise ConfigError("the model has no connector, so no image tokens")
        return self.connector.num_image_tokens

    def _check_joints(self) -> None:
        vision, connector, decoder = self.vision, self.connector, self.decoder
        image_size = self.image and self.image.size
        for left, a, right, b in (
            ("connector.input_size", connector and connector.input_size,
             "vision.hidden_size", vision and vision.hidden_size),
            ("connector.num_features", connector and connector.num_features,
             "vision's features per tile", vision and vision.num_features),
            ("connector.output_size", connector and connector.output_size,
             "decoder.hidden_size", decoder and decoder.hidden_size),
            ("image.size", image_size,
             "vision.image_size", vision and vision.image_size),
        ):  # fmt: skip
            fits = a is None or b is None or a == b
            require(fits, f"MM1Config: {left} is {a} but {right} is {b}")
