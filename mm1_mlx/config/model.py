"""A whole model, or some of its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from mm1_mlx.config.connector import ConnectorConfig
from mm1_mlx.config.decoder import DecoderConfig
from mm1_mlx.config.image import AnyresTiling, DynamicTiling, ImageConfig
from mm1_mlx.config.limits import MAX_PATCHES
from mm1_mlx.config.prompt import PromptConfig
from mm1_mlx.config.quantization import QuantizationConfig
from mm1_mlx.config.region import RegionConfig
from mm1_mlx.config.text import TextConfig
from mm1_mlx.config.vision import VisionConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.section import Section, require

MODEL_TYPE: Final = "mm1"


@dataclass(frozen=True, kw_only=True)
class MM1Config(Section):
    """A whole model, or some of its parts."""

    model_type: Literal["mm1"] = MODEL_TYPE
    vision: VisionConfig | None = None
    connector: ConnectorConfig | None = None
    region: RegionConfig | None = None
    decoder: DecoderConfig | None = None
    text: TextConfig | None = None
    image: ImageConfig | None = None
    prompt: PromptConfig | None = None
    quantization: QuantizationConfig | None = None

    # The sections that are modules; each one's name begins its tensors' names.
    PARTS: ClassVar[tuple[str, ...]] = (
        *("vision", "connector", "region", "decoder", "text"),
    )

    def __post_init__(self) -> None:
        decoder = self.decoder
        require(
            any(getattr(self, part) for part in self.PARTS),
            f"MM1Config: at least one of {list(self.PARTS)} is needed",
        )
        self._check_joints()
        self._check_tiles()
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
        return self.connector.image_tokens(self._num_features())

    def _num_features(self) -> int:
        """Features of one tile, which may be larger than those the encoder learned on."""
        assert self.connector is not None
        vision, image = self.vision, self.image
        if vision is None or image is None:
            return self.connector.num_features
        patches = (image.size // vision.patch_size) ** 2
        return patches + (not vision.drop_cls)

    def _check_joints(self) -> None:
        vision, connector, decoder = self.vision, self.connector, self.decoder
        region, text = self.region, self.text
        for left, a, right, b in (
            ("connector.input_size", connector and connector.input_size,
             "vision.hidden_size", vision and vision.hidden_size),
            ("connector.num_features", connector and connector.num_features,
             "vision's features per tile", vision and vision.num_features),
            ("connector.output_size", connector and connector.output_size,
             "decoder.hidden_size", decoder and decoder.hidden_size),
            ("region.input_size", region and region.input_size,
             "vision.hidden_size", vision and vision.hidden_size),
            ("region.output_size", region and region.output_size,
             "decoder.hidden_size", decoder and decoder.hidden_size),
            ("text.projection_size", text and text.projection_size,
             "vision.projection_size", vision and vision.projection_size),
        ):  # fmt: skip
            fits = a is None or b is None or a == b
            require(fits, f"MM1Config: {left} is {a} but {right} is {b}")

    def _check_tiles(self) -> None:
        vision, image, connector = self.vision, self.image, self.connector
        if vision is None or image is None:
            return
        require(
            image.size % vision.patch_size == 0,
            f"MM1Config: image.size {image.size} is not a multiple of "
            f"vision.patch_size {vision.patch_size}",
        )
        patches = (image.size // vision.patch_size) ** 2
        require(
            patches <= MAX_PATCHES,
            f"MM1Config: tiles of {image.size} pixels have {patches} patches, more than "
            f"{MAX_PATCHES}",
        )
        if isinstance(image.tiling, AnyresTiling) and connector:
            self._check_merge(image.tiling.merge, connector)
        if self.region:
            self._check_map(vision, image)

    def _check_map(self, vision: VisionConfig, image: ImageConfig) -> None:
        require(
            vision.drop_cls,
            "MM1Config: region reads a square map of features, but vision.drop_cls is "
            "false",
        )
        tiling = image.tiling
        pads = isinstance(tiling, DynamicTiling) or getattr(tiling, "fill", "") == "pad"
        require(
            image.resize == "squash" and not pads,
            f"MM1Config: region looks at shares of the whole picture, which image.resize "
            f"{image.resize!r} or a tiling that pads would move; expected 'squash'",
        )

    def _check_merge(self, merge: str, connector: ConnectorConfig) -> None:
        require(
            connector.newline == (merge == "unpad"),
            f"MM1Config: connector.newline is {connector.newline} but image.tiling "
            f"merges by {merge!r}",
        )
        tokens = self.num_image_tokens
        require(
            merge == "flat" or math.isqrt(tokens) ** 2 == tokens,
            f"MM1Config: image.tiling merges by {merge!r}, which needs a square of image "
            f"tokens per tile, not {tokens}",
        )
