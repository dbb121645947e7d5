"""What the parity tests of decoders of transformers' have in common."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sources
import torch
from parity import (
    Prompt,
    State,
    check_parity,
    our_logits,
    reinitialise,
    save,
    undetected_swaps,
)

from mm1_mlx.checkpoint import load_config, model_shapes
from mm1_mlx.config import DecoderConfig
from mm1_mlx.convert import Source, convert, detect_format
from mm1_mlx.convert.expected import possible_shapes
from mm1_mlx.convert.plan import plan

VOCABULARY = 101


def sizes(kind: str, **fields: Any) -> dict[str, Any]:
    """A config.json of a tiny decoder."""
    return {
        "model_type": kind,
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        **fields,
    }


# What a config's test says to see that it is read, and ``expected`` expects.
MARKED = {"rms_norm_eps": 3e-6, "rope_theta": 12345.0}


def expected(**changes: Any) -> DecoderConfig:
    """Our config of a decoder of ``sizes``, ``MARKED``, with these changes."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **MARKED,
        **changes,
    }
    return DecoderConfig(**values)


def reference(classes: tuple[Any, Any], values: Mapping[str, Any], seed: int) -> Any:
    """The model, every parameter new, ready to compute."""
    config_class, model_class = classes
    model = model_class(config_class(**copy.deepcopy(dict(values)))).eval()
    tied = model.config.tie_word_embeddings
    # A tied head repeats its last token for ever where embeddings dominate.
    reinitialise(model, seed, embedding=0.03 if tied else 1.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:  # experts, of which a token meets one at a time
                fan_in = parameter.shape[-1]
                parameter.normal_(std=fan_in**-0.5, generator=generator)
    model.tie_weights()
    return model


def forward_of(model: Any) -> Callable[..., Any]:
    """Its logits [T, V] of token ids."""

    def forward(tokens: list[int], _: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=torch.tensor([tokens])).logits[0]

    return forward


def state_of(model: Any) -> State:
    """Its tensors by the names they have in memory, a tied head left out."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def check(
    tmp_path: Path, forward: Any, state: State, values: Mapping[str, Any]
) -> float:
    """Assert parity of the converted state; the largest relative difference."""
    save(tmp_path / "in", state, values)
    convert(str(tmp_path / "in"), tmp_path / "out")
    return check_parity(tmp_path / "out", forward, Prompt.make(VOCABULARY), [None])


def check_swaps(tmp_path: Path, state: State, values: Mapping[str, Any]) -> int:
    """Assert that every swap of two rules is noticed; their number."""
    folder = save(tmp_path / "in", state, values)
    convert(str(folder), tmp_path / "out")
    prompt = Prompt.make(VOCABULARY)
    count, unnoticed = undetected_swaps(
        folder, tmp_path / "out", lambda m: our_logits(m, prompt, None)
    )
    assert unnoticed == []
    return count


def converted_config(
    tmp_path: Path, state: State, values: Mapping[str, Any]
) -> DecoderConfig:
    """The decoder's config that the converted model has."""
    save(tmp_path / "in", state, values)
    convert(str(tmp_path / "in"), tmp_path / "out")
    decoder = load_config(tmp_path / "out").decoder
    assert decoder is not None
    return decoder


def config_of(tmp_path: Path, values: Mapping[str, Any]) -> DecoderConfig:
    """The decoder's config that the format reads from a config.json, without weights."""
    with Source(str(sources.write(tmp_path / "in", values, {}))) as source:
        decoder = detect_format(source).config(source).decoder
    assert decoder is not None
    return decoder


def count_parameters(
    tmp_path: Path, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """Parameters of the model that a source of these shapes fills, to the last one."""
    with Source(str(sources.write(tmp_path / "in", values, {}))) as source:
        format = detect_format(source)
        config = format.config(source)
        wanted = model_shapes(config)
        result = plan(format.rules(source), shapes, wanted, possible_shapes(config))
    assert result.dropped == ()
    return sum(int(np.prod(shape)) for shape in wanted.values())


def shapes_of(
    classes: tuple[Any, Any],
    values: Mapping[str, Any],
    layout: Callable[[State], State] = dict,
) -> dict[str, Any]:
    """The shapes of a model of full size, which is never allocated."""
    config_class, model_class = classes
    with torch.device("meta"):
        model = model_class(config_class(**copy.deepcopy(dict(values))))
    return {name: tuple(x.shape) for name, x in layout(state_of(model)).items()}
