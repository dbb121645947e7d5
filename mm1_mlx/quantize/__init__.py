"""Packs a model's weights, component by component, and says what that costs."""

from mm1_mlx.quantize.job import Report, quantize
from mm1_mlx.recipe import RECIPES, Recipe, find_recipe, parse_way, way_of

__all__ = [
    "RECIPES",
    "Recipe",
    "Report",
    "find_recipe",
    "parse_way",
    "quantize",
    "way_of",
]
