"""Texts that may stand behind a prompt -> how likely the model finds each of them.

The prompt is read once, with its pictures; the texts are run behind it together, as rows
that share its cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mm1_mlx.batch import SIZE, Ask
from mm1_mlx.caches.shared import Prefix, SharedPrefixKVCache
from mm1_mlx.engine import Engine
from mm1_mlx.errors import CheckpointError, MM1Error, PromptError
from mm1_mlx.models import MM1
from mm1_mlx.prefill import prefill
from mm1_mlx.runtime import Runtime, wired


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of a text behind a prompt.

    Attributes:
        logprob: the sum of its tokens' log-probabilities, natural.
        num_tokens: how many they are.
        greedy: whether each is the likeliest where it stands: a greedy answer begins so.
    """

    logprob: float
    num_tokens: int
    greedy: bool


@dataclass(frozen=True)
class Candidates:
    """A question, and texts of which each may be its answer.

    A text stands right behind the prompt as the model's template ends it: where a word
    begins, it begins with a space, which is left out if the template ends with one.
    """

    ask: Ask
    texts: tuple[str, ...]


def loglikelihoods(
    runtime: Runtime, questions: Iterable[Candidates]
) -> Iterator[tuple[int, tuple[Likelihood, ...] | MM1Error]]:
    """How likely each question's texts are, with the question's number.

    A question that cannot be asked gives an error, and the others go on.

    Args:
        runtime: from ``load``.
        questions: read one by one on the model's thread.
    """
    return runtime.run(lambda gone: _score_all(runtime.engine, questions, gone))


def _score_all(
    engine: Engine, questions: Iterable[Candidates], gone: threading.Event
) -> Iterator[tuple[int, tuple[Likelihood, ...] | MM1Error]]:
    with engine.lock, wired():
        for number, question in enumerate(questions):
            if gone.is_set():
                return
            try:
                yield number, score(engine, question)
            except MM1Error as error:
                yield number, error


def score(engine: Engine, question: Candidates) -> tuple[Likelihood, ...]:
    """How likely a question's texts are; on the thread that owns the model.

    Raises:
        PromptError: prompt, pictures, texts and model do not fit together.
        CheckpointError: what the model predicts are no numbers.
    """
    if not question.texts:
        raise PromptError("there are no texts to score behind the prompt")
    ask, model = question.ask, engine.model
    # Experts that share out their places would share them with another row's padding.
    rows = 1 if model.decoder.has_capacity else SIZE
    context, texts = engine.continued(
        ask.prompt, ask.images, ask.settings, question.texts, rows
    )
    first = _logprobs(prefill(model, context))  # [1, V]
    layers = [Prefix(layer) for layer in context.cache]
    found = []
    for start in range(0, len(texts), rows):
        found += _score_rows(model, layers, first, texts[start : start + rows])
    if any(math.isnan(text.logprob) for text in found):
        raise CheckpointError(
            "what the model predicts are no numbers (NaN): its weights hold some, or "
            "overflow in the type that this machine computes in; convert it with --dtype "
            "float32"
        )
    engine.prefixes.keep(context.prompt.positions, context.cache, context.precision)
    return tuple(found)


def _score_rows(
    model: MM1, layers: Sequence[Prefix], first: mx.array, texts: list[tuple[int, ...]]
) -> list[Likelihood]:
    """How likely texts are behind a prompt.

    Args:
        model: reads them.
        layers: the prompt's cache.
        first: log-probabilities [1, V] of what follows the prompt.
        texts: their tokens.
    """
    B, longest = len(texts), max(map(len, texts))
    # A row's last token is only predicted. Padding behind a row is seen by none of it.
    padded = mx.array([[*text, *[0] * (longest - len(text))] for text in texts])
    logprobs = mx.broadcast_to(first[:, None], (B, 1, first.shape[-1]))
    if longest > 1:
        cache = [
            SharedPrefixKVCache.merge([SharedPrefixKVCache(layer)] * B)
            for layer in layers
        ]
        behind = _logprobs(model(padded[:, :-1], cache=cache))
        logprobs = mx.concatenate([logprobs, behind], axis=1)
    said = mx.take_along_axis(logprobs, padded[..., None], axis=-1)[..., 0]
    likeliest = logprobs.argmax(axis=-1) == padded
    real = mx.arange(longest) < mx.array([len(text) for text in texts])[:, None]
    sums = mx.where(real, said, 0).sum(axis=1)
    greedy = (likeliest | ~real).all(axis=1)
    mx.eval(sums, greedy)
    return [
        Likelihood(float(sums[i]), len(text), bool(greedy[i]))
        for i, text in enumerate(texts)
    ]


def _logprobs(logits: mx.array) -> mx.array:
    """Log-probabilities in float32, whatever the logits are in."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
