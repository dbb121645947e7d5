"""The image encoder: a vision transformer, by its fields CLIP's, AIM's or AIMv2's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm1_mlx.config.limits import (
    MAX_EXPERTS,
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    Activation,
)
from mm1_mlx.section import Section, check_positive, check_sizes, require


@dataclass(frozen=True, kw_only=True)
class VisionMoEConfig(Section):
    """Expert MLPs in an encoder's last blocks, chosen once per image.

    Source: Mobile V-MoE (arXiv 2309.04354). What its router reads and how many experts
    an image passes are not known here, so they are fields.
    """

    num_experts: int
    experts_per_image: int = 1
    # How many of the last blocks are sparse.
    num_sparse_layers: int
    # What a block's router sees of its normed input: the mean of all places, or the
    # class token alone.
    router_input: Literal["mean", "class_token"] = "mean"
    # Whether the chosen experts' probabilities are scaled to sum to 1.
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, MAX_EXPERTS, "num_experts")
        check_sizes(self, self.num_experts, "experts_per_image")
        check_sizes(self, MAX_LAYERS, "num_sparse_layers")


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Section):
    """A vision transformer; the defaults of what differs among them are CLIP's."""

    # Side of the pictures that the stored position embedding is for, in pixels.
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: Activation
    norm: Literal["layer", "rms"] = "layer"
    layer_norm_eps: float = 1e-5
    # Whether a class token attends with the patches.
    class_token: bool = True
    position: Literal["learned", "sincos"] = "learned"
    # How a learned position embedding is stretched to another grid: as transformers
    # does (Keys' kernel with a = -0.75), or as open_clip and axlearn do (a = -0.5).
    interpolation: Literal["bicubic", "bicubic_antialias"] = "bicubic_antialias"
    patch_bias: bool = False
    # A norm of the patches before their positions are added (AIM, AIMv2) ...
    patch_norm: bool = False
    # ... and one after (CLIP).
    pre_norm: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    # fc2(act(fc1 x) * fc3 x) in place of fc2(act(fc1 x)).
    gated_mlp: bool = False
    moe: VisionMoEConfig | None = None
    # Index into hidden states as Hugging Face counts them: -1 is the last block's
    # output, -2 the one before. Blocks past it are neither built nor stored.
    feature_layer: int = -1
    # Whether the tower's final norm is applied to the patch features.
    apply_post_norm: bool = True
    # Whether the class token is left out of the features.
    drop_cls: bool = True
    # Width of the space that CLIP shares with its text tower; None without one.
    projection_size: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, MAX_HIDDEN_SIZE, "image_size", "patch_size", "hidden_size")
        check_sizes(self, 8 * MAX_HIDDEN_SIZE, "intermediate_size")
        check_sizes(self, MAX_LAYERS, "num_hidden_layers")
        check_sizes(self, self.hidden_size, "num_attention_heads")
        check_positive(self, "layer_norm_eps")
        if self.projection_size is not None:
            check_sizes(self, MAX_HIDDEN_SIZE, "projection_size")
        self._check_fit()

    def _check_fit(self) -> None:
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
            self.position == "learned" or self.hidden_size % 4 == 0,
            f"VisionConfig: hidden_size {self.hidden_size} is not a multiple of 4, "
            "which sincos positions need",
        )
        require(
            -self.num_hidden_layers <= self.feature_layer <= -1,
            f"VisionConfig.feature_layer: {self.feature_layer} is outside "
            f"-{self.num_hidden_layers}..-1",
        )
        require(
            self.drop_cls or self.class_token,
            "VisionConfig.drop_cls: there is no class token to keep",
        )
        require(
            self.moe is None or self.moe.num_sparse_layers <= self.num_hidden_layers,
            f"VisionConfig.moe.num_sparse_layers: {self.moe and self.moe.num_sparse_layers} "
            f"is above the {self.num_hidden_layers} num_hidden_layers",
        )
        require(
            self.moe is None
            or self.class_token
            or self.moe.router_input != "class_token",
            "VisionConfig.moe: there is no class token for the router to read",
        )
        require(
            self.projection_size is None
            or (self.class_token and self.feature_layer == -1 and self.apply_post_norm),
            "VisionConfig.projection_size: CLIP's space is reached from the normed class "
            "token of the last block",
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

    def is_sparse(self, layer: int) -> bool:
        """Whether the block's MLP is one of experts."""
        moe = self.moe
        return (
            moe is not None and layer >= self.num_hidden_layers - moe.num_sparse_layers
        )
