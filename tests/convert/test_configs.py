"""Foreign config files are read in full, or refused by the field that is not known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sources
from PIL import Image

from mm1_mlx.config import ImageConfig, MM1Config, PromptConfig, RopeScaling
from mm1_mlx.convert import Source, detect_format
from mm1_mlx.errors import CheckpointError, ConfigError, MM1Error
from mm1_mlx.image import load_picture
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD, VIT_H_14_378

# What transformers 4 wrote of every nested config.
DUMP = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "diversity_penalty": 0.0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "pruned_heads": {},
    "repetition_penalty": 1.0,
    "return_dict": True,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_word_embeddings": True,
    "top_k": 50,
    "top_p": 1.0,
    "transformers_version": "4.31.0",
    "typical_p": 1.0,
}
# llava-hf/llava-1.5-7b-hf: all else is the classes' defaults.
LLAVA_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
HONEYBEE_7B = {
    "architectures": ["HoneybeeForConditionalGeneration"],
    "model_type": "",
    "is_composition": True,
    "lm_config": DUMP | {"pretrained_lm_name_or_path": "lmsys/vicuna-7b-v1.5"},
    "projector_config": DUMP
    | {
        "projector_type": "c-abs",
        "depth": 3,
        "mlp_depth": 2,
        "hidden_size": 1024,
        "num_eos_tokens": 0,
        "pos_emb": True,
        "feature_layer_index": -1,
        "prenorm": False,
        "num_query_tokens": 144,
        "encoder_hidden_size": 1024,
        "output_hidden_size": 4096,
    },
    "text_config": DUMP
    | {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "vision_config": DUMP
    | LLAVA_7B["vision_config"]  # type: ignore[operator]
    | {
        "encoder_type": "openai.clip",
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "image_size": 224,
        "model_type": "",
        "pretrained_vision_name_or_path": "openai/clip-vit-large-patch14",
    },
    "tie_word_embeddings": True,
}
DFN_H = {
    "model_type": "clip",
    "projection_dim": 1024,
    "logit_scale_init_value": 2.6592,
    "text_config": {"hidden_size": 1024},
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 378,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    },
}


def read(tmp_path: Path, config: Any, **files: Any) -> MM1Config:
    """The config that the folder's format makes of these files."""
    source = Source(str(sources.write(tmp_path / "in", config, {}, **files)))
    return detect_format(source).config(source)


def test_the_published_llava_config_is_understood(tmp_path: Path) -> None:
    config = read(tmp_path, LLAVA_7B)
    assert config.decoder is not None
    assert config.decoder.to_dict() == {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "rope_interleaved": False,
        "rope_scaling": None,
        "hidden_act": "silu",
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": None,
        "sliding_window": None,
        "moe": None,
        "norm": "rms",
        "rotary_dim": None,
        "embedding_scale": 1.0,
        "layer_sizes": None,
        "head_bias": False,
    }
    assert config.vision is not None
    assert config.vision.hidden_act == "quick_gelu"
    assert config.vision.layer_norm_eps == 1e-5
    assert config.vision.depth == 23
    assert not config.vision.apply_post_norm
    assert config.num_image_tokens == 576
    assert config.prompt == PromptConfig(
        template="llava", image_token_id=32000, eos_token_ids=(2,)
    )


def test_a_whole_dump_of_honeybee_s_config_is_understood(tmp_path: Path) -> None:
    config = read(tmp_path, HONEYBEE_7B)
    assert config.num_image_tokens == 144
    assert config.connector is not None
    assert config.connector.num_features == 256
    assert config.image == ImageConfig(
        size=224, resize="squash", mean=CLIP_MEAN, std=CLIP_STD
    )


def test_mm1_s_public_encoder_is_the_preset_s(tmp_path: Path) -> None:
    vision = read(tmp_path, DFN_H).vision
    assert vision is not None
    assert vision.projection_size == 1024
    # The preset leaves out CLIP's space, and stretches positions as axlearn does.
    assert (
        replace(vision, projection_size=None, interpolation="bicubic_antialias")
        == VIT_H_14_378
    )


