"""CLIP's text tower: tokens [B, T] to embeddings [B, P], in the space of pictures."""

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import TextConfig
from mm1_mlx.models.block import Block, norm


class TextEncoder(nn.Module):
    """Embeddings [B, P] of texts, tokens [B, T], not normalised.

    A causal transformer, read at one place of each text: where the end token stands
    first, or the highest token where the config names none.

    Attributes:
        logit_scale: the logarithm of what cosines are multiplied by.

    Source: OpenAI CLIP's ``encode_text``; names as in Hugging Face's CLIPTextModel.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, D)
        self.position_embedding = mx.random.normal(
            (config.max_position_embeddings, D), scale=0.01
        )
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.final_layer_norm = norm(config)
        self.projection = nn.Linear(D, config.projection_size, bias=False)
        # CLIP's at its start: cosines over a temperature of 0.07.
        self.logit_scale = mx.log(mx.array(1 / 0.07))

    def __call__(self, tokens: mx.array) -> mx.array:
        B, T = tokens.shape
        if self.config.max_position_embeddings < T:
            raise ValueError(
                f"texts have {T} tokens, expected at most "
                f"{self.config.max_position_embeddings}"
            )
        x = self.token_embedding(tokens) + self.position_embedding[:T]
        for layer in self.layers:
            x = layer(x, "causal")
        # Norms see one place at a time, so only the one that is read is normed.
        return self.projection(
            self.final_layer_norm(x[mx.arange(B), self._ends(tokens)])
        )

    def _ends(self, tokens: mx.array) -> mx.array:
        """The place [B] at which each text is read; 0 where it has no end token."""
        end = self.config.eos_token_id
        return mx.argmax(tokens if end is None else tokens == end, axis=-1)
