"""Limits of what a config file may ask for, checked before anything is allocated."""

from typing import Literal

MAX_LAYERS = 256
MAX_HIDDEN_SIZE = 32_768
MAX_VOCAB_SIZE = 1_000_000
MAX_EXPERTS = 512
# Points of a region; its sampler measures how far each is from every other.
MAX_REGION_POINTS = 4096
MAX_TILES = 64
# Patches of one tile, and pixels of one picture's tiles.
MAX_PATCHES = 16_384
MAX_TILE_PIXELS = 2**26

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
