"""This program's own format: to cast, upcycle or tile a model anew, or to take its parts."""

from mm1_mlx.checkpoint import load_config, load_manifest
from mm1_mlx.config import MODEL_TYPE, MM1Config

from ..rules import Table
from ..source import Source


def detect(source: Source) -> bool:
    """Whether the source is a model folder of ours."""
    return source.config.get("model_type") == MODEL_TYPE


def rules(source: Source) -> Table:
    """Every tensor under its own name.

    Raises:
        CheckpointError: a file is missing or does not have the manifest's size.
    """
    # First the tensors: of a hub repository the weights may not be there before.
    names: Table = {name: name for name in source.tensors if "{" not in name}
    load_manifest(source.folder)
    return names


def config(source: Source) -> MM1Config:
    """What its config.json says.

    Raises:
        CheckpointError: the folder is not finished, or of another version.
        ConfigError: it does not describe a model.
    """
    return load_config(source.folder)