def test_old_clip_configs_repeat_their_vision_half(tmp_path: Path) -> None:
    halves = {"vision_config_dict": {"hidden_act": "gelu"}}
    vision = read(tmp_path, DFN_H | halves).vision
    assert vision is not None
    assert vision.hidden_act == "gelu"


def test_qwen3_has_a_head_size_of_its_own(tmp_path: Path) -> None:
    decoder = read(tmp_path, {"model_type": "qwen3", "hidden_size": 2560}).decoder
    assert decoder is not None
    assert decoder.head_dim == 128
    assert decoder.qk_norm == "head"
    assert not decoder.qkv_bias


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 4}, None),
        ({"use_sliding_window": True, "sliding_window": 4}, None),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, 4),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["sliding_attention"] * 2,
            },
            4,
        ),
    ],
)
def test_qwen_s_windows_are_all_layers_or_none(
    fields: dict[str, Any], window: int | None, tmp_path: Path
) -> None:
    values = sources.LLAMA | {"model_type": "qwen2"} | fields
    decoder = read(tmp_path, values).decoder
    assert decoder is not None
    assert decoder.sliding_window == window


def test_linear_rope_of_transformers_4_is_read(tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    decoder = read(tmp_path, sources.LLAMA | {"rope_scaling": scaling}).decoder
    assert decoder is not None
    assert decoder.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)


