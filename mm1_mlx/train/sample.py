"""Conversations and documents as training targets: what is learned, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm1_mlx.config import MM1Config, PromptConfig
from mm1_mlx.errors import ConfigError, PromptError
from mm1_mlx.layout import Picture, Span
from mm1_mlx.messages import Part, Region, RegionToken, Turn
from mm1_mlx.prompt import encode_turns, lay_out, render
from mm1_mlx.tokenizer import Tokenizer

# A picture of one tile that somebody else encodes.
_UNSEEN = Picture((np.zeros((1, 1, 3), np.float32),), (1, 1), "")
# What the length of a packed row is a multiple of: few lengths, few compiled steps.
PACKED_STEP = 32


@dataclass(frozen=True)
class Sample:
    """Tokens of a conversation, one image token per picture, and which are learned."""

    tokens: tuple[int, ...]
    # Whether the token is a target: part of an assistant turn, its end included.
    learned: tuple[bool, ...]
    # For every region token, in order, the picture whose next region it is.
    regions: tuple[int, ...] = ()


def build_samples(
    turns: Sequence[Turn],
    config: MM1Config,
    tokenizer: Tokenizer,
    unlearned: Collection[int] = (),
) -> list[Sample]:
    """The samples of a conversation, whose regions ``regions.refer`` has written.

    A turn's targets are the tokens by which the conversation with the turn exceeds the
    one that stops where the assistant is about to answer, up to the first end token: a
    model that has said it is asked no more, though ChatML writes a line's end behind it.
    Where a template writes nothing behind an answer, as ``plain`` does, it gets an end
    token and ends a sample of its own: no later turn would be asked behind one.
    The assistant's turns that are ``unlearned``, counted from 0, are only read. Line breaks
    that an answer begins with are left out: a tokenizer would join them to the template's
    own, which are part of what a model is asked with. One sample
    holds all turns, unless the template writes them differently when later ones follow, as
    Qwen3's does, which leaves out what was thought: then each answer is learned behind the
    prompt that it would be asked with, and ends a sample of its own.

    Source: https://huggingface.co/Qwen/Qwen3-4B/blob/main/tokenizer_config.json, the chat
    template.

    Raises:
        PromptError: the template or tokenizer rewrites the prompt as its answer follows,
            or has none for an answer that is the first turn; or the tokenizer has no end
            token.
    """
    prompt = _prompt_of(config)
    turns = [_begun(turn) for turn in turns]
    whole = encode_turns(turns, prompt, tokenizer, answer=False)
    answers: dict[int, tuple[range, list[int]]] = {}
    for i, (role, _) in enumerate(turns):
        if role != "assistant" or i in unlearned:
            continue
        if i == 0:
            # transformers renders no empty conversation.
            raise PromptError(
                "the conversation begins with an answer, which the model's chat template "
                "has no prompt for; leave that turn out, or give it the weight 0"
            )
        before = encode_turns(turns[:i], prompt, tokenizer)
        after = encode_turns(turns[: i + 1], prompt, tokenizer, answer=False)
        if after[: len(before)] != before:
            raise PromptError(_why_rewritten(turns[:i], after, prompt, tokenizer))
        places = range(len(before), len(after))
        ends = (k + 1 for k in places if after[k] in tokenizer.hf.eos_token_ids)
        if (end := next(ends, None)) is None and _ends_bare(
            turns[: i + 1], prompt, tokenizer
        ):
            after = [*after, _end_token(prompt, tokenizer)]
        answers[i] = range(len(before), end or len(after)), after
    if all(whole[: len(after)] == after for _, after in answers.values()):
        learned = {k for answer, _ in answers.values() for k in answer}
        return [_sample(whole, learned, turns)]
    return [
        _sample(after, answer, turns[: i + 1]) for i, (answer, after) in answers.items()
    ]


def _why_rewritten(
    asked: Sequence[Turn],
    after: Sequence[int],
    prompt: PromptConfig,
    tokenizer: Tokenizer,
) -> str:
    """Why the tokens with an answer do not begin as what the answer was asked with."""
    earlier = encode_turns(asked, prompt, tokenizer, answer=False) if asked else []
    if list(after[: len(earlier)]) != earlier:
        return (
            f"turn {len(asked) + 1} cannot be told apart: the chat template or tokenizer "
            "writes earlier turns differently when it follows"
        )
    return (
        f"turn {len(asked) + 1} cannot be learned: the chat template or tokenizer does "
        "not write it behind the words that an answer is asked for with (some templates "
        "begin every answer with <think> and then leave that out); give the model's "
        "tokenizer a template that keeps them, or name a built-in one in config.json, "
        "prompt.template"
    )


def _ends_bare(
    turns: Sequence[Turn], prompt: PromptConfig, tokenizer: Tokenizer
) -> bool:
    """Whether the template writes nothing that could be seen behind the last turn."""
    (_, parts) = turns[-1]
    last = parts[-1] if parts else ""
    if not isinstance(last, str):
        return False
    written = render(turns, prompt, tokenizer, answer=False).rstrip()
    return written.endswith(tokenizer.shield(last).rstrip())


def _begun(turn: Turn) -> Turn:
    """The turn, an answer without line breaks before its first text."""
    role, parts = turn
    if role != "assistant" or not parts or not isinstance(parts[0], str):
        return turn
    return role, [parts[0].lstrip("\r\n"), *parts[1:]]


def _sample(
    tokens: Sequence[int], learned: Collection[int], turns: Sequence[Turn]
) -> Sample:
    taught = tuple(k in learned for k in range(len(tokens)))
    return Sample(tuple(tokens), taught, _regions_of(turns))


def _end_token(prompt: PromptConfig, tokenizer: Tokenizer) -> int:
    """What a text ends with.

    Raises:
        PromptError: the tokenizer has none.
    """
    end: int | None = tokenizer.hf.eos_token_id
    if end is not None:
        return end
    if not prompt.eos_token_ids:
        raise PromptError(
            "the tokenizer has no end token, so no text can end; name one in config.json, "
            "prompt.eos_token_ids"
        )
    return prompt.eos_token_ids[0]


def build_sample(
    turns: Sequence[Turn],
    config: MM1Config,
    tokenizer: Tokenizer,
    unlearned: Collection[int] = (),
) -> Sample:
    """The only sample of a conversation; arguments and errors as of ``build_samples``.

    Raises:
        PromptError: its answers need a sample each.
    """
    samples = build_samples(turns, config, tokenizer, unlearned)
    if len(samples) > 1:
        raise PromptError(
            f"the chat template writes the conversation's {len(samples)} answers "
            "differently when later turns follow, so they make no single sample"
        )
    return samples[0]


def build_document(
    parts: Sequence[Part], config: MM1Config, tokenizer: Tokenizer
) -> Sample:
    """The sample of text with pictures in it: every token of text behind the first.

    It is what a base model (template ``plain``) is shown, with an end token behind it.

    Raises:
        PromptError: the tokenizer has no end token.
    """
    prompt = _prompt_of(config)
    plain = replace(prompt, template="plain")
    tokens = encode_turns([("user", list(parts))], plain, tokenizer)
    end = _end_token(prompt, tokenizer)
    if not tokens or tokens[-1] != end:
        tokens.append(end)
    return Sample(
        tuple(tokens), (False, *[True] * (len(tokens) - 1)), _region_pictures(parts)
    )


def _prompt_of(config: MM1Config) -> PromptConfig:
    if config.prompt is None:
        raise ConfigError("the model has no prompt format, so it cannot be trained")
    return config.prompt


def _regions_of(turns: Sequence[Turn]) -> tuple[int, ...]:
    return _region_pictures(part for _, parts in turns for part in parts)


def _region_pictures(parts: Sequence[Part] | Iterator[Part]) -> tuple[int, ...]:
    held = list(parts)
    assert not any(isinstance(part, Region) for part in held), "refer to regions first"
    return tuple(part.picture for part in held if isinstance(part, RegionToken))


@dataclass(frozen=True)
class Row:
    """A sample with every picture in its place."""

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]
    # Of pictures and regions, which are numbered within the row.
    spans: tuple[Span, ...]

    def until(self, count: int) -> Row:
        """The first positions of the row.

        Raises:
            PromptError: a picture would be cut, or left out.
        """
        cut = next((span for span in self.spans if span.stop > count), None)
        if cut is not None:
            raise PromptError(
                f"picture {cut.picture + 1} stands at positions {cut.start}.."
                f"{cut.stop - 1}, of which {count} are kept; allow longer rows, or "
                "encode pictures in fewer tokens"
            )
        return Row(self.tokens[:count], self.learned[:count], self.spans)


def widen_sample(
    sample: Sample,
    pictures: Sequence[Picture],
    config: MM1Config,
    tokenizer: Tokenizer,
) -> Row:
    """The row of a sample; image tokens and the text between tiles are never learned.

    Raises:
        PromptError: a token has no embedding in the decoder, or places and pictures
            differ in number.
    """
    tokens: list[int] = []
    learned: list[bool] = []
    spans: list[Span] = []
    placed = lay_out(sample.tokens, pictures, config, tokenizer, sample.regions)
    for (stretch, held), target in zip(placed, sample.learned, strict=True):
        spans += [replace(span, start=len(tokens) + span.start) for span in held]
        tokens += stretch
        learned += [target and not held] * len(stretch)
    return Row(tuple(tokens), tuple(learned), tuple(spans))


@dataclass(frozen=True)
class Batch:
    """Rows of equal length, padded on the right, and the pictures they refer to."""

    tokens: NDArray[np.int32]  # [B, T]
    learned: NDArray[np.bool_]  # [B, T]
    # Positions count through the flattened [B * T]; several rows may share a picture.
    spans: tuple[Span, ...]
    pictures: tuple[Picture, ...]
    # Of every row, without its padding.
    lengths: tuple[int, ...]
    # Of the examples that stand behind one another in the only row; empty where every
    # row is one example.
    segments: tuple[int, ...] = ()

    @property
    def real(self) -> NDArray[np.bool_]:
        """Which tokens [B, T] are not padding."""
        return np.arange(self.tokens.shape[1]) < np.array(self.lengths)[:, None]


def collate(
    samples: Sequence[Sample],
    places: Sequence[Sequence[int]],
    pictures: Sequence[Picture],
    config: MM1Config,
    tokenizer: Tokenizer,
) -> Batch:
    """The batch of several samples.

    Args:
        samples: one per row.
        places: for every row, the indices of its pictures in ``pictures``.
        pictures: all pictures, each with regions in one row only; none where the caller
            encodes them, one tile each.
        config: the model's config.
        tokenizer: the one that made the samples.

    Raises:
        PromptError: a sample holds a token that the decoder has no embedding for, or
            another number of places than it has pictures or regions.
    """
    rows = []
    for sample, indices in zip(samples, places, strict=True):
        own = [pictures[i] if pictures else _UNSEEN for i in indices]
        rows.append(widen_sample(sample, own, config, tokenizer))
    return stack(rows, places, pictures)


def stack(
    rows: Sequence[Row], places: Sequence[Sequence[int]], pictures: Sequence[Picture]
) -> Batch:
    """The batch of rows one below the other; arguments as of ``collate``."""
    T = max(len(row.tokens) for row in rows)
    return Batch(
        tokens=_pad([row.tokens for row in rows], T, np.int32),
        learned=_pad([row.learned for row in rows], T, np.bool_),
        spans=_joined(rows, places, [b * T for b in range(len(rows))]),
        pictures=tuple(pictures),
        lengths=tuple(len(row.tokens) for row in rows),
    )


def pack(
    rows: Sequence[Row], places: Sequence[Sequence[int]], pictures: Sequence[Picture]
) -> Batch:
    """The batch of rows behind one another in one; arguments as of ``collate``.

    The first token of each is not learned: nothing of its own stands before it.
    """
    segments = tuple(len(row.tokens) for row in rows)
    starts = np.cumsum((0, *segments)).tolist()
    total = starts.pop()
    T = -(-total // PACKED_STEP) * PACKED_STEP
    learned = _pad([[x for row in rows for x in row.learned]], T, np.bool_)
    learned[0, starts] = False
    return Batch(
        tokens=_pad([[x for row in rows for x in row.tokens]], T, np.int32),
        learned=learned,
        spans=_joined(rows, places, starts),
        pictures=tuple(pictures),
        lengths=(total,),
        segments=segments,
    )


def _joined(
    rows: Sequence[Row], places: Sequence[Sequence[int]], starts: Sequence[int]
) -> tuple[Span, ...]:
    """The spans of rows that begin at ``starts``, pictures numbered for all of them."""
    return tuple(
        replace(span, start=start + span.start, picture=indices[span.picture])
        for row, indices, start in zip(rows, places, starts, strict=True)
        for span in row.spans
    )


def _pad(rows: Sequence[Sequence[Any]], length: int, dtype: Any) -> NDArray[Any]:
    padded = np.zeros((len(rows), length), dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
