"""LLaVA in its own layout, LLaVA-NeXT and M3 compute what transformers computes.

transformers has LLaVA-1.5 and LLaVA-NeXT; for the own layouts its tensors are renamed by
an independent map. M3's pooling is torch's ``avg_pool2d``, as its code calls it.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from parity import (  # noqa: E402
    Prompt,
    State,
    check_parity,
    our_logits,
    pictures,
    reinitialise,
    save,
    undetected_swaps,
)
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from mm1_mlx.checkpoint import load_config, load_model  # noqa: E402
from mm1_mlx.config import AnyresTiling, MLPConfig  # noqa: E402
from mm1_mlx.convert import Source, convert, detect_format  # noqa: E402
from mm1_mlx.convert.shared import llava  # noqa: E402
from mm1_mlx.errors import CheckpointError, ConfigError, MM1Error  # noqa: E402
from mm1_mlx.image import load_picture  # noqa: E402
from mm1_mlx.layout import Picture  # noqa: E402

pytestmark = pytest.mark.reference

VOCABULARY, IMAGE_ID, SIDE = 97, 96, 28
TEXT = {
    "vocab_size": VOCABULARY,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
# As the table of towers has it, but small.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 7,
}
# A draw whose greedy tokens are diverse for every size of picture.
NEXT_SEED = 2
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]  # [height, width]


def reference(next_: bool = False, **fields: Any) -> Any:
    """A model of transformers, every parameter re-initialised."""
    kind = LlavaNextConfig if next_ else LlavaConfig
    config = {
        "image_token_index": IMAGE_ID,
        "text_config": {"model_type": "llama"} | TEXT,
        "vision_config": {"model_type": "clip_vision_model"} | VISION,
    }
    if next_:
        config["image_grid_pinpoints"] = PINPOINTS
    made = kind(**copy.deepcopy(config | fields))
    cls = LlavaNextForConditionalGeneration if next_ else LlavaForConditionalGeneration
    model = cls(made).eval()
    reinitialise(model, NEXT_SEED if next_ else 1)
    return model


def forward_of(model: Any) -> Callable[..., Any]:
    """Logits of tokens and a picture of one tile, or of several."""

    def forward(tokens: list[int], given: Any) -> Any:
        extra = {}
        if isinstance(given, Picture):
            tiles = np.stack(given.tiles).transpose(0, 3, 1, 2)
            extra["image_sizes"] = torch.tensor([given.size[::-1]])
            given = torch.from_numpy(tiles.copy())[None]
        with torch.no_grad():
            ids = torch.tensor([tokens])
            return model(input_ids=ids, pixel_values=given, **extra).logits[0]

    return forward


def own_layout(state: State) -> State:
    """transformers' names as LLaVA's own: one flat decoder, its projector and tower."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.")
        for theirs, own in (
            ("language_model.", "model."),
            ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
            ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
            ("image_newline", "model.image_newline"),
        ):
            if name.startswith(theirs):
                name = own + name.removeprefix(theirs)
                break
        renamed[name] = tensor
    return renamed


OWN = TEXT | {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_tower": "openai/tiny",
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}
ANYRES = OWN | {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    # LLaVA's own pairs are [width, height].
    "image_grid_pinpoints": [pair[::-1] for pair in PINPOINTS],
}


@pytest.fixture(autouse=True)
def tiny_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llava.TOWERS, "tiny", VISION)


def prompt_for(out: Path, picture: Picture | None = None) -> Prompt:
    config, length = load_config(out), load_config(out).num_image_tokens
    if picture is not None:
        length = load_model(out).encode([picture])[0].shape[0]
    assert config.decoder is not None
    return Prompt.make(VOCABULARY, length, IMAGE_ID)


def photographs(size: tuple[int, int], out: Path) -> list[Picture]:
    """Two pictures of one size, as the converted model makes tiles of them."""
    rng = np.random.default_rng(3)
    image = load_config(out).image
    assert image is not None
    arrays = [rng.integers(0, 256, (*size[::-1], 3), np.uint8) for _ in "ab"]
    return [load_picture(Image.fromarray(array), image) for array in arrays]


def test_llava_s_own_layout_equals_transformers(tmp_path: Path) -> None:
    model = reference()
    save(tmp_path / "in", own_layout(model.state_dict()), OWN, shards=2)
    convert(str(tmp_path / "in"), tmp_path / "out")
    check_parity(
        tmp_path / "out",
        forward_of(model),
        prompt_for(tmp_path / "out"),
        pictures(SIDE),
    )


