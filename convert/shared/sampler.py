"""Ferret's region sampler: its tensors' names, and its section of a config.

https://github.com/apple/ml-ferret/blob/3c9e5c9/ferret/model/ferret_arch.py
"""

from mm1_mlx.config import DecoderConfig, RegionConfig, VisionConfig

from ..rules import Table, squeeze
from .fields import Fields

SAMPLER = "model.region_geo_sampler."


def table() -> Table:
    """The sampler's rules."""
    names: Table = {}
    stage = "region.stages.{}."
    for leaf in ("weight", "bias"):
        names[f"{SAMPLER}diff_projector_list.{{}}.{leaf}"] = f"{stage}diff_proj.{leaf}"
        names[f"{SAMPLER}agg_projector_list.{{}}.norm.{leaf}"] = f"{stage}norm.{leaf}"
        names[f"{SAMPLER}flatten_projector.{leaf}"] = f"region.flatten_proj.{leaf}"
        names[f"{SAMPLER}dim_projector.{leaf}"] = f"region.out_proj.{leaf}"
    net = f"{SAMPLER}agg_projector_list.{{}}.net.0."
    names[f"{net}weight"] = squeeze(f"{stage}agg_proj.weight", 2)
    names[f"{net}bias"] = f"{stage}agg_proj.bias"
    return names


def region_section(
    fields: Fields, vision: VisionConfig, decoder: DecoderConfig
) -> RegionConfig:
    """The sampler; its numbers of points stand in Ferret's code, not in its config.

    Raises:
        ConfigError: regions are read in another way.
    """
    fields.require("region_geo_sampler")
    fields.expect("region_geo_sampler", True)
    fields.expect("region_fea_adapter", False)
    fields.expect("sampler_pooler_mode", "max")
    fields.expect("mm_vision_select_feature", "patch")
    fields.integer("im_region_fea_token")
    return RegionConfig(input_size=vision.hidden_size, output_size=decoder.hidden_size)
