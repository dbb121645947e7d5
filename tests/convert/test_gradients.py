"""Gradients of a LLaVA model are those of PyTorch, converted as its weights are."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from parity import TOLERANCE, Prompt, pictures, reinitialise, save, to_torch  # noqa: E402
from transformers import LlavaConfig, LlavaForConditionalGeneration  # noqa: E402

from mm1_mlx.checkpoint import load_model  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402
from mm1_mlx.layout import Picture  # noqa: E402
from mm1_mlx.train.loss import next_token_loss  # noqa: E402
from mm1_mlx.train.sample import Batch  # noqa: E402

pytestmark = pytest.mark.reference

VOCABULARY, IMAGE_ID, IMAGE_TOKENS = 97, 96, 4
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
DECODERS = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
}


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_equal_pytorch(name: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": IMAGE_ID,
        "text_config": TEXT | DECODERS[name],
        "vision_config": VISION,
    }
    model = LlavaForConditionalGeneration(LlavaConfig(**copy.deepcopy(config))).eval()
    reinitialise(model, 0)
    state = {k: v.float() for k, v in model.state_dict().items()}
    convert(str(save(tmp_path / "in", state, config)), tmp_path / "out")

    prompt = Prompt.make(VOCABULARY, IMAGE_TOKENS, IMAGE_ID)
    assert prompt.span is not None
    tokens, pixels = np.array([prompt.tokens], np.int32), pictures(28)[0]
    learned = tokens != IMAGE_ID
    learned[0, 0] = False
    # The first token behind the picture is learned from an image token's state.
    assert learned[0, prompt.span.stop]

    theirs = model.double()
    logits = theirs(
        input_ids=torch.from_numpy(tokens).long(),
        pixel_values=to_torch(pixels).double(),
    ).logits[0, :-1]
    targets = torch.from_numpy(tokens[0, 1:]).long()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = losses[torch.from_numpy(learned[0, 1:])].mean()
    loss.backward()
    gradients = {
        k: torch.zeros_like(x) if x.grad is None else x.grad
        for k, x in theirs.named_parameters()
    }
    # The very rules that move the weights move their gradients.
    gradients = {k: x.float() for k, x in gradients.items()}
    assert gradients.keys() == state.keys()
    convert(str(save(tmp_path / "gradients", gradients, config)), tmp_path / "expected")
    expected = load_model(tmp_path / "expected").tensors()

    ours = load_model(tmp_path / "out", mx.float32)
    batch = Batch(
        tokens=tokens,
        learned=learned,
        spans=(prompt.span,),
        pictures=(Picture(tuple(pixels), (1, 1), ""),),
        lengths=(tokens.size,),
    )
    ours.train()
    (mean, count), found = nn.value_and_grad(ours, next_token_loss)(ours, batch)
    assert count.item() == learned.sum()
    assert mean.item() == pytest.approx(loss.item(), rel=TOLERANCE)
    compared = dict(tree_flatten(found))
    assert compared.keys() == expected.keys()
    largest = max(mx.abs(x).max().item() for x in expected.values())
    for path, gradient in compared.items():
        # A key's bias moves no softmax: there is nothing but rounding.
        size = max(mx.abs(expected[path]).max().item(), 1e-3 * largest)
        difference = mx.abs(gradient - expected[path]).max().item()
        assert difference <= TOLERANCE * size, path
