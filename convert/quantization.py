"""How a source's weights are packed, from the config.json of mlx-lm or mlx-vlm.

https://github.com/ml-explore/mlx-lm/blob/v0.32.2/mlx_lm/utils.py
"""

from collections.abc import Mapping

import mlx.core as mx

from mm1_mlx.config import Packing, QuantizationConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.pieces import TensorInfo

from .folder import PACKING
from .source import Source
from .tensors import FLOATS


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
        # A path may be told not to be packed, or to be so as all others are.
        said = {k: x for k, x in section.items() if not isinstance(x, bool)}
        return QuantizationConfig.from_dict(said)
    return None


def leaves_of(packing: Packing) -> dict[str, set[mx.Dtype]]:
    """What a packed module's tensors are called, and of which types they are."""
    if packing.mode == "affine":
        return {".weight": {mx.uint32}, ".scales": FLOATS, ".biases": FLOATS}
    return {".weight": {mx.uint32}, ".scales": {mx.uint8}}


def check_module(name: str, found: Mapping[str, TensorInfo], packing: Packing) -> None:
    """Pass only if a packed module's tensors are there and fit each other.

    Raises:
        CheckpointError: they are not complete, or not packed so.
    """
    for leaf, kinds in leaves_of(packing).items():
        info = found.get(name + leaf)
        if info is None:
            raise CheckpointError(
                f"{name!r} is packed, but {name + leaf!r} is missing; the source is "
                "incomplete, get it again"
            )
        if info.dtype not in kinds:
            raise CheckpointError(
                f"{name + leaf!r} holds {info.dtype}, expected "
                f"{' or '.join(sorted(map(str, kinds)))} of a packed module; get it "
                "again, or convert the unquantized checkpoint"
            )
    weight, *others = (found[name + leaf].shape for leaf in leaves_of(packing))
    scales, bits, size = others[0], packing.bits, packing.group_size
    # A number has no width, and a vector is no matrix.
    if (
        min(len(weight), len(scales)) < 2
        or weight[:-1] != scales[:-1]
        or weight[-1] * 32 != bits * scales[-1] * size
        or others[-1] != scales
    ):
        raise CheckpointError(
            f"{name!r} has weights {list(weight)}, scales and biases "
            f"{' and '.join(str(list(x)) for x in others)}, which are not packed with "
            f"{bits} bits in groups of {size}; config.json and the weights do not belong "
            "together"
        )


def _refusal(source: Source, key: str) -> CheckpointError:
    return CheckpointError(
        f"{source.name} is quantized ({key} in config.json); convert the checkpoint "
        "that it was made from"
    )
