"""CLIP's two towers compute what transformers computes."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sources
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
    CLIPVisionModelWithProjection,
)

from mm1_mlx.checkpoint import load_config, load_model  # noqa: E402
from mm1_mlx.config import ImageConfig, VisionConfig  # noqa: E402
from mm1_mlx.convert import Source, convert, detect_format  # noqa: E402
from mm1_mlx.errors import ConfigError  # noqa: E402
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


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 10,
    "pad_token_id": 1,
}
# Text ends with 49; 40 stands in its midst, and what follows the end changes nothing.
TOKENS = [[3, 40, 9, 40, 12, 49, 1, 1], [5, 6, 49, 1, 1, 1, 1, 1], [7] * 7 + [49]]
# How transformers finds a text's end: the highest id, or the first of a token.
ENDS = {"highest id": 2, "first 49": 49, "first 40": 40}


def whole(ends: str, width: int = 32, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": "clip",
        "projection_dim": width,
        "vision_config": CASES["2 x 2 patches"],
        "text_config": {**TEXT, "eos_token_id": ENDS[ends], **fields},
    }


def whole_reference(config: dict[str, Any], seed: int = 0) -> Any:
    values = {key: x for key, x in config.items() if key != "model_type"}
    model = CLIPModel(CLIPConfig(**values)).eval()
    reinitialise(model, seed)
    return model


def our_embeddings(model: MM1, pixels: NDArray[np.float32]) -> list[NDArray[Any]]:
    """Of the picture and of the texts, and how well they fit."""
    images = model.vision.project(mx.array(pixels))
    texts = model.text(mx.array(TOKENS))
    norm = [x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts)]
    logits = mx.exp(model.text.logit_scale) * norm[0] @ norm[1].T
    return [np.array(x) for x in (images, texts, logits)]


def their_embeddings(model: Any, pixels: NDArray[np.float32]) -> list[NDArray[Any]]:
    with torch.no_grad():
        output = model(input_ids=torch.tensor(TOKENS), pixel_values=to_torch(pixels))
    images = output.vision_model_output.pooler_output
    texts = output.text_model_output.pooler_output
    assert torch.allclose(images / images.norm(), output.image_embeds, atol=1e-6)
    return [x.numpy() for x in (images, texts, output.logits_per_image)]


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("fields", [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}])
def test_both_towers_equal_transformers(
    ends: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    config = whole(ends, width=24, **fields)
    model = whole_reference(config)
    save(tmp_path / "in", state_of(model, config), config)
    report = convert(str(tmp_path / "in"), tmp_path / "out")
    assert report.dropped == {}
    ours = load_model(tmp_path / "out")
    assert ours.config.text is not None
    assert ours.config.text.eos_token_id == (
        None if ends == "highest id" else ENDS[ends]
    )
    results = []
    for pixels in pictures(28):
        expected = their_embeddings(model, pixels)
        results.append(our_embeddings(ours, pixels))
        for result, reference in zip(results[-1], expected, strict=True):
            assert difference(result, reference) <= TOLERANCE
        theirs = features(model.vision_model, pixels)
        assert difference(our_features(ours, pixels), theirs) <= TOLERANCE
    first, second = results
    # Pictures differ, texts do not.
    assert difference(first[0], second[0]) > 0.1
    assert np.array_equal(first[1], second[1])
    assert difference(first[1][:1].repeat(2, axis=0), first[1][1:]) > 0.1


def test_every_swap_of_two_rules_of_both_towers_is_noticed(tmp_path: Path) -> None:
    config = whole("first 49")
    folder = save(tmp_path / "in", state_of(whole_reference(config), config), config)
    convert(str(folder), tmp_path / "out")
    pixels = pictures(28)[0]

    def everything(model: MM1) -> NDArray[np.float32]:
        images, texts, _ = our_embeddings(model, pixels)
        return np.concatenate([our_features(model, pixels)[0], images, texts]).ravel()

    count, unnoticed = undetected_swaps(folder, tmp_path / "out", everything)
    assert count > 150
    # A key's bias adds the same to all scores of a query, which softmax does not see.
    (pair,) = unnoticed
    assert all("k_proj.bias" in name for name in pair)


def test_a_projected_encoder_keeps_its_projection(tmp_path: Path) -> None:
    config = CASES["2 x 2 patches"] | {
        "architectures": ["CLIPVisionModelWithProjection"],
        "projection_dim": 20,
    }
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).eval()
    reinitialise(model, 0)
    save(tmp_path / "in", state_of(model, config), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    ours = load_model(tmp_path / "out")
    pixels = pictures(28)[0]
    with torch.no_grad():
        expected = model(to_torch(pixels)).image_embeds.numpy()
    assert difference(np.array(ours.vision.project(mx.array(pixels))), expected) <= 1e-4
    assert "text" not in ours


def test_beside_a_decoder_the_encoder_loses_text_and_projection(tmp_path: Path) -> None:
    config = whole("first 49")
    model = whole_reference(config)
    clip_folder = save(tmp_path / "clip", state_of(model, config), config)
    llama = str(sources.llama(tmp_path / "llama"))
    out = tmp_path / "out"
    report = convert(
        None, out, vision=str(clip_folder), connector="linear", decoder=llama
    )
    assert report.config.text is None
    assert report.config.vision is not None
    assert report.config.vision.projection_size is None
    dropped = report.dropped[str(clip_folder)]
    parts = {name.partition(".")[0] for name in dropped}
    assert parts == {
        "logit_scale",
        "text_model",
        "text_projection",
        "visual_projection",
    }
    pixels = pictures(28)[0]
    theirs = features(model.vision_model, pixels)
    assert difference(our_features(load_model(out), pixels), theirs) <= TOLERANCE


def test_a_connector_goes_on_reading_its_layer_of_a_whole_clip(tmp_path: Path) -> None:
    """The features of layer -2 lie before what the projection is reached from."""
    clip_folder = tmp_path / "clip"
    config = {
        "model_type": "clip",
        "projection_dim": 6,
        "vision_config": sources.CLIP,
        "text_config": {**TEXT, "eos_token_id": 49},
    }
    model = whole_reference(config)
    save(clip_folder, state_of(model, config), config)
    llava = str(sources.llava(tmp_path / "llava"))
    report = convert(llava, tmp_path / "out", vision=str(clip_folder))
    assert report.config.vision is not None
    assert report.config.vision.feature_layer == -2
    assert report.config.vision.projection_size is None


def test_old_configs_repeat_their_text_half_too(tmp_path: Path) -> None:
    config = whole("first 49") | {"text_config_dict": {"hidden_act": "gelu"}}
    source = Source(str(sources.write(tmp_path / "in", config, {})))
    text = detect_format(source).config(source).text
    assert text is not None
    assert text.hidden_act == "gelu"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_head": True}, r"CLIPConfig: field\(s\) \['use_head'\] are not known"),
        ({"text_config": {**TEXT, "eos_token_id": [49]}}, "expected an integer"),
        ({"text_config": TEXT}, "eos_token_id: 49407 is outside the vocabulary of 50"),
        (
            {"text_config": {**TEXT, "rope": 1, "eos_token_id": 2}},
            r"\['rope'\] are not",
        ),
        ({"projection_dim": "wide"}, "projection_dim: expected an integer, got 'wide'"),
    ],
)
def test_other_text_towers_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = Source(str(sources.write(tmp_path / "in", whole("first 49") | fields, {})))
    with pytest.raises(ConfigError, match=message):
        detect_format(source).config(source)


@pytest.mark.parametrize("size", [56, 42, 70])
def test_larger_pictures_stretch_positions_as_transformers_does(
    size: int, tmp_path: Path
) -> None:
    config = CASES["2 x 2 patches"] | {"image_size": 42}
    model = reference(config)
    save(tmp_path / "in", state_of(model, config), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    ours = load_model(tmp_path / "out")
    pixels = pictures(size)[0]
    with torch.no_grad():
        output = model(to_torch(pixels), interpolate_pos_encoding=True)
        expected = model.post_layernorm(output.last_hidden_state)[:, 1:].numpy()
    result = our_features(ours, pixels)
    assert result.shape[1] == (size // 14) ** 2
    assert difference(result, expected) <= TOLERANCE


def veclip(tmp_path: Path, vocabulary: int, **files: Any) -> ImageConfig | None:
    text = TEXT | {"vocab_size": vocabulary, "eos_token_id": 1, "pad_token_id": 0}
    text |= {"hidden_act": "gelu"}
    vision = CASES["2 x 2 patches"] | {"hidden_act": "gelu"}
    config = {"model_type": "clip", "vision_config": vision, "text_config": text}
    source = Source(str(sources.write(tmp_path / "in", config, {}, **files)))
    found = detect_format(source).config(source)
    assert found.vision is not None
    assert found.text is not None
    assert found.vision.hidden_act == found.text.hidden_act == "gelu"
    assert (found.text.eos_token_id, found.text.pad_token_id) == (1, 0)
    return found.image


@pytest.mark.parametrize("vocabulary", [32_000, 32_100, 32_128])
def test_veclip_s_pictures_are_tensorflow_s(vocabulary: int, tmp_path: Path) -> None:
    image = veclip(tmp_path, vocabulary)
    assert image is not None
    assert (image.size, image.resize, image.resample) == (28, "crop", "bilinear")


def test_a_preprocessor_or_clip_s_tokens_tell_that_it_is_no_veclip(
    tmp_path: Path,
) -> None:
    crop = {"crop_size": 28, "size": {"shortest_edge": 32}}
    image = veclip(tmp_path / "a", 32_128, preprocessor_config=crop)
    assert image is not None
    assert (image.resample, image.crop_from) == ("bicubic", 32)
    image = veclip(tmp_path / "b", 49_408)
    assert image is not None
    assert (image.resample, image.crop_from) == ("bicubic", None)


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
        interpolation="bicubic",
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
