"""Both sides of a parity test: a re-initialised PyTorch model, and ours converted."""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.generate import generate_step
from numpy.typing import NDArray
from safetensors.torch import save_file
from sources import Held, whole

from mm1_mlx.checkpoint import load_model, model_shapes
from mm1_mlx.convert import Source, detect_format
from mm1_mlx.convert.expected import possible_shapes
from mm1_mlx.convert.packed import Packed
from mm1_mlx.convert.plan import Shapes, plan
from mm1_mlx.convert.rules import Op, Rules
from mm1_mlx.layout import Picture, Span
from mm1_mlx.models import MM1

TOLERANCE = 1e-4
NUM_TOKENS = 32
MIN_DISTINCT = 8

torch.set_num_threads(1)
State = dict[str, torch.Tensor]
# A picture of one tile as its pixels [1, H, W, 3], or one of several.
Input = NDArray[np.float32] | Picture
# Logits [T, V] of token ids, and of one picture in their midst: [1, 3, H, W], or a Picture
# as it was given.
Forward = Callable[[list[int], Any], torch.Tensor]


def reinitialise(module: torch.nn.Module, seed: int, embedding: float = 1.0) -> None:
    """Give every parameter a value that shows when it lands in the wrong place."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {
        f"{name}.weight"
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.Embedding)
    }
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            leaf = name.rpartition(".")[2]
            if name in embeddings or leaf in ("class_embedding", "pos_emb"):
                parameter.normal_(generator=generator).mul_(embedding)
            elif parameter.dim() > 1:
                fan_in = math.prod(parameter.shape[1:])
                parameter.normal_(std=fan_in**-0.5, generator=generator)
            else:
                center = 1.0 if leaf == "weight" else 0.0
                parameter.uniform_(center - 0.2, center + 0.2, generator=generator)


def save(
    folder: Path, state: State, config: Mapping[str, Any], shards: int = 1
) -> Path:
    """A checkpoint as a hub repository holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        file = file if shards > 1 else "model.safetensors"
        # clone: tied tensors share memory, which safetensors refuses.
        part = {n: state[n].detach().clone().contiguous() for n in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def state_of(model: torch.nn.Module, config: Mapping[str, Any]) -> State:
    """The model's tensors, the tied head left out as transformers leaves it."""
    state = dict(model.state_dict())
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    return state


def pictures(size: int, seed: int = 0) -> list[NDArray[np.float32]]:
    """Two pictures' pixels, [1, H, W, 3]."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, size, size, 3)).astype(np.float32) for _ in "ab"]


def to_torch(pixels: NDArray[np.float32]) -> torch.Tensor:
    """[N, H, W, 3] to PyTorch's [N, 3, H, W]."""
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


@dataclass(frozen=True)
class Prompt:
    """Token ids, with a run of image placeholders where a picture stands."""

    tokens: list[int]
    span: Span | None
    # Where tokens of the picture's regions stand, one span each.
    regions: tuple[Span, ...] = ()

    @classmethod
    def make(
        cls, vocabulary: int, image_tokens: int = 0, image_id: int = 0
    ) -> "Prompt":
        rng = np.random.default_rng(1)
        before, after = (rng.integers(3, vocabulary - 3, n).tolist() for n in (3, 4))
        before = [t for t in before if t != image_id]
        span = (
            Span(len(before), image_tokens, "picture", 0, "") if image_tokens else None
        )
        return cls(before + [image_id] * image_tokens + after, span)


def embed(model: MM1, prompt: Prompt, pixels: Input | None) -> mx.array:
    """Our embeddings [T, D] of the prompt."""
    tokens = mx.array(prompt.tokens)
    if pixels is None:
        return model.embed(tokens, [], [])
    assert prompt.span is not None
    whole = isinstance(pixels, Picture)
    picture = pixels if whole else Picture(tuple(pixels), (1, 1), "")
    return model.embed(tokens, model.encode([picture]), [prompt.span, *prompt.regions])


def our_logits(model: MM1, prompt: Prompt, pixels: Input | None) -> NDArray[np.float32]:
    """Our logits [T, V] of the prompt."""
    embeddings = embed(model, prompt, pixels)
    return np.array(model(mx.array(prompt.tokens)[None], None, embeddings[None])[0])


def our_greedy(model: MM1, prompt: Prompt, pixels: Input | None) -> list[int]:
    """Our greedy continuation, by mlx-lm's loop."""
    steps = generate_step(
        mx.array(prompt.tokens),
        model,
        max_tokens=NUM_TOKENS,
        input_embeddings=embed(model, prompt, pixels),
    )
    return [int(token) for token, _ in steps]


def reference_greedy(forward: Forward, prompt: Prompt, pixels: Any) -> list[int]:
    """The reference's greedy continuation, the whole prompt again for every token."""
    tokens = list(prompt.tokens)
    for _ in range(NUM_TOKENS):
        tokens.append(int(forward(tokens, pixels)[-1].argmax()))
    return tokens[len(prompt.tokens) :]


def difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Largest difference over the largest value of the reference."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check_parity(
    out: Path,
    forward: Forward,
    prompt: Prompt,
    inputs: Sequence[Input | None],
) -> float:
    """Assert equal logits and greedy tokens; the largest relative difference.

    With several inputs, which must be pictures, their tokens must differ.
    """
    model = load_model(out)
    worst, continuations = 0.0, []
    for pixels in inputs:
        given = to_torch(pixels) if isinstance(pixels, np.ndarray) else pixels
        expected = forward(prompt.tokens, given).numpy()
        worst = max(worst, difference(our_logits(model, prompt, pixels), expected))
        tokens = reference_greedy(forward, prompt, given)
        assert our_greedy(model, prompt, pixels) == tokens
        assert len(tokens) == NUM_TOKENS
        assert len(set(tokens)) >= MIN_DISTINCT
        continuations.append(tuple(tokens))
    assert worst <= TOLERANCE
    assert len(set(continuations)) == len(inputs)
    return worst


