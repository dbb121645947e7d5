"""The rules fit public models of full size, by name and shape, without a weight."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sources

torch = pytest.importorskip("torch")
from test_configs import DFN_H, LLAVA_7B  # noqa: E402
from transformers import (  # noqa: E402  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mm1_mlx.checkpoint import model_shapes  # noqa: E402
from mm1_mlx.convert import Source, detect_format  # noqa: E402
from mm1_mlx.convert.expected import possible_shapes  # noqa: E402
from mm1_mlx.convert.plan import Plan, plan  # noqa: E402

pytestmark = pytest.mark.reference

MISTRAL_7B = {"model_type": "mistral", "sliding_window": None}
QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def fit(model: Any, config: dict[str, Any], tmp_path: Path) -> tuple[Plan, int]:
    """The plan of the model's tensors, and the number of parameters that ours has."""
    source = Source(str(sources.write(tmp_path / "in", config, {})))
    format = detect_format(source)
    ours = format.config(source)
    wanted = model_shapes(ours)
    found = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    result = plan(format.rules(source), found, wanted, possible_shapes(ours))
    return result, sum(int(np.prod(shape)) for shape in wanted.values())


@pytest.mark.parametrize(
    ("config", "parameters"), [(MISTRAL_7B, 7_241_732_096), (QWEN3_4B, 4_022_468_096)]
)
def test_decoders_fit(config: dict[str, Any], parameters: int, tmp_path: Path) -> None:
    values = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )
    _, count = fit(model, config, tmp_path)
    assert count == parameters == sum(p.numel() for p in model.parameters())


def test_mm1_s_encoder_fits(tmp_path: Path) -> None:
    vision = {"model_type": "clip_vision_model"} | DFN_H["vision_config"]  # type: ignore[operator]
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**vision))
    result, count = fit(model, vision, tmp_path)
    assert count == 631_371_520
    assert result.dropped == ()


def test_llava_fits(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(**LLAVA_7B))
    result, count = fit(model, LLAVA_7B, tmp_path)
    # One block of ViT-L/14 and the final norm lie past the feature layer.
    assert len(result.dropped) == 18
    block = 4 * (1024**2 + 1024) + 2 * 4 * 1024**2 + 4096 + 1024 + 2 * 2 * 1024
    assert count == sum(p.numel() for p in model.parameters()) - block - 2 * 1024
