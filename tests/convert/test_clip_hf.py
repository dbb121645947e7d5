"""CLIP's image encoder computes what transformers computes."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
from parity import (  # noqa: E402
    TOLERANCE,
    difference,
    pictures,
    reinitialise,
    save,
    state_of,
    to_torch,
    undetected_swaps,
)
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from mm1_mlx.checkpoint import load_config, load_model  # noqa: E402
from mm1_mlx.config import VisionConfig  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402
from mm1_mlx.models import MM1  # noqa: E402

pytestmark = pytest.mark.reference


def clip(
    width: int, heads: int, size: int, patch: int, **fields: Any
) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": width + 16,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": patch,
        **fields,
    }


CASES = {
    "2 x 2 patches": clip(32, 4, 28, 14),
    "5 x 5 patches, gelu, other eps": clip(
        36, 3, 35, 7, hidden_act="gelu", layer_norm_eps=1e-3
    ),
    "wide heads": clip(160, 2, 48, 16, num_hidden_layers=3),
}


def reference(config: dict[str, Any]) -> Any:
    model = CLIPVisionModel(CLIPVisionConfig(**config)).eval()
    reinitialise(model, 0)
    return model


def features(model: Any, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The last block's patch features, normalised: transformers does so for one only."""
    with torch.no_grad():
        hidden = model(to_torch(pixels)).last_hidden_state
        return np.asarray(model.post_layernorm(hidden)[:, 1:])


def our_features(model: MM1, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.array(model.vision(mx.array(pixels)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_features_equal_transformers(name: str, prefix: str, tmp_path: Path) -> None:
    config = CASES[name]
    model = reference(config)
    state = {f"{prefix}{n}": x for n, x in state_of(model, config).items()}
    # A buffer that old checkpoints hold.
    state[f"{prefix}embeddings.position_ids"] = torch.arange(5)[None]
    save(tmp_path / "in", state, config)
    report = convert(str(tmp_path / "in"), tmp_path / "out")
    assert report.dropped == {
        str(tmp_path / "in"): (f"{prefix}embeddings.position_ids",)
    }
    ours = load_model(tmp_path / "out")
    first, second = pictures(config["image_size"])
    for pixels in (first, second):
        expected = features(model, pixels)
        assert difference(our_features(ours, pixels), expected) <= TOLERANCE
    assert difference(our_features(ours, first), features(model, second)) > 0.1


def test_a_whole_clip_model_gives_its_vision_half(tmp_path: Path) -> None:
    config = CASES["2 x 2 patches"]
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 50, "eos_token_id": 2}
    model = CLIPModel(CLIPConfig(vision_config=config, text_config=text)).eval()
    reinitialise(model, 0)
    model.save_pretrained(tmp_path / "in")
    report = convert(str(tmp_path / "in"), tmp_path / "out")
    dropped = report.dropped[str(tmp_path / "in")]
    assert {name.partition(".")[0] for name in dropped} == {
        "logit_scale",
        "text_model",
        "text_projection",
        "visual_projection",
    }
    pixels = pictures(28)[0]
    ours = our_features(load_model(tmp_path / "out"), pixels)
    assert difference(ours, features(model.vision_model, pixels)) <= TOLERANCE


def test_eps_and_activation_are_the_source_s(tmp_path: Path) -> None:
    config = CASES["5 x 5 patches, gelu, other eps"]
    save(tmp_path / "in", state_of(reference(config), config), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    assert load_config(tmp_path / "out").vision == VisionConfig(
        image_size=35,
        patch_size=7,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
        hidden_act="gelu",
        layer_norm_eps=1e-3,
        feature_layer=-1,
        apply_post_norm=True,
        drop_cls=True,
    )


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    config = CASES["2 x 2 patches"]
    folder = save(tmp_path / "in", state_of(reference(config), config), config)
    convert(str(folder), tmp_path / "out")
    pixels = pictures(28)[0]
    count, unnoticed = undetected_swaps(
        folder, tmp_path / "out", lambda m: our_features(m, pixels)
    )
    assert count > 30
    assert unnoticed == []