def swapped_rules(rules: Rules, known: Shapes, wanted: Shapes) -> list[Rules]:
    """The table with every two targets of one shape exchanged, one pair at a time.

    Each target of an op with several counts by itself. A pair of targets that the model
    does not have, such as the final norm's, is left out.
    """
    by_shape: dict[tuple[Any, ...], list[tuple[str, int, bool]]] = {}
    for pattern, rule in rules.items():
        for place, target in enumerate(_as_op(rule).targets if rule else ()):
            first = re.sub(r"\{(-1)?\}", "0", target)
            if first in known:
                # Targets with and without a layer number cannot change places.
                key = (known[first], target.count("{"))
                by_shape.setdefault(key, []).append((pattern, place, first in wanted))
    return [
        _swap(rules, (a, i), (b, j))
        for group in by_shape.values()
        for (a, i, built), (b, j, also_built) in itertools.combinations(group, 2)
        if built or also_built
    ]


def _swap(rules: Rules, one: tuple[str, int], other: tuple[str, int]) -> Rules:
    """The table with two targets, each named by its row and place, exchanged."""
    swapped = dict(rules)
    names = [_as_op(rules[pattern]).targets[place] for pattern, place in (one, other)]
    for (pattern, place), target in zip((one, other), reversed(names), strict=True):
        op = _as_op(swapped[pattern])
        # Sources that count from 1 go on doing so.
        number = "{-1}" if "{-1}" in op.targets[place] else "{}"
        targets = list(op.targets)
        targets[place] = re.sub(r"\{(-1)?\}", number, target)
        # Packed weights are moved by names alone, no op can be for them.
        plain = isinstance(swapped[pattern], str)
        swapped[pattern] = targets[0] if plain else replace(op, targets=tuple(targets))
    return swapped


def _as_op(rule: str | Op | None) -> Op:
    return rule if isinstance(rule, Op) else Op((str(rule),), lambda x: (x,))


def undetected_swaps(
    folder: Path, out: Path, logits: Callable[[MM1], NDArray[np.float32]]
) -> tuple[int, list[set[str]]]:
    """Number of swapped tables, and the pairs of sources whose swap goes unnoticed.

    Packed weights change places together with their scales and biases.
    """
    model = load_model(out)
    expected = logits(model)
    with Source(str(folder)) as source:
        tensors = {name: Held(source.read(name)) for name in source.tensors}
        rules = detect_format(source).rules(source)
        packed = Packed.of(source)
        found = packed.shapes(source.tensors)
    find = packed.unpacking(tensors.__getitem__)
    wanted, known = model_shapes(model.config), possible_shapes(model.config)
    # Only the rows that this layout uses, so that the many plans are quick.
    names = [re.sub(r"\d+", "{}", name) for name in found]
    used = {p: r for p, r in rules.items() if re.sub(r"\d+", "{}", p) in names}
    tables = swapped_rules(used, known, wanted)
    unnoticed = []
    for table in tables:
        steps = packed.plan(plan(table, found, wanted, known)).steps
        pairs = [(k, whole(x)) for step in steps for k, x in step.tensors(find)]
        model.load_weights(pairs)
        if difference(logits(model), expected) <= TOLERANCE:
            unnoticed.append({str(table[p]) for p in used if table[p] != used[p]})
    return len(tables), unnoticed
