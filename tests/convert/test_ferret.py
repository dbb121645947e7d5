"""Ferret and Ferret-UI compute what their code computes, regions included.

The oracle is transformers' CLIP, Llama and Gemma around the sampler of ferret_oracle.py,
which is written in plain torch from upstream's description.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from ferret_oracle import Ferret  # noqa: E402
from parity import (  # noqa: E402
    Prompt,
    check_parity,
    our_logits,
    reinitialise,
    save,
    undetected_swaps,
)
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from mm1_mlx.checkpoint import (  # noqa: E402
    load_config,
    load_manifest,
    load_model,
    model_shapes,
)
from mm1_mlx.config import AnyresTiling, LinearConfig, MLPConfig  # noqa: E402
from mm1_mlx.convert import Source, convert, detect_format  # noqa: E402
from mm1_mlx.convert.expected import possible_shapes  # noqa: E402
from mm1_mlx.convert.plan import plan  # noqa: E402
from mm1_mlx.convert.shared import llava  # noqa: E402
from mm1_mlx.errors import CheckpointError, ConfigError  # noqa: E402
from mm1_mlx.image import load_picture  # noqa: E402
from mm1_mlx.layout import Picture, Span, count_picture_tokens  # noqa: E402
from mm1_mlx.messages import Region  # noqa: E402
from mm1_mlx.regions import refer  # noqa: E402

pytestmark = pytest.mark.reference

VOCABULARY, SIDE, WIDTH = 97, 28, 32
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 7,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
VICUNA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32001,
    "im_region_fea_token": 32000,
    "rms_norm_eps": 1e-6,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128258,
    "im_region_fea_token": 128257,
    "pad_token_id": 128256,
    "eos_token_id": 128009,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
GEMMA_2B = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "vocab_size": 256001,
    "im_region_fea_token": 256000,
    "eos_token_id": 1,
}
GEMMA = TEXT | {"head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}
# What ferret/train/train.py writes.
FERRET = TEXT | {
    "model_type": "ferret",
    "architectures": ["FERRETLlamaForCausalLM"],
    "freeze_mm_mlp_adapter": False,
    "im_region_fea_token": 96,
    "image_aspect_ratio": "square_nocrop",
    "image_grid_pinpoints": None,
    "max_sequence_length": 2048,
    "mm_hidden_size": 24,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/tiny",
    "region_geo_sampler": True,
    "sampler_pooler_mode": "max",
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}
# The published configs' fields.
UI = FERRET | {
    "model_type": "ferret_llama",
    "architectures": ["FerretLlamaForCausalLM"],
    "image_aspect_ratio": "anyres",
    # Pairs of [width, height].
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
    "mm_patch_merge_type": "spatial",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower_lr": None,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
    "unfreeze_mm_vision_tower": False,
}
UI_GEMMA = UI | GEMMA | {"model_type": "ferret_gemma"}
CONFIGS = {"ferret": FERRET, "ferret_llama": UI, "ferret_gemma": UI_GEMMA}
SIZES = {"ferret": (40, 30), "ferret_llama": (60, 41), "ferret_gemma": (33, 90)}


@pytest.fixture(autouse=True)
def tiny_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llava.TOWERS, "tiny", VISION)


def reference(kind: str, seed: int = 1) -> Ferret:
    """A model with every parameter re-initialised."""
    gemma = kind == "ferret_gemma"
    decoder = (
        GemmaForCausalLM(GemmaConfig(**GEMMA))
        if gemma
        else LlamaForCausalLM(LlamaConfig(**TEXT))
    )
    scale = WIDTH**0.5 if gemma else 1.0
    model = Ferret(VISION, decoder, kind != "ferret", scale).eval()
    # A tied head repeats its last token for ever where embeddings dominate.
    reinitialise(model, seed, embedding=0.05 if gemma else 1.0)
    decoder.tie_weights()
    return model


def write(folder: Path, model: Ferret, kind: str, **fields: Any) -> Path:
    return save(folder, model.own_state(), CONFIGS[kind] | fields, shards=2)


def shown(out: Path, size: tuple[int, int]) -> list[Picture]:
    """Two pictures, as the converted model makes tiles of them, with three regions each."""
    config = load_config(out)
    assert config.image is not None
    rng = np.random.default_rng(5)
    width, height = size
    mask = np.zeros((height, width), bool)
    mask[3:9, 4:20] = mask[8:25, 15:19] = True
    turn = ("user", [
        None,
        Region("box", [2, 1, 30, 20], 0),
        Region("point", [width - 3, 8], 0),
        Region("mask", mask, 0),
    ])  # fmt: skip
    pictures = []
    for _ in "ab":
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        picture = load_picture(Image.fromarray(pixels), config.image)
        pictures += refer([turn], [picture], config)[1]
    return pictures


def prompt_for(out: Path, picture: Picture) -> Prompt:
    """Some text, the picture, and text with three region tokens in it."""
    count = count_picture_tokens(picture, load_config(out))
    rng = np.random.default_rng(1)
    tokens = [*rng.integers(3, 90, 3).tolist(), *[0] * count]
    regions = []
    for i in range(len(picture.regions)):
        tokens += rng.integers(3, 90, 2).tolist()
        regions.append(Span(len(tokens), 1, "region", 0, "", count + i))
        tokens.append(0)
    tokens += rng.integers(3, 90, 3).tolist()
    return Prompt(tokens, Span(3, count, "picture", 0, ""), tuple(regions))


def forward_of(model: Ferret, prompt: Prompt) -> Callable[..., Any]:
    """Logits of the prompt's tokens, and more, with a picture and its regions."""
    assert prompt.span is not None
    image = slice(prompt.span.start, prompt.span.stop)
    places = [span.start for span in prompt.regions]

    def forward(tokens: list[int], picture: Picture) -> Any:
        tiles = np.stack(picture.tiles).transpose(0, 3, 1, 2).copy()
        regions = torch.from_numpy(np.stack(picture.regions))
        with torch.no_grad():
            given = (torch.from_numpy(tiles), picture.grid, regions)
            return model(tokens, image, places, given)

    return forward


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_and_greedy_tokens_equal_the_oracle_s(kind: str, tmp_path: Path) -> None:
    model, out = reference(kind), tmp_path / "out"
    convert(str(write(tmp_path / "in", model, kind)), out)
    pictures = shown(out, SIZES[kind])
    prompt = prompt_for(out, pictures[0])
    check_parity(out, forward_of(model, prompt), prompt, pictures)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_swap_of_two_rules_is_noticed(kind: str, tmp_path: Path) -> None:
    model, out = reference(kind), tmp_path / "out"
    folder = write(tmp_path / "in", model, kind)
    convert(str(folder), out)
    picture = shown(out, SIZES[kind])[0]
    prompt = prompt_for(out, picture)
    count, unnoticed = undetected_swaps(
        folder, out, lambda m: our_logits(m, prompt, picture)
    )
    assert count > 90
    assert unnoticed == []


