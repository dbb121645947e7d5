"""What a source may hold beside a model's tensors, and what must be equal in it."""

from dataclasses import replace

import mlx.core as mx

from mm1_mlx.checkpoint import model_shapes
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError
from mm1_mlx.pieces import Readable, read_in_pieces

from .packed import Packed
from .plan import Plan
from .source import Source


def possible_shapes(config: MM1Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that a source of this config may hold, built here or not."""
    vision, decoder = config.vision, config.decoder
    if vision:
        vision = replace(vision, feature_layer=-1, apply_post_norm=True)
    if decoder:
        decoder = replace(decoder, tie_word_embeddings=False)
    return model_shapes(replace(config, vision=vision, decoder=decoder))


def check_tied(source: Source, packed: Packed, result: Plan) -> None:
    """Pass only if a head that the config ties to the embedding is equal to it.

    Packed ones are compared as they are stored, and all piece by piece: whole they may
    fill the memory.

    Raises:
        CheckpointError: it is not.
    """
    heads = [name for name in result.dropped if name.endswith("lm_head.weight")]
    embeddings = [
        step.sources[0]
        for step in result.steps
        if step.targets == ("decoder.embed_tokens.weight",)
    ]
    for head in heads:
        pairs = [packed.stored(name) for name in (head, embeddings[0])]
        if len(pairs[0]) != len(pairs[1]) or not all(
            _equal(source.tensor(one), source.tensor(other))
            for one, other in zip(*pairs, strict=True)
        ):
            raise CheckpointError(
                f"{source.name}: config.json ties {head!r} to {embeddings[0]!r}, but "
                "they differ; set tie_word_embeddings to false there"
            )


def _equal(one: Readable, other: Readable) -> bool:
    return one.shape == other.shape and all(
        mx.array_equal(*pieces).item()
        for pieces in zip(read_in_pieces(one), read_in_pieces(other), strict=True)
    )
