"""AIM, and AIMv2 in ml-aim's layout, compute what a plain torch oracle computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
import encoders  # noqa: E402
from aim_oracle import AIM  # noqa: E402
from parity import pictures, reinitialise, save, to_torch  # noqa: E402

from mm1_mlx.config import ImageConfig  # noqa: E402
from mm1_mlx.convert import Source, convert, detect_format  # noqa: E402
from mm1_mlx.errors import CheckpointError, ConfigError  # noqa: E402

pytestmark = pytest.mark.reference

SIZES = {"size": 42, "patch": 14, "width": 32, "hidden": 128, "blocks": 2, "heads": 4}
CONFIG = {
    "img_size": 42,
    "patch_size": 14,
    "embed_dim": 32,
    "num_blocks": 2,
    "num_heads": 4,
    "num_channels": 3,
    "probe_layers": [0, 1],
    "num_classes": 10,
}
CONFIG_V2 = {
    "model_type": "aimv2",
    "architectures": ["AIMv2Model"],
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 42,
    "patch_size": 14,
    "num_channels": 3,
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "projection_dropout": 0.0,
    "qkv_bias": False,
    "use_bias": False,
}
# By version: the oracle's options and the config beside its weights.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "v1": ({}, CONFIG),
    "v2": ({"v2": True, "hidden": 40}, CONFIG_V2),
    "v2 native": (
        {"v2": True, "hidden": 40, "sincos": True},
        CONFIG_V2 | {"is_native": True},
    ),
}


def reference(case: str) -> AIM:
    model = AIM(**SIZES | CASES[case][0]).eval()
    reinitialise(model, 0)
    if hasattr(model.preprocessor, "pos_embed"):
        torch.nn.init.normal_(
            model.preprocessor.pos_embed, generator=torch.Generator().manual_seed(1)
        )
    return model


def features_of(model: AIM) -> encoders.Features:
    def features(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return model(to_torch(pixels)).numpy()

    return features


@pytest.mark.parametrize("case", CASES)
def test_features_equal_the_oracle(case: str, tmp_path: Path) -> None:
    model = reference(case)
    folder = save(tmp_path / "in", model.state_dict(), CASES[case][1])
    report = convert(str(folder), tmp_path / "out")
    dropped = report.dropped.get(str(folder), ())
    assert {name.partition(".")[0] for name in dropped} <= {"head"}
    assert len(dropped) == (7 if case == "v1" else 0)
    encoders.check_features(tmp_path / "out", features_of(model))


@pytest.mark.parametrize("case", ["v1", "v2 native"])
@pytest.mark.parametrize("size", [28, 70])
def test_sincos_positions_are_of_any_size(case: str, size: int, tmp_path: Path) -> None:
    model = reference(case)
    folder = save(tmp_path / "in", model.state_dict(), CASES[case][1])
    convert(str(folder), tmp_path / "out")
    pixels = pictures(size)[0]
    assert features_of(model)(pixels).shape[1] == (size // 14) ** 2
    encoders.check_picture(tmp_path / "out", features_of(model), pixels)


@pytest.mark.parametrize("case", CASES)
def test_every_swap_of_two_rules_is_noticed(case: str, tmp_path: Path) -> None:
    state = reference(case).state_dict()
    state = {name: x for name, x in state.items() if not name.startswith("head.")}
    folder = save(tmp_path / "in", state, CASES[case][1])
    convert(str(folder), tmp_path / "out")
    assert encoders.check_swaps(folder, tmp_path / "out") > 10


def test_a_pickled_backbone_with_a_config_beside_it_is_read(tmp_path: Path) -> None:
    """As apple/AIM has them: the head in a file of its own."""
    model, folder = reference("v1"), tmp_path / "in"
    folder.mkdir()
    state = model.state_dict()
    for name, is_head in (("backbone", False), ("head_last_layers", True)):
        part = {n: x for n, x in state.items() if n.startswith("head.") == is_head}
        torch.save(part, folder / f"aim_600m_2bimgs_attnprobe_{name}.pth")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        convert(str(folder), tmp_path / "out")
    least = {
        k: x for k, x in CONFIG.items() if k not in ("num_channels", "num_classes")
    }
    (folder / "config.json").write_text(json.dumps(least))
    convert(str(folder), tmp_path / "out")
    encoders.check_features(tmp_path / "out", features_of(model))


def test_eps_activation_and_pictures_are_ml_aim_s(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", {"x": torch.zeros(1)}, CONFIG | {"img_size": 224})
    with Source(str(folder)) as source:
        config = detect_format(source).config(source)
    assert config.vision == encoders.expected(
        image_size=224,
        hidden_size=32,
        intermediate_size=128,
        norm="layer",
        layer_norm_eps=1e-6,
        position="sincos",
        attention_bias=False,
        mlp_bias=False,
        gated_mlp=False,
    )
    assert config.image == ImageConfig(
        size=224,
        resize="crop",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_from=256,
        crop_rounding="even",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_channels": 1}, "num_channels: 1 is not supported; supported: 3"),
        ({"use_bias": True}, r"\['use_bias'\] are not known"),
        ({"post_trunk_norm": False}, "post_trunk_norm: False is not supported"),
        ({"img_size": [224, 112]}, "is not one side of a square"),
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
    ],
)
def test_what_aim_cannot_be_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "in", {"x": torch.zeros(1)}, CONFIG | fields)
    with pytest.raises(ConfigError, match=message):
        convert(str(folder), tmp_path / "out")


def test_aimv2_with_ml_aim_s_biases_is_refused(tmp_path: Path) -> None:
    config = CONFIG_V2 | {"use_bias": True}
    folder = save(tmp_path / "in", {"x": torch.zeros(1)}, config)
    with pytest.raises(ConfigError, match="use_bias: True is not supported"):
        convert(str(folder), tmp_path / "out")
