"""CLIP, a projector and a decoder of transformers put together in plain PyTorch.

What LLaVA's own code and xtuner's do around models of transformers': the encoder's chosen
hidden states without the class token, two linear layers with a GELU, and the results in
the place of a picture's tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from parity import (
    Prompt,
    State,
    check_parity,
    our_logits,
    pictures,
    reinitialise,
    undetected_swaps,
)
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mm1_mlx.convert import convert

# Of the tiny models: as many tokens, one of them a picture's; pixels; width everywhere.
VOCABULARY, IMAGE_ID, SIDE, WIDTH = 97, 96, 28, 32
PATCHES = 16
PROMPT = Prompt.make(VOCABULARY, PATCHES, IMAGE_ID)


def clip(values: Mapping[str, Any]) -> Any:
    """An encoder of these fields."""
    return CLIPVisionModel(CLIPVisionConfig(**values)).eval()


def llama(values: Mapping[str, Any]) -> Any:
    """A decoder of these fields."""
    return LlamaForCausalLM(LlamaConfig(**values)).eval()


def renew(modules: Sequence[torch.nn.Module], seed: int) -> None:
    """Give every parameter of the parts a new value, each part's from its own seed."""
    for i, module in enumerate(modules):
        reinitialise(module, seed + i)


def tower(encoder: Any, prefix: str) -> State:
    """The encoder's tensors, their names after the prefix as CLIP's own are."""
    return {
        f"{prefix}vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in encoder.state_dict().items()
    }


def check(
    folder: Path, forward: Any, prompt: Prompt = PROMPT, side: int = SIDE
) -> float:
    """Assert that the folder, converted, computes the same of two pictures."""
    out = folder.with_name("out")
    convert(str(folder), out)
    return check_parity(out, forward, prompt, pictures(side))


def check_swaps(folder: Path, prompt: Prompt = PROMPT, side: int = SIDE) -> int:
    """Assert that every swap of two rules is noticed; their number."""
    out = folder.with_name("out")
    convert(str(folder), out)
    pixels = pictures(side)[0]
    count, unnoticed = undetected_swaps(
        folder, out, lambda model: our_logits(model, prompt, pixels)
    )
    assert unnoticed == []
    return count


def project(clip: Any, projector: Any, pixels: torch.Tensor, layer: int) -> Any:
    """Image tokens [N, L, D] of pixels [N, 3, H, W]."""
    states = clip(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
    return projector(states[:, 1:])


def mlp(inputs: int, outputs: int) -> torch.nn.Sequential:
    """Two linear layers with a GELU between them."""
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, outputs),
        torch.nn.GELU(),
        torch.nn.Linear(outputs, outputs),
    )


def forward_of(
    encode: Callable[[torch.Tensor], torch.Tensor], decoder: Any, image_id: int
) -> Callable[..., Any]:
    """Logits [T, V] of tokens with a picture in their midst.

    Args:
        encode: image tokens [N, K, D] of pixels [N, 3, H, W].
        decoder: a causal language model of transformers'.
        image_id: the token that stands where the picture goes.
    """

    def forward(tokens: list[int], pixels: torch.Tensor | None) -> Any:
        with torch.no_grad():
            ids = torch.tensor([tokens])
            embeddings = decoder.get_input_embeddings()(ids).clone()
            if pixels is not None:
                image = encode(pixels).flatten(0, 1)
                # A model may write the token itself, behind the picture.
                places = (ids[0] == image_id).nonzero()[: len(image), 0]
                embeddings[0, places] = image
            return decoder(inputs_embeds=embeddings).logits[0]

    return forward