SIZES = [(60, 28), (28, 90), (50, 50), (33, 31), (100, 41)]


@pytest.mark.parametrize("size", SIZES)
def test_llava_next_equals_transformers(size: tuple[int, int], tmp_path: Path) -> None:
    model = reference(next_=True)
    model.save_pretrained(tmp_path / "in")
    convert(str(tmp_path / "in"), tmp_path / "out")
    shown = photographs(size, tmp_path / "out")
    prompt = prompt_for(tmp_path / "out", shown[0])
    check_parity(tmp_path / "out", forward_of(model), prompt, shown)


def test_llava_1_6_in_its_own_layout_equals_transformers(tmp_path: Path) -> None:
    model = reference(next_=True)
    save(tmp_path / "in", own_layout(model.state_dict()), ANYRES)
    convert(str(tmp_path / "in"), tmp_path / "out")
    shown = photographs((60, 41), tmp_path / "out")
    prompt = prompt_for(tmp_path / "out", shown[0])
    check_parity(tmp_path / "out", forward_of(model), prompt, shown)


def test_m3_without_144_image_tokens_takes_the_most(tmp_path: Path) -> None:
    model = reference()
    config = OWN | {
        "model_type": "llava_llama",
        "matryoshka_vis_token_scale": [16, 4, 1],
        "matryoshka_vis_token_sample": "avg_pooling",
    }
    save(tmp_path / "in", own_layout(model.state_dict()), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    made = load_config(tmp_path / "out")
    assert isinstance(made.connector, MLPConfig)
    # Of a grid of 4 x 4.
    assert made.connector.pooled_tokens == 16


@pytest.mark.parametrize(("scales", "tokens"), [([16, 4, 1], 4), ([1], 1)])
def test_m3_equals_transformers_with_pooled_image_tokens(
    scales: list[int], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm1_mlx.convert.formats import m3

    monkeypatch.setattr(m3, "PREFERRED", tokens)
    model = reference()
    projector = model.model.multi_modal_projector

    def pooled(features: Any) -> Any:
        made = projector_forward(features)
        side = int(made.shape[1] ** 0.5)
        grid = made.reshape(made.shape[0], side, side, -1).permute(0, 3, 1, 2)
        kernel = int((made.shape[1] / tokens) ** 0.5)
        grid = torch.nn.functional.avg_pool2d(grid, kernel, kernel)
        return grid.flatten(2).transpose(1, 2)

    projector_forward = projector.forward
    projector.forward = pooled
    config = OWN | {"matryoshka_vis_token_scale": scales}
    save(tmp_path / "in", own_layout(model.state_dict()), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    check_parity(
        tmp_path / "out",
        forward_of(model),
        Prompt.make(VOCABULARY, tokens, IMAGE_ID),
        pictures(SIDE),
    )


@pytest.mark.parametrize("layout", ["own", "transformers"])
def test_every_swap_of_two_rules_is_noticed(layout: str, tmp_path: Path) -> None:
    model = reference(next_=True)
    if layout == "own":
        save(tmp_path / "in", own_layout(model.state_dict()), ANYRES)
    else:
        model.save_pretrained(tmp_path / "in")
    convert(str(tmp_path / "in"), tmp_path / "out")
    shown = photographs((60, 41), tmp_path / "out")[0]
    prompt = prompt_for(tmp_path / "out", shown)
    count, unnoticed = undetected_swaps(
        tmp_path / "in", tmp_path / "out", lambda m: our_logits(m, prompt, shown)
    )
    assert count > 100
    assert unnoticed == []


def clip_folder(folder: Path, model: Any) -> Path:
    """The encoder where LLaVA-1.5 leaves it: in a repository of its own."""
    state = {
        f"vision_model.{name.removeprefix('model.vision_tower.')}": tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("model.vision_tower.")
    }
    return save(folder, state, {"model_type": "clip_vision_model"} | VISION)


def test_an_encoder_that_lies_elsewhere_is_asked_for_and_joined(tmp_path: Path) -> None:
    model = reference()
    state = own_layout(model.state_dict())
    own = {n: t for n, t in state.items() if not n.startswith(llava.TOWER)}
    folder = str(save(tmp_path / "in", own, OWN, shards=2))
    message = r"does not hold its vision part; add --vision openai/tiny"
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out")
    tower = clip_folder(tmp_path / "clip", model)
    convert(folder, tmp_path / "out", vision=str(tower))
    made = load_config(tmp_path / "out")
    assert made.image is not None
    assert made.image.resize == "pad"  # LLaVA's, not CLIP's own crop
    check_parity(
        tmp_path / "out",
        forward_of(model),
        prompt_for(tmp_path / "out"),
        pictures(SIDE),
    )


def read(tmp_path: Path, config: dict[str, Any]) -> Any:
    source = Source(str(save(tmp_path / "in", {}, config)))
    return detect_format(source).config(source)


def test_the_published_configs_are_understood(tmp_path: Path) -> None:
    published = OWN | {
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "mm_resampler_type": None,
        "unfreeze_mm_vision_tower": True,
        "mm_vision_tower_lr": 2e-06,
        "image_crop_resolution": 224,
        "image_split_resolution": 224,
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [
            *([336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]),
        ],
        "tokenizer_model_max_length": 4096,
        "tokenizer_padding_side": "right",
        "max_length": 4096,
    }
    made = read(tmp_path / "vicuna", published)
    grids = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
    assert made.image.tiling == AnyresTiling(grids=grids)
    assert made.vision.image_size == 336
    assert made.vision.feature_layer == -2
    assert made.prompt.template == "vicuna_v1"
    mistral = published | {
        "model_type": "llava_mistral",
        "architectures": ["LlavaMistralForCausalLM"],
        "image_grid_pinpoints": "[(336, 672), (672, 336)]",
    }
    made = read(tmp_path / "mistral", mistral)
    assert made.prompt.template == "mistral"
    assert made.image.tiling.grids == ((2, 1), (1, 2))
    m3 = {k: v for k, v in published.items() if k != "image_grid_pinpoints"} | {
        "model_type": "llava_llama",
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": "flat",
        "matryoshka_vis_token_scale": [576, 144, 36, 9, 1],
        "matryoshka_vis_token_sample": "avg_pooling",
    }
    assert read(tmp_path / "m3", m3).num_image_tokens == 144


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_vision_tower": "google/siglip"}, "mm_vision_tower: 'siglip' is not supp"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end: True is not supported"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type: 'qformer' is not supp"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type: 'mlp3x_gelu' is not"),
        ({"mm_surprise": 1}, r"field\(s\) \['mm_surprise'\] are not known here"),
        ({"image_aspect_ratio": "wide"}, "image_aspect_ratio: 'wide' is not supported"),
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 57]]},
            "not a list of pairs of multiples of 28 pixels",
        ),
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[" * 100_000},
            "not a list of pairs of multiples of 28 pixels",
        ),
        (
            {"image_aspect_ratio": "anyres", "mm_vision_select_feature": "cls_patch"},
            "mm_vision_select_feature: 'cls_patch' is not supported with image_aspect_r",
        ),
        (
            {"matryoshka_vis_token_scale": [7]},
            r"matryoshka_vis_token_scale: \[7\] holds no number of image tokens",
        ),
    ],
)
def test_what_is_not_understood_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, OWN | changes)


