"""Small foreign checkpoints on disk, without torch."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.pieces import ALL
from mm1_mlx.shard import Deferred

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": 2,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
LLAVA = {
    "model_type": "llava",
    "image_token_index": 63,
    "text_config": LLAMA,
    "vision_config": CLIP,
}

Tensors = dict[str, mx.array]


class Held:
    """A source tensor that is in memory."""

    def __init__(self, array: mx.array) -> None:
        self.array = array
        self.shape = tuple(array.shape)
        self.dtype = array.dtype

    def read(self, rows: slice = ALL) -> mx.array:
        """Its values, or some rows'."""
        return self.array if rows == ALL else self.array[rows]


def whole(tensor: Deferred) -> mx.array:
    """A tensor put together from its pieces."""
    pieces = [x.reshape(-1) for x in tensor.pieces()]
    return mx.concatenate(pieces).reshape(tensor.shape)


def _random(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    keys = mx.random.split(mx.random.key(0), len(shapes))
    return {
        name: mx.random.normal(shape, key=key)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def llama_tensors(model: str = "model.", head: str = "") -> Tensors:
    """The tensors of ``LLAMA``."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{model}embed_tokens.weight": (64, 16),
        f"{model}norm.weight": (16,),
        f"{head}lm_head.weight": (64, 16),
    }
    for i in range(2):
        block = f"{model}layers.{i}."
        shapes |= {
            f"{block}self_attn.q_proj.weight": (16, 16),
            f"{block}self_attn.k_proj.weight": (8, 16),
            f"{block}self_attn.v_proj.weight": (8, 16),
            f"{block}self_attn.o_proj.weight": (16, 16),
            f"{block}mlp.gate_proj.weight": (24, 16),
            f"{block}mlp.up_proj.weight": (24, 16),
            f"{block}mlp.down_proj.weight": (16, 24),
            f"{block}input_layernorm.weight": (16,),
            f"{block}post_attention_layernorm.weight": (16,),
        }
    return _random(shapes)


def clip_tensors(prefix: str = "vision_model.") -> Tensors:
    """The tensors of ``CLIP``."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.class_embedding": (8,),
        f"{prefix}embeddings.patch_embedding.weight": (8, 3, 8, 8),
        f"{prefix}embeddings.position_embedding.weight": (17, 8),
    }
    norms = [f"{prefix}pre_layrnorm", f"{prefix}post_layernorm"]
    linears: dict[str, tuple[int, int]] = {}
    for i in range(2):
        block = f"{prefix}encoder.layers.{i}."
        norms += [f"{block}layer_norm1", f"{block}layer_norm2"]
        linears |= dict.fromkeys(
            [f"{block}self_attn.{x}_proj" for x in ("q", "k", "v", "out")], (8, 8)
        )
        linears |= {f"{block}mlp.fc1": (12, 8), f"{block}mlp.fc2": (8, 12)}
    for name in norms:
        shapes |= {f"{name}.weight": (8,), f"{name}.bias": (8,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return _random(shapes)


def llava_tensors() -> Tensors:
    """The tensors of ``LLAVA`` in its published layout."""
    connector = _random(
        {
            "multi_modal_projector.linear_1.weight": (16, 8),
            "multi_modal_projector.linear_1.bias": (16,),
            "multi_modal_projector.linear_2.weight": (16, 16),
            "multi_modal_projector.linear_2.bias": (16,),
        }
    )
    decoder = llama_tensors("language_model.model.", "language_model.")
    return connector | decoder | clip_tensors("vision_tower.vision_model.")


def write(folder: Path, config: Any, tensors: Tensors, **files: Any) -> Path:
    """A checkpoint folder; ``files`` are further JSON files by their stem."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def llama(folder: Path, **fields: Any) -> Path:
    """A Llama checkpoint, with these config fields changed."""
    return write(folder, LLAMA | fields, llama_tensors())


def clip(folder: Path, **files: Any) -> Path:
    """A CLIP encoder, with these JSON files beside it."""
    return write(folder, CLIP, clip_tensors(), **files)


def llava(folder: Path, **fields: Any) -> Path:
    """A LLaVA checkpoint, with these config fields changed."""
    return write(folder, LLAVA | fields, llava_tensors())