LLAMA, LLAVA, CLIP = sources.LLAMA, sources.LLAVA, sources.CLIP


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        (
            LLAMA,
            {"hidden_act": "relu"},
            "hidden_act: activation 'relu' is not supported",
        ),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not"),
        (
            LLAMA,
            {"embedding_multiplier": 12.0},
            r"\['embedding_multiplier'\] are not kn",
        ),
        (LLAMA, {"attn_logit_softcapping": 50.0}, r"\['attn_logit_softcapping'\] are"),
        (
            LLAMA,
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "type 'yarn' is not",
        ),
        (
            LLAMA,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            r"rope: field\(s\) \['full_attention'\]",
        ),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope: field 'low_freq_factor' is missing",
        ),
        (LLAMA, {"hidden_size": "16"}, "hidden_size: expected an integer, got '16'"),
        (LLAMA, {"vocab_size": None}, "field 'vocab_size' is missing"),
        (
            LLAMA,
            {"num_attention_heads": 3},
            "is not a multiple of num_key_value_heads 2",
        ),
        (
            LLAMA | {"model_type": "qwen2"},
            {"use_sliding_window": True, "max_window_layers": 1},
            r"sliding windows in some layers only \(max_window_layers 1 of 2\)",
        ),
        (CLIP, {"num_channels": 4}, "num_channels: 4 is not supported; supported: 3"),
        (CLIP, {"image_size": [32, 16]}, r"image_size: \[32, 16\] is not one side"),
        (CLIP, {"use_head": True}, r"\['use_head'\] are not known here"),
        (
            LLAVA,
            {"vision_feature_layer": [-2, -5]},
            "expected an integer, got \\[-2, -5",
        ),
        (LLAVA, {"vision_feature_layer": 0}, "feature_layer: -3 is outside -2..-1"),
        (
            LLAVA,
            {
                "vision_feature_layer": 1,
                "vision_config": {"num_hidden_layers": "x"},
            },
            "num_hidden_layers: expected an integer, got 'x'",
        ),
        (LLAMA, {"hidden_size": 10**400}, "hidden_size: 10*... is larger than any mod"),
        (LLAVA, {"vision_feature_select_strategy": "cls"}, "'cls' is not supported"),
        (
            LLAVA,
            {"text_config": {"model_type": "gpt2"}},
            "model type 'gpt2' is not sup",
        ),
        (
            LLAVA,
            {"text_config": "llama"},
            "text_config: expected an object, got 'llama'",
        ),
        (
            LLAVA,
            {"vision_config": {"model_type": "siglip_vision_model"}},
            "model type 'siglip_vision_model' is not supported",
        ),
        (
            LLAVA,
            {"image_grid_pinpoints": [[336, 672]]},
            r"\['image_grid_pinpoints'\] are",
        ),
        (
            HONEYBEE_7B,
            {
                "projector_config": {
                    "projector_type": "d-abs",
                    "feature_layer_index": -1,
                }
            },
            "projector_type: 'd-abs' is not supported; supported: 'c-abs'",
        ),
        (
            HONEYBEE_7B,
            {"lm_config": {"delta_model_name_or_path": "vicuna-delta"}},
            "delta_model_name_or_path: 'vicuna-delta' is not supported; supported: leav",
        ),
        (
            HONEYBEE_7B,
            {"text_config": None},
            "HoneybeeConfig: field 'text_config' is missing",
        ),
    ],
)
def test_fields_that_change_the_model_are_refused_by_name(
    base: dict[str, Any], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if base is LLAMA and "num_attention_heads" in fields:
        base = base | {"num_key_value_heads": 2}
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, base | fields)


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    fields = {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(CheckpointError, match="is quantized"):
        read(tmp_path, LLAMA | fields)


SIZE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("values", "resize"),
    [
        (None, "crop"),
        ({"size": {"shortest_edge": 32}, "crop_size": SIZE}, "crop"),
        ({"size": 32, "crop_size": 32, "feature_extractor_type": "CLIP"}, "crop"),
        ({"size": SIZE, "do_center_crop": False}, "squash"),
        ({"size": SIZE, "do_center_crop": False, "crop_size": 24}, "squash"),
        ({"size": SIZE, "do_center_crop": True, "crop_size": SIZE}, "squash"),
        ({"size": {"shortest_edge": 32}, "crop_size": SIZE, "do_pad": True}, "pad"),
        ({"size": SIZE, "image_aspect_ratio": "pad"}, "pad"),
    ],
)
def test_the_preprocessor_says_how_pictures_become_square(
    values: Any, resize: str, tmp_path: Path
) -> None:
    files = {} if values is None else {"preprocessor_config": values}
    image = read(tmp_path, CLIP, **files).image
    assert image is not None
    assert image.resize == resize
    assert (image.mean, image.std) == (CLIP_MEAN, CLIP_STD)


