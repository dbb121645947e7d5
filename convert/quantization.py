"""How a source's weights are packed, from the config.json of mlx-lm or mlx-vlm.

https://github.com/ml-explore/mlx-lm/blob/v0.32.2/mlx_lm/utils.py
"""

from collections.abc import Mapping

from mm1_mlx.config import QuantizationConfig
from mm1_mlx.errors import CheckpointError

from .source import PACKING, Source

FIELDS = {"group_size", "bits", "mode"}


def quantization(source: Source) -> QuantizationConfig | None:
    """How the source's weights are packed, None if they are not.

    Raises:
        CheckpointError: they are quantized in a way that does not run here.
    """
    for key in PACKING:
        section = source.content.get(key)
        if not section:
            continue
        own = isinstance(section, Mapping) and "quant_method" not in section
        if not own or not {"group_size", "bits"} <= set(section):
            raise _refusal(source, key)
        if unknown := sorted(set(section) - FIELDS):
            raise CheckpointError(
                f"{source.name}: {key} in config.json packs some modules in a way of "
                f"their own, e.g. {unknown[:3]}, which does not run here; convert a "
                "checkpoint with one way for all, or the one that it was made from"
            )
        return QuantizationConfig.from_dict(section)
    return None


def _refusal(source: Source, key: str) -> CheckpointError:
    return CheckpointError(
        f"{source.name} is quantized ({key} in config.json); convert the checkpoint "
        "that it was made from"
    )
