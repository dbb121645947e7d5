"""AIM (arXiv 2401.08541), MM1's other encoder, as apple/ml-aim stores it.

https://github.com/apple/ml-aim/blob/bd9e068/aim-v1/aim/v1/torch/models.py

A source holds a ``config.json`` with the arguments of ``AIMForImageClassification``, as
its hub repositories do. The backbones of apple/AIM (``aim_*_backbone.pth``) come without:
put one into a folder with a config.json such as, for the 600M one,
``{"img_size": 224, "patch_size": 14, "embed_dim": 1536, "num_blocks": 24,
"num_heads": 12}``. Heads that classify are dropped.
"""

import math

from mm1_mlx.config import ImageConfig, MM1Config, VisionConfig

from ..rules import Table, conv, split, squeeze
from ..shared.fields import Fields
from ..source import Source
from . import clip_hf

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# The share of a picture's shortest edge that is kept.
KEPT = 0.875
LINEARS = {
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.fc3": "mlp.fc3",
}
NORMS = {"norm_1": "layer_norm1", "norm_2": "layer_norm2"}
HEAD = ("cls_token", "k.weight", "v.weight", "linear.weight", "linear.bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def table() -> Table:
    """The rules of AIM and of AIMv2, whose blocks have a gate and no biases."""
    patches, blocks = "preprocessor.patchifier.", "trunk.blocks.{}."
    ours = "vision.layers.{}."
    names: Table = {
        f"{patches}proj.weight": conv("vision.patch_embedding.weight"),
        f"{patches}proj.bias": "vision.patch_embedding.bias",
        "preprocessor.pos_embed": squeeze("vision.position_embedding", 0),
        f"{blocks}attn.qkv.weight": split(
            *(f"{ours}self_attn.{x}_proj.weight" for x in "qkv")
        ),
        **{f"{blocks}{a}.weight": f"{ours}{b}.weight" for a, b in LINEARS.items()},
        **{f"head.{leaf}": None for leaf in HEAD},
        **{f"head.bn.{leaf}": None for leaf in STATISTICS},
    }
    for kind in ("weight", "bias"):
        names |= {f"{blocks}{a}.{kind}": f"{ours}{b}.{kind}" for a, b in NORMS.items()}
        names[f"{patches}norm.{kind}"] = f"vision.patch_layernorm.{kind}"
        names[f"trunk.post_trunk_norm.{kind}"] = f"vision.post_layernorm.{kind}"
    return names


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the backbone and of its head."""
    return table()


def detect(source: Source) -> bool:
    """Whether the config holds the arguments of AIM's constructor, and no model type."""
    keys = {"embed_dim", "num_blocks", "num_heads", "img_size"}
    return not source.config.get("model_type") and keys <= set(source.config)


def config(source: Source) -> MM1Config:
    """The encoder: the last block, normalised.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(source.config, "AIM config", {"mlp_ratio": 4})
    fields.expect("num_channels", 3)
    fields.expect("post_trunk_norm", True)
    width = fields.integer("embed_dim")
    wide, given = fields.integer("mlp_ratio") * width, fields.get("mlp_hidden_dim")
    vision = VisionConfig.from_dict(
        {
            "image_size": clip_hf.square(fields, "img_size"),
            "patch_size": clip_hf.square(fields, "patch_size"),
            "hidden_size": width,
            "intermediate_size": given or wide,
            "num_hidden_layers": fields.integer("num_blocks"),
            "num_attention_heads": fields.integer("num_heads"),
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "class_token": False,
            "drop_cls": True,
            "position": "sincos",
            "patch_bias": True,
            "patch_norm": True,
            "pre_norm": False,
            "attention_bias": False,
            "mlp_bias": False,
        }
    )
    # Which layers the head reads, and its classes.
    fields.finish(("probe_layers", "num_classes", "ffn_dropout_rate"))
    image = ImageConfig(
        size=vision.image_size,
        resize="crop",
        mean=MEAN,
        std=STD,
        crop_from=math.ceil(vision.image_size / KEPT),
        crop_rounding="even",
    )
    return MM1Config(vision=vision, image=image)
