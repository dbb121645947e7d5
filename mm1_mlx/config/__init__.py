"""The shape of a model as plain values: frozen, strict, JSON in and out.

One section per part (``vision``, ``connector``, ``region``, ``decoder``, ``text``), one
for how pictures become pixels (``image``), one for how messages become text
(``prompt``) and one for how weights are packed (``quantization``). No mlx import: a tool
can read a model's config without a GPU stack. What MM1 (arXiv 2403.09611) leaves open is
a field here, never a constant in the code.
"""

from mm1_mlx.config.connector import (
    AttentionPoolConfig,
    AveragePoolConfig,
    CAbstractorConfig,
    ConnectorConfig,
    LinearConfig,
    MLPConfig,
    PerceiverConfig,
)
from mm1_mlx.config.decoder import DecoderConfig, LayerSizes, MoEConfig, RopeScaling
from mm1_mlx.config.image import (
    AnyresTiling,
    DynamicTiling,
    ImageConfig,
    SplitTiling,
    Tiling,
)
from mm1_mlx.config.limits import Activation
from mm1_mlx.config.model import MODEL_TYPE, MM1Config
from mm1_mlx.config.prompt import PromptConfig, Template
from mm1_mlx.config.quantization import Packing, QuantizationConfig
from mm1_mlx.config.region import RegionConfig
from mm1_mlx.config.text import TextConfig
from mm1_mlx.config.vision import VisionConfig, VisionMoEConfig

__all__ = [
    "MODEL_TYPE",
    "Activation",
    "AnyresTiling",
    "AttentionPoolConfig",
    "AveragePoolConfig",
    "CAbstractorConfig",
    "ConnectorConfig",
    "DecoderConfig",
    "DynamicTiling",
    "ImageConfig",
    "LayerSizes",
    "LinearConfig",
    "MLPConfig",
    "MM1Config",
    "MoEConfig",
    "Packing",
    "PerceiverConfig",
    "PromptConfig",
    "QuantizationConfig",
    "RegionConfig",
    "RopeScaling",
    "SplitTiling",
    "Template",
    "TextConfig",
    "Tiling",
    "VisionConfig",
    "VisionMoEConfig",
]
