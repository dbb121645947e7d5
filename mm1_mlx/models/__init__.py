"""The three parts of an MM1 model and their composition."""

from mm1_mlx.models.mm1 import MM1, named_tensors

__all__ = ["MM1", "named_tensors"]
