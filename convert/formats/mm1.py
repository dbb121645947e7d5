"""This program's own format: to cast, upcycle or tile a model anew, or to take its parts."""

from mm1_mlx.config import MODEL_TYPE, MM1Config

from ..rules import Table
from ..source import Source


def detect(source: Source) -> bool:
    """Whether the source is a model folder of ours."""
    return source.config.get("model_type") == MODEL_TYPE


def rules(source: Source) -> Table:
    """Every tensor under its own name."""
    return {name: name for name in source.tensors if "{" not in name}


def config(source: Source) -> MM1Config:
    """What its config.json says.

    Raises:
        ConfigError: it does not describe a model.
    """
    return MM1Config.from_dict(source.config)