def test_transformers_5_s_one_processor_file_is_read(tmp_path: Path) -> None:
    values = {"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}}
    image = read(tmp_path, CLIP, processor_config=values).image
    assert image == ImageConfig(
        size=32, resize="crop", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    )


@pytest.mark.reference
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("clip", {"size": {"shortest_edge": 32}, "crop_size": SIZE}),
        ("clip", {"size": {"shortest_edge": 37}, "crop_size": SIZE}),
        ("clip", {"size": SIZE, "do_center_crop": False}),
        ("clip", {"size": SIZE, "do_center_crop": True, "crop_size": SIZE}),
        ("llava", {"size": {"shortest_edge": 32}, "crop_size": SIZE}),
        ("llava", {"size": {"shortest_edge": 32}, "crop_size": SIZE, "do_pad": True}),
    ],
)
@pytest.mark.parametrize("statistics", [{}, {"image_mean": [0.5, 0.25, 0.75]}])
def test_pictures_are_made_as_the_source_s_processor_makes_them(
    kind: str, options: dict[str, Any], statistics: dict[str, Any], tmp_path: Path
) -> None:
    """Not square ones, on which the ways differ."""
    module = pytest.importorskip(
        f"transformers.models.{kind}.image_processing_pil_{kind}"
    )
    name = {"clip": "CLIPImageProcessorPil", "llava": "LlavaImageProcessorPil"}[kind]
    processor = getattr(module, name)(**options, **statistics)
    processor.save_pretrained(tmp_path / "processor")
    (path,) = (tmp_path / "processor").iterdir()
    files = {path.stem: json.loads(path.read_text())}
    section = read(tmp_path / "clip", CLIP, **files).image
    assert section is not None
    rng = np.random.default_rng(0)
    for width, height in ((97, 61), (45, 120), (64, 64)):
        noise = rng.integers(0, 256, (height // 3, width // 3, 3), np.uint8)
        photo = Image.fromarray(noise).resize((width, height))
        expected = np.asarray(processor(photo)["pixel_values"][0]).transpose(1, 2, 0)
        tile = load_picture(photo, section).tiles[0]
        np.testing.assert_allclose(tile, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resample": 2}, "resample: 2 is not supported; supported: 3"),
        ({"do_normalize": False}, "do_normalize: False is not supported"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor: 0.0078.* is not supported"),
        ({"crop_size": 24}, "crop_size 24 do not make the encoder's 32 x 32"),
        ({"size": 24}, "size 24 and crop_size None do not make the encoder's 32 x 32"),
        (
            {"do_center_crop": False, "size": {"shortest_edge": 32}},
            "without do_center_crop makes pictures of many sizes",
        ),
        (
            {"do_center_crop": False, "size": 32},
            "without do_center_crop makes pictures of many sizes",
        ),
        ({"offset": [1, 2]}, r"\['offset'\] are not known here"),
    ],
)
def test_other_preprocessing_is_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, CLIP, preprocessor_config=values)


@pytest.mark.parametrize(
    "name",
    [
        *("preprocessor_config", "processor_config", "generation_config"),
        *("tokenizer_config", "added_tokens"),
    ],
)
@pytest.mark.parametrize("content", [[1], "x", 3])
def test_files_that_hold_no_object_are_named(
    name: str, content: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"{name}.json is not a JSON object"):
        read(tmp_path, LLAVA, **{name: content})


ODD = [0, -1, "x", [], {}, 1.5, True, [1], {"a": 1}, {"a": [1]}]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("base", [LLAMA, CLIP, LLAVA, DFN_H])
def test_odd_values_are_taken_or_refused_but_never_crash(
    base: dict[str, Any], odd: Any, tmp_path: Path
) -> None:
    refused = 0
    for i, key in enumerate(base):
        try:
            read(tmp_path / str(i), base | {key: odd})
        except MM1Error:
            refused += 1
    assert refused > 0


QWEN = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "use_sliding_window": True,
    "max_window_layers": 32,
    "layer_types": ["full_attention"],
}


@pytest.mark.parametrize("odd", [None, *ODD], ids=repr)
@pytest.mark.parametrize(
    "base",
    [LLAVA_7B, HONEYBEE_7B, DFN_H, QWEN],
    ids=["llava", "honeybee", "dfn", "qwen"],
)
def test_odd_values_in_sections_are_taken_or_refused_but_never_crash(
    base: dict[str, Any], odd: Any, tmp_path: Path
) -> None:
    sections = {"": base} | {k: v for k, v in base.items() if isinstance(v, dict)}
    refused = 0
    for name, section in sections.items():
        for key in section:
            changed = section | {key: odd}
            config = base | {name: changed} if name else changed
            try:
                read(tmp_path / f"{name}-{key}", config)
            except MM1Error:
                refused += 1
    assert refused > 0


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_odd_chat_templates_are_taken_or_refused_but_never_crash(
    odd: Any, tmp_path: Path
) -> None:
    model = QWEN | {"layer_types": None}
    templates = (odd, [odd], [{"name": odd}], [{"name": "default", "template": odd}])
    for i, template in enumerate(templates):
        files = {"tokenizer_config": {"chat_template": template}}
        assert read(tmp_path / str(i), model, **files).prompt


