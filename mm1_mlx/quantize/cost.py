"""What packing costs: how far the packed model's predictions are from the model's own.

The unpacked model answers held-out prompts; at every token of its answers both models say
what may come next, and the two distributions are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from mm1_mlx.errors import CheckpointError
from mm1_mlx.models import MM1
from mm1_mlx.prompt import Prompt
from mm1_mlx.tokenizer import Tokenizer

MAX_ANSWER = 16


@dataclass(frozen=True)
class Sample:
    """A prompt, and the answer that the unpacked model gives.

    Attributes:
        prompt: with its pictures.
        answer: tokens, the end's included.
    """

    prompt: Prompt
    answer: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """All but the answer's last, behind which nothing is compared."""
        return (*self.prompt.tokens, *self.answer[:-1])


@dataclass(frozen=True)
class Reference:
    """Samples, and what the unpacked model predicts at every token of their answers."""

    samples: tuple[Sample, ...]
    # Logits [A, V] in float32 of every sample.
    logits: tuple[mx.array, ...]


@dataclass(frozen=True)
class Cost:
    """How a packed model differs from the one it was made from.

    Attributes:
        kl_mean: Kullback-Leibler divergence of its predictions, nats, the mean.
        kl_p99: and what 99 of 100 positions stay below.
        top1: share of positions at which the likeliest token is the same.
        positions: how many there are.
    """

    kl_mean: float
    kl_p99: float
    top1: float
    positions: int

    def to_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


def ask(
    model: MM1,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    progress: Callable[[], None] = lambda: None,
) -> Reference:
    """What the unpacked model answers, greedily, and predicts on the way."""
    samples, logits = [], []
    for prompt in prompts:
        embeddings = _embed(model, prompt.tokens, prompt, image_tokens(model, prompt))
        answer = []
        steps = generate_step(
            mx.array(prompt.tokens),
            model,
            max_tokens=MAX_ANSWER,
            input_embeddings=embeddings,
        )
        for token, _ in steps:
            answer.append(int(token))
            if answer[-1] in tokenizer.hf.eos_token_ids:
                break
        samples.append(Sample(prompt, tuple(answer)))
        logits.append(predict(model, samples[-1]))
        mx.eval(logits[-1])
        progress()
    return Reference(tuple(samples), tuple(logits))


def image_tokens(model: MM1, prompt: Prompt) -> list[mx.array]:
    """Those of the prompt's pictures."""
    tokens = model.encode(prompt.pictures)
    mx.eval(tokens)
    return tokens


def predict(
    model: MM1, sample: Sample, pictures: Sequence[mx.array] | None = None
) -> mx.array:
    """Logits [A, V] in float32 at every token of the answer.

    ``pictures`` are the prompt's image tokens where they are at hand.
    """
    if pictures is None:
        pictures = image_tokens(model, sample.prompt)
    x = _embed(model, sample.tokens, sample.prompt, pictures)[None]
    states = model.decoder.hidden(mx.array([sample.tokens]), input_embeddings=x)
    first = len(sample.prompt.tokens) - 1
    return model.decoder.logits(states[0, first:]).astype(mx.float32)


def _embed(
    model: MM1,
    tokens: tuple[int, ...],
    prompt: Prompt,
    pictures: Sequence[mx.array],
) -> mx.array:
    return model.embed(mx.array(tokens), pictures, prompt.spans)


def measure(
    model: MM1, reference: Reference, progress: Callable[[], None] = lambda: None
) -> Cost:
    """What it costs to have this model in place of the reference's.

    Raises:
        CheckpointError: one of the two predicts no numbers.
    """
    divergences, agreements = [], []
    for sample, expected in zip(reference.samples, reference.logits, strict=True):
        logits = predict(model, sample)
        divergences.append(np.array(divergence(logits, expected)))
        same = mx.argmax(logits, axis=-1) == mx.argmax(expected, axis=-1)
        agreements.append(np.array(same))
        progress()
    kl = np.concatenate(divergences).astype(np.float64)
    if wrong := int((~np.isfinite(kl)).sum()):
        raise CheckpointError(
            f"at {wrong:,} of {kl.size:,} positions the predictions are no numbers (NaN): "
            "weights hold some, or overflow in the type that this machine computes in; "
            "convert the model with --dtype float32"
        )
    return Cost(
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(np.concatenate(agreements).mean()),
        positions=kl.size,
    )


def divergence(logits: mx.array, expected: mx.array) -> mx.array:
    """Kullback-Leibler divergence [...] of predictions from the expected, in nats."""
    q = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    p = expected - mx.logsumexp(expected, axis=-1, keepdims=True)
    return (mx.exp(p) * (p - q)).sum(axis=-1)
