"""The language model: tokens [B, T] or embeddings [B, T, D] to logits [B, T, V].

One class by config: Llama, Vicuna, Mistral, Mixtral, Qwen2, Qwen3, OLMoE, OpenELM, Gemma,
Phi-3, StableLM, AFM, and MM1's own decoders, whose layer sizes are not published.
"""

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.rope_utils import initialize_rope
from numpy.typing import NDArray

from mm1_mlx.config import DecoderConfig
from mm1_mlx.kernels import attend
from mm1_mlx.models.activation import ACTIVATIONS
from mm1_mlx.models.moe import SparseMLP
from mm1_mlx.models.recompute import recomputed
from mm1_mlx.models.segments import Segments, segmented


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        D, head_dim = config.hidden_size, config.head_dim
        sizes = config.sizes(layer)
        self.num_heads = sizes.num_attention_heads
        self.num_kv_heads = sizes.num_key_value_heads
        self.scale = head_dim**-0.5
        queries, keys = self.num_heads * head_dim, self.num_kv_heads * head_dim
        self.q_proj = nn.Linear(D, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, D, bias=config.o_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            if config.qk_norm != "full":
                queries = keys = head_dim
            self.q_norm = nn.RMSNorm(queries, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(keys, eps=config.rms_norm_eps)
        self.rope = initialize_rope(
            config.rotary_dim or head_dim,
            config.rope_theta,
            config.rope_interleaved,
            config.rope_scaling.to_dict() if config.rope_scaling else None,
            config.max_position_embeddings,
        )

    def __call__(
        self, x: mx.array, mask: Any, cache: Any, rows: int | None = None
    ) -> mx.array:
        """Attention [B, T, D] of x over the cache and itself, or of its last rows."""
        T = x.shape[1]
        rows = rows or T
        q, k, v = self.q_proj(x[:, T - rows :]), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if isinstance(mask, Segments):
            return self.o_proj(mask.apart(self._attend, q, k, v))
        return self.o_proj(self._attend(q, k, v, mask, cache))

    def _attend(
        self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any = None
    ) -> mx.array:
        """Attention [B, rows, D] of the last projected queries over all keys [B, T, D]."""
        (B, rows, _), T = q.shape, k.shape[1]
        q = q.reshape(B, rows, self.num_heads, -1)
        k = k.reshape(B, T, self.num_kv_heads, -1)
        v = v.reshape(B, T, self.num_kv_heads, -1).transpose(0, 2, 1, 3)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3)
        offset = cache.offset if cache is not None else 0
        q = self.rope(q, offset=offset + T - rows)
        k = self.rope(k, offset=offset)
        if self.qk_norm == "rotated":
            q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        if rows < T:
            mask = _last_rows(mask, rows)
        x = attend(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return x.transpose(0, 2, 1, 3).reshape(B, rows, -1)


def _last_rows(mask: Any, rows: int) -> Any:
    """A mask for the last queries alone; nothing is hidden from the last one of all."""
    if isinstance(mask, mx.array):
        return mask[..., -rows:, :]
    return None if rows == 1 else mask


class MLP(nn.Module):
    """SwiGLU: down(activation(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        D, bias = config.hidden_size, config.mlp_bias
        H = config.sizes(layer).intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(D, H, bias=bias)
        self.up_proj = nn.Linear(D, H, bias=bias)
        self.down_proj = nn.Linear(H, D, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))

    def routed(
        self,
        x: mx.array,
        real: NDArray[np.bool_] | None = None,  # noqa: ARG002
    ) -> tuple[mx.array, None]:
        """The layer's output [B, T, D]: there is no gate whose logits to return."""
        return self(x), None


def norm(config: DecoderConfig) -> nn.Module:
    """A norm over the decoder's width, of the config's kind."""
    kind = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[config.norm]
    return kind(config.hidden_size, config.rms_norm_eps)


FEEDFORWARDS = {"dense": MLP, "sparse": SparseMLP}


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm(config)
        feedforward = "sparse" if config.is_sparse(layer) else "dense"
        self.mlp = FEEDFORWARDS[feedforward](config, layer)

    def __call__(
        self,
        x: mx.array,
        mask: Any,
        cache: Any,
        real: NDArray[np.bool_] | None = None,
        rows: int | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """States [B, T, D], and the gate's logits [B, T, E] where there are experts.

        With ``rows`` the last states alone: the others are only keys and values.
        """
        attention = self.self_attn(self.input_layernorm(x), mask, cache, rows)
        x = x[:, -attention.shape[1] :] + attention
        y, logits = self.mlp.routed(self.post_attention_layernorm(x), real)
        return x + y, logits


class Decoder(nn.Module):
    """Logits [B, T, V] for tokens [B, T], or for embeddings [B, T, D] in their place.

    ``cache`` holds one of mlx-lm's caches per layer and is updated in place.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.sliding_window = config.sliding_window
        self.has_capacity = bool(config.moe and config.moe.capacity_factor)
        # Whether blocks are computed again for their gradients.
        self.recompute = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config, i) for i in range(config.num_hidden_layers)]
        self.embedding_scale = config.embedding_scale
        self.norm = norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(
                config.hidden_size, config.vocab_size, bias=config.head_bias
            )

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        return self.logits(self.hidden(tokens, cache, input_embeddings))

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings [..., D] of tokens, in the precision of the norms.

        Some packed tables give bfloat16 whatever the other weights are.
        """
        return self.embed_tokens(tokens).astype(self.norm.weight.dtype)

    def hidden(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """The normed states [B, T, D] that ``logits`` reads."""
        return self.routed(tokens, cache, input_embeddings)[0]

    def last(
        self,
        tokens: mx.array,
        cache: list[Any],
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """The last of the normed states alone, [B, 1, D].

        The last layer then computes for the other positions what the cache keeps, and
        nothing else.
        """
        # For the places of experts that have so many, all tokens compete.
        rows = None if self.has_capacity else 1
        return self.routed(tokens, cache, input_embeddings, rows=rows)[0][:, -1:]

    def routed(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        real: NDArray[np.bool_] | None = None,
        rows: int | None = None,
        segments: Sequence[int] = (),
    ) -> tuple[mx.array, list[mx.array]]:
        """The normed states, and the gate's logits [B, T, E] of every sparse layer.

        Args:
            tokens: [B, T].
            cache: one per layer.
            input_embeddings: [B, T, D] in the tokens' place.
            real: which tokens [B, T] are no padding, None that all are.
            rows: of the last layer's states, how many are wanted, the last ones.
            segments: lengths of what stands in the only row without seeing each other;
                none where it is one.
        """
        x = self.embed(tokens) if input_embeddings is None else input_embeddings
        if self.embedding_scale != 1:
            # Rounded as transformers rounds it, in the weights' precision.
            x = x * mx.array(self.embedding_scale, x.dtype)
        caches = cache or [None] * len(self.layers)
        mask: Any = (
            segmented(segments, x, self.sliding_window)
            if segments
            else create_attention_mask(x, caches[0], window_size=self.sliding_window)
        )
        gates = []
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            asked = rows if layer is self.layers[-1] else None
            call = recomputed(layer) if self.recompute else layer
            x, logits = call(x, mask, layer_cache, real, asked)
            if logits is not None:
                gates.append(logits)
        return self.norm(x), gates

    @property
    def head(self) -> nn.Module:
        """The module whose weights score the vocabulary."""
        return cast(nn.Module, self["lm_head" if "lm_head" in self else "embed_tokens"])

    def logits(self, x: mx.array) -> mx.array:
        """Logits [..., V] of states [..., D]."""
        if "lm_head" in self:
            return self.lm_head(x)
        return self.embed_tokens.as_linear(x)