@pytest.mark.parametrize("kind", ["llava_mpt", "llama", None, ["llava"]])
def test_m3_is_a_llava_alone(kind: Any, tmp_path: Path) -> None:
    scales = {"matryoshka_vis_token_scale": [16, 4, 1]}
    with pytest.raises(MM1Error, match=r"matryoshka|is not one this program converts"):
        read(tmp_path, OWN | scales | {"model_type": kind})


NEXT = {
    "model_type": "llava_next",
    "text_config": {"model_type": "llama"} | TEXT,
    "vision_config": {"model_type": "clip_vision_model"} | VISION,
    "image_token_index": IMAGE_ID,
    "image_grid_pinpoints": PINPOINTS,
}


def read_next(tmp_path: Path, **preprocessor: Any) -> Any:
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": SIDE}
    folder = save(tmp_path / "in", {}, NEXT)
    text = json.dumps(sizes | preprocessor)
    (folder / "preprocessor_config.json").write_text(text)
    with Source(str(folder)) as source:
        return detect_format(source).config(source)


def test_tiles_are_those_that_model_and_preprocessor_agree_on(tmp_path: Path) -> None:
    alone = read_next(tmp_path)
    both = {"image_grid_pinpoints": PINPOINTS, "aspect_ratio_setting": "anyres"}
    assert read_next(tmp_path, **both) == alone
    assert len(alone.image.tiling.grids) == len(PINPOINTS)
    with pytest.raises(
        ConfigError, match=r"pinpoints: \[\[56, 56\]\] differ from conf"
    ):
        read_next(tmp_path, image_grid_pinpoints=[[56, 56]])
    with pytest.raises(ConfigError, match="aspect_ratio_setting: 'pad' is not support"):
        read_next(tmp_path, aspect_ratio_setting="pad")
