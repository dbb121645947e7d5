"""Published encoders have exactly the parameters that their papers and files say.

Built from the configs of their repositories, lazily: no weight is allocated.
"""

from pathlib import Path
from typing import Any

import pytest
import sources

from mm1_mlx.checkpoint import model_shapes
from mm1_mlx.config import MM1Config
from mm1_mlx.convert import Source, detect_format


def aim(width: int, blocks: int, heads: int) -> dict[str, Any]:
    sizes = {"embed_dim": width, "num_blocks": blocks, "num_heads": heads}
    return {"img_size": 224, "patch_size": 14, **sizes}


def aimv2(width: int, hidden: int, heads: int, size: int = 224) -> dict[str, Any]:
    return {
        "model_type": "aimv2_vision_model",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "image_size": size,
    }


def vit(width: int, layers: int, size: int, projection: int | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "image_size": size,
        "patch_size": 14,
    }
    if projection:
        architectures = ["CLIPVisionModelWithProjection"]
        fields |= {"architectures": architectures, "projection_dim": projection}
    return fields


ENCODERS = {
    "AIM-600M": (aim(1536, 24, 12), 680_535_552),
    "AIM-1B": (aim(2048, 24, 16), 1_209_370_624),
    "AIM-3B": (aim(3072, 24, 24), 2_720_025_600),
    "AIM-7B": (aim(4096, 32, 32), 6_445_404_160),
    "AIMv2-L": (aimv2(1024, 2816, 8), 309_197_824),
    "AIMv2-H": (aimv2(1536, 4096, 12), 680_851_968),
    "AIMv2-1B": (aimv2(2048, 5632, 16), 1_234_958_336),
    "AIMv2-3B": (aimv2(3072, 8192, 24), 2_720_658_432),
    "ViT-L/14": (vit(1024, 24, 224, None), 303_179_776),
    "ViT-L/14-336": (vit(1024, 24, 336, None), 303_507_456),
    "ViT-L/14-336, projected": (vit(1024, 24, 336, 768), 304_293_888),
    "ViT-H/14": (vit(1280, 32, 224, None), 630_766_080),
    "ViT-H/14, projected": (vit(1280, 32, 224, 1024), 632_076_800),
    "ViT-H/14-336": (vit(1280, 32, 336, None), 631_175_680),
    "ViT-H/14-378": (vit(1280, 32, 378, None), 631_371_520),
    "ViT-H/14-378, projected": (vit(1280, 32, 378, 1024), 632_682_240),
}


def read(folder: Path, config: dict[str, Any]) -> MM1Config:
    with Source(str(sources.write(folder / "in", config, {}))) as source:
        return detect_format(source).config(source)


def count(config: MM1Config, part: str) -> int:
    total = 0
    for name, shape in model_shapes(config).items():
        size = 1
        for side in shape:
            size *= side
        total += size if name.startswith(f"{part}.") else 0
    return total


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_the_published_number_of_parameters(
    name: str, tmp_path: Path
) -> None:
    config, expected = ENCODERS[name]
    assert count(read(tmp_path, config), "vision") == expected


@pytest.mark.parametrize(
    ("size", "patches"),
    [(224, 256), (336, 576), (378, 729), (448, 1024), (560, 1600), (672, 2304)],
)
def test_patches_follow_the_picture_s_size(
    size: int, patches: int, tmp_path: Path
) -> None:
    config = read(tmp_path, vit(1280, 32, size, None))
    assert config.vision is not None
    assert config.vision.num_features == patches


def test_openai_s_clip_has_its_428_million(tmp_path: Path) -> None:
    """openai/clip-vit-large-patch14: 427,616,513 with the logit scale."""
    config = read(
        tmp_path,
        {
            "model_type": "clip",
            "projection_dim": 768,
            "vision_config": vit(1024, 24, 224, None),
            "text_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                "eos_token_id": 2,
            },
        },
    )
    assert count(config, "vision") + count(config, "text") == 427_616_513