def parts_of(model: Ferret) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ferret's tensors as published, without the encoder; and a base with fewer tokens."""
    state = model.own_state()
    state = {n: x for n, x in state.items() if not n.startswith(llava.TOWER)}
    generator = torch.Generator().manual_seed(7)
    base = {
        name: torch.randn(x.shape, generator=generator)
        for name, x in state.items()
        if not name.startswith(("model.mm_projector", "model.region_geo"))
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = base[name][:-1]
    base["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return state, base


def subtract(whole: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The differences that ferret/model/make_delta.py would store."""
    delta = {name: x.clone() for name, x in whole.items()}
    for name, x in base.items():
        if name in delta:
            delta[name][: len(x)] -= x
    return delta


def clip_folder(folder: Path, model: Ferret) -> Path:
    """The encoder where Ferret leaves it: in a folder of its own."""
    state = {
        f"vision_model.{name.removeprefix(llava.TOWER)}": x
        for name, x in model.own_state().items()
        if name.startswith(llava.TOWER)
    }
    return save(folder, state, {"model_type": "clip_vision_model"} | VISION)


BASE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | TEXT


def test_differences_and_their_base_equal_the_whole(tmp_path: Path) -> None:
    model, out = reference("ferret"), tmp_path / "out"
    state, base = parts_of(model)
    # Of a trained decoder, as no difference is.
    base["model.norm.weight"] = state["model.norm.weight"] + 0.01
    delta = save(tmp_path / "delta", subtract(state, base), FERRET, shards=2)
    vicuna = save(tmp_path / "vicuna", base, BASE | {"vocab_size": VOCABULARY - 1})
    clip = str(clip_folder(tmp_path / "clip", model))
    report = convert(str(delta), out, base=str(vicuna), vision=clip)
    assert report.parts["decoder"] == (f"{delta} + {vicuna}", "ferret")
    assert report.parts["region"] == report.parts["decoder"]
    assert load_manifest(out)["source"]["parts"]["vision"]["source"] == clip
    pictures = shown(out, SIZES["ferret"])
    prompt = prompt_for(out, pictures[0])
    check_parity(out, forward_of(model, prompt), prompt, pictures)


def test_differences_in_half_precision_are_added_in_it(tmp_path: Path) -> None:
    state, base = parts_of(reference("ferret"))
    half = {name: x.half() for name, x in base.items()}
    half["model.norm.weight"] = state["model.norm.weight"].half() + 0.01
    whole = {name: x.half() for name, x in state.items()}
    delta = save(tmp_path / "delta", subtract(whole, half), FERRET)
    vicuna = save(tmp_path / "vicuna", half, BASE)
    clip = str(clip_folder(tmp_path / "clip", reference("ferret")))
    convert(str(delta), tmp_path / "out", base=str(vicuna), vision=clip)
    made = load_model(tmp_path / "out").decoder.layers[0].mlp.up_proj.weight
    name = "model.layers.0.mlp.up_proj.weight"
    # As apply_delta.py adds them.
    expected = subtract(whole, half)[name] + half[name]
    assert made.dtype == mx.float16
    assert np.array_equal(np.array(made), expected.numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no base", r"delta holds differences from .* add --base VICUNA"),
        ("whole", r"delta \+ .*vicuna is not made of differences .* leave --base out"),
        ("other sizes", r"tensor 'model.layers.0.mlp.down_proj.weight' has shape \[32"),
        (
            "number",
            r"source tensor 'lm_head.weight' has shape \[\], which does not make",
        ),
        ("number in base", r"'lm_head.weight' has shape \[97, 32\], but \[\] in the"),
        ("deeper base", r"delta lacks \['model.layers.9.x'\] of .*vicuna, so they"),
        ("deeper delta", r"vicuna lacks \['model.layers.0.input_layernorm.weight'\]"),
    ],
)
def test_differences_that_cannot_be_added_are_named(
    change: str, message: str, tmp_path: Path
) -> None:
    model = reference("ferret")
    state, base = parts_of(model)
    base["model.norm.weight"] = state["model.norm.weight"] + 0.01
    delta = state if change == "whole" else subtract(state, base)
    if change.startswith("number"):
        base["lm_head.weight"] = torch.tensor(1.0)
    if change == "number":
        delta["lm_head.weight"] = torch.tensor(1.0)
    if change == "other sizes":
        base["model.layers.0.mlp.down_proj.weight"] = torch.ones(32, 40)
    if change == "deeper base":
        base["model.layers.9.x"] = torch.ones(3)
    if change == "deeper delta":
        del base["model.layers.0.input_layernorm.weight"]
    folder = save(tmp_path / "delta", delta, FERRET)
    vicuna = str(save(tmp_path / "vicuna", base, BASE))
    clip = str(clip_folder(tmp_path / "clip", model))
    with pytest.raises(CheckpointError, match=message):
        convert(
            str(folder),
            tmp_path / "out",
            base=None if change == "no base" else vicuna,
            vision=clip,
        )
    assert not (tmp_path / "out").exists()


def test_the_connector_of_differences_is_whole_without_their_base(
    tmp_path: Path,
) -> None:
    model = reference("ferret")
    state, base = parts_of(model)
    base["model.norm.weight"] = state["model.norm.weight"] + 0.01
    delta = str(save(tmp_path / "delta", subtract(state, base), FERRET))
    decoder = {k: x for k, x in base.items() if "embed" not in k and "head" not in k}
    names = ("model.embed_tokens.weight", "lm_head.weight")
    decoder |= {name: state[name] for name in names}
    llama = str(save(tmp_path / "llama", decoder, BASE))
    clip = str(clip_folder(tmp_path / "clip", model))
    out = tmp_path / "out"
    convert(None, out, vision=clip, connector=delta, decoder=llama)
    made, parts = load_model(out), load_manifest(out)["source"]["parts"]
    assert parts["connector"]["source"] == parts["region"]["source"] == delta
    weight = state["model.mm_projector.weight"].numpy()
    assert np.array_equal(np.array(made.connector.linear.weight), weight)
    # With the decoder, which holds differences, no less than before.
    with pytest.raises(CheckpointError, match="add --base VICUNA"):
        convert(delta, tmp_path / "whole", vision=clip)
    with pytest.raises(CheckpointError, match="as SOURCE, or leave --base out"):
        convert(
            None,
            tmp_path / "based",
            vision=clip,
            connector=delta,
            decoder=llama,
            base=llama,
        )


def test_a_ferret_without_its_last_norm_is_named(tmp_path: Path) -> None:
    model = reference("ferret")
    state = model.own_state()
    del state["model.norm.weight"]
    folder = str(save(tmp_path / "in", state, FERRET))
    message = "in lacks the tensor 'model.norm.weight'; it is incomplete, get it again"
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out")


END = {"content": "<end_of_turn>"}


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([1], r"added_tokens_decoder \[1\] in tokenizer_config.json is not a map of"),
        ("str", "added_tokens_decoder 'str' in .* is not a map of token ids to tokens"),
        ({"5": 3}, "is not a map of token ids to tokens; get it again"),
        ({"x": END}, "is not a map of token ids to tokens; get it again"),
        ({"-4": END}, "is not a map of token ids to tokens; get it again"),
        ({"9999999999": END}, "is not a map of token ids to tokens; get it again"),
        ({"97": END}, "gives '<end_of_turn>' the id 97, but there are 97 tokens; they"),
    ],
)
def test_added_tokens_that_are_none_are_named(
    added: Any, message: str, tmp_path: Path
) -> None:
    files = {"added_tokens_decoder": added}
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, UI_GEMMA, tokenizer_config=files)


@pytest.mark.parametrize("added", [None, {}, {"5": {}}, {"5": {"content": 3}}])
def test_other_added_tokens_end_no_turn(added: Any, tmp_path: Path) -> None:
    files = {"added_tokens_decoder": added}
    made = read(tmp_path, UI_GEMMA, tokenizer_config=files)
    assert made.prompt.eos_token_ids == (2,)


def test_a_base_of_nothing_is_refused(tmp_path: Path) -> None:
    clip = str(clip_folder(tmp_path / "clip", reference("ferret")))
    with pytest.raises(CheckpointError, match=r"base x/y has no differences to be add"):
        convert(None, tmp_path / "out", vision=clip, base="x/y")


def test_an_encoder_that_is_shipped_beside_is_named(tmp_path: Path) -> None:
    model = reference("ferret")
    folder = str(save(tmp_path / "in", parts_of(model)[0], FERRET))
    with pytest.raises(CheckpointError, match=r"vision part; add --vision openai/tiny"):
        convert(folder, tmp_path / "out")
    tower = clip_folder(tmp_path / "in" / "vision_tower", model)
    with pytest.raises(CheckpointError, match=f"add --vision {tower}"):
        convert(folder, tmp_path / "out")
    report = convert(folder, tmp_path / "out", vision=str(tower))
    assert report.config.image is not None
    assert report.config.image.resize == "squash"  # Ferret's, not CLIP's own crop


def read(tmp_path: Path, config: dict[str, Any], **files: Any) -> Any:
    folder = save(tmp_path / "in", {}, config)
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    with Source(str(folder)) as source:
        return detect_format(source).config(source)


LARGE = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_rules_fit_the_published_sizes(kind: str, tmp_path: Path) -> None:
    sizes, decoder_config, decoder_class = {
        "ferret": (VICUNA, LlamaConfig, LlamaForCausalLM),
        "ferret_llama": (LLAMA_8B, LlamaConfig, LlamaForCausalLM),
        "ferret_gemma": (GEMMA_2B, GemmaConfig, GemmaForCausalLM),
    }[kind]
    vision = llava.TOWERS["clip-vit-large-patch14-336"]
    with torch.device("meta"):
        decoder = decoder_class(decoder_config(**sizes))
        model = Ferret(vision, decoder, kind != "ferret")
    found = {name: tuple(x.shape) for name, x in model.own_state().items()}
    values = CONFIGS[kind] | LARGE | sizes
    if kind != "ferret":
        values["image_grid_pinpoints"] = PINPOINTS
    with Source(str(save(tmp_path / "in", {}, values))) as source:
        format = detect_format(source)
        ours = format.config(source)
        wanted = model_shapes(ours)
        result = plan(format.rules(source), found, wanted, possible_shapes(ours))
    count = sum(map(math.prod, wanted.values()))
    assert (
        count
        == {
            "ferret": 7_077_601_292,
            "ferret_llama": 8_386_236_428,
            "ferret_gemma": 2_845_349_900,
        }[kind]
    )
    left = sum(math.prod(found[name]) for name in result.dropped)
    assert count == sum(map(math.prod, found.values())) - left
    # The last block and the norm behind it, which no one reads.
    assert all(".layers.23." in x or "post_layernorm" in x for x in result.dropped)
    own = [x for x in found if x.startswith(("model.mm_proj", "model.region_geo"))]
    assert len(own) == (18 if kind == "ferret" else 20)


def test_the_published_ferret_is_understood(tmp_path: Path) -> None:
    made = read(tmp_path, FERRET | LARGE | VICUNA)
    assert made.vision.image_size == 336
    assert made.vision.feature_layer == -2
    assert made.vision.drop_cls
    assert made.image.resize == "squash"
    assert made.image.tiling is None
    assert isinstance(made.connector, LinearConfig)
    assert made.num_image_tokens == 576
    region = made.region
    assert (region.input_size, region.output_size) == (1024, 4096)
    assert (region.num_points, region.num_sub_points) == (512, (128, 32))
    assert (region.num_neighbours, region.transposed) == (24, True)
    assert made.prompt.template == "ferret"
    assert made.decoder.rms_norm_eps == 1e-6
    assert made.decoder.rope_theta == 10_000
    assert made.decoder.hidden_act == "silu"


def test_the_published_ferret_uis_are_understood(tmp_path: Path) -> None:
    tower = {"mm_vision_tower": "/folder/openai-clip-vit-large-patch14-336"}
    common = UI | tower | {"image_grid_pinpoints": PINPOINTS}
    llama = common | LLAMA_8B | {"num_attention_head": 32}
    del llama["num_attention_heads"], llama["max_sequence_length"]
    made = read(tmp_path / "llama", llama)
    assert made.image.tiling == AnyresTiling(
        grids=((2, 1), (1, 2), (2, 2), (1, 3), (3, 1)), fill="squash", merge="rows"
    )
    assert made.image.resize == "squash"
    assert isinstance(made.connector, MLPConfig)
    assert made.connector.hidden_act == "gelu"
    assert made.prompt.template == "ferret_llama3"
    assert made.prompt.image_token_id == 128256
    assert made.prompt.eos_token_ids == (128009,)
    assert made.decoder.num_attention_heads == 32
    assert made.decoder.rope_theta == 500_000
    gemma = common | {"model_type": "ferret_gemma"} | GEMMA_2B
    del gemma["max_sequence_length"]
    added = {"107": {"content": "<end_of_turn>"}, "1": {"content": "<eos>"}}
    files = {"added_tokens_decoder": added, "chat_template": "{{ messages }}"}
    made = read(tmp_path / "gemma", gemma, tokenizer_config=files)
    # The decoder's own template is not what Ferret-UI was trained with.
    assert (made.prompt.template, made.prompt.content) == ("ferret_gemma", "string")
    assert made.prompt.eos_token_ids == (1, 107)
    assert made.decoder.tie_word_embeddings
    assert made.decoder.embedding_scale == 2048**0.5
    assert made.decoder.hidden_act == "gelu_tanh"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler_pooler_mode": "mean"}, "sampler_pooler_mode: 'mean' is not supp"),
        ({"region_geo_sampler": None}, "field 'region_geo_sampler' is missing"),
        ({"region_fea_adapter": True}, "region_fea_adapter: True is not supported"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio: 'pad' is not supported"),
        ({"mm_patch_merge_type": "flat", "image_aspect_ratio": "anyres"}, "merge_type"),
        ({"mm_vision_select_feature": "cls_patch"}, "'cls_patch' is not supported"),
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type: 'mlp2x_gelu' is not"),
        ({"mm_surprise": 1}, r"field\(s\) \['mm_surprise'\] are not known here"),
    ],
)
def test_what_is_not_understood_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, FERRET | changes)
