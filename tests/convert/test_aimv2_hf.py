"""AIMv2's encoder computes what transformers computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
import encoders  # noqa: E402
from parity import pictures, reinitialise, save, state_of, to_torch  # noqa: E402
from transformers import (  # noqa: E402
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionConfig,
    Aimv2VisionModel,
)

from mm1_mlx.checkpoint import load_config  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402
from mm1_mlx.errors import ConfigError  # noqa: E402

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


def features_of(model: Any) -> encoders.Features:
    def features(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(model(to_torch(pixels)).last_hidden_state)

    return features


@pytest.mark.parametrize("name", CASES)
def test_features_equal_transformers(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    model = reference(config)
    save(tmp_path / "in", state_of(model, config), config)
    report = convert(str(tmp_path / "in"), tmp_path / "out")
    dropped = set(report.dropped.get(str(tmp_path / "in"), ()))
    assert dropped >= (HEAD if config.get("use_head", True) else set())
    assert all(name.startswith("head.") for name in dropped)
    encoders.check_features(tmp_path / "out", features_of(model))


@pytest.mark.parametrize("size", [28, 70])
def test_native_resolution_means_tiles_of_any_size(size: int, tmp_path: Path) -> None:
    config = CASES["native resolution, no head"]
    model = reference(config)
    save(tmp_path / "in", state_of(model, config), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    encoders.check_picture(tmp_path / "out", features_of(model), pictures(size)[0])


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
    encoders.check_features(tmp_path / "out", features_of(model.vision_model))


def test_eps_and_activation_are_the_source_s(tmp_path: Path) -> None:
    config = CASES["biases, another activation and eps"]
    save(tmp_path / "in", state_of(reference(config), config), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    assert load_config(tmp_path / "out").vision == encoders.expected(
        hidden_size=36,
        intermediate_size=44,
        num_attention_heads=3,
        norm="rms",
        layer_norm_eps=1e-3,
        interpolation="bicubic",
        attention_bias=True,
        mlp_bias=True,
        gated_mlp=True,
    )


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    config = CASES["learned positions, a head"]
    folder = save(tmp_path / "in", state_of(reference(config), config), config)
    convert(str(folder), tmp_path / "out")
    assert encoders.check_swaps(folder, tmp_path / "out") >= 10


def test_unknown_fields_are_refused(tmp_path: Path) -> None:
    config = CASES["learned positions, a head"] | {"patch_dropout_rate": 0.1}
    folder = save(tmp_path / "in", {"x": torch.zeros(1)}, config)
    with pytest.raises(ConfigError, match=r"\['patch_dropout_rate'\] are not known"):
        convert(str(folder), tmp_path / "out")