@pytest.mark.parametrize("odd", ODD)
def test_odd_preprocessors_are_taken_or_refused_but_never_crash(
    odd: Any, tmp_path: Path
) -> None:
    keys = (
        "size",
        "crop_size",
        "resample",
        "rescale_factor",
        "image_mean",
        "image_std",
    )
    refused = 0
    for key in keys:
        try:
            read(tmp_path / key, CLIP, preprocessor_config={key: odd})
        except MM1Error:
            refused += 1
    assert refused > 0


PARTS = "{% for m in messages %}{% for c in m['content'] %}{{ c.text }}{% endfor %}"
STRING = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected", "content"),
    [
        (None, "plain", "string"),
        (STRING, "checkpoint", "string"),
        (PARTS, "checkpoint", "parts"),
        ("{% for x in message.content %}", "checkpoint", "parts"),
        ([{"name": "tool", "template": PARTS}], "plain", "string"),
        (
            [
                {"name": "tool", "template": PARTS},
                {"name": "default", "template": STRING},
            ],
            "checkpoint",
            "string",
        ),
    ],
)
def test_the_source_s_chat_template_is_used(
    template: Any, expected: str, content: str, tmp_path: Path
) -> None:
    prompt = read(tmp_path, LLAMA, tokenizer_config={"chat_template": template}).prompt
    assert prompt is not None
    assert (prompt.template, prompt.content) == (expected, content)


def test_template_files_go_before_the_tokenizer_s_config(tmp_path: Path) -> None:
    folder = sources.write(
        tmp_path / "in", LLAMA, {}, tokenizer_config={"chat_template": STRING}
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    source = Source(str(folder))
    prompt = detect_format(source).config(source).prompt
    assert prompt is not None
    assert prompt.content == "parts"
    (folder / "chat_template.jinja").write_text(STRING)
    prompt = detect_format(source).config(source).prompt
    assert prompt is not None
    assert prompt.content == "string"


def test_vicuna_is_told_by_its_name(tmp_path: Path) -> None:
    prompt = read(tmp_path, LLAMA | {"_name_or_path": "lmsys/vicuna-7b-v1.5"}).prompt
    assert prompt is not None
    assert prompt.template == "vicuna_v1"


@pytest.mark.parametrize(
    ("fields", "generation", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": [6, 7]}, (6, 7)),
        ({"eos_token_id": [5]}, None, (5,)),
        ({}, {"eos_token_id": None}, (2,)),
    ],
)
def test_generation_config_says_where_answers_end(
    fields: Any, generation: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    files = {} if generation is None else {"generation_config": generation}
    prompt = read(tmp_path, LLAMA | fields, **files).prompt
    assert prompt is not None
    assert prompt.eos_token_ids == expected


def test_an_end_that_is_no_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'</s>' is not a list"):
        read(tmp_path, LLAMA | {"eos_token_id": "</s>"})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"image_token_index": 60}, 60),
        # Out of the vocabulary of 64: the next that fits.
        ({"image_token_index": 64, "pad_token_id": 0}, 0),
        ({"pad_token_id": -1, "unk_token_id": 3}, 3),
        ({"eos_token_id": [9]}, 0),
    ],
)
def test_pictures_stand_on_a_token_of_the_vocabulary(
    fields: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    prompt = read(tmp_path, LLAMA | fields).prompt
    assert prompt is not None
    assert prompt.image_token_id == expected


def test_openclips_squash_wins_over_the_processors_crop(tmp_path: Path) -> None:
    """Apple's DFN5B was trained with squashed pictures; the HF file says crop."""
    files: dict[str, Any] = {
        "preprocessor_config": {"do_center_crop": True, "crop_size": 378, "size": 378}
    }
    image = read(tmp_path / "a", DFN_H, **files).image
    assert image is not None
    assert image.resize == "crop"
    files["open_clip_config"] = {"preprocess_cfg": {"resize_mode": "squash"}}
    image = read(tmp_path / "b", DFN_H, **files).image
    assert image is not None
    assert image.resize == "squash"
