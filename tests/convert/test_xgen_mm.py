"""xGen-MM computes what its parts compute in plain PyTorch and transformers.

transformers has Phi-3; open_clip (which needs torchvision), the Perceiver and the rows
beside the vocabulary are written anew in ``xgen_oracle.py``.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import llava_oracle  # noqa: E402
import xgen_oracle  # noqa: E402
from parity import (  # noqa: E402
    Prompt,
    check_parity,
    our_logits,
    pictures,
    reinitialise,
    save,
    undetected_swaps,
)
from transformers import Phi3Config, Phi3ForCausalLM  # noqa: E402

from mm1_mlx.checkpoint import load_config, model_shapes  # noqa: E402
from mm1_mlx.convert import Source, convert, detect_format  # noqa: E402
from mm1_mlx.convert.expected import possible_shapes  # noqa: E402
from mm1_mlx.convert.plan import plan  # noqa: E402
from mm1_mlx.convert.shared import xgen_mm  # noqa: E402
from mm1_mlx.errors import CheckpointError, ConfigError  # noqa: E402
from mm1_mlx.prompt import encode_turns  # noqa: E402
from mm1_mlx.tokenizer import load_tokenizer  # noqa: E402

pytestmark = pytest.mark.reference

# The table has more rows than the tokenizer has tokens; three more lie beside it.
ROWS, KNOWN, ADDED, WIDTH, SIDE, LATENTS = 104, 94, 3, 32, 28, 6
DEPTH, HEADS, HEAD_DIM = 2, 2, 12
TEXT = {
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 3e-6,
    "rope_theta": 12345.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "sliding_window": 64,
}
# As the hub's config.json has it, but what is small.
CONFIG = {
    "architectures": ["XGenMMModelForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_xgenmm.XGenMMConfig"},
    "model_type": "xgenmm",
    "text_config": TEXT | {"initial_tokenizer_len": KNOWN, "model_type": "phi3"},
    "torch_dtype": "float32",
    "transformers_version": "4.41.0.dev0",
    "vision_encoder_config": {
        "anyres_patch_sampling": False,
        "image_aspect_ratio": "pad",
        "model_name": "tiny",
        "force_image_size": SIDE,
        "model_type": "xgenmm_vision_encoder",
    },
    "vision_tokenizer_config": {
        "model_type": "xgenmm_vision_tokenizer",
        "vis_feature_dim": WIDTH,
        "lang_embedding_dim": WIDTH,
        "num_vis_tokens": LATENTS,
    },
}
TINY = {
    "patch_size": 7,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(xgen_mm.ENCODERS, "tiny", TINY)
    for name in ("DEPTH", "HEADS", "HEAD_DIM"):
        monkeypatch.setattr(xgen_mm, name, globals()[name])


def reference(seed: int = 0, bias: bool = True) -> tuple[Any, Any]:
    """The forward pass and the model."""
    decoder = Phi3ForCausalLM(Phi3Config(**TEXT, attn_implementation="eager"))
    decoder.set_input_embeddings(xgen_oracle.Embedding(ROWS, KNOWN, ADDED, WIDTH))
    decoder.lm_head = xgen_oracle.Head(WIDTH, ROWS, KNOWN, ADDED, bias)
    model = xgen_oracle.XGenMM(
        xgen_oracle.Encoder(SIDE, 7, WIDTH, 4, 2),
        xgen_oracle.Perceiver(WIDTH, WIDTH, LATENTS, DEPTH, HEADS, HEAD_DIM),
        decoder,
    ).eval()
    reinitialise(model, seed)
    return llava_oracle.forward_of(model.encode, decoder, KNOWN), model


PROMPT = Prompt.make(KNOWN, LATENTS, KNOWN)


@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_greedy_tokens_equal_the_oracle(bias: bool, tmp_path: Path) -> None:
    forward, model = reference(bias=bias)
    save(tmp_path / "in", model.state_dict(), CONFIG, shards=2)
    convert(str(tmp_path / "in"), tmp_path / "out")
    made = load_config(tmp_path / "out").decoder
    assert made is not None
    assert (made.head_bias, made.vocab_size) == (bias, KNOWN + ADDED)
    check_parity(tmp_path / "out", forward, PROMPT, pictures(SIDE))


def test_tokens_beside_the_table_have_rows_of_their_own(tmp_path: Path) -> None:
    forward, model = reference()
    save(tmp_path / "in", model.state_dict(), CONFIG)
    convert(str(tmp_path / "in"), tmp_path / "out")
    beside = Prompt([5, KNOWN + 1, 7, KNOWN + 2, 9, KNOWN], None)
    # Nothing stands in the last one's place here: it is a token as others are.
    check_parity(tmp_path / "out", lambda t, _: forward(t, None), beside, [None])


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    _, model = reference()
    save(tmp_path / "in", model.state_dict(), CONFIG)
    convert(str(tmp_path / "in"), tmp_path / "out")
    pixels = pictures(SIDE)[0]
    count, unnoticed = undetected_swaps(
        tmp_path / "in", tmp_path / "out", lambda m: our_logits(m, PROMPT, pixels)
    )
    assert count > 100
    assert unnoticed == []


def test_a_tied_head_has_no_bias(tmp_path: Path) -> None:
    decoder = read(tmp_path, CONFIG).decoder
    with pytest.raises(
        ConfigError, match="head_bias: a head tied to the embedding has"
    ):
        replace(decoder, head_bias=True, tie_word_embeddings=True)


def test_rows_that_are_missing_are_named(tmp_path: Path) -> None:
    _, model = reference()
    state = model.state_dict()
    beside = "vlm.lang_model.model.embed_tokens.additional_embedding.weight"
    del state[beside]
    save(tmp_path / "in", state, CONFIG)
    with pytest.raises(
        CheckpointError, match=f"belongs with '{beside}', which is miss"
    ):
        convert(str(tmp_path / "in"), tmp_path / "out")


def read(tmp_path: Path, config: dict[str, Any], **files: Any) -> Any:
    folder = save(tmp_path / "in", {}, config)
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    source = Source(str(folder))
    return detect_format(source).config(source)


def test_the_config_is_the_source_s(tmp_path: Path) -> None:
    made = read(tmp_path, CONFIG)
    decoder, connector = made.decoder, made.connector
    assert (decoder.rms_norm_eps, decoder.rope_theta) == (3e-6, 12345.0)
    assert (decoder.hidden_act, decoder.sliding_window) == ("silu", 64)
    assert made.vision.hidden_act == "quick_gelu"
    assert (made.vision.layer_norm_eps, made.vision.feature_layer) == (1e-5, -1)
    assert made.vision.apply_post_norm
    assert made.vision.drop_cls
    assert (connector.depth, connector.layer_norm_eps) == (DEPTH, 1e-5)
    assert (connector.num_image_tokens, connector.intermediate_size) == (LATENTS, 128)
    assert (made.image.resize, made.image.tiling) == ("squash", None)
    prompt = made.prompt
    assert prompt.template == "xgen_mm"
    assert prompt.image_token_id == KNOWN
    assert prompt.eos_token_ids == (2, KNOWN + 2)


# The hub's config.json of xgen-mm-phi3-mini-base-r-v1 and its processor's.
PUBLISHED = CONFIG | {
    "text_config": {
        "initial_tokenizer_len": 32012,
        "model_type": "phi3",
        "sliding_window": 2047,
        "torch_dtype": "bfloat16",
    },
    "vision_encoder_config": {
        "anyres_patch_sampling": False,
        "image_aspect_ratio": "pad",
        "model_type": "xgenmm_vision_encoder",
    },
    "vision_tokenizer_config": {"model_type": "xgenmm_vision_tokenizer"},
}
PROCESSOR = {
    "auto_map": {"AutoImageProcessor": "image_processing_xgenmm.XGenMMImageProcessor"},
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "XGenMMImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation_mode": "bicubic",
    "resize_mode": "squash",
    "size": [378, 378],
}


def test_the_published_sizes_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """662 tensors of 18.34 GB in float32, as the hub's index and shards have."""
    for name, number in (("DEPTH", 6), ("HEADS", 16), ("HEAD_DIM", 96)):
        monkeypatch.setattr(xgen_mm, name, number)
    with torch.device("meta"):
        decoder = Phi3ForCausalLM(Phi3Config(sliding_window=2047))
        decoder.set_input_embeddings(xgen_oracle.Embedding(32064, 32012, 3, 3072))
        decoder.lm_head = xgen_oracle.Head(3072, 32064, 32012, 3, True)
        encoder = xgen_oracle.Encoder(378, 14, 1280, 16, 32)
        for block in encoder.transformer.resblocks:
            block.mlp.c_fc = torch.nn.Linear(1280, 5120)
            block.mlp.c_proj = torch.nn.Linear(5120, 1280)
        encoder.proj = torch.nn.Parameter(torch.zeros(1280, 1024))
        perceiver = xgen_oracle.Perceiver(1280, 3072, 128, 6, 16, 96)
        state = xgen_oracle.XGenMM(encoder, perceiver, decoder).state_dict()
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    assert len(shapes) == 662
    assert round(4 * sum(x.numel() for x in state.values()) / 1e9, 2) == 18.34
    folder = save(tmp_path / "in", {}, PUBLISHED)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    weight_map = dict.fromkeys(shapes, "model.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = Source(str(folder))
    format = detect_format(source)
    made = format.config(source)
    assert made.decoder is not None
    assert made.decoder.vocab_size == 32_015
    assert made.num_image_tokens == 128
    assert made.image is not None
    assert made.image.size == 378
    wanted = model_shapes(made)
    result = plan(format.rules(source), shapes, wanted, possible_shapes(made))
    assert result.dropped == ("vlm.vision_encoder.proj",)


def test_prompts_have_the_tokens_that_the_tokenizer_lacks(
    tmp_path: Path, spm_folder: Path
) -> None:
    prompt = read(tmp_path, CONFIG).prompt
    tokenizer = load_tokenizer(spm_folder, prompt)
    known = len(tokenizer.hf.get_vocab())
    turns = [
        ("user", [None, "a?"]),
        ("assistant", ["b"]),
        ("user", [None, "c <image>"]),
    ]
    tokens = encode_turns(turns, prompt, tokenizer)
    image = tokenizer.image_id
    ends = tokenizer.hf.convert_tokens_to_ids("<|endofchunk|>")
    # "<image>" is the test tokenizer's own; the others follow its files' tokens.
    assert (ends, tokenizer.hf.convert_tokens_to_ids("<image placeholder>")) == (
        known - 1,
        known - 2,
    )
    assert tokens.count(image) == 2
    assert tokens.count(ends) == 1
    assert tokens.index(ends) < len(tokens) - 1 - tokens[::-1].index(image)


def test_what_stands_after_a_picture_may_be_set(
    tmp_path: Path, spm_folder: Path
) -> None:
    prompt = read(tmp_path, CONFIG).prompt
    filled = replace(prompt, after_image="<image placeholder>" * 3)
    tokenizer = load_tokenizer(spm_folder, filled)
    tokens = encode_turns([("user", [None, "a?"])], filled, tokenizer)
    filler = tokenizer.hf.convert_tokens_to_ids("<image placeholder>")
    place = tokens.index(tokenizer.image_id)
    assert tokens[place + 1 : place + 4] == [filler] * 3


def section(name: str, **fields: Any) -> dict[str, Any]:
    return {name: CONFIG[name] | fields}  # type: ignore[operator]


def encoder(**fields: Any) -> dict[str, Any]:
    return section("vision_encoder_config", **fields)


def connector(**fields: Any) -> dict[str, Any]:
    return section("vision_tokenizer_config", **fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            encoder(anyres_patch_sampling=True),
            "'anyres' gives the Perceiver stripes acro",
        ),
        (encoder(image_aspect_ratio="anyres"), "'anyres' gives the Perceiver stripes"),
        # As its code has it where the config says nothing.
        ({"vision_encoder_config": {}}, "'anyres' gives the Perceiver stripes across"),
        (
            encoder(model_name="google/siglip-so400m-patch14-384"),
            "the SigLIP encoder of xGen-MM 1.5 does not run here; version 1 does",
        ),
        (
            encoder(model_name="ViT-B-32"),
            "model_name: 'ViT-B-32' is not supported; sup",
        ),
        (encoder(surprise=1), r"field\(s\) \['surprise'\] are not known here"),
        (
            connector(repeat_latents=True),
            r"field\(s\) \['repeat_latents'\] are not known",
        ),
        (connector(vis_feature_dim=64), "vis_feature_dim: 64 is not supported; suppo"),
        (connector(lang_embedding_dim=64), "lang_embedding_dim: 64 is not supported"),
        (
            section("text_config", model_type="mpt"),
            "text_config: model type 'mpt' is not supported",
        ),
        ({"surprise": 1}, r"XGenMMConfig: field\(s\) \['surprise'\] are not known"),
    ],
)
def test_what_is_not_understood_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, CONFIG | changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resize_mode": "shortest"}, "resize_mode: 'shortest' is not supported"),
        ({"interpolation_mode": "bilinear"}, "interpolation_mode: 'bilinear' is not"),
        ({"size": [384, 384]}, r"size: \[384, 384\] is not supported"),
    ],
)
def test_pictures_that_are_made_otherwise_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    processor = PROCESSOR | {"size": [SIDE, SIDE]} | fields
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, CONFIG, preprocessor_config=processor)


def test_the_siglip_of_version_1_5_is_known_by_its_tensors(tmp_path: Path) -> None:
    name = "vlm.vision_encoder.embeddings.position_embedding.weight"
    folder = save(tmp_path / "in", {name: torch.zeros(4, 4)}, CONFIG)
    with pytest.raises(ConfigError, match=r"the SigLIP encoder of xGen-MM 1\.5 does"):
        convert(str(folder), tmp_path / "out")
