"""AIMv2's encoder computes what transformers computes."""

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
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionConfig,
    Aimv2VisionModel,
)

from mm1_mlx.checkpoint import load_config, load_model  # noqa: E402
from mm1_mlx.config import VisionConfig  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402
from mm1_mlx.errors import ConfigError  # noqa: E402
from mm1_mlx.models import MM1  # noqa: E402

pytestmark = pytest.mark.reference


def aimv2(width: int, heads: int, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": "aimv2_vision_model",
        "hidden_size": width,
        "intermediate_size": width + 8,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "image_size": 42,
        "patch_size": 14,
        **fields,
    }


CASES = {
    "learned positions, a head": aimv2(32, 4),
    "native resolution, no head": aimv2(32, 4, is_native=True, use_head=False),
    "biases, another activation and eps": aimv2(
        36, 3, qkv_bias=True, mlp_bias=True, hidden_act="gelu", rms_norm_eps=1e-3
    ),
}
HEAD = {
    *("head.cls_token", "head.k_proj.weight", "head.v_proj.weight"),
    *("head.output_proj.weight", "head.output_proj.bias"),
}


def reference(config: dict[str, Any]) -> Any:
    model = Aimv2VisionModel(Aimv2VisionConfig(**config)).eval()
    reinitialise(model, 0)
    return model


def features(model: Any, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(model(to_torch(pixels)).last_hidden_state)


def our_features(model: MM1, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.array(model.vision(mx.array(pixels)))


@pytest.mark.parametrize("name", CASES)
def test_features_equal_transformers(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    model = reference(config)
    save(tmp_path / "in", state_of(model, config), config)
    report = convert(str(tmp_path / "in"), tmp_path / "out")
    dropped = set(report.dropped.get(str(tmp_path / "in"), ()))
    assert dropped >= (HEAD if config.get("use_head", True) else set())
    assert all(name.startswith("head.") for name in dropped)
    ours = load_model(tmp_path / "out")
    first, second = pictures(42)
    for pixels in (first, second):
        expected = features(model, pixels)
        assert difference(our_features(ours, pixels), expected) <= TOLERANCE
    assert difference(our_features(ours, first), features(model, second)) > 0.1


@pytest.mark.parametrize("size", [28, 70])
def test_native_resolution_means_tiles_of_any_size(size: int, tmp_path: Path) -> None:
    config = CASES["native resolution, no head"]
    model = reference(config)
    save(tmp_path / "in", state_of(model, config), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    pixels = pictures(size)[0]
    result = our_features(load_model(tmp_path / "out"), pixels)
    assert difference(result, features(model, pixels)) <= TOLERANCE


def test_a_whole_model_gives_its_encoder(tmp_path: Path) -> None:
    vision = CASES["learned positions, a head"]
    text = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 50, "eos_token_id": 2,
    }  # fmt: skip
    model = Aimv2Model(
        Aimv2Config(vision_config=vision, text_config=text, projection_dim=8)
    ).eval()
    reinitialise(model, 0)
    model.save_pretrained(tmp_path / "in")
    report = convert(str(tmp_path / "in"), tmp_path / "out")
    dropped = report.dropped[str(tmp_path / "in")]
    assert {name.partition(".")[0] for name in dropped} == {
        *("logit_scale", "text_model", "text_projection"),
        *("visual_projection", "vision_model"),
    }
    assert {n for n in dropped if n.startswith("vision_model.")} == {
        f"vision_model.{name}" for name in HEAD
    }
    pixels = pictures(42)[0]
    ours = our_features(load_model(tmp_path / "out"), pixels)
    assert difference(ours, features(model.vision_model, pixels)) <= TOLERANCE


def test_eps_and_activation_are_the_source_s(tmp_path: Path) -> None:
    config = CASES["biases, another activation and eps"]
    save(tmp_path / "in", state_of(reference(config), config), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    assert load_config(tmp_path / "out").vision == VisionConfig(
        image_size=42,
        patch_size=14,
        hidden_size=36,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=3,
        hidden_act="gelu",
        norm="rms",
        layer_norm_eps=1e-3,
        class_token=False,
        interpolation="bicubic",
        patch_bias=True,
        patch_norm=True,
        pre_norm=False,
        attention_bias=True,
        mlp_bias=True,
        gated_mlp=True,
    )


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    config = CASES["learned positions, a head"]
    folder = save(tmp_path / "in", state_of(reference(config), config), config)
    convert(str(folder), tmp_path / "out")
    pixels = pictures(42)[0]
    count, unnoticed = undetected_swaps(
        folder, tmp_path / "out", lambda m: our_features(m, pixels)
    )
    assert count >= 10
    assert unnoticed == []


def test_unknown_fields_are_refused(tmp_path: Path) -> None:
    config = CASES["learned positions, a head"] | {"patch_dropout_rate": 0.1}
    folder = save(tmp_path / "in", {"x": torch.zeros(1)}, config)
    with pytest.raises(ConfigError, match=r"\['patch_dropout_rate'\] are not known"):
        convert(str(folder), tmp_path / "out")
