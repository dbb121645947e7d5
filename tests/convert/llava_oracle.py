"""CLIP, a projector and a decoder of transformers put together in plain PyTorch.

What LLaVA's own code and xtuner's do around models of transformers': the encoder's chosen
hidden states without the class token, two linear layers with a GELU, and the results in
the place of a picture's tokens.
"""

from collections.abc import Callable
from typing import Any

import torch


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
