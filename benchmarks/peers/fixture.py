"""A LLaVA in Hugging Face's layout, which every runtime here can load.

176.7 M parameters on disk, of which an answer uses 173.5 M: the features are those of the
last encoder block but one.

The weights are random but for two attention heads that copy: where a token was seen
before, the model says what came after it. So an answer can repeat its prompt, which is
what prompt lookup is for, and nothing has to be downloaded.

    python -m benchmarks.peers.fixture OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 0
VOCAB, WIDTH, LAYERS, HEADS, INTERMEDIATE = 32_000, 768, 12, 12, 2048
VISION_WIDTH, VISION_LAYERS, VISION_HEADS, PATCH, IMAGE = 512, 13, 8, 14, 336
HEAD = WIDTH // HEADS
# A large base leaves the slow half of the rotary pairs still over a prompt's length.
ROPE_THETA = 1e8
IMAGE_ID = 4
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

Tensors = dict[str, NDArray[np.float32]]

# What each stretch of the residual stream holds.
CODE = slice(0, 32)  # of the token
BEFORE = slice(32, 64)  # of the token before
NEXT = slice(64, 96)  # of the token to say
ONE = 96  # a constant


def language(random: np.random.Generator) -> Tensors:
    """The decoder, as transformers names it, without a prefix."""

    def matrix(rows: int, columns: int, gain: float = 1.0) -> NDArray[np.float32]:
        values = random.standard_normal((rows, columns), np.float32)
        return values * np.float32(gain / columns**0.5)

    codes = random.standard_normal((VOCAB, 32), np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    embeddings = 0.02 * random.standard_normal((VOCAB, WIDTH), np.float32)
    embeddings[:, :97] = 0
    embeddings[:, CODE], embeddings[:, ONE] = codes, 1
    head = matrix(VOCAB, WIDTH, 0.02)
    head[:, NEXT] = 30 * codes
    tensors = {
        "model.embed_tokens.weight": embeddings,
        "model.norm.weight": np.ones(WIDTH, np.float32),
        "lm_head.weight": head,
    }
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        tensors |= {
            f"{block}self_attn.q_proj.weight": matrix(WIDTH, WIDTH),
            f"{block}self_attn.k_proj.weight": matrix(WIDTH, WIDTH),
            f"{block}self_attn.v_proj.weight": matrix(WIDTH, WIDTH),
            # Small, so that the stream stays what the copying heads wrote.
            f"{block}self_attn.o_proj.weight": matrix(WIDTH, WIDTH, 0.01),
            f"{block}mlp.gate_proj.weight": matrix(INTERMEDIATE, WIDTH),
            f"{block}mlp.up_proj.weight": matrix(INTERMEDIATE, WIDTH),
            f"{block}mlp.down_proj.weight": matrix(WIDTH, INTERMEDIATE, 0.01),
            f"{block}input_layernorm.weight": np.ones(WIDTH, np.float32),
            f"{block}post_attention_layernorm.weight": np.ones(WIDTH, np.float32),
        }
    _look_back(tensors, "model.layers.0.self_attn.")
    _look_up(tensors, "model.layers.1.self_attn.")
    return tensors


def _look_back(tensors: Tensors, block: str) -> None:
    """Make head 0 of a layer write the code of the token before."""
    q, k, v, o = (tensors[f"{block}{x}_proj.weight"] for x in "qkvo")
    for matrix in (q, k, v):
        matrix[:HEAD] = 0
    angles = ROPE_THETA ** (-np.arange(8) / (HEAD // 2))
    # Rotated by one place, the query meets the key before it.
    q[np.arange(8), ONE], q[np.arange(8) + HEAD // 2, ONE] = (
        30 * np.cos(-angles),
        30 * np.sin(-angles),
    )
    k[:8, ONE] = 1
    v[:32, CODE] = np.eye(32)
    o[:, :HEAD] = 0
    o[BEFORE, :32] = np.eye(32)


def _look_up(tensors: Tensors, block: str) -> None:
    """Make head 0 of a layer find where this token was before, and copy what followed."""
    q, k, v, o = (tensors[f"{block}{x}_proj.weight"] for x in "qkvo")
    for matrix in (q, k, v):
        matrix[:HEAD] = 0
    slow = np.r_[16:32, 48:64]
    q[slow, CODE] = 0
    q[np.ix_(slow, np.arange(32))] = 8 * np.eye(32)
    k[np.ix_(slow, np.arange(32, 64))] = 8 * np.eye(32)
    v[:32, CODE] = np.eye(32)
    o[:, :HEAD] = 0
    o[NEXT, :32] = np.eye(32)


def vision(random: np.random.Generator) -> Tensors:
    """The CLIP encoder and the projector, as transformers' LLaVA names them."""
    tensors: Tensors = {}
    root = "vision_tower.vision_model."

    def linear(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), np.float32)
        tensors[f"{name}.weight"] = values * np.float32(columns**-0.5)
        tensors[f"{name}.bias"] = 0.02 * random.standard_normal(rows, np.float32)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = np.ones(VISION_WIDTH, np.float32)
        tensors[f"{name}.bias"] = np.zeros(VISION_WIDTH, np.float32)

    places = (IMAGE // PATCH) ** 2 + 1
    for name, shape in {
        "class_embedding": (VISION_WIDTH,),
        "patch_embedding.weight": (VISION_WIDTH, 3, PATCH, PATCH),
        "position_embedding.weight": (places, VISION_WIDTH),
    }.items():
        values = 0.02 * random.standard_normal(shape, np.float32)
        tensors[f"{root}embeddings.{name}"] = values
    norm(f"{root}pre_layrnorm")
    norm(f"{root}post_layernorm")
    for i in range(VISION_LAYERS):
        block = f"{root}encoder.layers.{i}."
        for x in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{block}self_attn.{x}", VISION_WIDTH, VISION_WIDTH)
        linear(f"{block}mlp.fc1", 4 * VISION_WIDTH, VISION_WIDTH)
        linear(f"{block}mlp.fc2", VISION_WIDTH, 4 * VISION_WIDTH)
        norm(f"{block}layer_norm1")
        norm(f"{block}layer_norm2")
    linear("multi_modal_projector.linear_1", WIDTH, VISION_WIDTH)
    linear("multi_modal_projector.linear_2", WIDTH, WIDTH)
    return tensors


TEXT_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD,
    "rms_norm_eps": 1e-5,
    "rope_theta": ROPE_THETA,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
CONFIG = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": IMAGE_ID,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "image_seq_length": (IMAGE // PATCH) ** 2,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "text_config": TEXT_CONFIG,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 4 * VISION_WIDTH,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": VISION_HEADS,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "hidden_act": "quick_gelu",
        "projection_dim": VISION_WIDTH,
        "vocab_size": VOCAB,
    },
}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": IMAGE},
    "do_center_crop": True,
    "crop_size": {"height": IMAGE, "width": IMAGE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
    "resample": 3,
}
PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "image_token": "<image>",
}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "LlavaProcessor",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "image_token": "<image>",
    "add_bos_token": True,
    "chat_template": TEMPLATE,
}


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer of numbers and a few words."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = " ".join(f"{i}" for i in range(1000))
    words = "USER: ASSISTANT: what is in this picture describe it the a of and "
    made.train_from_iterator([numbers, words * 20] * 5, trainer)
    # A text for every token: not every runtime bears a decoder that knows more of them.
    values = json.loads(made.to_str())
    vocabulary = values["model"]["vocab"]
    for i in range(len(vocabulary), VOCAB):
        vocabulary[f"w{i}"] = i
    return Tokenizer.from_str(json.dumps(values))


def write(out: Path) -> Path:
    """Write the model into ``out``, and its decoder alone into ``out/decoder``."""
    random = np.random.default_rng(SEED)
    text = language(random)
    whole = {f"language_model.{k}": v for k, v in text.items()} | vision(random)
    decoder = out / "decoder"
    decoder.mkdir(parents=True, exist_ok=True)
    save_file(whole, out / "model.safetensors", {"format": "pt"})
    save_file(text, decoder / "model.safetensors", {"format": "pt"})
    _json(out / "config.json", CONFIG)
    _json(decoder / "config.json", TEXT_CONFIG)
    _json(out / "preprocessor_config.json", PREPROCESSOR)
    _json(out / "processor_config.json", PROCESSOR)
    made = tokenizer()
    for folder in (out, decoder):
        made.save(str(folder / "tokenizer.json"))
        _json(folder / "tokenizer_config.json", TOKENIZER)
    return out


def _json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
