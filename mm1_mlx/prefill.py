"""A prompt into a key-value cache: what every way of answering begins with.

Only what the cache does not hold yet is encoded, embedded and run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mm1_mlx.blas import give_back
from mm1_mlx.budget import Answer as Needs
from mm1_mlx.budget import check_answer
from mm1_mlx.caches.shared import Prefix, SharedPrefixKVCache
from mm1_mlx.errors import MemoryLimitError
from mm1_mlx.layout import Picture
from mm1_mlx.memory.features import FeatureCache
from mm1_mlx.memory.prefixes import (
    KVPrecision,
    Position,
    PrefixCache,
    common,
    pack,
)
from mm1_mlx.models import MM1
from mm1_mlx.models.linear import drop_unpacked
from mm1_mlx.prompt import Prompt

# Positions run at once: enough for full speed, and few enough for their activations.
STEP = 2048
# And while others wait for their next tokens: a quarter of that as long.
SHORT_STEP = 512


# Whether the caller wants no more.
Stop = Callable[[], bool]


class Cancelled(Exception):  # noqa: N818  (no error)
    """The caller asked for no more."""


@dataclass
class Context:
    """A prompt of which the cache holds the first ``reused`` positions.

    Attributes:
        prompt: the whole prompt.
        cache: one of mlx-lm's caches per layer.
        precision: how it holds keys and values.
        reused: how many positions were in it already.
        embeddings: of the other positions, [T, D].
        shared: whether the cache begins with a prefix that others hold.
    """

    prompt: Prompt
    cache: list[Any]
    precision: KVPrecision
    reused: int
    embeddings: mx.array
    shared: bool = False


@dataclass(frozen=True)
class Shared:
    """A prefix that several prompts begin with, kept once for all of them."""

    positions: tuple[Position, ...]
    layers: list[Prefix]

    def begins(self, positions: tuple[Position, ...]) -> bool:
        """Whether a prompt begins with it, and goes on."""
        return len(positions) > len(self.positions) == common(self.positions, positions)


def prepare(
    model: MM1,
    prompt: Prompt,
    features: FeatureCache,
    prefixes: PrefixCache,
    precision: KVPrecision,
    room: int = 0,
    shared: Shared | None = None,
    promised: int = 0,
    between: Callable[[], None] | None = None,
) -> Context:
    """The prompt with the longest beginning that is known, and embeddings of the rest.

    Args:
        model: encodes and embeds.
        prompt: the whole prompt.
        features: what is known of pictures.
        prefixes: what is known of prompts.
        precision: how the cache holds keys and values.
        room: tokens of the longest answer, for which memory must be there too.
        shared: a prefix whose cache others use too; taken if the prompt begins so.
        promised: bytes that answers under way will still take.
        between: called behind every picture that is encoded; it may raise.

    Raises:
        MemoryLimitError: the device has not the memory for it.
    """
    shares = shared is not None and shared.begins(prompt.positions)
    reused = prefixes.longest(prompt.positions, precision)
    if shared is not None and shares:
        reused = len(shared.positions)
    if not reused:
        # What is kept for others makes room before new memory is taken.
        prefixes.make_room()
    needs = needs_of(model, prompt, features, precision, room, reused)
    try:
        check_answer(model.config, needs, promised=promised)
    except MemoryLimitError:
        kept = reused if shares else 0
        tiles = sum(len(picture.tiles) for picture in prompt.pictures)
        alone = replace(needs, reused=kept, tiles=tiles)
        spare = prefixes.nbytes + features.nbytes
        give_back()
        # A question that cannot be answered costs no conversation.
        check_answer(model.config, alone, spare=spare, promised=promised)
        prefixes.clear()
        features.clear()
        drop_unpacked(model)
        mx.clear_cache()
        give_back()
        reused = kept
    # Taken before pictures are encoded: meanwhile other answers may change what is kept.
    taken = None
    if reused and not shares:
        taken, _ = prefixes.take(prompt.positions, precision)
        assert taken is not None
    try:
        embeddings = embed(model, prompt.after(reused), features, between)
    except BaseException:
        if taken is not None:
            prefixes.keep(prompt.positions[:reused], taken, precision)
        raise
    cache = taken or model.make_cache()
    if shared is not None and shares:
        cache = [SharedPrefixKVCache(layer) for layer in shared.layers]
    return Context(prompt, cache, precision, reused, embeddings, shares)


def needs_of(
    model: MM1,
    prompt: Prompt,
    features: FeatureCache,
    precision: KVPrecision,
    room: int,
    reused: int,
) -> Needs:
    """What an answer takes: arguments as ``prepare`` has them, and positions known."""
    shown = _shown(prompt.after(reused))
    tiles = features.count_new_tiles(shown)
    if tiles and model.config.image is not None:
        # As many of the model's own size as have the area of the largest.
        side = max(tile.shape[0] for picture in shown for tile in picture.tiles)
        tiles = -(-tiles * side**2 // model.config.image.size**2)
    return Needs(
        positions=len(prompt.tokens),
        room=room,
        tiles=tiles,
        reused=reused,
        itemsize=model.decoder.norm.weight.dtype.size,
        kv_bits=precision.bits,
        kv_group_size=precision.group_size,
        kv_start=precision.start,
        processes=model.processes,
    )


def embed(
    model: MM1,
    prompt: Prompt,
    features: FeatureCache,
    between: Callable[[], None] | None = None,
) -> mx.array:
    """Embeddings [T, D] of a prompt; pictures without a span in it are not encoded."""
    found = features(_shown(prompt), between)
    tokens = mx.array(prompt.tokens)
    by_number = dict(zip(_numbers(prompt), found, strict=True))
    nothing = mx.zeros((0, model.decoder.norm.weight.shape[0]))
    image_tokens = [by_number.get(i, nothing) for i in range(len(prompt.pictures))]
    embeddings = model.embed(tokens, image_tokens, prompt.spans)
    mx.eval(embeddings)
    return embeddings


def _numbers(prompt: Prompt) -> list[int]:
    """The pictures that have a span in the prompt."""
    return sorted({span.picture for span in prompt.spans})


def _shown(prompt: Prompt) -> list[Picture]:
    return [prompt.pictures[i] for i in _numbers(prompt)]


def prefill(
    model: MM1,
    context: Context,
    *,
    step: int = STEP,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Stop | None = None,
    between: Callable[[], None] | None = None,
) -> mx.array:
    """Run the positions that the cache does not hold; logits [1, V] of the last one.

    Args:
        model: reads the embeddings.
        context: the prompt and the cache, which holds all of it afterwards.
        step: positions run at once.
        progress: called with positions done and in all, those of the cache included.
        cancelled: asked between two steps.
        between: called there, for whoever cannot wait for all of it; steps are short.

    Raises:
        Cancelled: the caller wants no more; the cache holds what was done so far.
    """
    tokens = mx.array(context.prompt.tokens)
    total, done = tokens.size, context.reused
    if between is not None:
        step = min(step, SHORT_STEP)
    if progress:
        progress(done, total)
    while True:
        end = min(done + step, total)
        part = context.embeddings[done - context.reused : end - context.reused]
        state = model.decoder.last(tokens[None, done:end], context.cache, part[None])
        pack(context.cache, context.precision)
        done = end
        if done == total:
            logits = model.decoder.logits(state[:, -1])
            mx.eval(logits, [layer.state for layer in context.cache])
            break
        mx.eval([layer.state for layer in context.cache])
        mx.clear_cache()
        if progress:
            progress(done, total)
        if cancelled is not None and cancelled():
            raise Cancelled
        if between is not None:
            between()
    if progress:
        progress(total, total)
    return logits
