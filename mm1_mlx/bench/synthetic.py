"""A config to a runtime of random weights: every size can be measured without a download.

Weights are drawn piece by piece and packed at once: of the unpacked model there is never
more than a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mm1_mlx.budget import check_load
from mm1_mlx.checkpoint import build_model, cast_to, settle
from mm1_mlx.config import MM1Config, Packing, PromptConfig, QuantizationConfig
from mm1_mlx.engine import Engine
from mm1_mlx.memory.features import FeatureCache
from mm1_mlx.memory.named import NamedPrefixes
from mm1_mlx.memory.prefixes import PrefixCache
from mm1_mlx.models import MM1
from mm1_mlx.quantize.pack import pack_deferred
from mm1_mlx.runtime import PREFIX_BYTES, Runtime
from mm1_mlx.shard import Deferred
from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.worker import Worker

# Drawn at a time: 32 MB in 16 bits.
PIECE = 1 << 24


def open_synthetic(
    name: str,
    config: MM1Config,
    packed: Mapping[str, Packing] | None = None,
    dtype: mx.Dtype = mx.float16,
) -> Runtime:
    """A model of random weights, ready to answer nonsense.

    Args:
        name: what it is called.
        config: the model's, with a decoder and a prompt section.
        packed: how its modules are packed, by path.
        dtype: of what is not packed.

    Raises:
        CheckpointError: the device has no room for it; nothing was allocated.
    """
    worker = Worker()
    try:
        engine = worker.submit(_engine, name, config, packed or {}, dtype).result()
    except BaseException:
        worker.close()
        raise
    return Runtime(engine, Path(name), name, (), worker)


def _engine(
    name: str, config: MM1Config, packed: Mapping[str, Packing], dtype: mx.Dtype
) -> Engine:
    model = synthetic_model(name, config, packed, dtype)
    assert config.prompt is not None
    prefixes = PrefixCache(PREFIX_BYTES)
    return Engine(
        model=model,
        tokenizer=_tokenizer(config.prompt),
        config=model.config,
        features=FeatureCache(model.encode, name),
        prefixes=prefixes,
        named=NamedPrefixes(name, name, prefixes),
    )


def synthetic_model(
    name: str, config: MM1Config, packed: Mapping[str, Packing], dtype: mx.Dtype
) -> MM1:
    """The model with random weights, packed as said; its matrices are the same each time.

    Raises:
        CheckpointError: the device has no room for it; nothing was allocated.
    """
    ways = QuantizationConfig.of_modules(packed) if packed else None
    config = replace(config, quantization=ways)
    model = build_model(config, packed)
    # Lazy: what is asked for here are sizes.
    weights = {k: cast_to(dtype, x) for k, x in model.tensors().items()}
    check_load(weights, name, config, "take a smaller one, or fewer bits")
    plain = MM1(replace(config, quantization=None)).tensors()
    drawn = ((k, _random(i, x, dtype)) for i, (k, x) in enumerate(plain.items()))
    del weights
    for path, tensor in pack_deferred(drawn, packed):
        array = mx.concatenate([x.flatten() for x in tensor.pieces()])
        array = array.reshape(tensor.shape)
        mx.eval(array)
        model.load_weights([(path, array)], strict=False)
        mx.clear_cache()
    return settle(model)


def _random(seed: int, tensor: mx.array, dtype: mx.Dtype) -> Deferred:
    """A tensor like one that is initialised; matrices are uniform, and of unit gain."""
    if tensor.ndim < 2:
        return Deferred(tuple(tensor.shape), dtype, lambda: [tensor.astype(dtype)])
    return Deferred(
        tuple(tensor.shape), dtype, _pieces(seed, tuple(tensor.shape), dtype)
    )


def _pieces(
    seed: int, shape: tuple[int, ...], dtype: mx.Dtype
) -> Callable[[], Iterator[mx.array]]:
    bound = (3 / shape[-1]) ** 0.5
    width, rows = shape[-1], prod(shape[:-1])
    step = max(1, PIECE // width)

    def pieces() -> Iterator[mx.array]:
        for start in range(0, rows, step):
            key = mx.random.key(seed << 32 | start)
            size = (min(step, rows - start), width)
            yield mx.random.uniform(-bound, bound, size, dtype, key=key)

    return pieces


def _tokenizer(config: PromptConfig) -> Tokenizer:
    """One that knows a word, and no other."""
    words = {"<unk>": 0, "</s>": 1, "a": 2}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    return Tokenizer(TokenizerWrapper(hf), config.image_token)
